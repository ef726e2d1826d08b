"""What exits on a fine-tuned classifier are worth: how often they agree with it, with a certificate, and how fast.

The certificate rests on rows that nothing else was learnt or chosen on, the figures on further ones. Where the backbone
was tuned for the exits, all of it is about the original's answers, not about the tuned model's own full depth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistentee.atomic_files import locked_folder, write_json
from consistentee.data.spooled import SpooledRows
from consistentee.evaluation.agreement import agreement_of_layers
from consistentee.evaluation.calibration import MAX_DISAGREEMENT, Calibration, calibrate_layers
from consistentee.evaluation.classification import run_tokenized
from consistentee.evaluation.results import AgreementEvaluation
from consistentee.evaluation.speed_classification import ClassificationSpeedRow, measure_speed
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.functional.bounds import binomial_interval
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.operating_points import save_operating_point
from consistentee.pipelines.classifier import Engine
from consistentee.training.states import LayerStates
from consistentee.training.teacher import teacher_logits

MOST_DISAGREEMENTS = 20
"""Texts on which exits and model differ that are kept, of those the model is surest of."""

LEAST_SPEEDUP = 1.15
"""Layer speed-up below which exits are said not to be worth it."""

SPEED_ROWS, SPEED_SECONDS = 256, 20.0

CERTIFIED = "certified"
"""Name of the operating point with the certificate."""


@dataclass(frozen=True)
class Disagreement:
    """A text that exits label otherwise than the model.

    Args:
        texts: one, or two of a pair.
        label, score: the model's: at full depth, or the original's where it was tuned.
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
        evaluation: on the reported rows.
        num_train_texts, num_policy_texts, num_calibration_texts: what the exits, the policy and the certificate saw.
        agreement_interval: of the agreement on the reported rows, at the confidence, two-sided and exact.
        confidence: of interval and certificate.
        max_disagreement: what was asked for.
        calibration: what the calibration rows prove, of the threshold if anything.
        disagreements: the reported rows on which exits and model differ, those the model is surest of.
        full_depth_agreement: of full depth on the reported rows: 1, or less where the backbone was tuned.
        accuracy, full_depth_accuracy: of the reported rows with known labels, at the exits and of the model itself;
            None where none is.
        original_accuracy: of the same, of the model before it was tuned; None where it was not.
        num_labelled: how many these are.
        speed: competitors at batch sizes 1 and 32.
        seconds: of the training and the report.
    """

    evaluation: AgreementEvaluation
    num_train_texts: int
    num_policy_texts: int
    num_calibration_texts: int
    agreement_interval: tuple[float, float]
    confidence: float
    max_disagreement: float
    calibration: Calibration
    disagreements: list[Disagreement]
    full_depth_agreement: float = 1.0
    accuracy: float | None = None
    full_depth_accuracy: float | None = None
    original_accuracy: float | None = None
    num_labelled: int = 0
    speed: tuple[ClassificationSpeedRow, ...] = ()
    seconds: float = 0.0

    @property
    def is_worth_it(self) -> bool:
        """Whether the exits save layers to speak of."""
        return self.evaluation.layer_speedup >= LEAST_SPEEDUP

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON: the evaluation's beside what is said here."""
        own = {
            name: value for name, value in asdict(self).items() if name not in ("evaluation", "calibration")
        }
        certificate = self.calibration.to_dict() if self.calibration.certified else None
        return {**self.evaluation.to_dict(), **own, "certificate": certificate}


def report_retrofit(
    saved: LoadedClassifier,
    *,
    calibration: SpooledRows,
    reported: SpooledRows,
    num_train_texts: int,
    num_policy_texts: int,
    max_disagreement: float,
    confidence: float = 0.95,
    original: LoadedClassifier | None = None,
    labels: Mapping[tuple[str, ...], int] | None = None,
    speed_seconds: float | None = SPEED_SECONDS,
    progress: bool = False,
) -> RetrofitReport:
    """Choose the threshold that calibration rows certify, and measure it on others.

    Args:
        saved: the retrofitted model.
        calibration: rows that nothing was learnt or chosen on.
        reported: others, likewise.
        num_train_texts, num_policy_texts: what exits and policy learnt from, for the record.
        max_disagreement: share of texts that may get another label, in (0, 1).
        confidence: of the certificate, in (0, 1).
        original: of a tuned model that before it: the model to agree with; None takes full depth, which is the original
            where nothing was tuned.
        labels: class indices by text, where they are known: accuracy is reported, too.
        speed_seconds: for timing batches of 1 and 32 against the model without exits; None does not time.
        progress: whether to show how far it is.
    """
    start = time.perf_counter()
    criterion, threshold = saved.exit_rule()
    states = run_tokenized(saved, calibration, description="calibration" if progress else None)
    logits = None if original is None else teacher_logits(original, calibration)
    found = calibrate_layers(
        states.layer_logits,
        states.exit_probs,
        goal=MAX_DISAGREEMENT,
        target=max_disagreement,
        criterion=criterion,
        confidence=confidence,
        signals=states.signals,
        answers=None if logits is None else logits.argmax(-1),
    )
    found = replace(
        found,
        reference=None if original is None else original.name,
        rows_fingerprint=calibration.fingerprint(),
        rows_source=calibration.texts.source,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(saved.model.device),
    )
    learnt = saved.record.get("thresholds") or {}  # the configuration may have that of an earlier report
    threshold = learnt.get(criterion, threshold) if found.threshold is None else found.threshold
    states = run_tokenized(saved, reported, description="report" if progress else None)
    logits = states.layer_logits[:, -1] if original is None else teacher_logits(original, reported)
    others = {name: saved.known_threshold(name) for name in saved.criteria if name != criterion}
    evaluation = agreement_of_layers(
        states.layer_logits,
        states.exit_probs,
        criterion=criterion,
        threshold=threshold,
        other_criteria=others,
        signals=states.signals,
        answers=logits.argmax(-1),
    )
    model = saved.early_exit_model
    evaluation = replace(
        evaluation,
        agreement_with=None if original is None else original.name,
        num_truncated=reported.num_truncated,
        environment=environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
    )
    rows = len(reported)
    interval = binomial_interval(round(evaluation.agreement * rows), rows, confidence)
    speed: tuple[ClassificationSpeedRow, ...] = ()
    if speed_seconds is not None:
        speed = time_exits(saved, reported, criterion, threshold, speed_seconds)
    return RetrofitReport(
        evaluation=evaluation,
        num_train_texts=num_train_texts,
        num_policy_texts=num_policy_texts,
        num_calibration_texts=len(calibration),
        agreement_interval=interval,
        confidence=confidence,
        max_disagreement=max_disagreement,
        calibration=found,
        disagreements=find_disagreements(saved, states, reported, criterion, threshold, logits),
        full_depth_agreement=evaluation.full_depth_agreement,
        speed=speed,
        seconds=time.perf_counter() - start,
        **accuracies(
            states, reported, labels or {}, criterion, threshold, None if original is None else logits
        ),
    )


def accuracies(
    states: LayerStates,
    rows: SpooledRows,
    labels: Mapping[tuple[str, ...], int],
    criterion: str,
    threshold: float,
    original_logits: Tensor | None,
) -> dict[str, Any]:
    """`accuracy`, `full_depth_accuracy` and `num_labelled` of the rows whose labels are known; nothing without any.

    `original_accuracy` too, where (rows, classes) logits of another model than full depth are given.
    """
    known = [(row, label) for row in range(len(rows)) if (label := labels.get(rows.text(row))) is not None]
    if not known:
        return {}
    index, truth = torch.tensor([row for row, _ in known]), torch.tensor([label for _, label in known])
    exit_layer = choose_exit_layer(states.exit_scores(criterion), threshold)
    predictions = states.layer_logits.argmax(-1)[index]
    at_exit = predictions.gather(1, exit_layer[index, None] - 1).squeeze(1)
    other: dict[str, float] = {}
    if original_logits is not None:
        other["original_accuracy"] = float((original_logits.argmax(-1)[index] == truth).double().mean())
    return {
        **other,
        "accuracy": float((at_exit == truth).double().mean()),
        "full_depth_accuracy": float((predictions[:, -1] == truth).double().mean()),
        "num_labelled": len(known),
    }


def find_disagreements(
    saved: LoadedClassifier,
    states: LayerStates,
    rows: SpooledRows,
    criterion: str,
    threshold: float,
    model_logits: Tensor,
) -> list[Disagreement]:
    """Texts that exits label otherwise than the model, whose logits are (rows, classes), the surest of it first."""
    exit_layer = choose_exit_layer(states.exit_scores(criterion), threshold)
    every = torch.arange(len(states))
    at_exit = states.layer_logits[every, exit_layer - 1]
    given, answers = at_exit.argmax(-1), model_logits.argmax(-1)  # as evaluated; probabilities may be equal
    exits, full = at_exit.softmax(-1), model_logits.softmax(-1)
    differ = (given != answers).nonzero().squeeze(1)
    order = differ[full[differ].amax(-1).argsort(descending=True)][:MOST_DISAGREEMENTS]
    names = saved.label_names
    return [
        Disagreement(
            texts=rows.text(row),
            label=names[int(answers[row])],
            score=float(full[row].amax()),
            exit_label=names[int(given[row])],
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


def keep_threshold(folder: str | Path, report: RetrofitReport) -> None:
    """Make the report's threshold the one that a saved folder exits by; a certified one gets a name, too.

    Where none is certified, that of an earlier report on the same rows goes.
    """
    path = Path(folder) / "config.json"
    with locked_folder(path.parent):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["threshold"] = report.evaluation.threshold
        points = dict(values.get("operating_points") or {})
        proof = points.get(CERTIFIED, {}).get("certificate") or {}
        if (
            not report.calibration.certified
            and proof.get("rows_fingerprint") == report.calibration.rows_fingerprint
        ):
            del points[CERTIFIED]
            values["operating_points"] = points or None
        write_json(path, values)
    if report.calibration.certified:
        save_operating_point(folder, CERTIFIED, report.calibration.operating_point(), overwrite=True)
