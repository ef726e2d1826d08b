"""Rows whose layers are run once: states of a frozen backbone, a chunk of rows at a time in memory.

Rows are shuffled and cut into chunks whose states fit. A chunk is run through the backbone, learnt from several times
over, and forgotten; the next one takes its memory. So memory does not grow with the rows, and the backbone runs once
for each, or twice for a chunk that an interruption fell into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from consistentee.backbones import encoders
from consistentee.data.batches import LengthGroupedBatches
from consistentee.data.spooled import SpooledRows
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification

RUN_AT_ONCE = 64  # rows
HIGHEST = 65504.0  # of float16


class CachedStates:
    """States of all layers but the last, and the last one's logits, of rows that are asked for; see above.

    Args:
        model: with a frozen backbone and its own head.
        rows: tokenized.
        collate: makes a padded batch of tokenized items.
        memory_mb: what a chunk's states may take.
        passes: how often a chunk is learnt from.
        batch_size, seed: of the batches.
        precision: `bf16` runs the backbone so; else as its weights are.

    An item is a dict of `states` (tokens, layers - 1, hidden) float16, `labels` (classes,) float32, the model's own
    logits, and `index`.
    """

    def __init__(
        self,
        model: EarlyExitForSequenceClassification,
        rows: SpooledRows,
        *,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        memory_mb: float,
        passes: int,
        batch_size: int,
        seed: int,
        precision: str = "no",
    ) -> None:
        self._model, self._rows, self._collate, self._precision = model, rows, collate, precision
        self.lengths, self.num_truncated = rows.lengths, rows.num_truncated
        exits, hidden = model.num_layers - 1, model.config.hidden_size
        most = max(int(memory_mb * 1e6 / (2 * exits * hidden)), int(self.lengths.max()))  # tokens
        order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
        self.chunks = chunks_of(order, self.lengths, most)
        largest = max(int(self.lengths[chunk].sum()) for chunk in self.chunks)
        self._states = torch.empty(largest, exits, hidden, dtype=torch.float16)
        self._logits = torch.empty(max(map(len, self.chunks)), model.config.num_classes)
        self._chunk_of = np.empty(len(rows), np.int64)
        self._place = np.empty(len(rows), np.int64)  # in its chunk
        self._start = np.empty(len(rows), np.int64)  # of its tokens there
        for number, chunk in enumerate(self.chunks):
            self._chunk_of[chunk], self._place[chunk] = number, np.arange(len(chunk))
            self._start[chunk] = np.cumsum(self.lengths[chunk]) - self.lengths[chunk]
        self._loaded: int | None = None
        self.batches = ChunkedBatches(self.chunks, self.lengths, batch_size, passes=passes, seed=seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._loaded != self._chunk_of[index]:
            self._load(int(self._chunk_of[index]))
        start = int(self._start[index])
        return {
            "states": self._states[start : start + int(self.lengths[index])],
            "labels": self._logits[int(self._place[index])],
            "index": index,
        }

    @torch.no_grad()
    def _load(self, number: int) -> None:
        """Run a chunk through the backbone, rows of similar length together."""
        model, device = self._model, self._model.device
        was_training = model.training
        model.eval()
        chunk = self.chunks[number]
        chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
        for start in range(0, len(chunk), RUN_AT_ONCE):
            part = chunk[start : start + RUN_AT_ONCE].tolist()
            batch = self._collate([self._rows[row] for row in part])
            inputs = [batch[name].to(device) for name in INPUTS if name in batch]
            kept: list[Tensor] = []
            with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                state = encoders.embed(model.backbone, *inputs)
                for index in range(model.num_layers):
                    state = encoders.run_layer(model.backbone, index, state)
                    kept.append(state.hidden_states)
                logits = model.classifiers(model.num_layers - 1, kept.pop(), state.attention_mask)[1]
            states = torch.stack(kept, dim=2)  # (rows, tokens, layers - 1, hidden)
            states = states.clamp(-HIGHEST, HIGHEST).to(self._states.dtype).cpu()
            self._logits[self._place[part]] = logits.float().cpu()
            for place, row in enumerate(part):
                length, first = int(self.lengths[row]), int(self._start[row])
                self._states[first : first + length] = states[place, :length]
        self._loaded = number
        model.train(was_training)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def collate_states(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of `CachedStates`' items, padded on the right.

    Returns:
        `states` (rows, tokens, layers - 1, hidden) float32, `attention_mask` (rows, tokens) int64, `labels` (rows,
        classes) float32.
    """
    states = [item["states"] for item in items]
    mask = [torch.ones(len(state), dtype=torch.int64) for state in states]
    return {
        "states": pad_sequence(states, batch_first=True).float(),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": torch.stack([item["labels"] for item in items]),
    }


class ExitsOnStates(nn.Module):
    """A model's classifiers but the last, on states that are there already.

    Args:
        model: whose; they are shared.
    """

    def __init__(self, model: EarlyExitForSequenceClassification) -> None:
        super().__init__()
        self.classifiers = model.classifiers

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (rows, layers - 1, classes) of states (rows, tokens, layers - 1, hidden)."""
        columns = [
            self.classifiers(index, layer, attention_mask)[1] for index, layer in enumerate(states.unbind(2))
        ]
        return torch.stack(columns, dim=1).float()


class ChunkedBatches:
    """Batches of rows, all passes over one chunk before the next; one epoch is all of it.

    Args:
        chunks: rows of each.
        lengths: (rows,) tokens.
        batch_size: rows of a batch.
        passes: over each chunk, each with its own order.
        seed: of the orders.
    """

    def __init__(
        self,
        chunks: Sequence[NDArray[np.int64]],
        lengths: NDArray[np.int64],
        batch_size: int,
        *,
        passes: int,
        seed: int,
    ) -> None:
        self._chunks, self._passes = chunks, passes
        self._batches = [LengthGroupedBatches(lengths[chunk], batch_size, seed=seed) for chunk in chunks]
        self._start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the batch to start at; there is one epoch."""
        self._start = epoch * len(self) + start_batch

    def __len__(self) -> int:
        return self._passes * sum(map(len, self._batches))

    def __iter__(self) -> Iterator[list[int]]:
        done = 0
        for chunk, batches in zip(self._chunks, self._batches, strict=True):
            for number in range(self._passes):
                skipped = min(max(self._start - done, 0), len(batches))
                done += len(batches)
                if skipped == len(batches):
                    continue
                batches.set_epoch(number, skipped)
                for batch in batches:
                    yield chunk[batch].tolist()


def chunks_of(order: NDArray[np.int64], lengths: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """Rows in their order, cut so that no chunk has more than `most` tokens and all have about as many.

    Example:
        >>> [chunk.tolist() for chunk in chunks_of(np.arange(4), np.array([3, 3, 3, 3]), 7)]
        [[0, 1], [2, 3]]
    """
    ends = np.cumsum(lengths[order])
    share = math.ceil(int(ends[-1]) / math.ceil(int(ends[-1]) / most))
    chunks: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + share, side="right")))
        chunks.append(order[start:end])
        start = end
    return chunks
