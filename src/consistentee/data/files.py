"""Files as rows: CSV, TSV, JSON lines, Parquet, `datasets` folders and plain text, read one row at a time.

Every complaint names the file, the row counted from 1, and what to do. How lines become rows is in `parsing`.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from consistentee.data.encodings import decoded_lines, file_lines
from consistentee.data.hub import FORMATS, HUB_PREFIX, datasets_folder, hub_source, hub_table, parquet_table
from consistentee.data.parsing import parse, quoted
from consistentee.data.tables import Table
from consistentee.errors import DataError

_log = logging.getLogger(__name__)

T = TypeVar("T")
Source = str | os.PathLike[str] | IO[str] | IO[bytes]

_DESCRIPTOR = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/\w+/fd/\d+")  # they seem to be the file behind them
_ARRAY_BEGINS = re.compile(r"\s*\[\s*(\{|$)")
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w.-]*")

KNOWN_TEXT_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
)
"""Columns that are taken for the text where none are named."""

TO_ANSWER, TO_CERTIFY, TO_LEARN = ("test", "validation", "train"), ("validation", "test"), ("train",)
"""Splits by what rows are read for, the first that is there; others must be named to be learnt from or certified on."""


def open_table(
    path: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("train",),
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Table:
    """The rows of a CSV, TSV, JSON or Parquet file or of a folder written by `datasets.save_to_disk`.

    Args:
        path: File or folder, or a data set on the hub (`hub_source`). JSON is objects, one a line or in one array. A
            folder may also be a hub's data set, downloaded.
        splits: Where there are several splits, the first of these that is there is read.
        header: Column names of a TSV file without a header line.
        skip_broken: Whether broken rows are left out and kept in the table's `skipped`, rather than raised.

    Returns:
        The table. Errors inside the file are raised while its rows are read.

    Raises:
        DataError: The file is missing, or of no known format, or the hub's data set cannot be loaded.
    """
    on_hub = hub_source(path)
    if on_hub is not None:
        return hub_table(on_hub, os.fspath(path), splits)
    path = Path(path)
    if not path.exists():
        raise DataError("There is no such file or folder.", file=path, remedy="Check the path.")
    if path.is_dir():
        return datasets_folder(path, splits)
    match FORMATS.get(path.suffix.lower()):
        case "parquet":
            return parquet_table(path)
        case "csv" | "tsv" | "jsonl":
            return _text_table(path, header, [] if skip_broken else None)
        case _:
            remedy = f"Give a file that ends in {', '.join(FORMATS)}, or a folder written by datasets.save_to_disk."
            raise DataError(f'The ending "{path.suffix}" is not known.', file=path, remedy=remedy)


def read_source(
    source: Source,
    read: Callable[[Table], Iterator[T]],
    *,
    columns: Sequence[str] = (),
    plain_too: bool = False,
    pairs: bool | None = None,
    splits: Sequence[str] = TO_ANSWER,
    known: Sequence[Sequence[str]] = (),
) -> Iterator[T]:
    """What a function makes of the rows of an input, one after the other, without ever holding the whole input.

    Args:
        source: A file, "-" for standard input, an open stream, a `datasets` folder, or `hf:user/name` (`hub_source`).
            Files go by their ending: `.csv` and `.tsv` with a header line, `.jsonl` and `.json` (objects, one a line or
            in one array), `.parquet`, anything else plain text. A stream, also a pipe or a device by its name, is JSON
            lines if it starts with "{", an array if with "[{", a table with a header line (TSV if that has a tab) where
            columns are named or the first line is nothing but column names, known ones among them, else plain text.
            Plain text is one column, "text", or two, "text_a" and "text_b".
        read: Takes the table.
        columns: Those that are named.
        plain_too: Whether a stream whose first line does not hold them all is plain text, rather than a table that
            lacks them.
        pairs: Whether a tab in plain text separates the two texts of a pair; None lets the first line decide.
        splits: Where there are several splits, the first of these that is there is read, and a warning says which.
        known: Columns, one set of which the header of a table without named columns holds.

    Raises:
        DataError: A file that is missing, or columns of a file of plain text; others as they are read.
    """
    if not isinstance(source, (str, os.PathLike)):
        file = str(getattr(source, "name", "the stream"))
        lines = decoded_lines(source, file)
    elif os.fspath(source) == "-":
        file = "standard input"
        lines = decoded_lines(getattr(sys.stdin, "buffer", sys.stdin), file)
    elif os.fspath(source).startswith(HUB_PREFIX) or Path(source).is_dir():
        table = open_table(source, splits=splits)
        if table.split is not None:
            _log.warning('Of the splits of %s, "%s" is read.', os.fspath(source), table.split)
        return read(table)
    else:
        path = Path(source)
        if not path.exists():
            remedy = 'Check the path, or give "-" for standard input.'
            raise DataError("There is no such file.", file=path, remedy=remedy)
        if not is_stream(os.fspath(source)):
            if path.suffix.lower() in FORMATS:
                return read(open_table(path))
            if columns:
                problem = "It is plain text, with a text on each line and no columns."
                remedy = f"Name none, or give a file of columns, which ends in {', '.join(FORMATS)}."
                raise DataError(problem, file=path, remedy=remedy)
            return read(_text_table(path, pairs=pairs))
        file, lines = str(path), file_lines(path)

    def of_stream() -> Iterator[T]:
        first = list(itertools.islice(lines, 1))
        begin = first[0][1] if first else ""
        file_format = _json_format(begin) or _line_format(begin, columns, plain_too, known)
        if not columns and file_format in ("csv", "tsv"):
            _log.warning(
                'The first line of %s, "%.60s", is a table\'s header: read as %s.',
                file,
                begin.strip(),
                file_format.upper(),
            )
        rows = parse(itertools.chain(first, lines), file, file_format, pairs=pairs)
        unit = "row" if file_format == "json array" else "line"
        yield from read(Table(file, rows, unit, is_plain=file_format == "text"))

    return of_stream()


def is_stream(source: str) -> bool:
    """Whether it can be read once only: standard input, also by its name, a pipe or a device."""
    path = Path(source)
    if source == "-" or _DESCRIPTOR.fullmatch(source):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def may_have_columns(source: str) -> bool:
    """Whether a file, data set or stream by name may have columns: all but files of plain text."""
    path = Path(source)
    is_known = source.startswith(HUB_PREFIX) or path.suffix.lower() in FORMATS or path.is_dir()
    return is_known or is_stream(source)


def read_texts(
    source: Source,
    text_columns: Sequence[str] | None = None,
    *,
    plain_too: bool = False,
    pairs: bool | None = None,
    splits: Sequence[str] = TO_ANSWER,
    skip_broken: bool = True,
    on_row: Callable[[Table, int, Mapping[str, Any]], object] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Texts to predict, or to learn from, one after the other.

    Args:
        source: As in `read_source`.
        text_columns: One or two columns; by default the first of KNOWN_TEXT_COLUMNS that the input has.
        plain_too: As in `read_source`.
        pairs: Whether every row is a pair of texts. If not, a tab is part of a text. None lets the input decide.
        splits: As in `read_source`.
        skip_broken: Whether a few broken rows of the hub, which nobody can correct, are left out with a warning. If
            not, they raise as others do.
        on_row: Called with table, number and values of every row, before its texts are given.

    Yields:
        Tuples of one text, or of two for pairs; the same number throughout.

    Raises:
        DataError: A file that is missing or empty, columns of a file of plain text, a row that is broken or whose text
            is empty, bytes that are no text (`encodings`), or no column that can be taken for the text.
    """
    if text_columns is not None and len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns must be one column or two, got {len(text_columns)}.")
    if text_columns is not None and pairs is not None and len(text_columns) != 1 + pairs:
        wanted = "two columns for pairs of texts" if pairs else "one column for single texts"
        raise ValueError(f"text_columns must be {wanted}, got {len(text_columns)}.")

    def texts(table: Table) -> Iterator[tuple[str, ...]]:
        columns, table = table.with_columns()
        taken = (None if table.is_plain else text_columns) or next(
            (
                known
                for known in KNOWN_TEXT_COLUMNS
                if set(known) <= set(columns) and pairs in (None, len(known) == 2)
            ),
            None,
        )
        if taken is None:
            what = "pair of texts" if pairs else "text"
            problem = f"None of its columns is known to hold the {what}; it has {quoted(columns)}."
            remedy = "Name the two text columns." if pairs else "Name the text columns."
            raise table.error(None, problem, remedy)

        def usable(row: int, values: Mapping[str, Any]) -> tuple[str, ...]:
            found = table.texts_of(row, values, taken)
            if on_row is not None:
                on_row(table, row, values)
            return found

        yield from (table if skip_broken else replace(table, skipped=None)).usable(usable)

    return read_source(
        source,
        texts,
        columns=text_columns or (),
        plain_too=plain_too,
        pairs=pairs,
        splits=splits,
        known=[names for names in KNOWN_TEXT_COLUMNS if pairs in (None, len(names) == 2)],
    )


def _json_format(begin: str) -> str | None:
    """The format of a text by how it begins: "jsonl" or "json array", None where it is neither."""
    if begin.lstrip().startswith("{"):
        return "jsonl"
    return "json array" if _ARRAY_BEGINS.match(begin) else None


def _line_format(
    begin: str, columns: Sequence[str], plain_too: bool, known: Sequence[Sequence[str]] = ()
) -> str:
    """The format of a text that is no JSON, by its first line.

    Args:
        begin: the line.
        columns: those that are named: with any it is "tsv" or "csv".
        plain_too: whether it is "text" all the same where it does not hold them.
        known: columns, one set of which a header holds beside others; without named columns any other line is "text".
    """
    file_format = "tsv" if "\t" in begin else "csv"
    if columns and not plain_too:
        return file_format
    try:
        (header,) = [begin.split("\t")] if file_format == "tsv" else csv.reader([begin])
    except (ValueError, csv.Error):  # no header is that long
        return "text"
    if columns:
        return file_format if set(columns) <= {name.strip() for name in header} else "text"
    names = [*header[:-1], header[-1].rstrip("\r\n")] if header else []
    is_header = len(names) > 1 and len(set(names)) == len(names) and all(map(_COLUMN_NAME.fullmatch, names))
    return file_format if is_header and any(set(some) <= set(names) for some in known) else "text"


def _text_table(
    path: Path,
    header: Sequence[str] | None = None,
    skipped: list[DataError] | None = None,
    pairs: bool | None = None,
) -> Table:
    """The rows of a file of lines; the JSON lines of a file may also be one array."""
    file_format = FORMATS.get(path.suffix.lower(), "text")
    unit = "line"
    if file_format == "jsonl":
        with path.open("rb") as stream:
            begin = stream.read(1024).lstrip(b"\xef\xbb\xbf\xff\xfe").replace(b"\0", b"")
        if begin.lstrip().startswith(b"["):
            file_format, unit = "json array", "row"
    rows = parse(file_lines(path), str(path), file_format, header, skipped, pairs)
    return Table(str(path), rows, unit, skipped=skipped, is_plain=file_format == "text")
