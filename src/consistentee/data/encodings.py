"""Bytes as lines of text: UTF-8, UTF-16 with a byte-order mark, lone carriage returns; what to do about the rest."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from consistentee.errors import DataError

_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_NO_TEXT: dict[re.Pattern[bytes], tuple[str, str]] = {
    re.compile(begin, re.DOTALL): (
        f"It is compressed by {name}.",
        f"Unpack it, or give its text on standard input: {command} FILE | consistentee predict MODEL -.",
    )
    for begin, name, command in (
        (rb"\x1f\x8b", "gzip", "zcat"),
        (rb"BZh[1-9]1AY&SY", "bzip2", "bzcat"),
        (rb"\xfd7zXZ\0", "xz", "xzcat"),
        (rb"\x28\xb5\x2f\xfd", "zstd", "zstdcat"),
    )
} | {
    re.compile(rb"PK\x03\x04"): (
        "It is a ZIP archive, as spreadsheets are, and no text.",
        "Unpack it; save a spreadsheet as CSV.",
    ),
    re.compile(rb"ARROW1\0|\xff{4}"): (
        "It is an Arrow file, and no text.",
        "Give the whole folder that datasets saved, or write Parquet.",
    ),
    re.compile(rb"PAR1[\0-\x08\x0e-\x1f]"): (
        "It is a Parquet file, and no text.",
        "Let its name end in .parquet.",
    ),
}
"""How files begin that are no text: what they are, and what to do."""

_MOSTLY = 0.3  # share of zero bytes from which a text has two bytes a character


def file_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, line ends kept, of a text file; errors and line ends as in `decoded_lines`."""
    with path.open("rb") as stream:
        yield from decoded_lines(stream, str(path))


def decoded_lines(stream: IO[str] | IO[bytes], file: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, line ends kept, of a stream of bytes or of text; nothing is read ahead.

    A byte-order mark says UTF-16 or UTF-32; without one it is UTF-8. A text whose lines all end with a carriage return
    alone (Excel's "CSV (Macintosh)") has its lines, too, which then end with a line feed.

    Args:
        stream: Of bytes or of text.
        file: Name for messages.

    Raises:
        DataError: Bytes that are no text in that encoding; the remedy is for what they seem to be.
    """
    texts = _texts(stream, file)
    first = next(texts, "").removeprefix("\ufeff")
    begin = _macintosh_lines(first) if "\r" in first and not first.endswith("\n") else [first]
    if first:
        yield from enumerate(itertools.chain(begin, texts), start=1)


def _texts(stream: IO[str] | IO[bytes], file: str) -> Iterator[str]:
    """Lines as text. A stream of text decodes ahead of its lines, so that an error there has no line."""
    lines = iter(stream)
    for number in itertools.count(1):
        try:
            line = next(lines, None)
        except UnicodeDecodeError as error:
            raise _not_utf8(error.object, error.start, file, None) from None
        if line is None:
            return
        if isinstance(line, bytes):
            encoding = _encoding(line, file) if number == 1 else None
            if encoding is not None:
                yield from _decoded(itertools.chain([line], lines), encoding, file)
                return
            try:
                line = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(error.object, error.start, file, number) from None
        yield str(line)


def _encoding(first: bytes, file: str) -> str | None:
    """The encoding that the first line's byte-order mark names, None for UTF-8.

    Raises:
        DataError: There is none, and every other byte is zero, or it is the beginning of no text at all.
    """
    for begin, (problem, remedy) in _NO_TEXT.items():
        if begin.match(first):
            raise DataError(problem, file=file, remedy=remedy)
    for mark, encoding in _BOMS.items():
        if first.startswith(mark):
            return encoding
    even, odd = first[::2].count(0), first[1::2].count(0)
    if even + odd > _MOSTLY * len(first):
        name = "UTF-16BE" if even > odd else "UTF-16LE"
        raise DataError(
            f"The text seems to be {name} without a byte-order mark: every other byte is zero.",
            file=file,
            row=1,
            remedy=f"Convert it: iconv -f {name} -t UTF-8.",
        )
    return None


def _decoded(lines: Iterable[str | bytes], encoding: str, file: str) -> Iterator[str]:
    """Lines of an encoding of two or four bytes a character, in which a line feed is not its one byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    rest = ""
    number = 1
    for line, is_last in _with_last(lines):
        try:
            rest += decoder.decode(line if isinstance(line, bytes) else line.encode(), is_last)
        except UnicodeDecodeError as error:
            raise DataError(
                f"There are bytes that are not {encoding.upper()}: {error.reason}.",
                file=file,
                row=number,
                remedy="The file seems to be damaged there, or cut off: write it again.",
            ) from None
        *whole, rest = rest.split("\n")
        for text in whole:
            number += 1
            yield text + "\n"
    if rest:
        yield rest


def _with_last(lines: Iterable[str | bytes]) -> Iterator[tuple[str | bytes, bool]]:
    yield from ((line, False) for line in lines)
    yield b"", True


def _macintosh_lines(text: str) -> list[str]:
    """The lines of a whole text that has carriage returns, and not a single line feed."""
    *whole, rest = text.split("\r")
    return [line + "\n" for line in whole] + ([rest] if rest else [])


def _not_utf8(line: bytes, start: int, file: str, row: int | None) -> DataError:
    """The error about bytes that are not UTF-8, with the remedy for what they seem to be."""
    problem = f"There are bytes that are not UTF-8 (0x{line[start]:02x})"
    high = [place for place, byte in enumerate(line) if byte >= 0x80]
    alone = sum(
        not (line[place - 1 : place] >= b"\x80" or line[place + 1 : place + 2] >= b"\x80") for place in high
    )
    read = [character for character in line.decode(errors="replace") if not character.isascii()]
    if 2 * read.count("\ufffd") < len(read):
        problem += "; other characters of the line are UTF-8, so it is damaged there."
        remedy = "Correct that character, or remove the line."
    elif 2 * alone < len(
        high
    ):  # letters with accents stand among plain ones, those of Chinese or Russian do not
        problem += "; they are of another encoding, such as GB18030, Shift_JIS, EUC-KR or Windows-1251."
        remedy = "Convert it from the encoding that it was written in: iconv -f ENCODING -t UTF-8."
    elif b"\r" in line and b"\n" not in line:
        problem += "; with lines that end with a carriage return, they seem to be Mac OS Roman."
        remedy = "Convert it: iconv -f MACINTOSH -t UTF-8, or save it as UTF-8."
    elif _is_windows(line):
        problem += "; they seem to be Windows-1252 (Latin 1)."
        remedy = "Convert it: iconv -f WINDOWS-1252 -t UTF-8, or save it as UTF-8."
    else:
        problem += ", nor of Windows-1252."
        remedy = "Find out what it was written in, and convert it: iconv -f ENCODING -t UTF-8."
    return DataError(problem, file=file, row=row, remedy=remedy)


def _is_windows(line: bytes) -> bool:
    """Whether a line makes sense as Windows-1252: what stands inside words are letters."""
    try:
        text = f" {line.decode('cp1252')} "
    except UnicodeDecodeError:
        return False
    return not any(
        character >= "\x80"
        and before.isascii()
        and before.isalpha()
        and after.isascii()
        and after.isalpha()
        and not (character.isalpha() or character in "\u2019\u2013\u2014\xad")
        for before, character, after in zip(text, text[1:], text[2:], strict=False)
    )
