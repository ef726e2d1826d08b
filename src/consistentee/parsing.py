"""Lines of text as rows: CSV, TSV, JSON lines and plain text.

Two rules that surprise people: a TSV file is split on tabs and nothing else (quotes are part of the text, as in GLUE),
and a CSV file follows the CSV rules (a quoted field may hold commas, doubled quotes and line breaks).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from consistentee.errors import DataError

LONGEST_CSV_FIELD = 2**24  # characters; Python's own limit of 131,072 is less than a long document

Numbered = Iterator[tuple[int, Any]]
"""Lines, records or rows with their number in the file, from 1."""


def raise_or_skip(error: DataError, skipped: list[DataError] | None) -> None:
    """Raise the error of a broken row, or note it where broken rows are left out."""
    if skipped is None:
        raise error
    skipped.append(error)


def quoted(names: Iterable[str], limit: int = 20) -> str:
    """Names in quotes for a message, cut after `limit` of them."""
    listed = [f'"{name}"' for name in names]
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")


def parse(
    lines: Numbered,
    file: str,
    file_format: str,
    header: Sequence[str] | None = None,
    skipped: list[DataError] | None = None,
) -> Numbered:
    """Lines of text as numbered rows, values by column.

    Args:
        lines: Numbered lines with their line ends.
        file: Name for messages.
        file_format: "csv", "tsv", "jsonl" or "text".
        header: Column names, where the first line of a TSV does not hold them.
        skipped: Collects the errors of broken rows; None raises the first.
    """
    if file_format == "csv":
        return _delimited(_csv_records(lines, file), file, None, skipped)
    filled = _without_blank_lines(lines, file, skipped)
    if file_format == "tsv":
        return _delimited(((number, line.split("\t")) for number, line in filled), file, header, skipped)
    return _json_objects(filled, file) if file_format == "jsonl" else _plain(filled, file)


def file_lines(path: Path) -> Numbered:
    """Numbered lines, line ends kept, of a UTF-8 file."""
    with path.open("rb") as stream:
        yield from decoded_lines(stream, str(path))


def decoded_lines(stream: IO[str] | IO[bytes], file: str) -> Numbered:
    """Numbered lines, line ends kept, of a stream of bytes or of text."""
    number = 0
    lines = iter(stream)
    while True:
        try:
            line = next(lines, None)
            if line is None:
                return
            number += 1
            text = line if isinstance(line, str) else line.decode("utf-8")
        except UnicodeDecodeError as error:
            row = (
                None if hasattr(stream, "encoding") else number
            )  # a stream of text decodes ahead of its lines
            raise DataError(
                f"There are bytes that are not UTF-8 (0x{error.object[error.start]:02x}).",
                file=file,
                row=row,
                remedy="Convert the file, for example with: iconv -f LATIN1 -t UTF-8.",
            ) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _without_blank_lines(lines: Numbered, file: str, skipped: list[DataError] | None) -> Numbered:
    """Lines without their ends; blank ones may only stand at the end of the file."""
    blank: int | None = None
    for number, line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        if not text.strip():
            blank = blank or number
            continue
        if blank is not None:
            raise_or_skip(DataError("The line is empty.", file=file, row=blank, remedy="Remove it."), skipped)
            blank = None
        yield number, text


def _csv_records(lines: Numbered, file: str) -> Numbered:
    """Records of a CSV file, each with the number of the line on which it starts."""
    csv.field_size_limit(
        max(csv.field_size_limit(), LONGEST_CSV_FIELD)
    )  # the csv module has one for the process
    reader = csv.reader((line for _, line in lines), strict=True)
    blank: int | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"This is not valid CSV: {error}.",
                file=file,
                row=start,
                remedy='Quote fields that hold commas, quotes or line breaks, and double the quotes inside: "a ""b""".',
            ) from None
        if fields is None:
            return
        if not fields:
            blank = blank or start
            continue
        if blank is not None:
            raise DataError("The line is empty.", file=file, row=blank, remedy="Remove it.")
        yield start, fields


def _delimited(
    records: Numbered, file: str, header: Sequence[str] | None, skipped: list[DataError] | None
) -> Numbered:
    for number, fields in records:
        if header is None:
            header = [name.strip() for name in fields]
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                raise DataError(
                    f'Column "{twice}" is there twice.', file=file, row=number, remedy="Rename one of them."
                )
            if len(header) == 1 and ";" in header[0]:
                raise DataError(
                    "The header is separated by semicolons.", file=file, row=number, remedy="Use commas."
                )
            continue
        if len(fields) != len(header):
            remedy = f"The header has {len(header)}: {quoted(header)}. Correct the line" + (
                "; a text that holds tabs needs CSV or JSON lines." if len(fields) > len(header) else "."
            )
            raise_or_skip(
                DataError(f"Fields on this line: {len(fields)}.", file=file, row=number, remedy=remedy),
                skipped,
            )
            continue
        yield number, dict(zip(header, fields, strict=True))


def _json_objects(lines: Numbered, file: str) -> Numbered:
    for number, line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"This is not JSON: {error}.", file=file, row=number, remedy="Write one JSON object a line."
            ) from None
        if not isinstance(values, dict):
            raise DataError(
                "This is not a JSON object.",
                file=file,
                row=number,
                remedy='Write {"text": ...} on each line.',
            )
        yield number, values


def _plain(lines: Numbered, file: str) -> Numbered:
    width = 0
    for number, line in lines:
        texts = line.split("\t")
        width = width or len(texts)
        if len(texts) > 2 or len(texts) != width:
            raise DataError(
                f"There {'is 1 text' if len(texts) == 1 else f'are {len(texts)} texts separated by tabs'}"
                + (f", but the first line has {width}." if len(texts) != width else "."),
                file=file,
                row=number,
                remedy="Give one text a line, or two separated by a tab on every line.",
            )
        yield number, dict(zip(("text",) if width == 1 else ("text_a", "text_b"), texts, strict=True))
