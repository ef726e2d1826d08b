"""What exits on a fine-tuned classifier are worth: how often they agree with it, with a certificate, and how fast.

The certificate rests on rows that nothing else was learnt or chosen on, the figures on further ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from consistentee.atomic_files import write_json
from consistentee.data.batches import collate
from consistentee.data.spooled import SpooledRows
from consistentee.evaluation.classification import evaluate_layers
from consistentee.evaluation.results import Evaluation
from consistentee.evaluation.speed_classification import ClassificationSpeedRow, measure_speed
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.functional.bounds import binomial_upper_bound
from consistentee.functional.certificates import Certified, certify
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import CurvePoint
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import Engine
from consistentee.training.states import LayerStates, run_all_layers

MOST_DISAGREEMENTS = 20
"""Texts on which exits and model differ that are kept, of those the model is surest of."""

LEAST_SPEEDUP = 1.15
"""Layer speed-up below which exits are said not to be worth it."""

SPEED_ROWS = 256


@dataclass(frozen=True)
class Disagreement:
    """A text that exits label otherwise than the model.

    Args:
        texts: one, or two of a pair.
        label, score: the model's, at full depth.
        exit_label, exit_score: of the exit.
        exit_layer: layers executed, from 1.
    """

    texts: tuple[str, ...]
    label: str
    score: float
    exit_label: str
    exit_score: float
    exit_layer: int


@dataclass(frozen=True, kw_only=True)
class RetrofitReport:
    """What the exits of a retrofitted model are worth.

    Args:
        evaluation: on the reported rows, with the model's own answers as labels: its accuracy is the agreement.
        num_train_texts, num_policy_texts, num_calibration_texts: what the exits, the policy and the certificate saw.
        agreement_interval: of the agreement on the reported rows, at the confidence, two-sided and exact.
        confidence: of interval and certificate.
        max_disagreement: what was asked for.
        certificate: of the threshold; None where the calibration rows do not prove it.
        disagreements: the reported rows on which exits and model differ, those the model is surest of.
        speed: competitors at batch sizes 1 and 32.
        seconds: of the training and the report.
    """

    evaluation: Evaluation
    num_train_texts: int
    num_policy_texts: int
    num_calibration_texts: int
    agreement_interval: tuple[float, float]
    confidence: float
    max_disagreement: float
    certificate: Certified | None
    disagreements: list[Disagreement]
    speed: tuple[ClassificationSpeedRow, ...] = ()
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list[str])

    @property
    def is_worth_it(self) -> bool:
        """Whether the exits save layers to speak of."""
        return self.evaluation.layer_speedup >= LEAST_SPEEDUP

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON; what is an accuracy against the model is called agreement."""
        found = self.evaluation
        others = {
            name: {"threshold": other.threshold, "curve": _agreement_curve(other.curve)}
            for name, other in found.other_criteria.items()
        }
        return {
            "num_hidden_layers": found.num_hidden_layers,
            "num_train_texts": self.num_train_texts,
            "num_policy_texts": self.num_policy_texts,
            "num_calibration_texts": self.num_calibration_texts,
            "num_examples": found.num_examples,
            "criterion": found.criterion,
            "threshold": found.threshold,
            "agreement": found.accuracy,
            "agreement_interval": list(self.agreement_interval),
            "mean_exit_layer": found.mean_exit_layer,
            "layer_speedup": found.layer_speedup,
            "max_disagreement": self.max_disagreement,
            "confidence": self.confidence,
            "certificate": None if self.certificate is None else asdict(self.certificate),
            "curve": _agreement_curve(found.curve),
            "other_criteria": others,
            "exit_histogram": found.exit_histogram,
            "exit_agreement": found.exit_accuracy,
            "per_layer_agreement": found.per_layer_accuracy,
            "disagreements": [asdict(one) for one in self.disagreements],
            "speed": [asdict(row) for row in self.speed],
            "notes": self.notes,
            "environment": found.environment,
            "seconds": self.seconds,
        }


def _agreement_curve(points: Sequence[CurvePoint]) -> list[dict[str, float]]:
    return [
        {
            "threshold": point.threshold,
            "agreement": point.accuracy,
            "mean_exit_layer": point.mean_exit_layer,
            "layer_speedup": point.layer_speedup,
        }
        for point in points
    ]


def agreement_states(
    saved: LoadedClassifier, rows: SpooledRows, *, batch_size: int = 64, description: str | None = None
) -> LayerStates:
    """All layers' outputs for rows without labels; the last layer's answers are in the labels' place."""
    model = saved.early_exit_model
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", kwargs_handlers=[AutocastKwargs(enabled=False)]
    )  # full precision, as it is served
    states = run_all_layers(
        model,
        cast(Any, rows),
        collate=partial(collate, tokenizer=saved.tokenizer),
        batch_size=batch_size,
        accelerator=accelerator,
        description=description,
    )
    return replace(states, labels=states.layer_logits[:, -1].argmax(-1))


def report_retrofit(
    saved: LoadedClassifier,
    *,
    calibration: SpooledRows,
    reported: SpooledRows,
    num_train_texts: int,
    num_policy_texts: int,
    max_disagreement: float,
    confidence: float = 0.95,
    speed_seconds: float | None = 20.0,
    progress: bool = False,
    announce: Callable[[str], object] = lambda _: None,
) -> RetrofitReport:
    """Choose the threshold that calibration rows certify, and measure it on others.

    Args:
        saved: the retrofitted model.
        calibration: rows that nothing was learnt or chosen on.
        reported: others, likewise.
        num_train_texts, num_policy_texts: what exits and policy learnt from, for the record.
        max_disagreement: share of texts that may get another label, in (0, 1).
        confidence: of the certificate, in (0, 1).
        speed_seconds: for timing batches of 1 and 32 against the model without exits; None does not time.
        progress: whether to show how far it is.
        announce: is told what is being done.
    """
    start = time.perf_counter()
    criterion, threshold = saved.exit_rule()
    states = agreement_states(saved, calibration, description="calibration" if progress else None)
    scores = exit_scores(criterion, states.layer_logits, states.exit_probs)
    losses = (states.layer_logits.argmax(-1) != states.labels[:, None]).float()
    certified = certify(scores, losses, max_loss=max_disagreement, confidence=confidence, criterion=criterion)
    if certified is not None:
        threshold = certified.threshold
    states = agreement_states(saved, reported, description="report" if progress else None)
    others = {name: saved.known_threshold(name) for name in saved.criteria if name != criterion}
    evaluation = evaluate_layers(
        states.layer_logits,
        states.exit_probs,
        states.labels,
        criterion=criterion,
        threshold=threshold,
        other_criteria=others,
        classifier_logits=states.classifier_logits,
        label_names=saved.label_names,
    )
    model = saved.early_exit_model
    evaluation = replace(
        evaluation,
        num_truncated=reported.num_truncated,
        environment=environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
    )
    rows = len(reported)
    wrong = round((1 - evaluation.accuracy) * rows)
    half = (1 + confidence) / 2
    interval = (1 - binomial_upper_bound(wrong, rows, half), binomial_upper_bound(rows - wrong, rows, half))
    speed: tuple[ClassificationSpeedRow, ...] = ()
    if speed_seconds is not None:
        announce("timing")
        speed = time_exits(saved, reported, criterion, threshold, speed_seconds)
    return RetrofitReport(
        evaluation=evaluation,
        num_train_texts=num_train_texts,
        num_policy_texts=num_policy_texts,
        num_calibration_texts=len(calibration),
        agreement_interval=interval,
        confidence=confidence,
        max_disagreement=max_disagreement,
        certificate=certified,
        disagreements=find_disagreements(saved, states, reported, criterion, threshold),
        speed=speed,
        seconds=time.perf_counter() - start,
    )


def find_disagreements(
    saved: LoadedClassifier, states: LayerStates, rows: SpooledRows, criterion: str, threshold: float
) -> list[Disagreement]:
    """Texts that exits label otherwise than the model, the surest of the model first, at most so many."""
    scores = exit_scores(criterion, states.layer_logits, states.exit_probs)
    exit_layer = choose_exit_layer(scores, threshold)
    every = torch.arange(len(states))
    probabilities = states.layer_logits.softmax(-1)
    exits, full = probabilities[every, exit_layer - 1], probabilities[:, -1]
    differ = (exits.argmax(-1) != full.argmax(-1)).nonzero().squeeze(1)
    order = differ[full[differ].amax(-1).argsort(descending=True)][:MOST_DISAGREEMENTS]
    names = saved.label_names
    return [
        Disagreement(
            texts=rows.text(row),
            label=names[int(full[row].argmax())],
            score=float(full[row].amax()),
            exit_label=names[int(exits[row].argmax())],
            exit_score=float(exits[row].amax()),
            exit_layer=int(exit_layer[row]),
        )
        for row in order.tolist()
    ]


def time_exits(
    saved: LoadedClassifier, rows: SpooledRows, criterion: str, threshold: float, seconds: float
) -> tuple[ClassificationSpeedRow, ...]:
    """The engine with exits against the model without, batches of 1 and of 32, in about so many seconds."""
    engine = Engine(saved)
    sample = [rows.texts.item(int(row)) for row in rows.rows[:SPEED_ROWS]]
    found = measure_speed(
        engine,
        sample,
        batch_sizes=(1, 32),
        throughput=False,
        rule=engine.rule(criterion, threshold),
        budget=TimeBudget(seconds),
        with_onnxruntime=False,
    )
    return found.rows


def save_threshold(folder: str | Path, threshold: float) -> None:
    """Make a threshold the one that a saved folder exits by."""
    path = Path(folder) / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "threshold": threshold})
