"""Labelled texts: loading them by task or from files, and splitting them.

What a file looks like is the business of `files`, what a task looks like that of `tasks`, and what becomes of the texts
on their way into the model that of `batches`; the names of `batches` that everybody needs are here too.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consistentee.data.batches import LengthGroupedBatches, TokenizedDataset, collate, encode_texts, tokenize
from consistentee.data.files import Table, open_table, read_texts, table_of
from consistentee.data.labels import match_labels, numbers_as_written_once, same_number_twice
from consistentee.data.parsing import quoted, raise_or_skip
from consistentee.data.tasks import ClassificationTask, LabelColumns, get_task, plain_name
from consistentee.errors import DataError

__all__ = [
    "LengthGroupedBatches",
    "TextDataset",
    "TokenizedDataset",
    "collate",
    "encode_texts",
    "load_files",
    "load_task",
    "read_texts",
    "stratified_split",
    "tokenize",
]

_log = logging.getLogger(__name__)

LOCAL_ENDINGS = (".tsv", ".jsonl", ".csv", ".parquet", ".json")
BROKEN_SHARE = 0.01  # more broken rows than this and the file is not what it claims to be


@dataclass(frozen=True)
class TextDataset:
    """Labelled texts, or pairs of texts.

    Args:
        texts: One tuple a row, of one text or of two.
        labels: (rows,) class indices into `label_names`.
        label_names: Class names by index.
        source: Where the rows come from, for messages and records.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    label_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(
                f"texts and labels must be equally many, got {len(self.texts)} and {len(self.labels)}."
            )

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> TextDataset:
        """The rows with these indices, in their order."""
        rows = [int(index) for index in indices]
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        return TextDataset(texts, labels, self.label_names, self.source)

    def max_samples(self, count: int | None, seed: int = 0) -> TextDataset:
        """At most `count` rows, drawn so that every class keeps its share; the rows keep their order.

        Args:
            count: The number of rows to keep, at least 1; None keeps all.
            seed: Same seed, same rows.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        if count is None or count >= len(self):
            return self
        counts = np.bincount(self.labels)
        lowest = np.minimum(counts, 1) if count >= np.count_nonzero(counts) else np.zeros_like(counts)
        return self.select(_draw(self.labels, _shares(counts, count, lowest, counts), seed))


def load_task(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    label_names: Sequence[str] | None = None,
    need_train: bool = False,
) -> tuple[TextDataset | None, TextDataset]:
    """Training and evaluation rows of a task, from the hub or from a local folder.

    Args:
        name: A task of `tasks.TASKS`.
        data_dir: The task's folder, or the folder that holds it (GLUE's own layout, `text<TAB>label`, JSON lines of
            `text_a`, `text_b`, `label`); None loads from the hub.
        label_names: Class names by index, for a model that has its own order; None takes the task's.
        need_train: Whether a missing training file is an error.

    Returns:
        The training rows (None where the folder has no training file) and the evaluation rows: GLUE's dev set, or
        the test set where it has labels.

    Raises:
        DataError: A missing or broken file; the message names file, row and remedy.
        ValueError: An unknown task.
    """
    task = get_task(name)
    names = tuple(label_names) if label_names is not None else task.label_names
    train_table, evaluation_table = _hub_tables(task) if data_dir is None else _local_tables(task, data_dir)
    if train_table is None and (need_train or names is None):
        reason = "to train on" if need_train else "to learn the label names from"
        raise DataError(
            f'There is no training file of task "{task.name}" {reason}.',
            file=data_dir,
            remedy=f"Put {' or '.join('train' + ending for ending in LOCAL_ENDINGS)} there.",
        )
    train = None
    if train_table is not None:
        train = _labelled(_read(train_table, task.layouts), names, task.label_aliases, training=True)
        names = train.label_names
    evaluation_rows = _read(evaluation_table, task.layouts)
    return train, _labelled(evaluation_rows, names, task.label_aliases, training=False)


def load_files(
    train_file: str | os.PathLike[str] | None,
    eval_file: str | os.PathLike[str] | None,
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str] | None = None,
) -> tuple[TextDataset | None, TextDataset | None]:
    """Training and evaluation rows from files of one's own.

    Args:
        train_file: CSV, TSV, JSON lines or Parquet file, or a `datasets.save_to_disk` folder; None for none.
        eval_file: The same; of a folder with several splits, "validation" is read, else "test".
        text_columns: One column, or two for pairs.
        label_column: The column of the label, strings or integers.
        label_names: Class names by index; None learns them: from the file where it declares them, else from the
            labels of the training file (of the evaluation file where there is no other), integers in numerical order,
            strings in alphabetical order.

    Returns:
        The training rows and the evaluation rows, each None where no file was given.

    Raises:
        DataError: A missing or broken file, an unknown label, a single class; the message names file, row and remedy.
        ValueError: No file, or column names that make no sense.
    """
    if train_file is None and eval_file is None:
        raise ValueError("train_file or eval_file must be given, got neither.")
    if isinstance(text_columns, str) or len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns must be a list of one column or two, got {text_columns!r}.")
    if label_column in text_columns or len(set(text_columns)) < len(text_columns):
        raise ValueError(
            f"Columns must differ, got text columns {quoted(text_columns)} and label column {label_column!r}."
        )
    layouts = (LabelColumns(tuple(text_columns), label_column),)
    names = tuple(label_names) if label_names is not None else None
    train = evaluation = None
    if train_file is not None:
        train = _labelled(_read(open_table(train_file), layouts), names, {}, training=True)
        names = train.label_names
    if eval_file is not None:
        table = open_table(eval_file, splits=("validation", "test"))
        evaluation = _labelled(_read(table, layouts), names, {}, training=False)
    return train, evaluation


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
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}.")
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


@dataclass(frozen=True)
class _Rows:
    """Rows as read, labels still as the file writes them."""

    table: Table
    numbers: list[int]
    texts: list[tuple[str, ...]]
    labels: list[str]
    declared_names: tuple[str, ...] | None


def _read(table: Table, layouts: Sequence[LabelColumns]) -> _Rows:
    """Every row of a table; broken ones raise, or are left out with a warning where the table collects them."""
    columns, table = table.with_columns()
    layout = next((layout for layout in layouts if {*layout.text, layout.label} <= set(columns)), None)
    if layout is None:
        wanted = [(*layout.text, layout.label) for layout in layouts]
        problem = (
            f"It has none of the sets of columns {' or '.join(f'({quoted(names)})' for names in wanted)}."
        )
        if len(wanted) == 1:
            problem = f"There is no column {quoted(name for name in wanted[0] if name not in columns)}."
        remedy = f"Columns here: {quoted(columns)}. Name the columns as the file does, or rename those of the file."
        raise table.error(1, problem, remedy)
    rows = _Rows(table, [], [], [], table.class_labels.get(layout.label))
    for number, values in table.rows:
        try:
            texts = table.texts_of(number, values, layout.text)
            label = _label_text(table, number, layout.label, table.value_of(number, values, layout.label))
        except DataError as error:
            raise_or_skip(error, table.skipped)
            continue
        rows.numbers.append(number)
        rows.texts.append(texts)
        rows.labels.append(label)
    if table.skipped:
        if len(table.skipped) > BROKEN_SHARE * (len(rows.texts) + len(table.skipped)):
            raise table.skipped[0]
        _log.warning("Broken rows skipped: %d. The first: %s", len(table.skipped), table.skipped[0])
    return rows


def _label_text(table: Table, number: int, column: str, value: Any) -> str:
    """A label as the string that names its class: 1, 1.0 and " 1" are all "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, (str, int)) else None
    if value is None or value != value or text == "":
        raise table.error(
            number, f'The label in column "{column}" is missing.', f"Fill it in or remove the {table.unit}."
        )
    if text is None:
        problem = f'The label in column "{column}" must be a string or an integer, got {str(value)[:40]}.'
        raise table.error(number, problem, "Give a class, not a number on a scale.")
    return text


def _labelled(
    rows: _Rows, label_names: tuple[str, ...] | None, aliases: Mapping[str, str], *, training: bool
) -> TextDataset:
    labels = rows.labels
    if label_names is None and rows.declared_names is None:
        labels = _one_spelling(rows)
    seen = Counter(labels)
    names = label_names or rows.declared_names or _learned_names(seen)
    if len(set(names)) < len(names):
        raise ValueError(f"label_names must differ, got {quoted(names)}.")
    classes = {name: index for index, name in enumerate(names)}
    known = match_labels(aliases.values(), classes)  # a model may write the task's names in other letters
    written = {alias: known[name] for alias, name in aliases.items() if name in known}
    index_of = match_labels(seen, written | classes)
    for number, label in zip(rows.numbers, labels, strict=True):
        if label not in index_of:
            remedy = "Correct it, or add rows of this class to the training file."
            raise rows.table.error(
                number, f'Label "{label}" is not known; known labels: {quoted(names)}.', remedy
            )
    if len(names) < 2 or (training and len(seen) < 2):
        raise rows.table.error(
            None,
            f"There is a single class, {quoted(seen)}, in it.",
            "Give rows of at least two classes; check the label column.",
        )
    return TextDataset(rows.texts, [index_of[label] for label in labels], names, rows.table.file)


def _one_spelling(rows: _Rows) -> list[str]:
    """The labels, a whole number always written the same way.

    Raises:
        DataError: One number in two spellings among labels that are not all numbers.
    """
    spelling = numbers_as_written_once(rows.labels)
    twice = same_number_twice(spelling.values())
    if twice is not None:
        places = [rows.numbers[rows.labels.index(label)] for label in twice]
        problem = (
            f'Labels "{twice[0]}" ({rows.table.unit} {places[0]}) and "{twice[1]}" are the same number, and the other '
            "labels are not all whole numbers."
        )
        raise rows.table.error(places[1], problem, "Write a class always in the same way.")
    return [spelling[label] for label in rows.labels]


def _learned_names(labels: Iterable[str]) -> tuple[str, ...]:
    if all(re.fullmatch(r"[+-]?[0-9]+", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _hub_tables(task: ClassificationTask) -> tuple[Table, Table]:
    if task.hub_path is None:
        raise DataError(
            f'Task "{task.name}" has no canonical home on the hub.',
            remedy="Give --data-dir with train.tsv, dev.tsv and test.tsv of text<TAB>label; "
            f"the data are at {task.home}.",
        )
    import datasets

    name = f"{task.hub_path}/{task.hub_config}"
    try:
        splits = datasets.load_dataset(task.hub_path, task.hub_config)
        train, evaluation = splits["train"], splits[task.evaluation_split]
    except Exception as error:  # whatever the network, the hub or the cache comes up with
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "Check the network, or give --data-dir with the task's files."
        raise DataError(
            f"It could not be loaded from the hub: {reason}.", file=name, remedy=remedy
        ) from error
    return (
        table_of(train, f"{name} train", skip_broken=True),  # nobody can correct the rows of the hub
        table_of(evaluation, f"{name} {task.evaluation_split}", skip_broken=True),
    )


def _local_tables(task: ClassificationTask, data_dir: str | os.PathLike[str]) -> tuple[Table | None, Table]:
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError("There is no such folder.", file=root, remedy="Check --data-dir.")
    inner = sorted(
        path for path in root.iterdir() if path.is_dir() and plain_name(path.name) == plain_name(task.name)
    )

    def first_table(folder: Path, stems: Sequence[str]) -> Table | None:
        """The first file that is there, one with labels before one without (GLUE-like test files have none)."""
        unlabelled: Table | None = None
        for path in (folder / f"{stem}{ending}" for stem in stems for ending in LOCAL_ENDINGS):
            if path.is_file():
                header = task.local_header if path.suffix == ".tsv" else None
                columns, table = open_table(
                    path, header=header, skip_broken=task.skip_broken_rows
                ).with_columns()
                if any(layout.label in columns for layout in task.layouts):
                    return table
                unlabelled = unlabelled or table
        return unlabelled

    for folder in (root, *inner):
        evaluation = first_table(folder, task.evaluation_files)
        if evaluation is not None:
            return first_table(folder, ("train",)), evaluation
    looked_for = ", ".join(f"{stem}{LOCAL_ENDINGS[0]}" for stem in task.evaluation_files)
    raise DataError(
        f'There is no evaluation file of task "{task.name}" in it or in its folder "{task.name}".',
        file=root,
        remedy=f"Give the folder that holds one of {looked_for} (or {', '.join(LOCAL_ENDINGS[1:])}).",
    )
