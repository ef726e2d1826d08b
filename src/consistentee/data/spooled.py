"""Any number of texts without labels, tokenized once and kept on disk: memory holds a few bytes a row.

Duplicates are dropped as they come. Rows are read back one by one, in any order, as items that `batches.collate` takes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from consistentee.atomic_files import room_for_temporary_files
from consistentee.data.rows import Text, text_rows
from consistentee.data.tokenization import encode_texts
from consistentee.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from consistentee.data.batches import TokenizedDataset

READ_AT_ONCE = 1024  # texts
DIGEST_BYTES = 12  # of a text, to know it again: two of a million are taken for one with a chance of 1e-17


class SpooledTexts:
    """Texts or pairs in files without a name, which go with the process.

    Attributes:
        source: where they come from, for messages and records.
        lengths: (rows,) int64, tokens of every row.
        num_duplicates: texts that were dropped because they had come before.
        num_known: texts that were dropped because they were known already.
        cut: (rows,) bool, which were cut.
        text_pairs: whether a row is a pair.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.num_duplicates = self.num_known = 0
        self.text_pairs = False
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self.cut: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._token_ends = self._text_ends = np.zeros(0, np.int64)  # (rows,), in numbers and in bytes
        self._has_types = False
        self._digest = hashlib.sha256()
        self._tokens: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this does
        self._texts: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        for file in (self._tokens, self._texts):
            weakref.finalize(self, file.close)

    @classmethod
    def read(
        cls,
        texts: Iterable[Text],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        source: str,
        max_texts: int | None = None,
        known: Iterable[tuple[str, ...]] = (),
    ) -> SpooledTexts:
        """Read texts to their end, or until there are enough.

        Args:
            texts: strings or tuples of one text, or all pairs.
            tokenizer, max_length: as in `encode_texts`.
            source: where they come from.
            max_texts: different ones, at most.
            known: texts that are dropped.

        Raises:
            DataError: there is none, or one of which no token is left; single texts stand beside pairs.
            FullDiskError: there is no room for them in the folder for temporary files.
        """
        self = cls(source)
        known_digests = set(map(text_digest, known))
        lengths, cut, token_ends, text_ends = array("q"), array("b"), array("q"), array("q")
        for part in _parts(self._new(text_rows(texts, source), known_digests), max_texts):
            rows, is_cut = encode_texts(part, tokenizer, max_length)
            self._has_types, self.text_pairs = "token_type_ids" in rows[0], len(part[0]) == 2
            with room_for_temporary_files(self._tokens, self._texts):
                for row, row_texts, row_cut in zip(rows, part, is_cut, strict=True):
                    numbers = [*row["input_ids"], *row.get("token_type_ids", ())]
                    line = json.dumps(row_texts, ensure_ascii=False).encode("utf-8", "surrogatepass")
                    self._tokens.write(np.asarray(numbers, dtype=np.int32).tobytes())
                    self._texts.write(line)
                    self._digest.update(line + b"\n")
                    lengths.append(len(row["input_ids"]))
                    cut.append(row_cut)
                    token_ends.append((token_ends[-1] if token_ends else 0) + len(numbers))
                    text_ends.append((text_ends[-1] if text_ends else 0) + len(line))
        with room_for_temporary_files(self._tokens, self._texts):
            self._tokens.flush()
            self._texts.flush()
        if not lengths:
            beside = f" but {self.num_known:,} that are known already" if self.num_known else ""
            raise DataError(f"{source} holds no text{beside}.", remedy="Give files with texts.")
        self.lengths, self.cut = np.array(lengths, np.int64), np.array(cut, np.bool_)
        self._token_ends, self._text_ends = np.array(token_ends, np.int64), np.array(text_ends, np.int64)
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """Hash of all rows in their order."""
        return self._digest.hexdigest()[:16]

    def text(self, row: int) -> tuple[str, ...]:
        """A row as it was read."""
        end = int(self._text_ends[row])
        start = int(self._text_ends[row - 1]) if row else 0
        self._texts.seek(start)
        return tuple(json.loads(self._texts.read(end - start).decode("utf-8", "surrogatepass")))

    def item(self, row: int) -> dict[str, Any]:
        """A row's `input_ids` and, where the tokenizer gives them, `token_type_ids`."""
        end = int(self._token_ends[row])
        start = int(self._token_ends[row - 1]) if row else 0
        self._tokens.seek(4 * start)
        numbers = np.frombuffer(self._tokens.read(4 * (end - start)), np.int32).tolist()
        if not self._has_types:
            return {"input_ids": numbers}
        half = len(numbers) // 2
        return {"input_ids": numbers[:half], "token_type_ids": numbers[half:]}

    def _new(self, texts: Iterable[tuple[str, ...]], known: set[bytes]) -> Iterator[tuple[str, ...]]:
        seen: set[bytes] = set()
        for row in texts:
            digest = text_digest(row)
            if digest in known:
                self.num_known += 1
            elif digest in seen:
                self.num_duplicates += 1
            else:
                seen.add(digest)
                yield row


class SpooledRows:
    """Some rows of `SpooledTexts`, as a data set of tokenized rows.

    Args:
        texts: all of them.
        rows: (rows,) which.

    Attributes:
        labels: (rows,) int64, all 0: there are none.
    """

    def __init__(self, texts: SpooledTexts, rows: Sequence[int] | NDArray[np.int64]) -> None:
        self.texts, self.rows = texts, np.asarray(rows, dtype=np.int64)
        self.lengths = texts.lengths[self.rows]
        self.num_truncated = int(texts.cut[self.rows].sum())
        self.labels = torch.zeros(len(self.rows), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.texts.item(int(self.rows[index])), "labels": 0, "index": int(index)}

    def text(self, index: int) -> tuple[str, ...]:
        """A row as it was read."""
        return self.texts.text(int(self.rows[index]))

    def fingerprint(self) -> str:
        """Hash of these rows in their order."""
        return hashlib.sha256(self.texts.fingerprint().encode() + self.rows.tobytes()).hexdigest()[:16]


class JoinedRows:
    """Tokenized rows with labels, and behind them rows without, as one data set.

    Args:
        first, more: of the same tokenizer.

    Attributes:
        labels: (rows,) int64, 0 where there is none.
    """

    def __init__(self, first: TokenizedDataset, more: SpooledRows) -> None:
        self._first, self._more = first, more
        self.lengths = np.concatenate([first.lengths, more.lengths])
        self.labels = torch.cat([first.labels, more.labels])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        behind = index - len(self._first)
        item = self._first[index] if behind < 0 else self._more[behind]
        return {**item, "index": int(index)}


def text_digest(row: tuple[str, ...]) -> bytes:
    """What tells a row of texts from others, in few bytes."""
    content = "\x1f".join(row).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _parts(texts: Iterator[tuple[str, ...]], most: int | None) -> Iterator[list[tuple[str, ...]]]:
    texts = itertools.islice(texts, most)
    while part := list(itertools.islice(texts, READ_AT_ONCE)):
        yield part
