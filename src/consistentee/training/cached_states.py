"""Rows whose layers are run once: states of a frozen backbone, a chunk of rows at a time in memory or in a file.

Rows are shuffled and cut into chunks whose states fit. A chunk is run through the backbone, learnt from several times
over, and forgotten; the next one takes its place. So neither memory nor the disk grows with the rows, and the backbone
runs once for each, or twice for a chunk that an interruption fell into. What is learnt from all rows several times over
is better than what is learnt from one small chunk after another, hence the file: it is read row by row, not mapped, so
that it never counts as memory of the process.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from consistentee.backbones import encoders
from consistentee.data.batches import LengthGroupedBatches
from consistentee.data.spooled import SpooledRows
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.progress import show_progress

RUN_AT_ONCE = 64  # rows
HIGHEST = 65504.0  # of float16


class StateStore(Protocol):
    """Room for the states of tokens, (tokens, layers - 1, hidden) float16."""

    def write(self, first: int, states: Tensor) -> None:
        """Keep states from a token on."""
        ...

    def read(self, first: int, count: int) -> Tensor:
        """The states of so many tokens, which are not written to."""
        ...


class StatesInMemory:
    """A tensor that takes memory where it is written to.

    Args:
        shape: tokens, layers - 1, hidden.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.states = torch.empty(shape, dtype=torch.float16)

    def write(self, first: int, states: Tensor) -> None:
        """See `StateStore`."""
        self.states[first : first + len(states)] = states

    def read(self, first: int, count: int) -> Tensor:
        """See `StateStore`."""
        return self.states[first : first + count]


class StatesInFile:
    """A file without a name, which goes with this object or with the process.

    Args:
        shape: tokens, layers - 1, hidden.
        folder: where it is made; None: Python's folder of temporary files.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, shape: tuple[int, int, int], folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._shape, self._token_bytes = shape[1:], 2 * math.prod(shape[1:])
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  lives as long as this
        weakref.finalize(self, self._file.close)
        size, where = shape[0] * self._token_bytes, folder or Path(tempfile.gettempdir())
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not in the middle
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            self._file.close()
            free = shutil.disk_usage(where).free
            raise OSError(
                error.errno,
                f"The layers' states take {size / 1e6:,.0f} MB in {where}, where {free / 1e6:,.0f} MB are free. Make "
                "room, or give a lower max_disk_mb (0: no file, a chunk of max_cache_mb in memory at a time).",
            ) from error

    def write(self, first: int, states: Tensor) -> None:
        """See `StateStore`."""
        rest = states.contiguous().numpy().reshape(-1).view(np.uint8).data
        self._file.seek(first * self._token_bytes)
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, first: int, count: int) -> Tensor:
        """See `StateStore`."""
        found = torch.empty(count, *self._shape, dtype=torch.float16)
        rest = found.numpy().reshape(-1).view(np.uint8).data
        self._file.seek(first * self._token_bytes)
        while rest:
            read = self._file.readinto(rest)  # pyright: ignore[reportAttributeAccessIssue]
            if not read:
                raise EOFError("A file of states is shorter than what was written to it.")
            rest = rest[read:]
        return found


class CachedStates:
    """States of all layers but the last, and the last one's logits, of rows that are asked for; see above.

    Args:
        model: with a frozen backbone and its own head.
        rows: tokenized.
        collate: makes a padded batch of tokenized items.
        memory_mb: what a chunk's states may take in memory.
        disk_mb: what they may take in a file, where that is more and all rows need more than `memory_mb`.
        passes: how often a chunk is learnt from.
        min_steps: in all passes together; fewer become more passes.
        batch_size, seed: of the batches.
        precision: `bf16` runs the backbone so; else as its weights are.

    Attributes:
        folder: where the file is made; None: Python's folder of temporary files.

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
        disk_mb: float = 0.0,
        passes: int,
        min_steps: int = 0,
        batch_size: int,
        seed: int,
        precision: str = "no",
    ) -> None:
        self._model, self._rows, self._collate, self._precision = model, rows, collate, precision
        self.lengths, self.num_truncated = rows.lengths, rows.num_truncated
        exits, hidden = model.num_layers - 1, model.config.hidden_size
        self.folder: Path | None = None
        self._in_file = disk_mb > memory_mb and 2 * exits * hidden * int(self.lengths.sum()) > memory_mb * 1e6
        allowed = disk_mb if self._in_file else memory_mb
        most = max(int(allowed * 1e6 / (2 * exits * hidden)), int(self.lengths.max()))  # tokens
        order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
        self.chunks = chunks_of(order, self.lengths, most)
        self._shape = (max(int(self.lengths[chunk].sum()) for chunk in self.chunks), exits, hidden)
        self.release()
        self._logits = torch.empty(max(map(len, self.chunks)), model.config.num_classes)
        self._chunk_of = np.empty(len(rows), np.int64)
        self._place = np.empty(len(rows), np.int64)  # in its chunk
        self._start = np.empty(len(rows), np.int64)  # of its tokens there
        for number, chunk in enumerate(self.chunks):
            self._chunk_of[chunk], self._place[chunk] = number, np.arange(len(chunk))
            self._start[chunk] = np.cumsum(self.lengths[chunk]) - self.lengths[chunk]
        self.batches = ChunkedBatches(
            self.chunks, self.lengths, batch_size, passes=passes, min_steps=min_steps, seed=seed
        )

    def __len__(self) -> int:
        return len(self._rows)

    def release(self) -> None:
        """Give the room of the states back; who asks for a row again gets its chunk anew."""
        self._store: StateStore | None = None
        self._loaded: int | None = None

    def load_for(self, batch: int, *, shown: bool) -> None:
        """Run the chunk of a batch through the backbone, which may take minutes, before somebody asks for it.

        Args:
            batch: number of the batch.
            shown: whether to show how far it is.
        """
        self.batches.set_epoch(0, batch)
        for rows in itertools.islice(self.batches, 1):
            self._load(int(self._chunk_of[rows[0]]), shown=shown)

    def __getitem__(self, index: int) -> dict[str, Any]:
        store = self._store
        if store is None or self._loaded != self._chunk_of[index]:
            store = self._load(int(self._chunk_of[index]))
        return {
            "states": store.read(int(self._start[index]), int(self.lengths[index])),
            "labels": self._logits[int(self._place[index])],
            "index": index,
        }

    def _room(self) -> StateStore:
        """For the largest chunk."""
        if self._in_file:
            return StatesInFile(self._shape, self.folder)
        return StatesInMemory(self._shape)

    @torch.no_grad()
    def _load(self, number: int, *, shown: bool = False) -> StateStore:
        """Run a chunk through the backbone, rows of similar length together; where its states are."""
        store = self._store = self._store or self._room()
        model, device = self._model, self._model.device
        modes = [
            (module, module.training) for module in model.modules()
        ]  # steps set those of the exits alone
        model.eval()
        chunk = self.chunks[number]
        chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
        with show_progress("states of the layers", len(chunk), unit="text", shown=shown) as bar:
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
                states = states.clamp(-HIGHEST, HIGHEST).to(torch.float16).cpu()
                self._logits[self._place[part]] = logits.float().cpu()
                for place, row in enumerate(part):
                    length, first = int(self.lengths[row]), int(self._start[row])
                    store.write(first, states[place, :length])
                bar.update(len(part))
        self._loaded = number
        for module, training in modes:
            module.training = training
        return store


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
        min_steps: batches in all; fewer become more passes.
        seed: of the orders.
    """

    def __init__(
        self,
        chunks: Sequence[NDArray[np.int64]],
        lengths: NDArray[np.int64],
        batch_size: int,
        *,
        passes: int,
        min_steps: int = 0,
        seed: int,
    ) -> None:
        self._chunks = chunks
        self._batches = [LengthGroupedBatches(lengths[chunk], batch_size, seed=seed) for chunk in chunks]
        self._passes = max(passes, math.ceil(min_steps / sum(map(len, self._batches))))
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
