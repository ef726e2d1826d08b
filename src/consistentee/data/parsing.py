"""Lines of text as rows: CSV, TSV, JSON lines and plain text.

Two rules that surprise people: a TSV file is split on tabs and nothing else (quotes are part of the text, as in GLUE),
and a CSV file follows the CSV rules (a quoted field may hold commas, doubled quotes and line breaks).
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from consistentee.errors import DataError

LONGEST_CSV_FIELD = 2**24  # characters; Python's own limit of 131,072 is less than a long document

_SPACE = re.compile(r"[ \t\r\n]*")

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
    pairs: bool | None = None,
) -> Numbered:
    """Lines of text as numbered rows, values by column.

    Args:
        lines: Numbered lines with their line ends.
        file: Name for messages.
        file_format: "csv", "tsv", "jsonl", "json array" (whose rows count its objects) or "text".
        header: Column names, where the first line of a TSV does not hold them.
        skipped: Collects the errors of broken rows; None raises the first.
        pairs: Whether a tab in plain text separates the two texts of a pair; None lets the first line decide.
    """
    if file_format == "csv":
        return _delimited(_csv_records(lines, file), file, None, skipped)
    if file_format == "json array":
        return _json_array("".join(line for _, line in lines), file)
    filled = _without_blank_lines(lines, file, skipped)
    if file_format == "tsv":
        return _delimited(((number, line.split("\t")) for number, line in filled), file, header, skipped)
    return _json_objects(filled, file) if file_format == "jsonl" else _plain(filled, file, pairs)


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
            if "new-line character" in str(error):
                raise DataError(
                    "There is a carriage return (\\r) outside of quotes that ends no line.",
                    file=file,
                    row=start,
                    remedy="End all lines with \\n, or quote the field that holds it.",
                ) from None
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
                f"This is not JSON: {error}.",
                file=file,
                row=number,
                remedy="Write one JSON object a line, or an array of objects: [{...}, {...}].",
            ) from None
        if not isinstance(values, dict):
            raise DataError(
                "This is not a JSON object.",
                file=file,
                row=number,
                remedy='Write {"text": ...} on each line.',
            )
        yield number, values


def _json_array(text: str, file: str) -> Numbered:
    """The objects of an array, on however many lines."""
    decoder = json.JSONDecoder()
    place = text.index("[") + 1

    def broken(row: int, problem: str) -> DataError:
        line = text.count("\n", 0, place) + 1
        remedy = "Write an array of objects, [{...}, {...}], or one JSON object a line."
        return DataError(f"{problem} (line {line}).", file=file, row=row, unit="row", remedy=remedy)

    for row in itertools.count(1):
        place = _behind_space(text, place)
        if text[place : place + 1] == "]":
            if text[place + 1 :].strip():
                raise broken(row, "There is something behind the end of the array")
            return
        if row > 1:
            if text[place : place + 1] != ",":
                raise broken(row, "There is no comma after the object before, and no end of the array")
            place = _behind_space(text, place + 1)
        try:
            values, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise broken(row, f"This is not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(values, dict):
            raise broken(row, "This is not a JSON object")
        place = end
        yield row, values


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _plain(lines: Numbered, file: str, pairs: bool | None) -> Numbered:
    width = 0 if pairs is None else 1 + pairs
    for number, line in lines:
        texts = [line] if pairs is False else line.split("\t")
        width = width or len(texts)
        if len(texts) > 2 or len(texts) != width:
            other = "the model takes pairs" if pairs else f"the first line has {width}"
            raise DataError(
                f"There {'is 1 text' if len(texts) == 1 else f'are {len(texts)} texts separated by tabs'}"
                + (f", but {other}." if len(texts) != width else "."),
                file=file,
                row=number,
                remedy="Give two texts separated by a tab on every line."
                if pairs
                else "Give one text a line, or two separated by a tab on every line.",
            )
        yield number, dict(zip(("text",) if width == 1 else ("text_a", "text_b"), texts, strict=True))
