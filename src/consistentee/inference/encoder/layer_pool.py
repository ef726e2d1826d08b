"""Rows that arrive at any time, each with its own threshold: what serves requests while others are on their way.

The pool holds rows before every layer. A *step* takes the rows of one layer past it, as many as fit into a batch; who
exits is answered at once, the rest wait for the next layer, where later arrivals may catch up with them. So whoever
exits early is answered early, batches of deep layers are filled with what is left of many requests, and a new row need
not wait until those before it are through.

**Which layer.** The one with the most rows that fit into a batch; of equals the shallowest. A step costs much before it
has any rows, so newcomers wait at the first layer until they are many or nothing else is left to do. Under
load more rows pass a step, and the last ones come sooner than with the shallowest layer first. So that none waits for
ever, a row that has been in the pool for `patience` steps goes first, with all that stand beside it.

A row may go on after it is answered (`to_the_end`), to learn what full depth says; nobody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from consistentee.inference.encoder.backend import Backend, TokenRow
from consistentee.inference.encoder.incremental_scores import ExitHistory, IncrementalExitScores
from consistentee.inference.encoder.scheduler import BATCH_TOKENS
from consistentee.inference.memory import give_back_memory
from consistentee.inference.modes import inference_only

PATIENCE = 4
"""Steps a row waits at most before it goes first, in times the number of layers."""

GIVE_BACK_STEPS = 64
"""After so many steps free memory goes back to the system: a request that comes alone does not wait for that."""

BATCHES_INSIDE = 8
"""Rows of so many whole batches are between layers at most; the others wait as token ids."""


@dataclass(frozen=True)
class PoolRow:
    """A row that goes into a pool.

    Args:
        key: names it in answers; no two rows inside may have the same.
        tokens: what `encode_texts` gives.
        threshold: it exits at the first layer whose exit score exceeds it.
        to_the_end: whether it goes on to the last layer after it was answered.
    """

    key: Hashable
    tokens: TokenRow
    threshold: float
    to_the_end: bool = False


@dataclass(frozen=True)
class PoolAnswer:
    """What came of a row.

    Args:
        key: of the row.
        logits: (classes,) float32, of its prediction there.
        exit_layer: from 1; of a row that went on, the last layer.
        went_on: whether it was answered before, and this is what full depth says.
    """

    key: Hashable
    logits: NDArray[np.float32]
    exit_layer: int
    went_on: bool = False


class Pool(Protocol):
    """What a service asks of it: `LayerPool`, or something that is compared with it."""

    def add(self, rows: Sequence[PoolRow], exit_scores: IncrementalExitScores | None) -> None:
        """Take rows in, which exit by these scores; None: all layers for all of them."""
        ...

    def step(self) -> tuple[list[PoolAnswer], int]:
        """Compute for a while: who was answered, and how many rows were computed."""
        ...

    def drop(self, keys: Collection[Hashable]) -> None:
        """Forget rows that nobody waits for any more."""
        ...

    def __len__(self) -> int: ...


@dataclass
class _Inside:
    """A batch between two layers, (rows,) each: what they are, their thresholds, who is answered, since which step."""

    batch: Any
    rows: list[PoolRow]
    history: ExitHistory | None
    thresholds: NDArray[np.float32]
    answered: NDArray[np.bool_]
    since: NDArray[np.int64]

    def select(self, backend: Backend[Any], kept: NDArray[np.int64]) -> _Inside:
        index = kept.tolist()
        return _Inside(
            backend.select(self.batch, index),
            [self.rows[row] for row in index],
            None if self.history is None else self.history.select(index),
            self.thresholds[kept],
            self.answered[kept],
            self.since[kept],
        )


@dataclass
class _Line:
    """Rows under one criterion: those that wait as tokens, and those before each layer, (layers,) lists of batches."""

    exit_scores: IncrementalExitScores | None
    waiting: deque[tuple[PoolRow, int]]
    inside: list[list[_Inside]]


class LayerPool:
    """Rows between the layers of one model; see the module. For one thread at a time.

    Args:
        backend: runs the layers.
        num_classes: classes of the model.
        most_tokens: of one batch; None takes what is fastest on the device.
        patience: steps after which a row goes first; None takes `PATIENCE` times the layers.
    """

    def __init__(
        self,
        backend: Backend[Any],
        num_classes: int,
        *,
        most_tokens: int | None = None,
        patience: int | None = None,
    ) -> None:
        device = "cuda" if backend.device.type == "cuda" else "cpu"
        self._backend, self._classes = backend, num_classes
        self._most_tokens = most_tokens or BATCH_TOKENS[device]
        self._patience = PATIENCE * backend.num_layers if patience is None else patience
        self._lines: dict[int, _Line] = {}
        self._steps = self._tokens_inside = 0
        self._dropped: set[Hashable] = set()
        self._keys: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, rows: Sequence[PoolRow], exit_scores: IncrementalExitScores | None) -> None:
        """Take rows in, behind those that wait."""
        line = self._lines.setdefault(
            id(exit_scores), _Line(exit_scores, deque(), [[] for _ in range(self._backend.num_layers)])
        )
        line.waiting.extend((row, self._steps) for row in rows)
        self._keys.update(row.key for row in rows)

    def drop(self, keys: Collection[Hashable]) -> None:
        """Forget rows: they are taken out before the next layer that they would pass."""
        self._dropped.update(key for key in keys if key in self._keys)

    @inference_only
    def step(self) -> tuple[list[PoolAnswer], int]:
        """Take the rows of one layer past it; nothing where there is none.

        Returns:
            Who was answered, and how many rows passed.
        """
        chosen = self._choose()
        if chosen is None:
            return [], 0
        line, layer_index = chosen
        active = self._take(line, layer_index)
        self._steps += 1
        if self._steps % GIVE_BACK_STEPS == 0:
            give_back_memory()
        if active is None:
            return [], 0
        return self._pass(line, layer_index, active), len(active.rows)

    def _choose(self) -> tuple[_Line, int] | None:
        """The line and layer whose rows go next."""
        fullest: tuple[tuple[int, int, int], _Line] | None = None
        oldest: tuple[int, int, _Line] | None = None
        room = self._tokens_inside < BATCHES_INSIDE * self._most_tokens
        for line in self._lines.values():
            for layer_index, count, since in self._waiting(line, room):
                order = -count, layer_index, since
                if fullest is None or order < fullest[0]:
                    fullest = order, line
                if oldest is None or (since, -layer_index) < (oldest[0], -oldest[1]):
                    oldest = since, layer_index, line
        if fullest is None:
            return None
        if oldest is not None and self._steps - oldest[0] > self._patience:
            return oldest[2], oldest[1]
        return fullest[1], fullest[0][1]

    def _waiting(self, line: _Line, room: bool) -> Iterator[tuple[int, int, int]]:
        """Layers before which rows of a line stand: how many fit into a batch, and since which step the oldest is here.

        Nobody waits for rows that are answered: they count for nothing and are as young as can be.
        """
        if line.waiting and room:
            lengths = (len(row.tokens["input_ids"]) for row, _ in line.waiting)
            yield 0, self._fitting(lengths), line.waiting[0][1]
        for layer_index, batches in enumerate(line.inside):
            if batches:
                lengths = (
                    length
                    for active in batches
                    for length, is_answered in zip(
                        self._backend.lengths(active.batch), active.answered.tolist(), strict=True
                    )
                    if not is_answered
                )
                since = min(
                    int(np.where(active.answered, self._steps, active.since).min()) for active in batches
                )
                yield layer_index, self._fitting(lengths), since

    def _fitting(self, lengths: Iterable[int]) -> int:
        """How many of the first rows fit into a batch."""
        tokens = count = 0
        for length in lengths:
            tokens += length
            if count and tokens > self._most_tokens:
                break
            count += 1
        return count

    def _take(self, line: _Line, layer_index: int) -> _Inside | None:
        """The rows that pass a layer together, as many as fit; None where all of them were dropped."""
        if layer_index == 0:
            return self._start(line)
        batches = line.inside[layer_index]
        tokens = sum(self._backend.lengths(batches[0].batch))
        found = [batches.pop(0)]
        while batches:
            tokens += sum(self._backend.lengths(batches[0].batch))
            if tokens > self._most_tokens or not self._backend.can_merge(found[0].batch, batches[0].batch):
                break
            found.append(batches.pop(0))
        return self._without_dropped(self._merged(found))

    def _start(self, line: _Line) -> _Inside | None:
        """A batch of rows that wait, oldest first; None where all of them were dropped."""
        rows: list[tuple[PoolRow, int]] = []
        tokens = 0
        while line.waiting:
            row, since = line.waiting[0]
            size = len(row.tokens["input_ids"])
            if row.key in self._dropped:
                line.waiting.popleft()
                self._forget(row.key)
                continue
            if rows and tokens + size > self._most_tokens:
                break
            line.waiting.popleft()
            rows.append((row, since))
            tokens += size
        if not rows:
            return None
        self._tokens_inside += tokens
        entered = [row for row, _ in rows]
        return _Inside(
            self._backend.start([row.tokens for row in entered]),
            entered,
            None if line.exit_scores is None else line.exit_scores.begin(len(entered)),
            np.array([row.threshold for row in entered], dtype=np.float32),
            np.zeros(len(entered), dtype=np.bool_),
            np.array([since for _, since in rows], dtype=np.int64),
        )

    def _merged(self, parts: list[_Inside]) -> _Inside:
        if len(parts) == 1:
            return parts[0]
        histories = [part.history for part in parts if part.history is not None]
        return _Inside(
            self._backend.merge([part.batch for part in parts]),
            [row for part in parts for row in part.rows],
            ExitHistory.merge(histories) if histories else None,
            np.concatenate([part.thresholds for part in parts]),
            np.concatenate([part.answered for part in parts]),
            np.concatenate([part.since for part in parts]),
        )

    def _without_dropped(self, active: _Inside) -> _Inside | None:
        if not self._dropped:
            return active
        gone = np.array([row.key in self._dropped for row in active.rows])
        if not gone.any():
            return active
        self._leave([row for row, is_gone in zip(active.rows, gone, strict=True) if is_gone])
        return None if gone.all() else active.select(self._backend, np.flatnonzero(~gone))

    def _pass(self, line: _Line, layer_index: int, active: _Inside) -> list[PoolAnswer]:
        """Take a batch past a layer, and answer who exits."""
        backend, is_last = self._backend, layer_index == self._backend.num_layers - 1
        logits = np.zeros((0, self._classes), dtype=np.float32)
        exits = np.full(len(active.rows), is_last)
        if line.exit_scores is None or active.history is None:
            active.batch = backend.run_layer(layer_index, active.batch)
            if is_last:
                logits = backend.classify(layer_index, active.batch)[:, : self._classes].cpu().numpy()
        elif not line.exit_scores.has_exit(layer_index):
            active.batch = backend.run_layer(layer_index, active.batch)
            line.exit_scores.skip(active.history)
        else:
            active.batch, features = backend.pass_layer(
                layer_index, active.batch, with_pooled=line.exit_scores.reads_pooled
            )
            scores = line.exit_scores.step(active.history, features.cpu().numpy())
            exits |= scores > active.thresholds
            logits = active.history.prediction_logits
        answers: list[PoolAnswer] = []
        goes_on = np.zeros(len(active.rows), dtype=np.bool_)
        for row in np.flatnonzero(exits).tolist():
            asked = active.rows[row]
            if is_last or not active.answered[row]:
                layer = layer_index + 1
                if not active.answered[row]:
                    answers.append(PoolAnswer(asked.key, logits[row].copy(), layer))
                if is_last and asked.to_the_end:
                    answers.append(PoolAnswer(asked.key, logits[row].copy(), layer, went_on=True))
            active.answered[row] = True
            goes_on[row] = asked.to_the_end and not is_last
        stay = ~exits | goes_on
        self._leave([row for row, stays in zip(active.rows, stay, strict=True) if not stays])
        if stay.all():
            line.inside[layer_index + 1].append(active)
        elif stay.any():
            line.inside[layer_index + 1].append(active.select(backend, np.flatnonzero(stay)))
        return answers

    def _leave(self, rows: Sequence[PoolRow]) -> None:
        for row in rows:
            self._tokens_inside -= len(row.tokens["input_ids"])
            self._forget(row.key)

    def _forget(self, key: Hashable) -> None:
        self._keys.discard(key)
        self._dropped.discard(key)
