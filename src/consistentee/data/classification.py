"""Labelled texts, by task or from files of one's own. How a label is written, and what it means, is in `labels`."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consistentee.data.files import open_table
from consistentee.data.labels import (
    is_nameless,
    match_labels,
    names_of_nameless,
    number_on_a_scale,
    numbers_as_written_once,
    same_number_twice,
)
from consistentee.data.parsing import quoted
from consistentee.data.rows import TextDataset
from consistentee.data.sources import no_training_rows, task_tables
from consistentee.data.spooled import text_digest
from consistentee.data.tables import Table
from consistentee.data.tasks import LabelColumns, get_task
from consistentee.errors import DataError


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
    aliases = task.label_aliases
    if names and task.label_names and is_nameless(names) and len(names) == len(task.label_names):
        own = dict(zip(task.label_names, names, strict=True))
        aliases = own | {alias: own[name] for alias, name in aliases.items()}
    train_table, evaluation_table = task_tables(task, data_dir)
    if train_table is None and (need_train or names is None):
        reason = "to train on" if need_train else "to learn the label names from"
        raise no_training_rows(task, data_dir, reason)
    train = None
    if train_table is not None:
        train = _labelled(_read(train_table, task.layouts), names, aliases, training=True)
        names = train.label_names
    if evaluation_table is None:
        raise DataError(f'There are no evaluation rows of task "{task.name}".', file=data_dir)
    evaluation = _read(evaluation_table, task.layouts)
    return train, _labelled(evaluation, names, aliases, training=False)


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


class NotedLabels:
    """Labels of texts that nothing learns from, noted while the texts are read; rows may lack one.

    Args:
        text_columns: One column, or two for pairs.
        label_column: The column of the label.
    """

    def __init__(self, text_columns: Sequence[str], label_column: str) -> None:
        self.text_columns, self.label_column = tuple(text_columns), label_column
        self._labels: dict[bytes, str] = {}  # by the text's digest: there may be millions
        self._first: dict[str, tuple[Table, int]] = {}
        self._files: set[str] = set()

    def note(self, table: Table, row: int, values: Mapping[str, Any]) -> None:
        """Keep a row's label, if it has one; the first counts where a text has several.

        Raises:
            DataError: The first row of a file has no such column, or a label is no class.
        """
        if table.file not in self._files and self.label_column not in values:
            problem = f'There is no column "{self.label_column}".'
            remedy = (
                "Name the column of the label as the file does; a first row without a label has it empty."
            )
            raise table.error(row, problem, f"Columns here: {quoted(values)}. {remedy}")
        self._files.add(table.file)
        value = values.get(self.label_column)
        if not _is_missing(value):
            label = sys.intern(_label_text(table, row, self.label_column, value))
            self._first.setdefault(label, (table, row))
            self._labels.setdefault(text_digest(table.texts_of(row, values, self.text_columns)), label)

    def classes_of(
        self, texts: Iterable[tuple[str, ...]], label_names: Sequence[str]
    ) -> dict[tuple[str, ...], int]:
        """Class indices of these texts, without those that have no label.

        Raises:
            DataError: A label is not among the names, whosever it is.
        """
        classes = {name: index for index, name in enumerate(label_names)}
        declared = {table.class_labels.get(self.label_column) for table, _ in self._first.values()}
        aliases = names_of_nameless(label_names, declared.pop() if len(declared) == 1 else None)
        index_of = match_labels(
            self._first, {alias: classes[name] for alias, name in aliases.items()} | classes
        )
        for label, (table, row) in self._first.items():
            if label not in index_of:
                problem = f'Label "{label}" is not known; known labels: {quoted(label_names)}.'
                raise table.error(row, problem, "Correct it, or name another label column, or none.")
        labels = {text: self._labels.get(text_digest(text)) for text in texts}
        return {text: index_of[label] for text, label in labels.items() if label is not None}


@dataclass(frozen=True)
class _Rows:
    """Rows as read, labels still as the file writes them."""

    table: Table
    numbers: list[int]
    texts: list[tuple[str, ...]]
    labels: list[str]
    declared_names: tuple[str, ...] | None


def _read(table: Table, layouts: Sequence[LabelColumns]) -> _Rows:
    layout, table = table.with_layout(layouts)

    def row(number: int, values: Mapping[str, Any]) -> tuple[int, tuple[str, ...], str]:
        texts = table.texts_of(number, values, layout.text)
        label = table.value_of(number, values, layout.label)
        return number, texts, _label_text(table, number, layout.label, label)

    found = list(table.usable(row))
    return _Rows(
        table,
        [number for number, _, _ in found],
        [texts for _, texts, _ in found],
        [label for _, _, label in found],
        table.class_labels.get(layout.label),
    )


def _is_missing(label: Any) -> bool:
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def _label_text(table: Table, number: int, column: str, value: Any) -> str:
    """A label as the string that names its class: 1, 1.0 and " 1" are all "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, (str, int)) else None
    if _is_missing(value):
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
        _require_classes(rows)
        labels = _one_spelling(rows)
    seen = Counter(labels)
    names = label_names or rows.declared_names or _learned_names(seen)
    if len(set(names)) < len(names):
        raise ValueError(f"label_names must differ, got {quoted(names)}.")
    classes = {name: index for index, name in enumerate(names)}
    aliases = {**names_of_nameless(names, rows.declared_names), **aliases}
    known = match_labels(aliases.values(), classes)  # a model may write the task's names in other letters
    written = {alias: known[name] for alias, name in aliases.items() if name in known}
    index_of = match_labels(seen, written | classes)
    for number, label in zip(rows.numbers, labels, strict=True):
        if label not in index_of:
            remedy = "Correct it, leave its rows out, or train on rows of this class, too."
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


def _require_classes(rows: _Rows) -> None:
    """Raise a DataError where the labels are numbers that are not all whole."""
    label = number_on_a_scale(rows.labels)
    if label is not None:
        problem = f'Label "{label}" is not a whole number, and all labels are numbers.'
        row = rows.numbers[rows.labels.index(label)]
        raise rows.table.error(row, problem, "Give classes, not numbers on a scale.")


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
