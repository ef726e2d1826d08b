"""Training of a causal language model with exits, top to bottom: warm-up, then policy and exits in turn.

    phase 1  warm-up      backbone + exits on the layer-weighted sum of their losses, estimated from a few layers a step
    phase 2  policy       fitted on cached states of held-out response tokens; CALM's classifier on the same tokens
    phase 3  consistent   backbone + exits on the loss at exits drawn from the policy, later tokens seeing what is left
    phases 2 and 3 repeat; of the rounds that validation finds no worse the last is kept, with its thresholds

Source: ConsistentEE (AAAI 2024, arXiv:2312.11882), generation. Differences: the exact policy gradient by default, a
policy on held-out texts (cross-fitted), some weighted sum kept in phase 3, one learning-rate schedule over all phases,
and any `exit_head` in place of one head per layer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import set_seed

from consistentee.backbones.limits import LONGER_TRAINING, check_tokenizer, say_cuts, training_length
from consistentee.backbones.loading import load_tokenizer
from consistentee.config import GenerationTrainingConfig
from consistentee.data.batches import collate
from consistentee.data.rows import InstructionDataset
from consistentee.data.templates import prompt_template
from consistentee.data.tokenization import encode_rows
from consistentee.errors import SettingError
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training import checkpoints
from consistentee.training.adapters import Adapters, add_adapters
from consistentee.training.run import Report, Run
from consistentee.training.run_folders import open_output, run_identity
from consistentee.training.steps import Figures, Optimisation, parameter_groups
from consistentee.training.tasks.token_objectives import (
    Objective,
    ObjectiveOutput,
    consistent_objective,
    full_depth_objective,
    response_counts,
    weighted_sum_objective,
)
from consistentee.training.token_policy import TokenPolicyChoice
from consistentee.training.token_policy_phase import first_exit_layer, run_policy_phase, token_states
from consistentee.training.token_rounds import record_round, report_choice, report_exits, training_record
from consistentee.training.token_states import TokenStates

EARLY_EXIT, FULL_DEPTH = "early_exit_generation", "full_depth_generation"


def train_generation(
    *,
    backbone: str | Path,
    train_data: InstructionDataset,
    output_dir: str | Path,
    config: GenerationTrainingConfig | None = None,
    task: str | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Train a causal language model with exits and save it.

    Args:
        backbone: hub name or local folder of a supported causal language model.
        train_data: instructions with responses. A `validation_fraction` of them is kept from the model.
        output_dir: where checkpoints go during the run and the finished model afterwards.
        config: settings; the defaults if missing.
        task: name of the task, for the record.
        resume: go on from the last checkpoint in `output_dir` if there is one.
        report: is given lines of text to show.

    Returns:
        The folder of the saved model: weights (adapters merged), tokenizer, prompt template, thresholds, training
        record, model card.

    Raises:
        FileExistsError: if `output_dir` holds another run and `resume` is not set, or anything of anybody else's.
        ImportError: LoRA without peft.
        ValueError: an unsupported backbone, too little data, a resumed run with other settings, data or backbone, or an
            `output_dir` that is the backbone's.
    """
    config = config or GenerationTrainingConfig()
    started = _start(
        EARLY_EXIT,
        backbone=backbone,
        train_data=train_data,
        output_dir=output_dir,
        config=config,
        task=task,
        resume=resume,
        report=report,
    )
    if started is None:
        return Path(output_dir)
    run, adapters = started
    progress = run.progress
    warmup_steps = run.steps_of(config.warmup_epochs)
    round_steps = run.steps_of(config.consistent_epochs)
    weighted_sum = {
        "layers_per_step": config.layers_per_step,
        "last_layer_share": config.last_layer_share,
        "logit_rows": config.logit_rows,
    }

    # Phase 1: every exit learns every token, deeper layers weigh more.
    _steps(
        run,
        warmup_steps,
        weighted_sum_objective(**weighted_sum),
        phase="warm-up",
        learning_rate=config.learning_rate,
    )
    if not progress["warmup_done"]:
        progress["warmup_done"] = True
        run.checkpoint()

    # Phases 2 and 3, in turn.
    fitted: tuple[TokenPolicyChoice, TokenStates] | None = None
    while not progress["training_done"]:
        number = progress["rounds_done"]
        if not progress["policy_fitted"]:
            # Phase 2: with everything else frozen, the policy learns when to leave.
            fitted = run_policy_phase(run, f"round {number} policy")
            if number == 0:
                progress["warmup"] = report_exits(run, fitted[1])
            record_round(run, number, *fitted)
            progress["policy_fitted"] = True
            stale = number - progress["best_round"] >= config.patience
            progress["training_done"] = stale or number == config.rounds or round_steps == 0
            if stale and number < config.rounds:
                run.say(f"Stopped early: {config.patience} rounds in turn with a worse validation score.")
            run.checkpoint()
        if not progress["training_done"]:
            # Phase 3: a token's loss comes from where it leaves.
            objective = consistent_objective(weighted_sum_share=config.weighted_sum_share, **weighted_sum)
            _steps(
                run,
                warmup_steps + (number + 1) * round_steps,
                objective,
                phase=f"round {number + 1} consistent",
                learning_rate=config.consistent_learning_rate or config.learning_rate,
            )
            progress.update(rounds_done=number + 1, policy_fitted=False)
            run.checkpoint()

    # The kept round's weights, policy and thresholds; they are still here if it was the last.
    if fitted is None or progress["best_round"] != progress["rounds_done"]:
        run.load_weights(checkpoints.load_weights(run.best_path))
        fitted = run_policy_phase(run, "final policy")
    choice, states = fitted
    report_choice(run, choice)
    model = run.model
    model.config.threshold = choice.thresholds["policy"]
    model.config.thresholds = {
        name: value for name, value in choice.thresholds.items() if name != model.config.criterion
    }
    adapters.merge()
    return run.write(model, training_record(run, choice, states))


def finetune_generation(
    *,
    backbone: str | Path,
    train_data: InstructionDataset,
    output_dir: str | Path,
    config: GenerationTrainingConfig | None = None,
    task: str | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Fine-tune the plain language model by the same recipe: the reference for every claim.

    Same rows, batches, learning rates and schedule as `train_generation`, and as many steps as all its phases together;
    the best epoch by validation token accuracy is kept. What is saved is a plain Hugging Face model. Arguments and
    errors as in `train_generation`.
    """
    config = config or GenerationTrainingConfig()
    if config.backbone_training == "frozen":
        raise SettingError(
            "backbone_training must be full or lora to fine-tune the plain model, got frozen. "
            "A frozen backbone is its own reference."
        )
    started = _start(
        FULL_DEPTH,
        backbone=backbone,
        train_data=train_data,
        output_dir=output_dir,
        config=config,
        task=task,
        resume=resume,
        report=report,
    )
    if started is None:
        return Path(output_dir)
    run, adapters = started
    progress = run.progress
    per_epoch = run.steps_of(1.0)
    ends = [*range(per_epoch, run.optimisation.total_steps, per_epoch), run.optimisation.total_steps]
    objective = full_depth_objective(logit_rows=config.logit_rows)
    for number, end in list(enumerate(ends))[progress["rounds_done"] :]:
        _steps(run, end, objective, phase=f"epoch {number + 1}", learning_rate=config.learning_rate)
        states = token_states(run, run.validation, "validation", keep_pooled=False, last_layer_only=True)
        figures = {"accuracy": states.per_layer_accuracy[-1], "loss": float(states.losses[:, -1].mean())}
        run.say(
            f"Epoch {number + 1} of {len(ends)}: validation token accuracy {figures['accuracy']:.4f}, "
            f"loss {figures['loss']:.4f}"
        )
        progress["history"].append({"epoch": number + 1, **figures, "num_examples": len(states)})
        best = progress["best_score"]
        if best is None or figures["accuracy"] >= best:  # of equals, the longer trained
            progress.update(best_score=figures["accuracy"], best_round=number)
            run.keep_best()
        progress["rounds_done"] = number + 1
        run.checkpoint()
    run.load_weights(checkpoints.load_weights(run.best_path))
    adapters.merge()
    kept = progress["history"][progress["best_round"]]
    figures = {name: kept[name] for name in ("accuracy", "loss", "num_examples")}
    template: dict[str, Any] = run.model.config.prompt_template
    return run.write(
        run.model.backbone,
        {"prompt_template": template, "validation": figures, "history": progress["history"]},
    )


# The start of a run.


def _start(
    kind: str,
    *,
    backbone: str | Path,
    train_data: InstructionDataset,
    output_dir: str | Path,
    config: GenerationTrainingConfig,
    task: str | None,
    resume: bool,
    report: Report,
) -> tuple[Run, Adapters] | None:
    """Load everything a run needs, and go back to its last checkpoint if it is resumed. None if it has finished."""
    output_dir = Path(output_dir)
    identity = run_identity(kind, backbone, config, train_data.fingerprint())
    opened = open_output(
        output_dir,
        identity=identity,
        config=config,
        resume=resume,
        report=report,
        unused_parameters=True,  # a step touches the exits it draws, and of the backbone's parameters perhaps not all
    )
    if opened is None:
        return None
    accelerator, newest = opened

    set_seed(config.seed)
    tokenizer = load_tokenizer(backbone)
    template = prompt_template(
        config.prompt_template, tokenizer, parse_special_tokens=config.parse_special_tokens
    )
    exits = kind == EARLY_EXIT
    model = EarlyExitForCausalLM.from_backbone(
        backbone,
        exit_head=config.exit_head if exits else "shared",
        exit_head_rank=config.exit_head_rank,
        policy_hidden_size=config.policy_hidden_size,
        policy_dropout=config.policy_dropout,
        initial_exit_bias=config.initial_exit_bias,
        prompt_template=template.to_dict(),
        task=task,
        max_sequence_length=config.max_length,
    )
    max_length = training_length(
        config.max_length,
        default=type(config).max_length,
        backbone=model.config.backbone_config,
        name=backbone,
    )
    check_tokenizer(tokenizer, model.get_input_embeddings(), backbone, pads=False)
    positions = getattr(model.config.backbone_config, "max_position_embeddings", None)
    if positions:  # pipelines cut by it (`handle_long_generation`); many tokenizers come without a length
        tokenizer.model_max_length = min(tokenizer.model_max_length, int(positions))
    model.config.min_exit_layer = first_exit_layer(config.min_exit_layer, model.num_layers)
    model.checkpoint_layers = config.gradient_checkpointing
    model.policy.requires_grad_(False)  # fitted on their own, on cached states
    model.confidence_classifier.requires_grad_(False)
    model.exit_heads.requires_grad_(exits)
    adapters = Adapters(None)
    if config.backbone_training == "frozen":
        model.backbone.requires_grad_(False)
    elif config.backbone_training == "lora":
        adapters = add_adapters(
            model.backbone,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
        )

    kept, held = train_data.split(config.validation_fraction, config.seed)
    lengths = {"max_length": max_length, "max_prompt_length": config.max_prompt_length}
    train_rows = encode_rows(train_data.select(kept), tokenizer, template, **lengths)
    validation = encode_rows(train_data.select(held), tokenizer, template, **lengths)
    num_truncated = train_rows.num_truncated + validation.num_truncated
    texts = f"texts to train on were longer than {max_length} tokens"
    say_cuts(num_truncated, len(train_data), texts, LONGER_TRAINING)
    counts = response_counts(
        torch.from_numpy(train_rows.lengths), torch.from_numpy(train_rows.prompt_lengths)
    )

    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    run = Run(
        kind=kind,
        config=config,
        output_dir=output_dir,
        task=task,
        report=report,
        tokenizer=tokenizer,
        model=accelerator.unwrap_model(prepared),
        accelerator=accelerator,
        optimisation=Optimisation(
            accelerator=accelerator,
            model=prepared,
            optimizer=optimizer,
            dataset=train_rows,
            collate=partial(collate, tokenizer=tokenizer),
            config=config,
            total_steps=0,
            row_weights=counts.float(),
        ),
        validation=validation,
        policy_rows=validation,
        identity={
            **identity,
            "data": {
                "source": train_data.source,
                "train_rows": len(kept),
                "validation_rows": len(held),
                "truncated_rows": num_truncated,
                "train_tokens": int(counts.sum()),
                **identity["data"],
            },
        },
        progress={
            "checkpoints": 0,
            "warmup_done": False,
            "rounds_done": 0,
            "policy_fitted": False,
            "training_done": False,
            "best_score": None,
            "best_hits": [],
            "best_round": 0,
            "history": [],
        },
    )
    run.begin(
        newest,
        resume=resume,
        description=f"{model.num_layers} layers, {len(kept)} training rows ({int(counts.sum())} response tokens) and "
        f"{len(held)} validation rows, backbone {config.backbone_training}",
    )
    return run, adapters


# The steps of the phases.


def _steps(run: Run, until: int, objective: Objective, *, phase: str, learning_rate: float) -> None:
    """Take optimizer steps on an objective."""

    def fixed_parts() -> None:
        run.model.policy.eval()
        run.model.confidence_classifier.eval()
        if run.config.backbone_training == "frozen":
            run.model.backbone.eval()

    run.optimisation.run(
        until,
        _losses,
        phase=phase,
        learning_rate=learning_rate,
        before_step=fixed_parts,
        objective=objective,
    )


def _losses(output: ObjectiveOutput, labels: Tensor) -> tuple[Tensor, Figures]:
    return output.losses, output.figures
