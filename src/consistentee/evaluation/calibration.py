"""A threshold with a certificate: what a saved classifier's own rows prove about exiting early.

Three goals. *Disagreement*: how often an exit gives another class than the last layer; it needs no labels. *Accuracy
loss*: how often an exit is wrong where the last layer is right. That is at least the accuracy lost, which is that share
less the rows that an exit gets right and the last layer wrong: what is certified is therefore more than asked for, and
exact, as a loss is 0 or 1. *Speed-up*: a threshold for a budget of layers, and a bound of the disagreement there.

A reference, such as the model that a tuned one is to imitate, may take the last layer's place in all three.

For a speed-up some of the rows choose the threshold by their depth and the others judge it: a bound on rows that have
chosen the threshold would be none.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistentee.data.rows import Text, TextDataset, split_rows
from consistentee.data.sketches import seen_rows
from consistentee.errors import DataError
from consistentee.evaluation.agreement import unlabelled_rows
from consistentee.evaluation.classification import class_columns, predict_classes, run_layers
from consistentee.evaluation.layer_times import LayerTimes, times_on
from consistentee.functional.bounds import at_most, smallest_certifiable_rows
from consistentee.functional.certificates import (
    Certified,
    bound_at,
    certify,
    threshold_for_speedup,
    threshold_pieces,
)
from consistentee.functional.criteria import digits, exit_scores
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier

MAX_DISAGREEMENT, MAX_ACCURACY_LOSS, MIN_SPEEDUP = "max_disagreement", "max_accuracy_loss", "min_speedup"
GOALS = (MAX_DISAGREEMENT, MAX_ACCURACY_LOSS, MIN_SPEEDUP)
MOST_SEEN = 0.9
"""Above this share of rows that the model was trained on they are refused."""
LEAST_TOLD = 10
"""Of fewer rows the share says too little to refuse them: a repeated text may be the only one that can be told."""

CHOOSING_SHARE = 0.25
"""Of the rows, where a speed-up is asked for: these choose the threshold, the others judge it."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was asked for, and what the rows prove.

    Attributes:
        goal: one of `GOALS`.
        target: the loss allowed, or the speed-up asked for.
        criterion: whose threshold it is.
        certified: whether there is a threshold with a proof.
        threshold: it; None where there is none.
        num_rows: rows that judged.
        num_choosing_rows: other rows, which chose the threshold for a speed-up.
        losses: rows that judged against the threshold; None without one.
        losses_allowed: the most that would still certify the goal; None without a threshold, and for a speed-up.
        bound: upper confidence bound of the share of losses at the threshold.
        confidence: of the certificate.
        rows_needed: the fewest rows that could certify the goal; None for a speed-up.
        mean_exit_layer, layer_speedup, agreement: of the rows that judged, at the threshold.
        reference: name of the model in full depth's place; None for full depth.
        full_depth_losses: rows that judged against full depth itself; None without a reference, as none does.
        accuracy, full_depth_accuracy: of the same, where labels were given.
        num_hidden_layers: of the model.
        num_truncated: rows that were cut.
        share_seen: of the rows that the model was trained on, about; None where its folder does not tell.
        rows_fingerprint: hash of all rows' texts.
        rows_source: name of the file or task that they come from.
        date: UTC, of the calibration.
        clock: where a speed-up on the clock was asked for: what an input, a layer and an exit cost here, milliseconds,
            and the `speedup` of the rows that judged.
        most_speedup: what the lowest threshold gives these rows, of what a speed-up was asked for; None for others.
        environment: hardware and versions.
        seconds: what it took.
    """

    goal: str
    target: float
    criterion: str
    certified: bool
    threshold: float | None
    num_rows: int
    num_choosing_rows: int
    losses: float | None
    losses_allowed: float | None
    bound: float | None
    confidence: float
    rows_needed: int | None
    mean_exit_layer: float | None
    layer_speedup: float | None
    agreement: float | None
    reference: str | None = None
    full_depth_losses: int | None = None
    accuracy: float | None = None
    full_depth_accuracy: float | None = None
    num_hidden_layers: int
    num_truncated: int = 0
    share_seen: float | None = None
    rows_fingerprint: str = ""
    rows_source: str = ""
    date: str = ""
    clock: dict[str, Any] | None = None
    most_speedup: float | None = None
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON."""
        return asdict(self)

    def operating_point(self) -> dict[str, Any]:
        """Criterion, threshold and certificate, as a model folder keeps them."""
        left_out = (
            *("criterion", "threshold", "certified", "environment", "seconds", "num_hidden_layers"),
            "most_speedup",
        )
        proof = {name: value for name, value in self.to_dict().items() if name not in left_out}
        names = ("consistentee", "torch", "transformers", "dtype", "hardware")
        proof["versions"] = {name: self.environment[name] for name in names if name in self.environment}
        kept = {name: value for name, value in proof.items() if value is not None}
        return {"criterion": self.criterion, "threshold": self.threshold, "certificate": kept}


def calibrate_layers(
    layer_logits: Tensor,
    exit_probs: Tensor | None,
    *,
    goal: str,
    target: float,
    criterion: str = "policy",
    confidence: float = 0.95,
    labels: Tensor | None = None,
    signals: Mapping[str, Tensor] | None = None,
    answers: Tensor | None = None,
    times: LayerTimes | None = None,
    has_exit: Sequence[bool] | None = None,
    seed: int = 0,
) -> Calibration:
    """Choose a threshold for a goal on the outputs of all layers, with what the rows prove about it.

    Args:
        layer_logits: (rows, layers, classes), every layer's prediction as an exit there would give it.
        exit_probs: (rows, layers), conditional exit probabilities; read by `policy` and `quantile` only.
        goal: one of `GOALS`.
        target: the loss allowed, in (0, 1), or the layer speed-up, in (1, layers].
        criterion: one of `CRITERIA`.
        confidence: in (0, 1).
        labels: (rows,), int64; needed for an accuracy loss.
        signals: `LayerStates.signals`, for the criteria that read them.
        answers: (rows,), int64, a reference's classes in place of the last layer's.
        times: what layers and exits cost: a speed-up is then one on the clock, against no early exits.
        has_exit: (layers,), which layers have an exit; None: all. Only their times need it.
        seed: of which rows choose, for a speed-up.

    Raises:
        ValueError: a value out of its range, no labels where they are needed, or fewer than two rows for a speed-up.
    """
    if goal not in GOALS:
        raise ValueError(f'goal must be one of {", ".join(GOALS)}, got "{goal}".')
    scores = exit_scores(criterion, layer_logits, exit_probs, **(signals or {}))
    predictions = layer_logits.argmax(-1)  # (rows, layers)
    target_classes = predictions[:, -1] if answers is None else answers  # (rows,)
    losses = (predictions != target_classes[:, None]).float()
    if goal == MAX_ACCURACY_LOSS:
        if labels is None:
            raise ValueError("labels must be given for max_accuracy_loss.")
        right = predictions == labels[:, None]
        losses = ((target_classes == labels)[:, None] & ~right).float()
    judging, num_choosing = torch.arange(len(scores)), 0
    costs = None if times is None else times.at_layers(has_exit)
    found: Certified | None
    at: dict[str, Any] = {"agreement": None}
    if goal == MIN_SPEEDUP:
        judged, choosing = split_rows(len(scores), CHOOSING_SHARE, seed)
        judging, num_choosing = torch.tensor(judged), len(choosing)
        threshold = threshold_for_speedup(
            scores[choosing],
            target,
            criterion=criterion,
            judged_rows=len(judged),
            costs=costs,
            full_cost=None if times is None else times.full_depth_ms,
        )
        found = bound_at(
            scores[judging], losses[judging], threshold, confidence=confidence, criterion=criterion
        )
        spent = torch.arange(1, scores.shape[1] + 1).double() if costs is None else costs
        lowest = threshold_pieces(scores[judging], spent.expand(len(judging), -1), criterion).losses[-1]
        full_cost = scores.shape[1] if times is None else times.full_depth_ms
        at["most_speedup"] = full_cost * len(judging) / float(lowest)
    else:
        found = certify(scores, losses, max_loss=target, confidence=confidence, criterion=criterion)
    if found is not None:
        chosen = (choose_exit_layer(scores[judging], found.threshold) - 1)[:, None]
        given = predictions[judging].gather(1, chosen).squeeze(1)
        if times is not None and costs is not None:
            spent = float(costs[chosen].mean())
            at["clock"] = times.to_dict() | {"milliseconds": spent, "speedup": times.full_depth_ms / spent}
        at["agreement"] = float((given == target_classes[judging]).double().mean())
        if labels is not None:
            at["accuracy"] = float((given == labels[judging]).double().mean())
            at["full_depth_accuracy"] = float((predictions[judging, -1] == labels[judging]).double().mean())
    return Calibration(
        goal=goal,
        target=target,
        criterion=criterion,
        certified=found is not None,
        threshold=None if found is None else found.threshold,
        num_rows=len(judging),
        num_choosing_rows=num_choosing,
        losses=None if found is None else found.losses,
        losses_allowed=None if found is None else found.losses_allowed,
        bound=None if found is None else found.bound,
        confidence=confidence,
        rows_needed=None if goal == MIN_SPEEDUP else smallest_certifiable_rows(target, confidence),
        mean_exit_layer=None if found is None else found.mean_exit_layer,
        layer_speedup=None if found is None else found.layer_speedup,
        num_hidden_layers=scores.shape[1],
        full_depth_losses=None if answers is None else int(losses[judging, -1].sum()),
        **at,
    )


def calibrate_model(
    saved: LoadedClassifier,
    rows: TextDataset | Sequence[Text],
    *,
    goal: str,
    target: float,
    criterion: str | None = None,
    confidence: float = 0.95,
    reference: LoadedClassifier | None = None,
    clock_batch_size: int | None = None,
    backend: str = "torch",
    batch_size: int = 64,
    source: str = "texts",
    progress: bool = False,
) -> Calibration:
    """Choose a threshold of a saved model for a goal, with what the rows prove about it.

    Args:
        saved: the model, from `load_model`.
        rows: labelled rows, or texts alone; drawn from what the model will see, and used for nothing before.
        goal: one of `GOALS`.
        target: the loss allowed, or the layer speed-up asked for.
        criterion: an exit criterion; None takes the saved one.
        confidence: in (0, 1).
        reference: the model to agree with, or to lose no accuracy against, as it was saved; None takes full depth.
        clock_batch_size: a speed-up is one on the clock of this machine, for so many inputs that start together; None:
            of layers.
        backend: of the engine that is timed for it.
        batch_size: rows per step; does not change the result.
        source: where texts without labels come from.
        progress: whether to show how far it is.

    Raises:
        DataError: there is no row, or they are the rows that the thresholds were chosen on.
        ValueError: as of `calibrate_layers`, or the model has no exits.
    """
    start = time.perf_counter()
    model = saved.early_exit_model
    rule = criterion or model.config.criterion
    labelled = isinstance(rows, TextDataset)
    dataset = rows if isinstance(rows, TextDataset) else unlabelled_rows(rows, saved.label_names, source)
    if not len(dataset):
        raise DataError("There must be at least one row, got none.", file=dataset.source)
    seen = share_seen(saved, dataset)
    description = "calibrating" if progress else None
    states, num_truncated = run_layers(saved, dataset, batch_size=batch_size, description=description)
    logits, labels = states.layer_logits, None
    if labelled:
        logits, labels = logits[..., class_columns(saved, dataset.label_names)], states.labels
    answers = None
    if reference is not None:
        answers = predict_classes(reference, dataset, beside=saved, batch_size=batch_size, progress=progress)
    found = calibrate_layers(
        logits,
        states.exit_probs,
        goal=goal,
        target=target,
        criterion=rule,
        confidence=confidence,
        labels=labels,
        signals=states.signals,
        answers=answers,
        times=None
        if clock_batch_size is None
        else times_on(
            saved,
            dataset.texts,
            batch_size=clock_batch_size,
            criterion=rule,
            backend=backend,
            progress=progress,
        ),
        has_exit=model.config.has_exit,
    )
    return replace(
        found,
        reference=None if reference is None else reference.name,
        num_truncated=num_truncated,
        share_seen=seen,
        rows_fingerprint=fingerprint_of_texts(dataset.texts),
        rows_source=Path(dataset.source).name,
        date=datetime.now(timezone.utc).date().isoformat(),
        environment=environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
        seconds=time.perf_counter() - start,
    )


def fingerprint_of_texts(texts: Sequence[tuple[str, ...]]) -> str:
    """Hash of texts in their order, without labels."""
    digest = hashlib.sha256()
    for parts in texts:
        digest.update("\x1f".join(parts).encode() + b"\x1e")
    return digest.hexdigest()[:16]


def share_seen(saved: LoadedClassifier, dataset: TextDataset) -> float | None:
    """The share of the rows that the model was trained on, about; None where its training record does not tell.

    Raises:
        DataError: it was trained on these very rows, or on nearly all of them.
    """
    data: Mapping[str, Any] = saved.record.get("data") or {}
    seen, told = seen_rows(data.get("text_sketch", ""), dataset.texts)
    share = None if "text_sketch" not in data else seen / max(told, 1)
    if data.get("fingerprint") == dataset.fingerprint() or (told >= LEAST_TOLD and seen > MOST_SEEN * told):
        raise DataError(
            f'Model "{saved.name}" was trained, and its thresholds chosen, on these rows, which can therefore certify '
            "nothing.",
            file=dataset.source,
            remedy="Give rows that nothing was chosen on.",
        )
    return share


def calibration_lines(found: Calibration) -> list[str]:
    """What was found, in sentences; the first is the outcome, the last may be a warning."""
    lines = _outcome(found)
    if found.certified and found.share_seen:
        lines.append(
            f"Warning: about {100 * found.share_seen:.2g} % of the rows are among those that the model was trained on. "
            "Unless inputs to come repeat them as often, the certificate is too favourable."
        )
    return lines


def _outcome(found: Calibration) -> list[str]:
    target = "full depth" if found.reference is None else f'model "{found.reference}"'
    if not found.certified and found.num_rows >= (found.rows_needed or 0) and found.full_depth_losses:
        loses = "is wrong where" if found.goal == MAX_ACCURACY_LOSS else "gives another class than"
        right = " is right" if found.goal == MAX_ACCURACY_LOSS else ""
        return [
            f"Full depth itself {loses} {target}{right} on {found.full_depth_losses:,} of {found.num_rows:,} rows, and "
            f"{_points(found.target)} at {_share(found.confidence)} allows fewer: no threshold is certified."
        ]
    if not found.certified or found.threshold is None or found.bound is None:
        return [
            f"{found.num_rows:,} rows can certify no {_points(found.target)} at {_share(found.confidence)}: "
            f"{found.rows_needed:,} can."
        ]
    depth, what = found.num_hidden_layers, _losses(found.goal, found.losses or 0)
    head = f"{found.criterion} threshold {digits(found.threshold, 4)}: {what}"
    speed = (
        f"Layer speed-up {found.layer_speedup:.2f}x: {found.mean_exit_layer:.2f} of {depth} layers on average. "
        f"Agreement with {target} {_share(found.agreement or 0, 2)}"
    )
    if found.accuracy is not None and found.full_depth_accuracy is not None:
        speed += f", accuracy {_share(found.accuracy, 2)} (full depth {_share(found.full_depth_accuracy, 2)})"
    if found.goal == MIN_SPEEDUP:
        lines = [
            f"{head} in {found.num_rows:,} rows: at most {at_most(found.bound)} of all, confidence "
            f"{_share(found.confidence)}; {found.num_choosing_rows:,} other rows chose the threshold.",
            f"{speed}.",
        ]
        if found.clock is not None:
            lines.append(
                f"{found.clock['speedup']:.2f}x on the clock at batches of {found.clock['batch_size']}: "
                f"{found.clock['milliseconds']:.3f} ms an input, {found.clock['full_depth_ms']:.3f} ms without exits."
            )
        reached = found.layer_speedup if found.clock is None else found.clock["speedup"]
        if (reached or 0) < found.target:
            lines.append(
                f"The rows that judged stay below the {found.target:g}x asked for, by chance."
                if (found.most_speedup or 0) >= found.target
                else f"No threshold gives them the {found.target:g}x asked for: the lowest gives "
                f"{found.most_speedup or 0:.2f}x."
            )
        return lines
    of = "of disagreement with" if found.goal == MAX_DISAGREEMENT else "of accuracy lost against"
    lines = [
        f"{head} of {found.losses_allowed:,} allowed in {found.num_rows:,} rows; certified: at most "
        f"{_points(found.target)} {of} {target}, confidence {_share(found.confidence)}.",
        f"{speed}; upper bound of the losses {at_most(found.bound)}.",
    ]
    if found.mean_exit_layer == depth:
        lines.append(
            "No row exits early at a threshold that passes: this saves nothing. Allow more, or give more rows."
        )
    return lines


NO_PROMISE = (
    "It holds on average, for rows drawn as these were. It promises nothing for a single input, for one class, for "
    "inputs that have changed since, for another dtype, or if something was chosen on these rows."
)


def _losses(goal: str, count: float) -> str:
    noun = "loss" if goal == MAX_ACCURACY_LOSS else "disagreement"
    plural = "losses" if goal == MAX_ACCURACY_LOSS else "disagreements"
    return f"{count:,} {noun if count == 1 else plural}"


def _points(share: float) -> str:
    points = float(np.round(100 * share, 6))
    return f"{points:g} point{'' if points == 1 else 's'}"


def _share(share: float, decimals: int | None = None) -> str:
    return f"{100 * share:g} %" if decimals is None else f"{100 * share:.{decimals}f} %"
