"""Lines of text in whatever bytes they come: encodings, line ends, and remedies that do not make rubbish."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from consistentee.data.classification import load_files
from consistentee.data.encodings import decoded_lines, file_lines
from consistentee.data.files import read_texts
from consistentee.data.generation import load_generation_files, read_prompts
from consistentee.data.templates import prompt_template
from consistentee.errors import DataError
from tiny import tiny_tokenizer

TEXT = "one\n\u0a0d zwei \u010a\n\nüber ∑\n"  # with characters whose UTF-16 has the byte of a line feed


def lines_of(content: bytes) -> list[str]:
    lines = list(decoded_lines(io.BytesIO(content), "here"))
    assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
    return [line for _, line in lines]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("content", [TEXT, TEXT.rstrip("\n"), TEXT.replace("\n", "\r\n"), "x", "\n"])
def test_a_byte_order_mark_names_the_encoding(encoding: str, content: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    assert lines_of((mark + content).encode(encoding)) == content.splitlines(keepends=True)


def test_nothing() -> None:
    for content in (b"", b"\xef\xbb\xbf", b"\xff\xfe"):
        assert lines_of(content) == []


def test_utf16_is_read_line_by_line() -> None:
    class Watched(io.RawIOBase):
        asked = 0

        def __iter__(self) -> Iterator[bytes]:
            for line in io.BytesIO("a\nb\nc\n".encode("utf-16")):
                self.asked += 1
                yield line

    stream = Watched()
    lines = decoded_lines(stream, "here")
    assert next(lines) == (1, "a\n")
    assert stream.asked <= 2  # half of a line feed stands before the next line


@pytest.mark.parametrize("content", ['text,y\ra,0\r"b\rc",1\r', 'text,y\ra,0\r"b\rc",1'])
def test_lines_that_end_with_a_carriage_return_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode())
    train, _ = load_files(tmp_path / "a.csv", None, ["text"], "y")
    assert train is not None
    assert (train.texts, train.labels) == ([("a",), ("b\nc",)], [0, 1])
    for name, text in (("a.tsv", "text\ty\ra\t0\rb\t1\r"), ("a.jsonl", '{"text": "a"}\r{"text": "b"}')):
        (tmp_path / name).write_bytes(text.encode())
        assert list(read_texts(tmp_path / name)) == [("a",), ("b",)]
    (tmp_path / "a.txt").write_bytes(b"a\rb c\r")
    assert list(read_texts(tmp_path / "a.txt")) == [("a",), ("b c",)]
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.txt")] == ["a", "b c"]
    assert load_generation_files(tmp_path / "a.txt", None)[0].references == ["a", "b c"]
    (tmp_path / "template").write_bytes(b"{instruction}, {input}\r---\r{instruction}\r")
    assert prompt_template(tmp_path / "template", tiny_tokenizer()).without_input == "{instruction}"


def test_a_carriage_return_inside_a_line_stays() -> None:
    assert lines_of(b"a\rb\nc\r") == ["a\rb\n", "c\r"]


@pytest.mark.parametrize(
    "encoding, text, remedy",
    [
        ("cp1252", "It’s “fine” for 5 €", "they seem to be Windows-1252 .* iconv -f WINDOWS-1252 -t UTF-8"),
        ("latin-1", "Le café est très bon", "they seem to be Windows-1252 .* iconv -f WINDOWS-1252 -t UTF-8"),
        ("mac-roman", "texte,y\rcafé,1\rthé,0\r", "seem to be Mac OS Roman.* iconv -f MACINTOSH -t UTF-8"),
        ("gb18030", "这是一个句子", "of another encoding, such as GB18030.* iconv -f ENCODING"),
        ("shift-jis", "これは文です", "of another encoding"),
        ("cp1251", "Это предложение", "of another encoding"),
        ("cp1250", "może być dłoń", "nor of Windows-1252"),
    ],
)
def test_the_remedy_makes_the_text(encoding: str, text: str, remedy: str) -> None:
    with pytest.raises(
        DataError, match=f"here, line 1: There are bytes that are not UTF-8.*{remedy}"
    ) as caught:
        lines_of(text.encode(encoding))
    named = re.search(r"iconv -f (\S+)", str(caught.value))
    assert named is not None
    if named[1] != "ENCODING":
        codec = {"WINDOWS-1252": "cp1252", "MACINTOSH": "mac-roman"}[named[1]]
        assert text.encode(encoding).decode(codec) == text


def test_damaged_files() -> None:
    with pytest.raises(
        DataError, match=r"line 2: .* other characters of the line are UTF-8, so it is damaged"
    ):
        lines_of("a\ncafé thé ".encode() + b"\xff \n")
    with pytest.raises(
        DataError, match=r"line 2: There are bytes that are not UTF-16: .* damaged there, or cut"
    ):
        lines_of("a\nb\n".encode("utf-16")[:-1])


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b"a text\n" * 99, mtime=0), r"compressed by gzip\. Unpack it, .*: zcat FILE \|"),
        (bz2.compress(b"a text\n" * 99), r"compressed by bzip2\. Unpack it, .*: bzcat FILE \|"),
        (lzma.compress(b"a text\n" * 99), r"compressed by xz\. Unpack it, .*: xzcat FILE \|"),
        (b"\x28\xb5\x2f\xfd\x04\x58", r"compressed by zstd\. Unpack it, .*: zstdcat FILE \|"),
        (
            b"PK\x03\x04\x14\x00\x00",
            r"a ZIP archive, as spreadsheets are, .* Unpack it; save a spreadsheet as CSV",
        ),
        (
            b"ARROW1\x00\x00\xff",
            r"an Arrow file, .* Give the whole folder that datasets saved, or write Parquet",
        ),
        (b"\xff\xff\xff\xff\x98\x01\x00\x00", r"an Arrow file, and no text"),
        (b"PAR1\x15\x04\x15", r"a Parquet file, .* Let its name end in \.parquet"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "zip", "arrow", "arrow-stream", "parquet"],
)
def test_what_is_no_text_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: It is {message}"):
            list(file_lines(tmp_path / name))


def test_texts_that_begin_like_files_of_bytes() -> None:
    for text in ("BZh is a name\n", "PAR1 and ARROW1\n", "ARROW1\n", "PK\n"):
        assert lines_of(text.encode()) == [text]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("some text\nmore\n".encode(encoding))
    name = encoding.replace("-", "").upper().replace("UTF16", "UTF-16")
    with pytest.raises(DataError, match=rf"a\.txt, line 1: .* {name} without .* iconv -f {name} -t UTF-8"):
        list(file_lines(path))
