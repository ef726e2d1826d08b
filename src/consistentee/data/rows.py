"""Rows in memory: labelled texts, and instructions with responses; how they are chosen, split and told apart."""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from consistentee.data.templates import Turn
from consistentee.errors import DataError

Text = str | tuple[str, ...]
"""What users give for a row of texts: one, or a pair."""


def require_texts(texts: object) -> None:
    """Raise ValueError for what is no list of texts: a loop over one string gives letters, over a table its columns."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one text. Put it into a list.")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise ValueError(
            f"texts must be a list of texts, got columns by name ({type(texts).__name__}). Give a column, such as "
            'table["text"], or of pairs zip(table["text_a"], table["text_b"]).'
        )


def text_rows(texts: Iterable[Text], source: str) -> Iterator[tuple[str, ...]]:
    """Texts as tuples, all of one or all of two.

    Args:
        texts: strings, or tuples or lists of one or two.
        source: where they come from, for messages.

    Raises:
        DataError: one of them is something else, or is a pair beside single texts.
        ValueError: they are one text, or a table.
    """
    require_texts(texts)
    width = None
    for number, given in enumerate(texts, start=1):
        row = given if isinstance(given, tuple) else tuple(given) if isinstance(given, list) else (given,)
        if len(row) not in (1, 2) or not all(isinstance(text, str) for text in row):
            problem = f"Texts must be strings or pairs of strings, got {given!r:.60}."
            remedy = "Correct it, or leave the row out."
            raise DataError(problem, file=source, row=number, unit="row", remedy=remedy)
        if len(row) != (width := width or len(row)):
            got = "a pair" if width == 1 else "a single text"
            problem = f"Rows must be all single texts or all pairs, got {got} where the first is none."
            remedy = "Keep single texts and pairs apart."
            raise DataError(problem, file=source, row=number, unit="row", remedy=remedy)
        yield row


def prompt_pairs(prompts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Prompts as they are, each known to be an instruction and an input.

    Raises:
        DataError: one of them is something else, such as a string.
        ValueError: they are one text, or a table.
    """
    require_texts(prompts)
    for number, asked in enumerate(prompts, start=1):
        parts: object = asked
        if (
            not isinstance(parts, (tuple, list))
            or len(parts) != 2
            or not all(isinstance(part, str) for part in parts)
        ):
            problem = f"It must be an instruction and an input, got {asked!r:.60}."
            remedy = 'Where it has no input, that is "": ("Name three rivers.", "").'
            raise DataError(problem, row=number, unit="prompt", remedy=remedy)
        yield asked


class _Rows(ABC):
    """What both kinds of rows have: every field that is a list holds one value a row."""

    def __len__(self) -> int:
        return len(next(iter(self._lists().values())))

    def select(self, indices: Iterable[int]) -> Self:
        """The rows with these indices, in their order."""
        rows = [int(index) for index in indices]
        chosen = {name: [values[row] for row in rows] for name, values in self._lists().items()}
        return replace(self, **chosen)  # type: ignore[type-var]

    def max_samples(self, count: int | None, seed: int = 0) -> Self:
        """At most `count` rows, drawn at random, of labelled ones so that every class keeps its share; in their order.

        Args:
            count: The number of rows to keep, at least 1; None keeps all.
            seed: Same seed, same rows.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        if count is None or count >= len(self):
            return self
        return self.select(self._draw(count, seed))

    def fingerprint(self) -> str:
        """Hash of all rows, and of label names: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for parts in self._parts():
            digest.update("\x1f".join(parts).encode("utf-8", "surrogatepass") + b"\x1e")
        return digest.hexdigest()[:16]

    def _lists(self) -> dict[str, list[Any]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, list)}

    @abstractmethod
    def _draw(self, count: int, seed: int) -> Iterable[int]:
        """So many of the rows' indices, drawn at random, ascending."""

    @abstractmethod
    def _parts(self) -> Iterable[Sequence[str]]:
        """What the rows' fingerprint is made of."""


@dataclass(frozen=True)
class TextDataset(_Rows):
    """Labelled texts, or pairs of texts.

    Args:
        texts: One tuple a row, of one text or of two; a string becomes a tuple of one.
        labels: (rows,) class indices into `label_names`.
        label_names: Class names by index.
        source: Where the rows come from, for messages and records.

    Raises:
        DataError: A text is none, single texts stand beside pairs, a label is no class, or a class has no name of its
            own.
        ValueError: Texts and labels are not equally many, or the texts are one string or a table.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    label_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", list(text_rows(self.texts, self.source)))
        object.__setattr__(self, "label_names", tuple(self.label_names))  # lists are one value a row
        if len(self.texts) != len(self.labels):
            raise ValueError(
                f"texts and labels must be equally many, got {len(self.texts)} and {len(self.labels)}."
            )
        for name in self.label_names:
            if not isinstance(name, str) or self.label_names.count(name) > 1:
                problem = f"Each class must have a name of its own, and names are texts, got {name!r:.60}."
                raise DataError(
                    problem, file=self.source, remedy="Give other label_names, one for each class."
                )
        classes = len(self.label_names)
        for row, label in enumerate(self.labels, start=1):
            if not isinstance(label, SupportsIndex) or not 0 <= operator.index(label) < classes:
                problem = f"The label must be a class index from 0 to {classes - 1}, got {label!r:.60}."
                remedy = "Give indices into label_names, and leave out rows without a label."
                raise DataError(problem, file=self.source, row=row, unit="row", remedy=remedy)
        object.__setattr__(self, "labels", [operator.index(label) for label in self.labels])

    def split(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Split the rows in two, every class with its share, as `stratified_split` does."""
        return stratified_split(self.labels, fraction, seed)

    def _draw(self, count: int, seed: int) -> list[int]:
        counts = np.bincount(self.labels)
        lowest = np.minimum(counts, 1) if count >= np.count_nonzero(counts) else np.zeros_like(counts)
        return _draw(self.labels, _shares(counts, count, lowest, counts), seed)

    def _parts(self) -> Iterable[Sequence[str]]:
        yield self.label_names
        for texts, label in zip(self.texts, self.labels, strict=True):
            yield *texts, str(label)


@dataclass(frozen=True)
class InstructionDataset(_Rows):
    """Instructions with the responses that are expected.

    Args:
        instructions: One a row. Where it and the input are "", the reference is a text to learn as a whole.
        inputs: What the instruction is about, one a row; "" where it stands alone.
        references: The responses, one a row, none empty.
        source: Where the rows come from, for messages and records.
        history: The turns of the conversation before the instruction, one tuple a row; None where no row has any.
        conversations: Which conversation a row is of; rows of one are never split. None where every row stands alone.

    Raises:
        DataError: An instruction, input or reference is no text.
        ValueError: They are not equally many, or are one string or a table.
    """

    instructions: list[str]
    inputs: list[str]
    references: list[str]
    source: str
    history: list[tuple[Turn, ...]] | None = None
    conversations: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("instructions", "inputs", "references"):
            object.__setattr__(self, name, _column(name, getattr(self, name), self.source))
        for name in ("history", "conversations"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, list(getattr(self, name)))
        counts = (len(self.instructions), len(self.inputs), len(self.references))
        if len(set(counts)) > 1:
            raise ValueError(f"instructions, inputs and references must be equally many, got {counts}.")

    def prompts(self) -> list[tuple[str, str, tuple[Turn, ...]]]:
        """Instruction, input and history of every row."""
        history = [()] * len(self) if self.history is None else self.history
        return list(zip(self.instructions, self.inputs, history, strict=True))

    def split(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Split the rows in two at random, as `split_rows` does; the answers of a conversation stay together."""
        if self.conversations is None:
            return split_rows(len(self), fraction, seed)
        names = sorted(set(self.conversations))
        _, held = split_rows(len(names), fraction, seed)
        is_held = {names[place] for place in held}
        kept_rows, held_rows = [], []
        for row, name in enumerate(self.conversations):
            (held_rows if name in is_held else kept_rows).append(row)
        return kept_rows, held_rows

    def _draw(self, count: int, seed: int) -> NDArray[np.int64]:
        return np.sort(np.random.default_rng(seed).permutation(len(self))[:count])

    def _parts(self) -> Iterable[Sequence[str]]:
        for row, (instruction, context, history) in enumerate(self.prompts()):
            number = (
                () if self.conversations is None else (str(self.conversations[row]),)
            )  # of which splits depend
            yield (
                *(part for turn in history for part in turn),
                instruction,
                context,
                self.references[row],
                *number,
            )


def _column(name: str, texts: Iterable[str], source: str) -> list[str]:
    """One text a row, as a list, whatever holds them."""
    require_texts(texts)
    column = list(texts)
    for number, text in enumerate(column, start=1):
        if not isinstance(text, str):
            problem = f"{name} must be strings, got {text!r:.60}."
            remedy = 'Correct it, or leave the row out; where there is no input, that is "".'
            raise DataError(problem, file=source, row=number, unit="row", remedy=remedy)
    return column


def require_rows(name: str, rows: object, *kinds: type[_Rows]) -> None:
    """Raise TypeError for what is none of these kinds of rows, such as a `Dataset` of another library.

    Args:
        name: of the argument.
        rows: what was given for it.
        kinds: `TextDataset`, `InstructionDataset` or both.
    """
    if isinstance(rows, kinds):
        return
    calls = [
        f"{kind.__name__}({', '.join(field.name for field in fields(kind) if field.default is MISSING)})"  # type: ignore[arg-type]
        for kind in kinds
    ]
    raise TypeError(
        f"{name} must be a {' or '.join(calls)}, got a {type(rows).__name__}. Make one of its columns."
    )


def split_rows(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows in two at random, both parts with at least one.

    Args:
        count: The number of rows, at least 2.
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Same seed, same split.

    Returns:
        Indices of the rows kept and of the rows held out, both ascending.

    Raises:
        DataError: Fewer than two rows.
        ValueError: A fraction outside (0, 1).

    Example:
        >>> kept, held = split_rows(10, fraction=0.2, seed=0)
        >>> len(kept), len(held)
        (8, 2)
    """
    _require_fraction(fraction)
    if count < 2:
        raise DataError(f"Rows that are to be split: {count}.", remedy="Give at least two rows.")
    held = min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]).tolist(), np.sort(order[:held]).tolist()


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows in two so that both parts hold every class that has at least two rows.

    Args:
        labels: (rows,) class indices from 0.
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Same seed, same split.

    Returns:
        Indices of the rows kept and of the rows held out, both ascending. A class with one row stays in the first.

    Raises:
        DataError: No class has two rows.
        ValueError: A fraction outside (0, 1).

    Example:
        >>> kept, held = stratified_split([0, 0, 0, 0, 1, 1, 1, 1, 2], fraction=0.5, seed=0)
        >>> len(kept), len(held)
        (5, 4)
    """
    _require_fraction(fraction)
    counts = np.bincount(np.asarray(labels, dtype=np.int64))
    if not len(counts) or counts.max() < 2:
        raise DataError(
            f"{len(labels)} rows without two of one class cannot be split.",
            remedy="Give an evaluation file, or more rows.",
        )
    lowest, highest = np.where(counts > 1, 1, 0), np.maximum(counts - 1, 0)
    held = _draw(labels, _shares(counts, round(fraction * len(labels)), lowest, highest), seed)
    is_held = set(held)
    return [row for row in range(len(labels)) if row not in is_held], held


def _require_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}.")


def _shares(
    counts: NDArray[np.int64], total: int, lowest: NDArray[np.int64], highest: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`total` rows shared out over classes by largest remainder, each class within its bounds, which come first."""
    quota = counts * (total / counts.sum())
    shares = np.clip(np.floor(quota).astype(np.int64), lowest, highest)
    by_remainder = np.argsort(np.floor(quota) - quota, kind="stable")
    while shares.sum() < total and (shares < highest).any():
        for label in by_remainder:
            shares[label] += int(shares.sum() < total and shares[label] < highest[label])
    while shares.sum() > total and (shares > lowest).any():
        shares[np.argmax(shares - lowest)] -= 1
    return shares


def _draw(labels: Sequence[int], shares: NDArray[np.int64], seed: int) -> list[int]:
    """Row indices, ascending: of every class as many as its share, drawn at random."""
    rng, by_class = np.random.default_rng(seed), np.asarray(labels)
    drawn = [rng.permutation(np.flatnonzero(by_class == label))[:share] for label, share in enumerate(shares)]
    return [int(row) for row in np.sort(np.concatenate(drawn))]
