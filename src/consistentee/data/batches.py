"""Texts on their way into the model: tokenized, collated with right padding, and grouped by length into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from consistentee.data.literal import as_text
from consistentee.errors import DataError, SettingError, require_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from consistentee.data.classification import TextDataset

TOKENIZED_AT_ONCE = 1024  # rows
BATCHES_PER_CHUNK = (
    50  # batches that are sorted by length together: more saves padding, fewer shuffles better
)


class TokenizedDataset(Dataset[dict[str, Any]]):
    """Tokenized rows, held as one flat array of token ids.

    Args:
        rows: `input_ids` and, where the tokenizer gives them, `token_type_ids` of every row, integers.
        labels: (rows,) class indices.
        label_names: Class names by index.
        num_truncated: How many of the rows were cut.

    An item is a dict of `input_ids` (list of int), `token_type_ids` (list of int, where there are any), `label` (int)
    and `index` (int, the row's own position in this dataset).
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Sequence[int] | NDArray[np.int32]]],
        labels: Sequence[int],
        label_names: tuple[str, ...] = (),
        *,
        num_truncated: int = 0,
    ) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"rows and labels must be equally many, got {len(rows)} and {len(labels)}.")
        self.label_names = label_names
        self.num_truncated = num_truncated
        self.labels = torch.tensor(labels, dtype=torch.int64)  # (rows,)
        self.lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)  # (rows,) tokens
        self._ends = np.cumsum(self.lengths)
        keys = [key for key in ("input_ids", "token_type_ids") if rows and key in rows[0]]
        self._flat: dict[str, NDArray[np.int32]] = {}
        for key in keys:  # (tokens of all rows,)
            self._flat[key] = np.concatenate([np.asarray(row[key], dtype=np.int32) for row in rows])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}.")
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        item: dict[str, Any] = {key: flat[start:end].tolist() for key, flat in self._flat.items()}
        return {**item, "label": int(self.labels[index]), "index": int(index)}


def encode_with_cuts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """Token ids of texts or pairs, not padded, and which of them were cut.

    Args:
        texts: Tuples of one text, or all of two.
        tokenizer: A Hugging Face tokenizer; whether special tokens that a text spells are text, is its own setting
            (`literal.take_literally`).
        max_length: The most tokens of a row, special ones included; what is longer is cut (of a pair, the longer text).

    Returns:
        One dict a row, `input_ids` and, where the tokenizer gives them, `token_type_ids`: what `collate` takes; and for
        each row whether it was longer than `max_length`.

    Raises:
        DataError: A text of which no token is left, half a character, or pairs for a tokenizer that cannot keep them
            apart.
        ValueError: A `max_length` that leaves no room for text.
    """
    if not texts:
        return [], []
    pair = len(texts[0]) == 2
    if any(len(row) != len(texts[0]) for row in texts):
        raise ValueError("texts must be all single texts or all pairs, got both.")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise SettingError(
            f"max_length must be above the tokenizer's {special} special tokens, got {max_length}."
        )
    if pair and special <= tokenizer.num_special_tokens_to_add(pair=False):
        raise DataError(
            "The tokenizer puts no separator between the two texts of a pair.",
            remedy="Take a backbone whose tokenizer takes pairs, or one text column.",
        )
    for position, row in enumerate(texts, start=1):
        for part in row:
            require_characters(part, row=position)
    encoded = tokenizer(
        as_text([row[0] for row in texts], tokenizer),
        as_text([row[1] for row in texts], tokenizer) if pair else None,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows = [{key: list(encoded[key][row]) for key in keys} for row in range(len(texts))]
    cut = [_is_cut(encoded, row, texts[row], tokenizer, max_length) for row in range(len(texts))]
    for texts_of_row, row in zip(texts, rows, strict=True):
        if not row["input_ids"]:
            raise DataError(
                f"The tokenizer leaves nothing of the text {texts_of_row[0][:40]!r}.",
                remedy="Remove the row.",
            )
    return rows, cut


def _is_cut(
    encoded: Any, row: int, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> bool:
    """Whether a tokenizer left something of a text out; fast ones tell, others are asked again."""
    if len(encoded["input_ids"][row]) < max_length:
        return False
    if encoded.encodings is not None:
        return bool(encoded.encodings[row].overflowing)
    text, second = texts[0], texts[1] if len(texts) == 2 else None
    return len(tokenizer(text, second, verbose=False)["input_ids"]) > max_length


def encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> list[dict[str, list[int]]]:
    """Token ids of texts or pairs, not padded; arguments and errors as in `encode_with_cuts`.

    Returns:
        One dict a row, `input_ids` and, where the tokenizer gives them, `token_type_ids`: what `collate` takes.
    """
    return encode_with_cuts(texts, tokenizer, max_length)[0]


def tokenize(
    dataset: TextDataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> TokenizedDataset:
    """Tokenize every row of a labelled data set.

    Args:
        dataset: Texts or pairs with labels.
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of a row, special ones included.

    Returns:
        The tokenized rows, in the same order.

    Raises:
        DataError: As in `encode_texts`.
    """
    rows: list[
        dict[str, NDArray[np.int32]]
    ] = []  # arrays at once: lists of a large data set would take gigabytes
    num_truncated = 0
    for position, texts in enumerate(dataset.texts, start=1):
        for text in texts:
            require_characters(text, row=position, unit="row")
    for start in range(0, len(dataset), TOKENIZED_AT_ONCE):
        encoded, cut = encode_with_cuts(
            dataset.texts[start : start + TOKENIZED_AT_ONCE], tokenizer, max_length
        )
        rows += [{key: np.array(tokens, dtype=np.int32) for key, tokens in row.items()} for row in encoded]
        num_truncated += sum(cut)
    return TokenizedDataset(rows, dataset.labels, dataset.label_names, num_truncated=num_truncated)


def collate(items: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A batch of tensors from items of different length, padded on the right to the longest.

    Args:
        items: Items of a `TokenizedDataset`, or rows of `encode_texts`; at least one.
        tokenizer: Gives the padding ids.

    Returns:
        `input_ids`, `attention_mask` (1 = real token) and, where the items have them, `token_type_ids`, each
        (batch, tokens) int64; and, where the items have them, `labels` and `index`, each (batch,) int64.

    Raises:
        ValueError: The tokenizer has no padding token.
    """
    if not isinstance(tokenizer.pad_token_id, int):
        raise ValueError("The tokenizer must have a padding token, got none. Set tokenizer.pad_token.")
    rows = [item["input_ids"] for item in items]
    width = max(len(row) for row in rows)

    def padded(values: Sequence[Sequence[int]], padding: int) -> Tensor:  # (batch, tokens)
        return torch.tensor([[*row, *[padding] * (width - len(row))] for row in values], dtype=torch.int64)

    batch = {
        "input_ids": padded(rows, tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
    if "token_type_ids" in items[0]:
        batch["token_type_ids"] = padded(
            [item["token_type_ids"] for item in items], tokenizer.pad_token_type_id
        )
    for key, name in (("label", "labels"), ("index", "index")):
        if key in items[0]:
            batch[name] = torch.tensor([item[key] for item in items], dtype=torch.int64)  # (batch,)
    return batch


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
