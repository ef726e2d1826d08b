"""Rows of one file or data set, read as they are asked for. Every complaint names the file, the row, and what to do."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from consistentee.data.parsing import quoted, raise_or_skip
from consistentee.errors import DataError

_log = logging.getLogger(__name__)

BROKEN_SHARE = 0.01  # more broken rows than this and the file is not what it claims to be


class ColumnSet(Protocol):
    """A set of columns that a file may have."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there, what is to be learned last."""
        ...


SomeColumns = TypeVar("SomeColumns", bound=ColumnSet)
Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """Rows of one file, read as they are asked for.

    Args:
        file: Name for messages.
        rows: Pairs of the row's number, from 1, and its values by column.
        unit: What the number counts, "line" or "row".
        class_labels: Class names by column, where the file itself declares them (`datasets.ClassLabel`).
        skipped: Collects the errors of broken rows, which are then left out; None raises the first.
        split: The split that was taken of several; None where there is one, or one was named.
        is_plain: Whether it is plain text, whose columns have no names of its own.
    """

    file: str
    rows: Iterator[tuple[int, Mapping[str, Any]]]
    unit: str = "line"
    class_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    skipped: list[DataError] | None = None
    split: str | None = None
    is_plain: bool = False

    def error(self, row: int | None, problem: str, remedy: str) -> DataError:
        """The error that is to be raised about a row of this table."""
        return DataError(problem, file=self.file, row=row, unit=self.unit, remedy=remedy)

    def with_columns(self) -> tuple[tuple[str, ...], Table]:
        """The columns of the first row, and the same table with that row still to come.

        Raises:
            DataError: There is no row.
        """
        rows = iter(self.rows)
        first = next(rows, None)
        if first is None:
            raise self.error(None, "There is no row of data in it.", "Give a file with at least one row.")
        return tuple(first[1]), replace(self, rows=itertools.chain([first], rows))

    def with_layout(self, layouts: Sequence[SomeColumns]) -> tuple[SomeColumns, Table]:
        """The first set of columns that is there, and the same table with its first row still to come.

        Raises:
            DataError: None is there; the message lists the columns.
        """
        columns, table = self.with_columns()
        layout = next((layout for layout in layouts if set(layout.needed) <= set(columns)), None)
        if layout is None:
            problem = (
                f"There is no column {quoted(name for name in layouts[0].needed if name not in columns)}."
            )
            if len(layouts) > 1:
                wanted = " or ".join(f"({quoted(layout.needed)})" for layout in layouts)
                problem = f"It has none of the sets of columns {wanted}."
            remedy = f"Columns here: {quoted(columns)}. Name the columns as the file does, or rename those of the file."
            raise self.error(1, problem, remedy)
        return layout, table

    def usable(self, read: Callable[[int, Mapping[str, Any]], Row]) -> Iterator[Row]:
        """What a function makes of every row; broken rows raise, or are left out where they are collected.

        Raises:
            DataError: A broken row; at the end, where they are collected, that they are more than BROKEN_SHARE.
        """
        count = 0
        for number, values in self.rows:
            try:
                found = read(number, values)
            except DataError as error:
                raise_or_skip(error, self.skipped)
                continue
            count += 1
            yield found
        if self.skipped:
            if len(self.skipped) > BROKEN_SHARE * (count + len(self.skipped)):
                raise self.skipped[0]
            _log.warning("Broken rows skipped: %d. The first: %s", len(self.skipped), self.skipped[0])

    def texts_of(self, row: int, values: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
        """The text columns of a row, checked to be text that is not empty."""
        return tuple(self._text(row, column, self.value_of(row, values, column)) for column in columns)

    def value_of(self, row: int, values: Mapping[str, Any], column: str) -> Any:
        """One column of a row.

        Raises:
            DataError: The row has no such column; the message lists those it has.
        """
        if column not in values:
            raise self.error(row, f'There is no column "{column}".', f"Columns here: {quoted(values)}.")
        return values[column]

    def _text(self, row: int, column: str, value: Any) -> str:
        if value is None or (isinstance(value, str) and not value.strip()):
            problem = f'The text in column "{column}" is empty.'
            raise self.error(row, problem, f"Fill it in or remove the {self.unit}.")
        if not isinstance(value, str):
            raise self.error(
                row,
                f'Column "{column}" must hold text, got {type(value).__name__} {str(value)[:40]!r}.',
                "Name the column that holds the text, or write the value as a string.",
            )
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                problem = f'The text in column "{column}" holds half a surrogate pair, which is no character.'
                raise self.error(row, problem, "Write the character as UTF-8.") from None
        return value
