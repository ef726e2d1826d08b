"""Tokenized rows on their way into the model: held flat, padded, and grouped by length into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""

BATCHES_PER_CHUNK = (
    50  # batches that are sorted by length together: more saves padding, fewer shuffles better
)

Tokens = Sequence[int] | NDArray[np.int32]
"""Token ids of one row."""


class _FlatRows(Dataset[dict[str, Any]]):
    """Rows of different length, each key held as one flat array.

    Args:
        columns: By key, the integers of every row, as many as it has tokens.
        num_truncated: How many of the rows were cut.
    """

    def __init__(self, columns: Mapping[str, Sequence[Tokens]], num_truncated: int) -> None:
        self.num_truncated = num_truncated
        rows = columns["input_ids"]
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)  # (rows,) tokens
        self._ends = np.cumsum(self.lengths)
        self._flat: dict[str, NDArray[np.int32]] = {  # (tokens of all rows,)
            key: np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, dtype=np.int32) for row in values)])
            for key, values in columns.items()
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}.")
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        return {key: flat[start:end].tolist() for key, flat in self._flat.items()}


class TokenizedDataset(_FlatRows):
    """Tokenized rows with one label each.

    Args:
        rows: `input_ids` and, where the tokenizer gives them, `token_type_ids` of every row, integers.
        labels: (rows,) class indices.
        label_names: Class names by index.
        num_truncated: How many of the rows were cut.

    An item is a dict of `input_ids` (list of int), `token_type_ids` (list of int, where there are any), `labels` (int)
    and `index` (int, the row's own position in this dataset).
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Tokens]],
        labels: Sequence[int],
        label_names: tuple[str, ...] = (),
        *,
        num_truncated: int = 0,
    ) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"rows and labels must be equally many, got {len(rows)} and {len(labels)}.")
        keys = ["input_ids", *(key for key in ("token_type_ids",) if rows and key in rows[0])]
        super().__init__({key: [row[key] for row in rows] for key in keys}, num_truncated)
        self.label_names = label_names
        self.labels = torch.tensor(labels, dtype=torch.int64)  # (rows,)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "labels": int(self.labels[index]), "index": int(index)}


class TokenizedPrompts(_FlatRows):
    """Tokenized prompts with their responses.

    Args:
        prompts: Token ids of every prompt.
        responses: Token ids of every response, equally many rows; a prompt or a response may be empty, not both.
        num_truncated: How many of the rows were cut.

    An item is a dict of `input_ids` (list of int, prompt and response), `labels` (list of int, the same with IGNORED in
    place of the prompt) and `index` (int, the row's own position in this dataset).
    """

    def __init__(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens], *, num_truncated: int = 0
    ) -> None:
        if len(prompts) != len(responses):
            raise ValueError(
                f"prompts and responses must be equally many, got {len(prompts)} and {len(responses)}."
            )
        rows = [
            np.array([*both[0], *both[1]], dtype=np.int32) for both in zip(prompts, responses, strict=True)
        ]
        super().__init__({"input_ids": rows}, num_truncated)
        self.prompt_lengths = np.array([len(row) for row in prompts], dtype=np.int64)  # (rows,) tokens

    def __getitem__(self, index: int) -> dict[str, Any]:
        input_ids = super().__getitem__(index)["input_ids"]
        prompt = int(self.prompt_lengths[index])
        return {
            "input_ids": input_ids,
            "labels": [IGNORED] * prompt + input_ids[prompt:],
            "index": int(index),
        }


def with_more_tokens(
    rows: TokenizedPrompts, source: TokenizedPrompts, tokens: int, seed: int
) -> TokenizedPrompts:
    """Rows, and behind them as many of another data set as so many response tokens leave room for.

    Args:
        rows: all are kept.
        source: rows are drawn from it evenly, each once at most.
        tokens: of responses, at most.
        seed: of the draw.
    """
    missing = tokens - int((rows.lengths - rows.prompt_lengths).sum())
    order = np.random.default_rng(seed).permutation(len(source))
    ends = np.cumsum((source.lengths - source.prompt_lengths)[order])
    drawn = order[: int(np.searchsorted(ends, missing, side="right"))]
    items = [rows[row]["input_ids"] for row in range(len(rows))] + [
        source[row]["input_ids"] for row in drawn.tolist()
    ]
    prompts = [*rows.prompt_lengths.tolist(), *source.prompt_lengths[drawn].tolist()]
    return TokenizedPrompts(
        [ids[:end] for ids, end in zip(items, prompts, strict=True)],
        [ids[end:] for ids, end in zip(items, prompts, strict=True)],
    )


def collate(items: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A batch of tensors from items of different length, padded on the right to the longest.

    Args:
        items: Items of a `TokenizedDataset` or `TokenizedPrompts`, or rows of `encode_texts`; at least one.
        tokenizer: Gives the padding ids, that of the end of text where it has none for padding.

    Returns:
        `input_ids`, `attention_mask` (1 = real token) and what else the items have, int64: `token_type_ids` and labels
        of tokens (IGNORED on the padding), (batch, tokens); `index` and labels of rows, (batch,).

    Raises:
        ValueError: The tokenizer has no padding token, nor one for the end of text.
    """
    padding_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(padding_id, int):
        raise ValueError("The tokenizer must have a padding token, got none. Set tokenizer.pad_token.")
    paddings = {
        "input_ids": padding_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "labels": IGNORED,
    }
    columns = {key: [item[key] for item in items] for key in items[0]}
    columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
    return {
        key: pad(values, paddings[key]) if isinstance(values[0], list) else torch.tensor(values)
        for key, values in columns.items()
    }


def pad(rows: Sequence[Tokens], padding: int, *, left: bool = False) -> Tensor:
    """Rows of different length as one tensor, padded on the right or, so that all end and go on at one place, the left.

    Args:
        rows: Integers of every row; at least one row.
        padding: What is put in.
        left: Where.

    Returns:
        (rows, tokens) int64.

    Example:
        >>> pad([[5], [6, 7]], 0, left=True).tolist()
        [[0, 5], [6, 7]]
    """
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    side = "left" if left else "right"
    return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=side)


def pad_left(rows: Sequence[Tokens], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` (1 = real token), both (rows, tokens) int64, of prompts that are to go on."""
    return pad(rows, pad_token_id, left=True), pad([[1] * len(row) for row in rows], 0, left=True)


class LengthGroupedBatches(Sampler[list[int]]):
    """Shuffled batches of row indices, rows of similar length together, the same for the same seed and epoch.

    It yields whole (global) batches; where several processes train, each takes its share of every batch.

    Args:
        lengths: (rows,) tokens of every row.
        batch_size: Rows of a batch; the batch with the rows that are left over is smaller, and anywhere in the epoch.
        seed: Not negative. Same seed and epoch, same batches in the same order.
        group_by_length: False shuffles the rows and nothing else.
    """

    def __init__(
        self, lengths: ArrayLike, batch_size: int, *, seed: int = 0, group_by_length: bool = True
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate over, and the batch to start at.

        Args:
            epoch: From 0.
            start_batch: Batches of this epoch to leave out because an interrupted run has done them, from 0 to
                `len(self)`; it holds until the next call.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}.")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch must be in [0, {len(self)}], got {start_batch}.")
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start_batch` is."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = rng.permutation(len(self.lengths))
        if self.group_by_length:
            size = BATCHES_PER_CHUNK * self.batch_size
            chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
            rows = np.concatenate(
                [chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks] or [rows]
            )
        batches = [
            rows[start : start + self.batch_size].tolist() for start in range(0, len(rows), self.batch_size)
        ]
        order = rng.permutation(len(batches)) if self.group_by_length else np.arange(len(batches))
        yield from (batches[position] for position in order[self.start_batch :])
