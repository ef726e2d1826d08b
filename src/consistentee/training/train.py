"""What users call to train: rows or responses, by one of the methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers.trainer_utils import set_seed

from consistentee.atomic_files import user_path
from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
from consistentee.config import (
    ClassificationTrainingConfig,
    GenerationTrainingConfig,
    RetrofitConfig,
    TrainingConfig,
)
from consistentee.data.literal import read_special_tokens
from consistentee.data.rows import InstructionDataset, Text, TextDataset, require_rows
from consistentee.data.spooled import SpooledTexts
from consistentee.errors import SettingError
from consistentee.models.keeps_original import check_single_label
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.methods import METHODS, check_method, method_of
from consistentee.training.run import Report, Run, TrainingTask
from consistentee.training.run_folders import OpenedFolder, must_be_folder, open_output, run_identity
from consistentee.training.steps import OptimizerSteps, Rows, make_accelerator, parameter_groups
from consistentee.training.tasks.classification import ClassificationTraining
from consistentee.training.tasks.generation import GenerationTraining
from consistentee.training.tasks.retrofit import RetrofitTraining
from consistentee.training.tasks.unlabelled import UnlabelledTraining


def train(
    *,
    backbone: str | Path,
    train_data: TextDataset | InstructionDataset,
    output_dir: str | Path,
    config: TrainingConfig | None = None,
    task: str | None = None,
    method: str = "consistent",
    unlabelled: Iterable[Text] | None = None,
    warm_up_dir: str | Path | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Train a classifier or a causal language model with exits, and save it.

    Args:
        backbone: hub name or local folder of a supported encoder, or causal language model.
        train_data: labelled rows, or instructions with responses. A `validation_fraction` of them is kept from the
            model.
        output_dir: where checkpoints go during the run and the finished model afterwards.
        config: settings, `ClassificationTrainingConfig` or `GenerationTrainingConfig`; the defaults if missing.
        task: name of the task, for the record.
        method: one of `METHODS`: how to train.
        unlabelled: texts, or pairs, without labels for a classifier's exits and policy, by agreement with its last
            layer; they are read as they come, duplicates and texts of `train_data` are dropped. None for none.
        warm_up_dir: folder of first steps that trainings share: one that differs from another only in what comes after
            the warm-up (policy, reward, rounds of the same epochs in all; a method whose first phase is the same) goes
            on from its, and ends as it would alone. The first leaves them there: weights and optimizer, three times the
            trained weights' size. None for none.
        resume: go on from the last checkpoint in `output_dir` if there is one.
        report: is given lines of text to show.

    Returns:
        The folder of the saved model: weights (adapters merged), tokenizer, label names or prompt template, thresholds,
        training record, model card.

    Raises:
        FileExistsError: if `output_dir` holds another run and `resume` is not set, or anything of anybody else's.
        ImportError: LoRA without peft.
        SettingError: `unlabelled` texts for a method or a task that does not learn from them; `warm_up_dir` for a
            method whose first steps are nobody else's; exits for a model of one layer.
        TypeError: data or settings of another task.
        ValueError: an unsupported backbone, an unknown method or one for another task, too little data, a resumed run
            with other settings, data or backbone, an `output_dir` that is the backbone's, or a `threshold_metric` that
            does not fit the classes.
    """
    row = method_of(method)
    if unlabelled is not None and not row.unlabelled:
        able = ", ".join(name for name, other in METHODS.items() if other.unlabelled)
        raise SettingError(f'Unlabelled texts go with method {able}, got "{method}". Leave them out.')
    if warm_up_dir is not None and not row.begins_with:
        able = ", ".join(name for name, other in METHODS.items() if other.begins_with)
        raise SettingError(f'A folder of warm-ups goes with method {able}, got "{method}". Leave it out.')
    shared = None if warm_up_dir is None else user_path(warm_up_dir)
    if shared is not None:
        must_be_folder("Folder of warm-ups", shared)
    trained = _task_of(train_data, config, unlabelled, backbone)
    check_method(method, trained.task, trained.config)
    run = start_run(
        trained,
        method,
        backbone=backbone,
        output_dir=output_dir,
        task_name=task,
        resume=resume,
        report=report,
        warm_up_dir=shared,
    )
    return user_path(output_dir) if run is None else _run_method(run, method)


def finetune(
    *,
    backbone: str | Path,
    train_data: TextDataset | InstructionDataset,
    output_dir: str | Path,
    config: TrainingConfig | None = None,
    task: str | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Fine-tune the plain model by the same recipe: `train` with the method `plain`, the reference for every claim."""
    return train(
        backbone=backbone,
        train_data=train_data,
        output_dir=output_dir,
        config=config,
        task=task,
        method="plain",
        resume=resume,
        report=report,
    )


def retrofit(
    *,
    model: str | Path,
    texts: Iterable[Text],
    output_dir: str | Path,
    config: RetrofitConfig | None = None,
    source: str = "texts",
    max_texts: int | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Give a fine-tuned classifier exits that imitate it, from texts without labels; see `methods/retrofit.py`.

    Backbone and head stay what they are, unless `tune_backbone` says otherwise: at full depth the folder gives the
    model's own logits.

    Args:
        model: hub name or local folder of a Hugging Face sequence classifier, or of a plain model of ours.
        texts: strings, or tuples of one text or two; duplicates are dropped.
        output_dir, resume, report: as in `train`.
        config: settings.
        source: where the texts come from, for the record.
        max_texts: different ones to read, at most.

    Returns:
        The folder of the saved model.

    Raises:
        DataError: too few texts, or one that cannot be read.
        FileExistsError, ValueError: as `train`; a model that is no classifier of one class an input, that has exits, or
            one layer.
    """
    config = RetrofitConfig() if config is None else config
    task = retrofit_task(model, texts, config, source=source, max_texts=max_texts)
    return run_retrofit(task, output_dir, resume=resume, report=report)


def retrofit_task(
    model: str | Path,
    texts: Iterable[Text],
    config: RetrofitConfig,
    *,
    source: str,
    max_texts: int | None = None,
    original: LoadedClassifier | None = None,
    **shares: float,
) -> RetrofitTraining:
    """Open the model, unless it is, and read the texts; arguments and errors as of `retrofit` and `part_texts`."""
    original = original or load_model(model, LoadedClassifier)
    check_single_label(original.model.config, str(model))
    if config.parse_special_tokens is None:
        config = replace(config, parse_special_tokens=original.parse_special_tokens)
    else:
        read_special_tokens(original.tokenizer, config.parse_special_tokens)
    longest = min(config.max_length, original.longest)
    spooled = SpooledTexts.read(texts, original.tokenizer, longest, source=source, max_texts=max_texts)
    original.check_texts(2 if spooled.text_pairs else 1, f"each row of {source}")
    return RetrofitTraining(config, spooled, original, **shares)


def run_retrofit(
    task: RetrofitTraining, output_dir: str | Path, *, resume: bool = False, report: Report
) -> Path:
    """Train what `retrofit_task` made; arguments as of `retrofit`."""
    run = start_retrofit(task, output_dir, resume=resume, report=report)
    return user_path(output_dir) if run is None else _run_method(run, "retrofit")


def start_retrofit(
    task: RetrofitTraining, output_dir: str | Path, *, resume: bool = False, report: Report
) -> Run | None:
    """The run of `run_retrofit`, before its first step; None if it has finished."""
    return start_run(
        cast(Any, task),
        "retrofit",
        backbone=task.original.name,
        output_dir=output_dir,
        task_name=None,
        resume=resume,
        report=report,
    )


def _run_method(run: Run, method: str) -> Path:
    """From the run's first step to its saved model, or to whatever stops it."""
    try:
        return METHODS[method].load()(run)
    finally:
        run.let_go()


def _task_of(
    data: TextDataset | InstructionDataset,
    config: TrainingConfig | None,
    unlabelled: Iterable[Text] | None,
    backbone: str | Path,
) -> TrainingTask:
    """The task of the data, with its settings."""
    require_rows("train_data", data, TextDataset, InstructionDataset)
    rows = isinstance(data, TextDataset)
    config_class = ClassificationTrainingConfig if rows else GenerationTrainingConfig
    config = config_class() if config is None else config
    if not isinstance(config, config_class):
        raise TypeError(
            f"config must be a {config_class.__name__} for a {type(data).__name__}, got {type(config).__name__}."
        )
    if unlabelled is not None:
        if not rows:
            raise SettingError(
                "Unlabelled texts go with rows to classify, got text to generate. Leave them out."
            )
        texts: Any = UnlabelledTraining.read(cast(Any, config), cast(Any, data), unlabelled, backbone)
        return texts
    task: Any = (ClassificationTraining if rows else GenerationTraining)(cast(Any, config), cast(Any, data))
    return task


def start_run(
    task: TrainingTask,
    method: str,
    *,
    backbone: str | Path,
    output_dir: str | Path,
    task_name: str | None,
    resume: bool,
    report: Report,
    warm_up_dir: Path | None = None,
) -> Run | None:
    """Load everything a run needs, and go back to its last checkpoint if it is resumed. None if it has finished.

    The run has its output folder to itself until `Run.let_go`.
    """
    output_dir, config, exits = user_path(output_dir), task.config, METHODS[method].exits
    kind = ("early_exit" if exits else "full_depth") + task.suffix
    texts = task.unlabelled if isinstance(task, UnlabelledTraining) else None
    identity = run_identity(
        kind,
        method,
        backbone,
        config.to_dict(),
        task.data.fingerprint(),
        None if texts is None else texts.fingerprint(),
    )
    opened = open_output(
        output_dir,
        identity=identity,
        defaults=type(config)().to_dict(),
        resume=resume,
        report=report,
        new_accelerator=lambda: make_accelerator(
            str(output_dir),
            mixed_precision=config.mixed_precision,
            tracker=config.tracker,
            unused_parameters=task.unused_parameters or METHODS[method].unused_parameters,
        ),
    )
    if opened is None:
        return None
    try:
        run = _new_run(
            task,
            method,
            backbone=backbone,
            task_name=task_name,
            output_dir=output_dir,
            report=report,
            warm_up_dir=warm_up_dir,
            kind=kind,
            identity=identity,
            opened=opened,
        )
        run.begin(opened.newest, resume=resume)
    except BaseException:
        opened.let_go()
        raise
    return run


def _new_run(
    task: TrainingTask,
    method: str,
    *,
    backbone: str | Path,
    task_name: str | None,
    output_dir: Path,
    report: Report,
    warm_up_dir: Path | None,
    kind: str,
    identity: dict[str, Any],
    opened: OpenedFolder,
) -> Run:
    """A run before its first step, in an opened folder."""
    config, exits, accelerator = task.config, METHODS[method].exits, opened.accelerator
    set_seed(config.seed)
    parts = task.prepare(backbone, task_name, exits=exits)
    if METHODS[method].joint_policy:
        parts.model.policy.requires_grad_(True)
    cut = parts.train_rows.num_truncated + parts.validation.num_truncated
    say_cuts(
        cut, len(task.data), f"texts to train on were longer than {parts.max_length} tokens", LONGER_TRAINING
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(parts.model, config.weight_decay), lr=config.learning_rate, fused=True
    )
    prepared, optimizer = accelerator.prepare(parts.trained or parts.model, optimizer)
    if parts.trained is None:
        parts.model = accelerator.unwrap_model(prepared)
    else:
        parts.model.to(accelerator.device)
    return Run(
        kind=kind,
        config=config,
        task=task,
        task_name=task_name,
        output_dir=output_dir,
        report=report,
        parts=parts,
        accelerator=accelerator,
        steps=OptimizerSteps(
            accelerator=accelerator,
            model=prepared,
            optimizer=optimizer,
            rows=cast(Rows, parts.train_rows),
            collate=parts.collate,
            row_weights=parts.row_weights,
            batch_size=config.batch_size,
            group_by_length=config.group_by_length,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            head_learning_rate=config.head_learning_rate,
            warmup_ratio=config.warmup_ratio,
            schedule=config.schedule,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            tracked=config.tracker != "none",
            checkpoint_every=config.checkpoint_every,
            given_batches=parts.batches,
        ),
        identity={
            **identity,
            "data": {
                "source": task.data.source,
                "train_rows": len(parts.train_rows),
                "validation_rows": len(parts.validation),
                "truncated_rows": cut,
                **parts.data,
                **identity["data"],
            },
        },
        progress={
            "checkpoints": 0,
            "rounds_done": 0,
            "policy_fitted": False,
            "training_done": False,
            "best_score": None,
            "best_hits": [],
            "exit_layers": [],
            "best_round": 0,
            "layer_cost": None,
            "policy_input": None,
            "history": [],
            "forgetting": [],
            "unlabelled": None,
            "taken_over": None,
        },
        warm_up_dir=warm_up_dir,
        let_go=opened.let_go,
    )
