"""One training run around its phases: start or resume it, remember how far it came, save what it made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from consistentee.atomic_files import write_json
from consistentee.backbones.limits import LONGER_TRAINING, check_tokenizer, say_cuts, training_length
from consistentee.backbones.loading import load_tokenizer
from consistentee.config import ClassificationTrainingConfig
from consistentee.data.batches import TokenizedDataset, collate
from consistentee.data.literal import read_special_tokens
from consistentee.data.rows import TextDataset, stratified_split
from consistentee.data.tokenization import tokenize
from consistentee.inference.timing import environment
from consistentee.models.card import write_model_card
from consistentee.models.record import RECORD_FILE
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.training import checkpoints
from consistentee.training.run_folders import open_output, run_identity
from consistentee.training.states import LayerStates, run_all_layers, run_full_depth
from consistentee.training.steps import Optimisation, parameter_groups

Report = Callable[[str], None]
Model = EarlyExitForSequenceClassification | FullDepthForSequenceClassification
MAX_SEEN_ROWS = 10_000  # of the rows the classifiers have seen, at most these teach the policy
T = TypeVar("T")


@dataclass
class Run:
    """A run's parts.

    Attributes:
        config: `ClassificationTrainingConfig`, or `GenerationTrainingConfig`.
        validation: rows kept from the classifiers, for every choice: `TokenizedDataset`, or `TokenizedPrompts`.
        policy_rows: what the policy learns from: the validation rows (cross-fitted), or rows the classifiers have seen.
        identity: what a resumed run must share with the one it goes on with.
        progress: all there is to remember beside weights and optimizer, as plain JSON values.
    """

    kind: str
    config: Any
    output_dir: Path
    task: str | None
    report: Report
    tokenizer: PreTrainedTokenizerBase
    model: Any
    accelerator: Accelerator
    optimisation: Optimisation
    validation: Any
    policy_rows: Any
    identity: dict[str, Any]
    progress: dict[str, Any]

    @property
    def best_path(self) -> Path:
        """Where the best round's weights wait."""
        return self.output_dir / checkpoints.FOLDER / checkpoints.BEST

    def say(self, message: str) -> None:
        """Show a line, once, whatever the number of processes."""
        if self.accelerator.is_main_process:
            self.report(message)

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, rounded; at least one unless there are no epochs."""
        return max(1, round(epochs * len(self.optimisation.batches))) if epochs else 0

    def states(
        self, dataset: TokenizedDataset, description: str, *, keep_pooled: bool = False
    ) -> LayerStates:
        """All layers' outputs for a data set under the current weights."""
        return run_all_layers(
            self.model,
            dataset,
            collate=self.optimisation.collate,
            accelerator=self.accelerator,
            keep_pooled=keep_pooled,
            memory_limit_mb=self.config.max_cache_mb,
            scratch_dir=self.output_dir / checkpoints.FOLDER,
            description=description,
        )

    def logits(self, dataset: TokenizedDataset, description: str) -> Tensor:
        """The full-depth model's logits for a data set, (rows, classes)."""
        return run_full_depth(
            self.model,
            dataset,
            collate=self.optimisation.collate,
            accelerator=self.accelerator,
            description=description,
        )

    def weights(self) -> dict[str, Tensor]:
        """All weights that training can have changed: everything but a backbone's frozen parameters."""
        frozen = self._frozen()
        return {name: value for name, value in self.model.state_dict().items() if name not in frozen}

    def _frozen(self) -> set[str]:
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {
            name
            for name, parameter in parameters
            if name.startswith("backbone.") and not parameter.requires_grad
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put weights of this run into the model, whose policy may have got another input since the start."""
        if self.kind == "early_exit" and self.progress["policy_input"] is not None:
            policy = self.model.new_policy(self.progress["policy_input"])
            self.model.set_policy(policy.requires_grad_(False))
        left_out = set(self.model.load_state_dict(weights, strict=False).missing_keys)
        if left_out - self._frozen() or not weights.keys() <= self.model.state_dict().keys():
            raise ValueError(f"The weights kept in {self.output_dir} are not of this model. Start anew.")

    def from_main_process(self, value: T | None) -> T:
        """What the main process has, on every process."""
        if self.accelerator.num_processes > 1:
            (value,) = broadcast_object_list([value])
        return cast(T, value)

    def keep_best(self) -> None:
        """Remember the present weights as the best so far."""
        if self.accelerator.is_main_process:
            checkpoints.save_weights(self.best_path, self.weights())
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Make this moment one from which `resume` can go on."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            optimizer = {
                "optimizer": self.optimisation.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            self.progress["checkpoints"] += 1
            checkpoints.save_checkpoint(
                self.output_dir,
                self.progress["checkpoints"],
                weights=self.weights(),
                optimizer=optimizer,
                progress={**self.progress, "step": self.optimisation.step, "identity": self.identity},
            )
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Go back to a checkpoint's moment, of this very run."""
        weights, optimizer, progress = checkpoints.load_checkpoint(folder)
        del progress["identity"]
        self.optimisation.step = progress.pop("step")
        self.progress.clear()
        self.progress.update(progress)
        self.load_weights(weights)
        self.optimisation.optimizer.load_state_dict(optimizer["optimizer"])
        if self.accelerator.scaler is not None and optimizer["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(optimizer["scaler"])
        self.say(f"Resumed at step {self.optimisation.step} of {self.optimisation.total_steps}.")

    def save(self, record: dict[str, Any], *, thresholds: dict[str, float] | None = None) -> Path:
        """Write the finished classifier with its record and card, then remove the checkpoints."""
        self.model.config.task = self.task
        self.model.config.max_length = self.config.max_length
        self.tokenizer.model_max_length = self.model.config.max_input_length
        if thresholds is not None:
            self.model.config.threshold = thresholds["policy"]
            record = {**record, "thresholds": thresholds}
        return self.write(self.model, record)

    def write(self, model: Any, record: dict[str, Any]) -> Path:
        """Write a finished model with its record and card, then remove the checkpoints.

        Everything is first written beside its place. The record is moved last: a folder with a record is complete.

        Args:
            model: what is written, by its `save_pretrained`.
            record: figures, for the record.
        """
        if self.accelerator.is_main_process:
            record = {
                "kind": self.kind,
                "task": self.task,
                "backbone": self.identity["backbone"],
                "backbone_fingerprint": self.identity["backbone_fingerprint"],
                "config": self.config.to_dict(),
                "data": self.identity["data"],
                "environment": environment(self.accelerator.device, self.config.seed)
                | {
                    "accelerate": version("accelerate"),
                    "processes": self.accelerator.num_processes,
                    "mixed_precision": str(self.accelerator.mixed_precision),
                },
                **record,
            }
            staged = self.output_dir / checkpoints.FOLDER / checkpoints.STAGING
            model.save_pretrained(staged)
            self.tokenizer.save_pretrained(staged)
            write_model_card(staged, record)
            write_json(staged / RECORD_FILE, record)
            checkpoints.place_model(self.output_dir, last=RECORD_FILE)
            checkpoints.remove_checkpoints(self.output_dir)
        self.accelerator.wait_for_everyone()
        if self.config.tracker != "none":
            for tracker in self.accelerator.trackers:  # `end_training` would also part the processes for good
                tracker.finish()
        self.say(f"Saved to {self.output_dir}")
        return self.output_dir

    def begin(self, newest: Path | None, *, resume: bool, description: str) -> None:
        """Claim the folder, plan the steps, start the tracker, and go back to the last checkpoint if there is one.

        Args:
            newest: that checkpoint.
            resume: whether the caller expects one.
            description: model and data, in words.
        """
        config, optimisation = self.config, self.optimisation
        if self.accelerator.is_main_process:
            checkpoints.claim(self.output_dir)
        optimisation.total_steps = self.steps_of(config.warmup_epochs) + config.rounds * self.steps_of(
            config.consistent_epochs
        )
        optimisation.checkpoint = self.checkpoint
        if config.tracker != "none":
            settings = {
                name: value
                for name, value in config.to_dict().items()
                if isinstance(value, (int, float, str))
            }
            self.accelerator.init_trackers("consistentee", config=settings)
        self.say(
            f"{description}, {optimisation.total_steps} steps, {self.accelerator.device}, precision "
            f"{self.accelerator.mixed_precision}"
        )
        if newest is not None:
            self.restore(newest)
        elif resume:
            self.say("No checkpoint to resume from: starting at the beginning.")


def start_run(
    model_class: type[Model],
    *,
    backbone: str | Path,
    train_data: TextDataset,
    output_dir: str | Path,
    config: ClassificationTrainingConfig,
    task: str | None,
    resume: bool,
    report: Report,
) -> Run | None:
    """Load everything a run needs, and go back to its last checkpoint if it is resumed. None if it has finished."""
    output_dir = Path(output_dir)
    kind = "early_exit" if model_class is EarlyExitForSequenceClassification else "full_depth"
    identity = run_identity(kind, backbone, config, train_data.fingerprint())
    opened = open_output(output_dir, identity=identity, config=config, resume=resume, report=report)
    if opened is None:
        return None
    accelerator, newest = opened

    set_seed(config.seed)
    model = _new_model(model_class, backbone, train_data, config)
    if isinstance(model, EarlyExitForSequenceClassification):
        model.policy.requires_grad_(False)  # fitted on its own, on cached states
    tokenizer = load_tokenizer(backbone)
    max_length = training_length(
        config.max_length,
        default=type(config).max_length,
        backbone=model.config.backbone_config,
        name=backbone,
    )
    check_tokenizer(tokenizer, model.get_input_embeddings(), backbone)
    read_special_tokens(tokenizer, config.parse_special_tokens)
    kept, held = stratified_split(train_data.labels, config.validation_fraction, config.seed)
    if len(held) < 2:
        raise ValueError(
            f"validation rows must be at least 2, got {len(held)} of {len(train_data)} rows. "
            "Give more rows, or a higher validation_fraction."
        )
    train_part = train_data.select(kept)
    train_rows = tokenize(train_part, tokenizer, max_length)
    validation = tokenize(train_data.select(held), tokenizer, max_length)
    num_truncated = train_rows.num_truncated + validation.num_truncated
    texts = f"texts to train on were longer than {max_length} tokens"
    say_cuts(num_truncated, len(train_data), texts, LONGER_TRAINING)
    policy_rows = validation
    if config.policy_data == "seen":
        policy_rows = tokenize(train_part.max_samples(MAX_SEEN_ROWS, config.seed), tokenizer, max_length)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    optimisation = Optimisation(
        accelerator=accelerator,
        model=prepared,
        optimizer=optimizer,
        dataset=train_rows,
        collate=partial(collate, tokenizer=tokenizer),
        config=config,
        total_steps=0,
    )
    run = Run(
        kind=kind,
        config=config,
        output_dir=output_dir,
        task=task,
        report=report,
        tokenizer=tokenizer,
        model=accelerator.unwrap_model(prepared),
        accelerator=accelerator,
        optimisation=optimisation,
        validation=validation,
        policy_rows=policy_rows,
        identity={
            **identity,
            "data": {
                "source": train_data.source,
                "text_pairs": len(train_data.texts[0]) == 2,
                "train_rows": len(kept),
                "validation_rows": len(held),
                "truncated_rows": num_truncated,
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
            "best_round": 0,
            "layer_cost": None,
            "policy_input": None,
            "history": [],
            "forgetting": [],
        },
    )
    run.begin(
        newest,
        resume=resume,
        description=f"{model.num_layers} layers, {len(train_data.label_names)} classes, {len(kept)} training and "
        f"{len(held)} validation rows",
    )
    return run


def _new_model(
    model_class: type[Model],
    backbone: str | Path,
    train_data: TextDataset,
    config: ClassificationTrainingConfig,
) -> Model:
    head: dict[str, Any] = {
        "label_names": train_data.label_names,
        "pooling": config.pooling,
        "head": config.head,
        "num_queries": config.num_queries,
        "classifier_hidden_size": config.classifier_hidden_size,
        "head_dropout": config.head_dropout,
        "parse_special_tokens": config.parse_special_tokens,
        "text_pairs": len(train_data.texts[0]) == 2,
    }
    if model_class is FullDepthForSequenceClassification:
        return FullDepthForSequenceClassification.from_backbone(backbone, **head)
    return EarlyExitForSequenceClassification.from_backbone(
        backbone,
        **head,
        ensemble_decay=config.ensemble_decay,
        policy_input="state+log_odds" if config.policy_input == "auto" else config.policy_input,
        policy_hidden_size=config.policy_hidden_size,
        policy_dropout=config.policy_dropout,
        initial_exit_bias=config.initial_exit_bias,
    )
