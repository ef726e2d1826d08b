"""What a layer and an exit cost on this machine: exits in milliseconds instead of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.results import AgreementEvaluation, Clock, Evaluation
from consistentee.evaluation.speed import median_seconds
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.timing import time_in_turn
from consistentee.models.exit_subsets import with_exit_layers
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import Engine
from consistentee.progress import show_progress

TIMED_REPEATS = 5

TIMED_ROWS = 128
"""Rows at most on which layers and exits are timed."""


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one input among others of its batch.

    Args:
        batch_size: inputs that start together.
        start_ms: before the first layer, and after the last.
        layer_ms: of a layer.
        exit_ms: of an exit: its classifier, its score and the decision.
        num_hidden_layers: of the model.
    """

    batch_size: int
    start_ms: float
    layer_ms: float
    exit_ms: float
    num_hidden_layers: int

    def at_layers(self, has_exit: Sequence[bool] | None = None) -> Tensor:
        """Milliseconds of an input that exits at each layer, (layers,) float64.

        Args:
            has_exit: (layers,), which layers have an exit; None: all. Every input passes those before its own, and its
                own is paid for at the last layer as at any other.
        """
        layers = torch.arange(1, self.num_hidden_layers + 1, dtype=torch.float64)
        exits = layers if has_exit is None else torch.tensor(has_exit, dtype=torch.float64).cumsum(0)
        return self.start_ms + self.layer_ms * layers + self.exit_ms * exits

    @property
    def full_depth_ms(self) -> float:
        """Of an input of a model that has no exit but at its last layer."""
        return self.start_ms + self.layer_ms * self.num_hidden_layers + self.exit_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"full_depth_ms": self.full_depth_ms}


def measure_layer_times(
    engine: Engine,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    criterion: str = "policy",
    repeats: int = TIMED_REPEATS,
    tick: Callable[[], object] = lambda: None,
) -> LayerTimes:
    """Time an engine on rows that all exit at the first exit, at the last layer, and at the last layer without exits.

    The three run in turn; from their medians follow a layer, an exit, and the rest. An exit that is lost in the noise
    costs nothing.

    Args:
        engine: of a model with exits on all layers.
        rows: tokenized, whole batches of them count.
        batch_size: inputs that start together.
        criterion: by whose scores it is decided who exits.
        repeats: timed repetitions.
        tick: called after every pass.

    Raises:
        ValueError: there are fewer rows than one batch, or the model has one layer.
    """
    depth = engine.backend.num_layers
    count = len(rows) // batch_size * batch_size
    if not count or depth < 2:
        raise ValueError(
            f"There must be at least one batch of {batch_size} rows and two layers to measure, got {len(rows)} rows "
            f"and {depth} layers."
        )
    used = sorted(rows, key=lambda row: len(row["input_ids"]))[:count]
    batches = [used[start : start + batch_size] for start in range(0, count, batch_size)]

    def steps(rule: ExitRule) -> list[Callable[[], object]]:
        return [partial(engine.run, batch, batch_size=batch_size, rule=rule) for batch in batches]

    work = {
        "first": steps(ExitRule.fixed([1] * batch_size, criterion)),
        "last": steps(ExitRule.fixed([depth] * batch_size, criterion)),
        "without": steps(ExitRule.full_depth()),
    }
    with torch.inference_mode():
        seconds = time_in_turn(work, engine.backend.device, repeats, tick)
    first, last, without = (1000 * median_seconds(seconds[name]) / count for name in work)
    both = max(0.0, last - first) / (depth - 1)
    exit_ms = min(both, max(0.0, last - without) / (depth - 1))
    return LayerTimes(batch_size, max(0.0, first - both), both - exit_ms, exit_ms, depth)


def times_on(
    saved: LoadedClassifier,
    texts: Sequence[tuple[str, ...]],
    *,
    batch_size: int,
    criterion: str | None = None,
    backend: str = "torch",
    progress: bool = False,
) -> LayerTimes:
    """What a layer and an exit of a model cost here, timed on the first of some texts.

    Args:
        saved: a model with exits, on all layers or on some.
        texts: `TIMED_ROWS` of them, or one batch where that is more.
        batch_size: inputs that start together.
        criterion: by whose scores it is decided who exits; None takes the saved one.
        backend: of the engine.
        progress: whether to show how far it is.

    Raises:
        ValueError: as of `measure_layer_times`.
    """
    whole = with_exit_layers(saved, None)
    encoded, _ = encode_texts(texts[: max(TIMED_ROWS, batch_size)], whole.tokenizer, whole.max_length)
    title, passes = "timing layers and exits", 3 * (TIMED_REPEATS + 1)
    with show_progress(title, passes, unit="run", shown=progress) as shower:
        return measure_layer_times(
            Engine(whole, backend=backend),
            encoded,
            batch_size=batch_size,
            criterion=criterion or whole.early_exit_model.config.criterion,
            tick=shower.update,
        )


def clock_of(
    evaluation: Evaluation | AgreementEvaluation,
    times: LayerTimes,
    exit_scores: Callable[[str], Tensor],
    has_exit: Sequence[bool],
) -> Clock:
    """An evaluation's points in milliseconds.

    Args:
        evaluation: of a classifier.
        times: what layers and exits cost, by the criterion that is reported; exits by others are taken to cost as much.
        exit_scores: gives the scores, (rows, layers), of a criterion on the rows that were evaluated.
        has_exit: (layers,), which layers of the model have an exit.
    """
    at_layers = times.at_layers(has_exit)
    curves = {evaluation.criterion: evaluation.curve}
    curves |= {name: other.curve for name, other in evaluation.other_criteria.items()}
    scores = {name: exit_scores(name) for name in curves}

    def spent(name: str, threshold: float) -> float:
        return float(at_layers[choose_exit_layer(scores[name], threshold) - 1].mean())

    return Clock(
        times.batch_size,
        times.start_ms,
        times.layer_ms,
        times.exit_ms,
        times.full_depth_ms,
        spent(evaluation.criterion, evaluation.threshold),
        {
            name: spent(name, other.threshold)
            for name, other in evaluation.other_criteria.items()
            if other.threshold is not None
        },
        {name: [spent(name, point.threshold) for point in curve] for name, curve in curves.items()},
    )
