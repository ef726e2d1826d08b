"""Exits for a fine-tuned classifier: its own answers are the labels, and an exit is right where it agrees.

The backbone stays what it is, or is tuned with the exits (`tune_backbone`). The answers are the original's in either
case, and a tuned model's last layer learns them like the exits below it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from consistentee.atomic_files import user_path
from consistentee.backbones.limits import check_depth
from consistentee.backbones.loading import backbone_fingerprint
from consistentee.config import RetrofitConfig
from consistentee.data.batches import collate
from consistentee.data.sketches import text_sketch
from consistentee.data.spooled import SpooledRows, SpooledTexts
from consistentee.errors import DataError
from consistentee.functional.losses import divergence_losses, weighted_sum_loss
from consistentee.models.card import license_of
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.training.adapters import Adapters, add_adapters
from consistentee.training.cached_states import CachedStates, ChunkedBatches, ExitsOnStates, collate_states
from consistentee.training.finite import require_finite
from consistentee.training.instances import Instances
from consistentee.training.policy_choice import PolicyChoice
from consistentee.training.run import Parts, PolicyInstances, Run
from consistentee.training.states import LayerStates, run_all_layers
from consistentee.training.steps import Figures, Objective, resolve_precision
from consistentee.training.tasks.classification import (
    AUTO_INPUTS,
    ClassificationTraining,
    keep_choice,
    row_instances,
)
from consistentee.training.teacher import TaughtRows, collate_taught, teacher_logits

FEWEST_TEXTS = 40


@dataclass(frozen=True)
class TextParts:
    """What each text is for; no text is for two things.

    Attributes:
        exits: indices of texts that the exits learn from.
        policy: that the policy learns from.
        calibration: that a certificate rests on.
        report: that figures are reported on.
    """

    exits: NDArray[np.int64]
    policy: NDArray[np.int64]
    calibration: NDArray[np.int64]
    report: NDArray[np.int64]


def part_texts(
    count: int,
    *,
    policy_texts: int,
    calibration_texts: int,
    report_texts: int,
    seed: int,
    policy_share: float = 1 / 3,
    held_share: float = 0.1,
) -> TextParts:
    """Share texts out at random, `policy_share` to the policy and `held_share` each to calibration and report at most.

    Raises:
        DataError: there are too few.
    """
    if count < FEWEST_TEXTS:
        raise DataError(
            f"Different texts to learn from must be at least {FEWEST_TEXTS}, got {count}.",
            remedy="Give more; a few thousand are enough for good exits.",
        )
    order = np.random.default_rng((seed, count)).permutation(count)
    held, policy_part = int(held_share * count), int(policy_share * count)
    sizes = [min(report_texts, held), min(calibration_texts, held), min(policy_texts, policy_part)]
    report, calibration, policy, exits = np.split(order, np.cumsum(sizes))
    return TextParts(*(np.sort(part) for part in (exits, policy, calibration, report)))


class RetrofitTraining(ClassificationTraining):
    """A `TrainingTask` of texts without labels.

    Args:
        config: how to train.
        data: the texts.
        original: the model that gets exits, opened.
        shares: of `part_texts`, in place of its own.
    """

    measure = "agreement"
    config: RetrofitConfig
    data: Any

    def __init__(
        self, config: RetrofitConfig, data: SpooledTexts, original: LoadedClassifier, **shares: float
    ) -> None:
        self.config, self.data, self.original = config, data, original
        self.policy_inputs = AUTO_INPUTS if config.policy_input == "auto" else (config.policy_input,)
        self._policy_rows = None
        self._adapters = Adapters(None)
        self.parts = part_texts(
            len(data),
            policy_texts=config.policy_texts,
            calibration_texts=config.calibration_texts,
            report_texts=config.report_texts,
            seed=config.seed,
            **shares,
        )

    def held_rows(self) -> tuple[SpooledRows, SpooledRows]:
        """Rows that nothing is learnt on: those a certificate may rest on, and those to report on."""
        return SpooledRows(self.data, self.parts.calibration), SpooledRows(self.data, self.parts.report)

    @property
    def is_tuned(self) -> bool:
        """Whether the backbone is trained as well: full depth is then not the original."""
        return self.config.tune_backbone != "none"

    def prepare(self, backbone: str | Path, task_name: str | None, *, exits: bool) -> Parts:
        """As `TrainingTask` says."""
        config, tokenizer = self.config, self.original.tokenizer
        is_local = user_path(backbone).is_dir()
        model = EarlyExitForSequenceClassification.from_classifier(
            backbone,
            num_queries=config.num_queries,
            classifier_hidden_size=config.classifier_hidden_size,
            head_dropout=config.head_dropout,
            ensemble_decay=config.ensemble_decay,
            policy_input=self.policy_inputs[-1],
            policy_hidden_size=config.policy_hidden_size,
            policy_dropout=config.policy_dropout,
            initial_exit_bias=config.initial_exit_bias,
            max_length=min(config.max_length, self.original.longest),
            parse_special_tokens=self.original.parse_special_tokens,
            text_pairs=self.data.text_pairs,
            exits_only=config.exits_only,
            original={
                "name": str(user_path(backbone).resolve()) if is_local else str(backbone),
                "fingerprint": backbone_fingerprint(backbone),
                "revision": getattr(self.original.model.config, "_commit_hash", None),
                "license": license_of(backbone),
                **({"tuned": config.tune_backbone} if self.is_tuned else {}),
            },
        )
        check_depth(model.num_layers)
        for frozen in (model.backbone, model.classifiers.layers[-1], model.policy):
            frozen.requires_grad_(False)
        self._collate = partial(collate, tokenizer=tokenizer)
        tuned = f", backbone tuned: {config.tune_backbone}" if self.is_tuned else ""
        return Parts(
            model=model,
            tokenizer=tokenizer,
            validation=SpooledRows(self.data, self.parts.policy),
            max_length=model.config.max_length,
            row_weights=None,
            description=f"{model.num_layers} layers, {model.config.num_classes} classes, "
            f"{len(self.parts.exits):,} texts for the exits and {len(self.parts.policy):,} for the policy{tuned}",
            data={
                "text_pairs": self.data.text_pairs,
                "duplicates": self.data.num_duplicates,
                "text_sketch": text_sketch(map(self.data.text, (*self.parts.exits, *self.parts.policy))),
                "calibration_rows": len(self.parts.calibration),
                "report_rows": len(self.parts.report),
            },
            **(self._rows_of_tokens(model) if self.is_tuned else self._rows_of_states(model)),
        )

    def _rows_of_states(self, model: EarlyExitForSequenceClassification) -> dict[str, Any]:
        """Of `Parts`, for a frozen backbone: steps run the exits alone, on states that are computed once."""
        config = self.config
        rows = CachedStates(
            model,
            SpooledRows(self.data, self.parts.exits),
            collate=self._collate,
            memory_mb=config.max_cache_mb,
            disk_mb=config.max_disk_mb,
            passes=cast(int, config.passes),
            min_steps=config.exit_min_steps,
            batch_size=config.batch_size,
            seed=config.seed,
            precision=resolve_precision(config.mixed_precision),
        )
        return {
            "train_rows": rows,
            "collate": collate_states,
            "trained": ExitsOnStates(model),
            "batches": rows.batches,
        }

    def _rows_of_tokens(self, model: EarlyExitForSequenceClassification) -> dict[str, Any]:
        """Of `Parts`, for a tuned backbone: steps run all of the model, `passes` epochs of rows with their answers."""
        config = self.config
        if config.tune_backbone == "lora":
            self._adapters = add_adapters(
                model.backbone, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout
            )
        else:
            model.backbone.requires_grad_(True)
            model.classifiers.layers[-1].requires_grad_(True)
        rows = SpooledRows(self.data, self.parts.exits)
        every = np.arange(len(rows))
        return {
            "train_rows": TaughtRows(
                rows, teacher_logits(self.original, rows, description="the model's answers")
            ),
            "collate": partial(collate_taught, tokenizer=self.original.tokenizer),
            "batches": ChunkedBatches(
                [every], rows.lengths, config.batch_size, passes=cast(int, config.passes), seed=config.seed
            ),
        }

    def weighted_sum(self) -> Objective:
        """Every exit learns the model's own distribution: the divergence from it, deeper layers weigh more."""

        def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
            output = model(**batch)  # a tuned model's last layer learns as well
            exits = output.classifier_logits if self.is_tuned else output  # (rows, layers, classes)
            agrees = exits[:, -1].argmax(-1) == labels.argmax(-1)
            return weighted_sum_loss(divergence_losses(exits, labels)), {"agreement": agrees.float()}

        return objective

    def fixed_parts(self, model: Any) -> None:
        """As `TrainingTask` says; steps run a backbone only to tune it."""
        model.policy.eval()
        if not self.is_tuned:
            model.backbone.eval()

    def policy_data(self, run: Run, description: str) -> PolicyInstances:
        """As `TrainingTask` says."""
        config = self.config
        if isinstance(rows := run.parts.train_rows, CachedStates):
            rows.release()  # the exits have learnt from them
        states = self.agreement_states(
            run.model, run.parts.validation, run=run, description=f"{description}: states", keep_pooled=True
        )
        measure = config.hardness if config.reward == "hardness" else "uniform"
        learnt: Instances = row_instances(states, config.reward_loss, measure)
        lost = 1 - float(
            learnt.correct[:, -1].double().mean()
        )  # by a tuned last layer; the exits get what is left
        max_loss = max(0.0, config.max_accuracy_loss - lost) if self.is_tuned else None
        return PolicyInstances(learnt, None, None, states, max_loss=max_loss)

    def agreement_states(
        self, model: Any, rows: SpooledRows, *, run: Run, description: str, keep_pooled: bool = False
    ) -> LayerStates:
        """All layers' outputs, with the original's answers as labels."""
        states = run_all_layers(
            model,
            cast(Any, rows),
            collate=self._collate,
            accelerator=run.accelerator,
            keep_pooled=keep_pooled,
            memory_limit_mb=self.config.max_cache_mb,
            scratch_dir=run.scratch_dir,
            description=description,
        )
        require_finite("logits", "after the last step", [states.classifier_logits])
        answers = teacher_logits(self.original, rows) if self.is_tuned else states.layer_logits[:, -1]
        return replace(states, labels=answers.argmax(-1))

    def record(
        self, run: Run, data: PolicyInstances | None, choice: PolicyChoice | None, criterion: str
    ) -> dict[str, Any]:
        """As `TrainingTask` says."""
        return {"original": run.model.config.original}

    def finish(self, run: Run, choice: PolicyChoice | None, criterion: str) -> Any:
        """As `TrainingTask` says; the tokenizer is the original's, as it was."""
        self._adapters.merge()
        if choice is not None:
            keep_choice(run.model, choice, criterion)
        return run.model
