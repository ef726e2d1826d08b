"""Exits where they pay: which layers keep one, by what it costs on this machine against what exiting there saves.

From exits on all layers, those go one after another whose removal makes the inputs fastest at the loss allowed, each
time with the threshold that then suits, until no removal gains. Predictions, exit probabilities and scores of what is
left are computed anew each time: the running prediction, and so the policy's features, lack what was removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistentee.data.rows import TextDataset
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.calibration import MAX_ACCURACY_LOSS, MAX_DISAGREEMENT
from consistentee.evaluation.classification import class_columns, run_layers
from consistentee.evaluation.layer_times import TIMED_REPEATS, TIMED_ROWS, LayerTimes, times_on
from consistentee.evaluation.speed import median_seconds
from consistentee.functional.certificates import certify
from consistentee.functional.criteria import exit_scores
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.timing import time_in_turn
from consistentee.models.exit_subsets import with_exit_layers
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import Engine
from consistentee.progress import show_progress
from consistentee.training.states import LayerStates

NOBODY_EXITS = ExitRule("confidence", 1.0)
"""Full depth as the model gives it: the last layer's prediction, ensembled with those before it where the model is."""

LEAST_GAIN = 0.002
"""An exit goes only if inputs become faster by more than this share: less is noise."""


@dataclass(frozen=True)
class SubsetPoint:
    """What some exits give at the fastest threshold that keeps the goal on the rows that choose.

    Args:
        exit_layers: the layers that have one, from 1.
        threshold: of the criterion; None where no threshold keeps the goal: nobody exits early.
        mean_exit_layer: of the rows.
        milliseconds: of an input, by what layers and exits cost.
        losses: rows that count against the goal.
    """

    exit_layers: tuple[int, ...]
    threshold: float | None
    mean_exit_layer: float
    milliseconds: float
    losses: int


@dataclass(frozen=True)
class TimedPoint:
    """All exits or the chosen ones, timed on rows that chose nothing.

    Args:
        name: `all exits`, `chosen exits`, or `full depth`.
        batch_size: inputs that start together.
        milliseconds: of an input, median of the repetitions.
        mean_exit_layer, agreement: of the rows; agreement with full depth of the model with all exits.
        accuracy: where there are labels.
    """

    name: str
    batch_size: int
    milliseconds: float
    mean_exit_layer: float
    agreement: float
    accuracy: float | None


@dataclass(frozen=True)
class ExitChoice:
    """Which layers keep an exit, and how that was found.

    Args:
        times: what a layer and an exit cost.
        steps: from all exits to those chosen, an exit fewer each time.
        num_rows: rows that chose.
        timed: on other rows.
    """

    times: LayerTimes
    steps: tuple[SubsetPoint, ...]
    num_rows: int
    timed: tuple[TimedPoint, ...] = ()

    @property
    def exit_layers(self) -> list[int]:
        """The layers that keep one."""
        return list(self.steps[-1].exit_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"times": self.times.to_dict(), "exit_layers": self.exit_layers}


def choose_exit_layers(
    saved: LoadedClassifier,
    rows: TextDataset,
    *,
    goal: str,
    target: float,
    criterion: str | None = None,
    confidence: float = 0.95,
    batch_size: int = 1,
    backend: str = "torch",
    progress: bool = False,
) -> ExitChoice:
    """Choose the layers that keep an exit.

    Args:
        saved: a model with exits; those that it has on fewer layers are forgotten.
        rows: that choose. Nothing can be certified on them afterwards.
        goal: `max_disagreement` with full depth, or `max_accuracy_loss`, for which the rows need labels.
        target: the share of the rows allowed.
        criterion: None takes the saved one.
        confidence: a threshold must keep the goal on these rows as if it were to be certified.
        batch_size: for which inputs are to be fast.
        backend: of the engine that is timed.
        progress: whether to show how far it is.

    Raises:
        ValueError: another goal, or too few rows to time.
    """
    if goal not in (MAX_DISAGREEMENT, MAX_ACCURACY_LOSS):
        raise ValueError(
            f'goal must be {MAX_DISAGREEMENT} or {MAX_ACCURACY_LOSS} to choose exits, got "{goal}".'
        )
    whole = with_exit_layers(saved, None)
    rule = criterion or whole.early_exit_model.config.criterion
    times = times_on(
        saved, rows.texts, batch_size=batch_size, criterion=rule, backend=backend, progress=progress
    )
    states, _ = run_layers(whole, rows, keep_pooled=True, description="choosing exits" if progress else None)
    subsets = _Subsets(
        whole, states, rule, goal, target, confidence, times, class_columns(whole, rows.label_names)
    )
    depth = whole.num_hidden_layers
    steps = [subsets.at(tuple(range(1, depth + 1)))]
    while len(steps[-1].exit_layers) > 1:
        kept = steps[-1].exit_layers
        fewer = [subsets.at(tuple(x for x in kept if x != layer)) for layer in kept[:-1]]
        best = min(fewer, key=lambda point: point.milliseconds)
        if best.milliseconds > (1 - LEAST_GAIN) * steps[-1].milliseconds:
            break
        steps.append(best)
    return ExitChoice(times, tuple(steps), len(rows))


@dataclass(frozen=True)
class _Subsets:
    """Rows with all layers' states, and what is asked of them."""

    saved: LoadedClassifier
    states: LayerStates
    criterion: str
    goal: str
    target: float
    confidence: float
    times: LayerTimes
    columns: Any

    def at(self, exit_layers: tuple[int, ...]) -> SubsetPoint:
        """What some exits give; full depth is that of all exits."""
        model: Any = self.saved.early_exit_model
        states, depth = self.states, model.num_layers
        has_exit = [layer in exit_layers for layer in range(1, depth + 1)]
        with torch.no_grad():
            layer_logits = model.layer_predictions(states.classifier_logits, has_exit)
            probs = torch.cat(
                [
                    model.layer_exit_probs(part.float(), logits, has_exit)
                    for part, logits in zip(
                        _pooled(states).split(1024), layer_logits.split(1024), strict=True
                    )
                ]
            )
        signals = dict(states.signals)
        if not all(has_exit):
            signals["has_exit"] = torch.tensor(has_exit).expand(len(states), -1)
        scores = exit_scores(self.criterion, layer_logits, probs, **signals)
        predictions = layer_logits[..., self.columns].argmax(-1)
        answers = states.layer_logits[:, -1][..., self.columns].argmax(-1)
        losses = (predictions != answers[:, None]).float()
        if self.goal == MAX_ACCURACY_LOSS:
            right = predictions == states.labels[:, None]
            losses = ((answers == states.labels)[:, None] & ~right).float()
        found = certify(
            scores, losses, max_loss=self.target, confidence=self.confidence, criterion=self.criterion
        )
        layers = (
            torch.full((len(scores),), depth) if found is None else choose_exit_layer(scores, found.threshold)
        )
        possible = found is not None or all(has_exit)  # else not even its last layer keeps the goal
        spent = self.times.at_layers(has_exit)[layers - 1]
        return SubsetPoint(
            exit_layers,
            None if found is None else found.threshold,
            float(layers.double().mean()),
            float(spent.mean()) if possible else math.inf,
            int(losses.gather(1, layers[:, None] - 1).sum()),
        )


def _pooled(states: LayerStates) -> Tensor:
    if states.pooled is None:
        raise AssertionError("the states were not kept")
    return states.pooled


def time_choice(
    saved: LoadedClassifier,
    choice: ExitChoice,
    rows: TextDataset,
    *,
    criterion: str | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    labelled: bool = False,
    backend: str = "torch",
    repeats: int = TIMED_REPEATS,
    progress: bool = False,
) -> ExitChoice:
    """Time all exits, the chosen ones and full depth in turn, on rows that had no part in the choice.

    Args:
        saved: the model.
        choice: its thresholds are used, each set of exits with its own.
        rows: as many as `TIMED_ROWS` of them are timed; agreement and accuracy are of all.
        criterion: None takes the saved one.
        batch_sizes: inputs that start together.
        labelled: whether the rows have labels.
        backend: of the engines.
        repeats: timed repetitions.
        progress: whether to show how far it is.
    """
    encoded, _ = encode_texts(rows.texts, saved.tokenizer, saved.max_length)
    part = encoded[:TIMED_ROWS]
    rule = criterion or saved.early_exit_model.config.criterion
    engines = [
        Engine(with_exit_layers(saved, layers), backend=backend) for layers in (None, choice.exit_layers)
    ]
    runs = {
        "full depth": (engines[0], NOBODY_EXITS),
        "all exits": (engines[0], _rule_at(choice.steps[0], rule)),
        "chosen exits": (engines[1], _rule_at(choice.steps[-1], rule)),
    }
    answers = {
        name: engine.run(encoded, batch_size=batch_sizes[0], rule=how) for name, (engine, how) in runs.items()
    }
    labels = np.array([class_columns(saved, rows.label_names)[label] for label in rows.labels])
    found: list[TimedPoint] = []
    for size in batch_sizes:
        work = {
            name: [partial(engine.run, part, batch_size=size, rule=how)]
            for name, (engine, how) in runs.items()
        }
        with show_progress(
            f"timing batches of {size}", 3 * (repeats + 1), unit="run", shown=progress
        ) as shower:
            seconds = time_in_turn(work, engines[0].backend.device, repeats, shower.update)
        for name, given in answers.items():
            predicted = np.array(given.labels)
            found.append(
                TimedPoint(
                    name,
                    size,
                    1000 * median_seconds(seconds[name]) / len(part),
                    float(np.mean(given.exit_layers)),
                    float((predicted == np.array(answers["full depth"].labels)).mean()),
                    float((predicted == labels).mean()) if labelled else None,
                )
            )
    return replace(choice, timed=tuple(found))


def _rule_at(point: SubsetPoint, criterion: str) -> ExitRule:
    """The rule of some exits; where no threshold keeps the goal, all layers."""
    if point.threshold is None:
        return NOBODY_EXITS
    return ExitRule(criterion, point.threshold)


def choice_lines(choice: ExitChoice) -> list[str]:
    """What was found, a step a line, and a table of what was timed."""
    times, depth = choice.times, choice.times.num_hidden_layers
    lines = [
        f"At batches of {times.batch_size} an input costs {times.layer_ms:.3f} ms a layer, {times.exit_ms:.3f} ms an "
        f"exit here; {times.full_depth_ms:.2f} ms without early exits."
    ]
    before: tuple[int, ...] | None = None
    for point in choice.steps:
        what = (
            f"{len(point.exit_layers)} exits" if before is None else f"without layer {_gone(before, point)}"
        )
        lines.append(
            f"{what}: {point.milliseconds:.2f} ms expected, {depth / point.mean_exit_layer:.2f}x fewer layers"
        )
        before = point.exit_layers
    lines.append(f"Layers that keep an exit: {', '.join(map(str, choice.exit_layers))}.")
    if choice.timed:
        lines += [
            "",
            "| exits | batch | ms an input | mean exit layer | agreement | accuracy |",
            "|---|---|---|---|---|---|",
        ]
    for timed in choice.timed:
        accuracy = "" if timed.accuracy is None else f"{100 * timed.accuracy:.2f} %"
        lines.append(
            f"| {timed.name} | {timed.batch_size} | {timed.milliseconds:.2f} | {timed.mean_exit_layer:.2f} | "
            f"{100 * timed.agreement:.2f} % | {accuracy} |"
        )
    return lines


def _gone(before: tuple[int, ...], point: SubsetPoint) -> int:
    return next(layer for layer in before if layer not in point.exit_layers)
