"""Rows on their way through the layers: who exits where, and how the rest stay together.

An *active batch* is a batch between two layers with what its rows bring along. It passes a layer, rows that exit are
written down, the rest close up; in throughput mode neighbouring batches that have become small are merged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.backend import Answers, Backend, TokenRow
from consistentee.inference.encoder.incremental_scores import (
    ExitHistory,
    IncrementalExitScores,
    labels_and_scores,
)
from consistentee.inference.modes import inference_only

AHEAD = {"cpu": 0, "cuda": 1}
"""Batches submitted before the host asks who exits from an earlier one: on a GPU it decides about one while the device
computes the next. Nothing is computed in vain."""

SPLIT_TOKENS = 16384
"""Latency mode on a GPU: a batch of so many tokens goes as two halves, so that there is a next one to compute."""

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Throughput mode: tokens that go through a layer together. More hardly helps and falls out of the caches."""


@dataclass(frozen=True)
class ExitRule:
    """When rows exit.

    Args:
        criterion: one of `criteria.CRITERIA`; None: nothing exits before the last layer.
        threshold: a row exits at the first layer whose exit score exceeds it.
        exit_layers: exit there instead, 1-based, one for each row of a run: to study speed. The criterion is still
            computed, so that the cost is real.
    """

    criterion: str | None
    threshold: float = 0.0
    exit_layers: tuple[int, ...] | None = None

    @classmethod
    def full_depth(cls) -> ExitRule:
        """All layers for all rows; no classifier but the last is computed."""
        return cls(None)

    @classmethod
    def fixed(cls, exit_layers: Sequence[int], criterion: str = "policy") -> ExitRule:
        """Every row exits where it is told to; the criterion is computed all the same."""
        return cls(criterion, exit_layers=tuple(exit_layers))

    def never_exits(self, num_layers: int) -> bool:
        """Whether no score can exceed the threshold before the last layer."""
        if self.criterion is None or self.exit_layers is not None:
            return self.criterion is None
        return EXIT_CRITERIA[self.criterion].thresholds.lets_nobody_exit(self.threshold, num_layers)

    def check(self, rows: int, num_layers: int) -> None:
        """Raise unless fixed exit layers fit the rows and the model.

        Raises:
            ValueError: they are not one for each row, or not among the layers.
        """
        if self.exit_layers is None:
            return
        if len(self.exit_layers) != rows:
            raise ValueError(
                f"exit_layers must be one for each of {rows} rows, got {len(self.exit_layers)} of them."
            )
        wrong = next((layer for layer in self.exit_layers if not 1 <= layer <= num_layers), None)
        if wrong is not None:
            raise ValueError(f"exit_layers must be in [1, {num_layers}], got {wrong}.")


@dataclass
class ActiveBatch:
    """Rows between two layers.

    Args:
        batch: the backend's.
        rows: which of the run's rows they are.
        history: what their exit scores carry along.
    """

    batch: Any
    rows: list[int]
    history: ExitHistory


class HostCopy:
    """Values on their way to the host; on a GPU the copy runs behind the kernels launched before it."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def wait(self) -> NDArray[np.float32]:
        """The values, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy()


@inference_only
def run_rows(
    backend: Backend[Any],
    rows: Sequence[TokenRow],
    *,
    batch_size: int | None,
    rule: ExitRule,
    exit_scores: IncrementalExitScores | None,
    num_classes: int,
) -> Answers:
    """Answers for tokenized rows.

    Args:
        backend: runs the layers.
        rows: what `encode_texts` gives, none longer than the model's positions.
        batch_size: rows that start together (latency mode); None: throughput mode, all rows one window.
        rule: when they exit.
        exit_scores: of the rule's criterion; None: all layers for all rows.
        num_classes: classes of the model.

    Raises:
        ValueError: fixed exit layers that do not fit.
    """
    rule.check(len(rows), backend.num_layers)
    run = _Run(backend, rows, rule, exit_scores, num_classes)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    if batch_size is None:
        run.move(run.token_batches(order), pooled=True)
    else:
        for start in range(0, len(order), batch_size):
            run.move(run.halves(order[start : start + batch_size]), pooled=False)
    return Answers(run.labels, run.scores, run.exit_layers, run.real_tokens, run.computed_tokens)


@dataclass
class _Run:
    """One call: its input, and the answers as they come in."""

    backend: Backend[Any]
    inputs: Sequence[TokenRow]
    rule: ExitRule
    exit_scores: IncrementalExitScores | None
    num_classes: int
    labels: list[int] = field(init=False)
    scores: list[float] = field(init=False)
    exit_layers: list[int] = field(init=False)
    real_tokens: int = 0
    computed_tokens: int = 0

    def __post_init__(self) -> None:
        count = len(self.inputs)
        self.labels, self.scores, self.exit_layers = [0] * count, [0.0] * count, [0] * count
        device = "cuda" if self.backend.device.type == "cuda" else "cpu"
        self.most_tokens, self.ahead = BATCH_TOKENS[device], AHEAD[device]
        self.with_pooled = self.exit_scores is not None and self.exit_scores.reads_pooled

    def token_batches(self, order: Sequence[int]) -> list[list[int]]:
        """Rows in batches of at most `BATCH_TOKENS` tokens, or of one row."""
        batches: list[list[int]] = []
        tokens = 0
        for row in order:
            length = len(self.inputs[row]["input_ids"])
            if not batches or tokens + length > self.most_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(row)
            tokens += length
        return batches

    def halves(self, batch: list[int]) -> list[list[int]]:
        """A batch of latency mode in the parts it goes in: one, or two where the host works beside the device."""
        tokens = sum(len(self.inputs[row]["input_ids"]) for row in batch)
        if not self.ahead or self.exit_scores is None or tokens < SPLIT_TOKENS or len(batch) < 2:
            return [batch]
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]

    def move(self, parts: Sequence[list[int]], *, pooled: bool) -> None:
        """Take some batches through the model, layer by layer, until the last row has exited."""
        if self.exit_scores is None:
            for part in parts:
                self._run_through(part)
            return
        batches: Iterable[ActiveBatch] = [self._start(part, self.exit_scores) for part in parts]
        for layer_index in range(self.backend.num_layers):
            batches = self._layer(batches, layer_index, self.exit_scores, pooled=pooled)
            if not self.ahead:  # one layer for all, then the next: its weights stay in the caches
                batches = list(batches)
        for _ in batches:
            raise AssertionError("after the last layer no row is left")

    def _layer(
        self,
        batches: Iterable[ActiveBatch],
        layer_index: int,
        exit_scores: IncrementalExitScores,
        *,
        pooled: bool,
    ) -> Iterator[ActiveBatch]:
        """Take batches past one layer; gives those of which rows are left, in their order."""
        submitted: deque[tuple[ActiveBatch, HostCopy]] = deque()
        if not exit_scores.has_exit(layer_index):
            yield from (self._skip(active, layer_index, exit_scores) for active in batches)
            return
        for active in self._join(batches) if pooled else batches:
            submitted.append(self._submit(active, layer_index))
            if len(submitted) > self.ahead:
                yield from self._collect(*submitted.popleft(), layer_index, exit_scores)
        while submitted:
            yield from self._collect(*submitted.popleft(), layer_index, exit_scores)

    def _run_through(self, part: list[int]) -> None:
        """All layers for some rows, and the last classifier."""
        backend = self.backend
        batch = backend.run_all_layers(backend.start([self.inputs[row] for row in part]))
        self.real_tokens += backend.num_layers * sum(backend.lengths(batch))
        self.computed_tokens += backend.num_layers * backend.computed_tokens(batch)
        last = backend.num_layers - 1
        exit_features = backend.classify(last, batch)
        self._write(part, exit_features[:, : self.num_classes].cpu().numpy(), last)

    def _start(self, part: list[int], exit_scores: IncrementalExitScores) -> ActiveBatch:
        batch = self.backend.start([self.inputs[row] for row in part])
        return ActiveBatch(batch, part, exit_scores.begin(len(part)))

    def _skip(self, active: ActiveBatch, layer_index: int, exit_scores: IncrementalExitScores) -> ActiveBatch:
        """Take a batch past a layer that has no exit."""
        batch = self.backend.run_layer(layer_index, active.batch)
        self._count(batch)
        exit_scores.skip(active.history)
        return ActiveBatch(batch, active.rows, active.history)

    def _count(self, batch: Any) -> None:
        self.real_tokens += sum(self.backend.lengths(batch))
        self.computed_tokens += self.backend.computed_tokens(batch)

    def _submit(self, active: ActiveBatch, layer_index: int) -> tuple[ActiveBatch, HostCopy]:
        """Start one layer and its classifier; does not wait for a GPU."""
        backend = self.backend
        batch, exit_features = backend.pass_layer(layer_index, active.batch, with_pooled=self.with_pooled)
        self._count(batch)
        return ActiveBatch(batch, active.rows, active.history), HostCopy(exit_features)

    def _collect(
        self,
        active: ActiveBatch,
        exit_features: HostCopy,
        layer_index: int,
        exit_scores: IncrementalExitScores,
    ) -> Iterator[ActiveBatch]:
        """Write down who exits after a layer, and give the rest, if there is one."""
        scores = exit_scores.step(active.history, exit_features.wait())
        exits = self._exits(active.rows, scores, layer_index)
        if not exits.any():
            yield active
            return
        exiting, stay = np.flatnonzero(exits).tolist(), np.flatnonzero(~exits).tolist()
        self._write([active.rows[p] for p in exiting], active.history.prediction_logits[exiting], layer_index)
        if stay:
            rows = [active.rows[position] for position in stay]
            yield ActiveBatch(self.backend.select(active.batch, stay), rows, active.history.select(stay))

    def _exits(self, rows: Sequence[int], scores: NDArray[np.float32], layer_index: int) -> NDArray[np.bool_]:
        """Which rows exit here, (rows,)."""
        if layer_index == self.backend.num_layers - 1:
            return np.ones(len(rows), dtype=np.bool_)
        if self.rule.exit_layers is not None:
            return np.array([self.rule.exit_layers[row] == layer_index + 1 for row in rows], dtype=np.bool_)
        return scores > self.rule.threshold

    def _write(self, rows: Sequence[int], logits: NDArray[np.float32], layer_index: int) -> None:
        """Note label, score and exit layer of rows that exit, by their logits (rows, classes)."""
        labels, scores = labels_and_scores(logits, [layer_index + 1] * len(rows))
        for row, label, score in zip(rows, labels.tolist(), scores.tolist(), strict=True):
            self.labels[row], self.scores[row], self.exit_layers[row] = label, score, layer_index + 1

    def _join(self, batches: Iterable[ActiveBatch]) -> Iterator[ActiveBatch]:
        """Join neighbours as long as together they are no larger than one batch."""
        group: list[ActiveBatch] = []
        tokens = 0
        for active in batches:
            size = sum(self.backend.lengths(active.batch))
            fits = tokens + size <= self.most_tokens
            if group and not (fits and self.backend.can_merge(group[-1].batch, active.batch)):
                yield self._merged(group)
                group, tokens = [], 0
            group.append(active)
            tokens += size
        if group:
            yield self._merged(group)

    def _merged(self, batches: Sequence[ActiveBatch]) -> ActiveBatch:
        if len(batches) == 1:
            return batches[0]
        batch = self.backend.merge([active.batch for active in batches])
        rows = [row for active in batches for row in active.rows]
        return ActiveBatch(batch, rows, ExitHistory.merge([active.history for active in batches]))
