"""Rows without padding: the tokens of a batch one after another, and how attention finds its way among them.

A padded batch computes every linear map for its padding too. Here the tokens of all rows lie in one (tokens, hidden)
matrix; only attention needs to know which belong together, and pads there alone, within groups of similar rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_GROUP_WASTE = 0.15
"""Share of padding that attention accepts inside a group of rows, before another group is begun."""

MOST_PADDED = 1.5
"""Positions for each token, up to which all rows of a batch are padded together where no layer is computed."""

ROUNDING = ((64, 1), (1024, 16))
"""Up to so many tokens, they are rounded up to multiples of the second number; beyond to multiples of 64."""


def padded_count(tokens: int) -> int:
    """Rows of the token matrix for so many tokens on CPU.

    oneDNN builds a new kernel for each new number of rows and keeps it (in float32 of many tokens only for GELU, where
    BLAS does the products), so that the numbers it meets are rounded up: to multiples of 16 above 64 tokens, of 64
    above 1,024.

    Args:
        tokens: real tokens, at least 1.
    """
    step = next((step for most, step in ROUNDING if tokens <= most), 64)
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Group:
    """Consecutive rows that attend together, padded to the longest of them.

    Args:
        rows: how many.
        width: tokens of the longest.
        start, end: their tokens in the matrix.
        padding: None where all are equally long. Else `gather` (rows * width,) int64, the matrix row of each position
            (of padding: the row's first token), `scatter` (end - start,) int64, the position of each token, and `mask`
            (rows, width) bool, true for tokens.
    """

    rows: int
    width: int
    start: int
    end: int
    padding: tuple[Tensor, Tensor, Tensor] | None


class Layout:
    """Where the rows of a packed batch lie.

    Args:
        lengths: tokens of each row, at least one row of at least one token.
        device: of the index tensors.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.tokens = sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(rows,), each row's first token."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rows in groups of similar length, for attention."""
        bounds = [0, *_group_ends(self.lengths)]
        return tuple(self._group(first, last) for first, last in pairwise(bounds))

    @cached_property
    def first_tokens(self) -> Tensor:
        """(rows,) int64, on the device."""
        return torch.from_numpy(self.starts).to(self.device)

    @cached_property
    def row_of_token(self) -> Tensor:
        """(tokens,) int64, on the device."""
        rows = np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)
        return torch.from_numpy(rows).to(self.device)

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Matrix rows of some rows' tokens, (tokens,) int64, on the device."""
        index = np.concatenate(
            [np.arange(self.starts[row], self.starts[row] + self.lengths[row]) for row in rows]
        )
        return torch.from_numpy(index).to(self.device)

    def _group(self, first: int, last: int) -> Group:
        lengths = np.asarray(self.lengths[first:last], dtype=np.int64)
        start, width = int(self.starts[first]), int(lengths.max())
        end = start + int(lengths.sum())
        if int(lengths.min()) == width:
            return Group(last - first, width, start, end, None)
        position = np.arange(width)
        mask = position < lengths[:, None]  # (rows, width)
        gather = np.where(mask, self.starts[first:last, None] + position, self.starts[first:last, None])
        padding = (gather.reshape(-1), np.flatnonzero(mask), mask)
        found = tuple(torch.from_numpy(array).to(self.device) for array in padding)
        return Group(last - first, width, start, end, (found[0], found[1], found[2]))


def similar_rows(lengths: Sequence[int]) -> list[list[int]]:
    """The rows, by index, in groups that can be padded together.

    All of them in their order where that makes little padding, else by length: one long row would have every other
    padded to its width.
    """
    if max(lengths) * len(lengths) <= MOST_PADDED * sum(lengths):
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    bounds = [0, *_group_ends([lengths[row] for row in order])]
    return [order[first:last] for first, last in pairwise(bounds)]


def _group_ends(lengths: Sequence[int]) -> list[int]:
    """Where groups end: as soon as one more row would make more than `MAX_GROUP_WASTE` of the group padding."""
    ends: list[int] = []
    first, width, tokens = 0, 0, 0
    for row, length in enumerate(lengths):
        wider = max(width, length)
        positions = wider * (row - first + 1)
        if row > first and positions - tokens - length > MAX_GROUP_WASTE * positions:
            ends.append(row)
            first, width, tokens = row, length, length
        else:
            width, tokens = wider, tokens + length
    return [*ends, len(lengths)]


@dataclass(frozen=True)
class PackedBatch:
    """Rows on their way through the layers.

    Args:
        hidden_states: (tokens or a few more, hidden); what lies beyond `layout.tokens` is filler without meaning.
        layout: where the rows lie.
    """

    hidden_states: Tensor
    layout: Layout

    def select(self, rows: Sequence[int]) -> PackedBatch:
        """The batch of some of its rows, ascending indices."""
        index = self.layout.tokens_of(rows)
        lengths = [self.layout.lengths[row] for row in rows]
        return pack(self.hidden_states.index_select(0, index), lengths)

    @staticmethod
    def merge(batches: Sequence[PackedBatch]) -> PackedBatch:
        """The rows of several batches, in their order."""
        if len(batches) == 1:
            return batches[0]
        lengths = [length for batch in batches for length in batch.layout.lengths]
        return pack(torch.cat([batch.hidden_states[: batch.layout.tokens] for batch in batches]), lengths)


def pack(tokens: Tensor, lengths: Sequence[int]) -> PackedBatch:
    """A packed batch of (tokens, hidden) states."""
    layout = _layout(tuple(lengths), tokens.device)
    on_cpu = tokens.device.type == "cpu"
    filler = padded_count(len(tokens)) - len(tokens) if on_cpu else 0
    if filler:
        tokens = torch.cat([tokens, tokens.new_zeros(filler, tokens.shape[1])])
    return PackedBatch(tokens, layout)


@lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    """Layouts recur: the same batch at every layer that nobody exits at, single rows of the same length."""
    return Layout(lengths, device)
