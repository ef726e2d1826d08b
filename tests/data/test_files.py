"""Reading rows: every format, and what is said about every kind of broken row."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from consistentee.data.files import is_stream, may_have_columns, open_table, read_texts
from consistentee.data.generation import read_prompts
from consistentee.errors import DataError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path) -> list[tuple[int, dict]]:
    return [(number, dict(values)) for number, values in open_table(path).rows]


def test_csv_follows_the_csv_rules(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", '\ufefftext,label\r\n"a, ""b""\nc",x\r\nplain \'quote,y\r\n\r\n')
    assert rows_of(path) == [
        (2, {"text": 'a, "b"\nc', "label": "x"}),
        (4, {"text": "plain 'quote", "label": "y"}),
    ]


def test_csv_takes_a_field_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", f"text,label\n{'a' * 200_000},x\n")
    assert len(rows_of(path)[0][1]["text"]) == 200_000


def test_tsv_splits_on_tabs_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", '\ufefftext\tlabel\r\n"open quote\t1\r\na\u2028b, "c"\t0\r\n')
    assert rows_of(path) == [
        (2, {"text": '"open quote', "label": "1"}),
        (3, {"text": 'a\u2028b, "c"', "label": "0"}),
    ]


def test_tsv_without_a_header(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "x\t1\ny\t0\n")
    assert [values for _, values in open_table(path, header=("text", "label")).rows] == [
        {"text": "x", "label": "1"},
        {"text": "y", "label": "0"},
    ]


def test_jsonl(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "ä", "label": 1}\n{"text": "\\n", "label": null}\n\n\n')
    assert rows_of(path) == [(1, {"text": "ä", "label": 1}), (2, {"text": "\n", "label": None})]


ROWS = [{"text": "a, [b]", "label": 1}, {"text": "é\n}", "label": None}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_array_of_json_objects(tmp_path: Path, name: str, encoding: str, indent: int | None) -> None:
    content = "\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n\n"
    table = open_table(written(tmp_path / name, content.encode(encoding)))
    assert list(table.rows) == [(1, ROWS[0]), (2, ROWS[1])]
    assert "row 7: problem" in str(table.error(7, "problem", "remedy"))


def test_no_row_in_an_array(tmp_path: Path) -> None:
    assert list(open_table(written(tmp_path / "a.json", " [\n] ")).rows) == []


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "label": [1, None]}), tmp_path / "a.parquet"
    )
    table = open_table(tmp_path / "a.parquet")
    assert table.unit == "row"
    assert list(table.rows) == [(1, {"text": "a", "label": 1}), (2, {"text": "b", "label": None})]


@pytest.mark.parametrize(
    "stored", [{"_type": "Hologram", "depth": 3}, {"_type": "Value"}, {"a": 1}, 5, None], ids=str
)
def test_parquet_with_a_feature_type_of_a_later_datasets(tmp_path: Path, stored: object) -> None:
    features = {"text": stored, "label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = pyarrow.table({"text": ["a", "b"], "label": [1, None]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    table = open_table(tmp_path / "a.parquet")
    assert list(table.rows) == [(1, {"text": "a", "label": "yes"}), (2, {"text": "b", "label": None})]
    assert list(read_texts(tmp_path / "a.parquet")) == [("a",), ("b",)]


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a", "b"]},
        {"text": ["a", "b"], "label": ["yes", "no"]},
        {"text": ["a", "b"], "label": [1.0, 0.0]},
    ],
    ids=["without", "names", "floats"],
)
def test_parquet_whose_label_is_not_what_datasets_wrote(tmp_path: Path, columns: dict[str, list]) -> None:
    rows = labelled_parquet(tmp_path / "a.parquet", columns)
    table = open_table(tmp_path / "a.parquet")
    assert table.class_labels == {}
    assert [values for _, values in table.rows] == rows.to_pylist()


def test_parquet_with_a_class_without_a_name(tmp_path: Path) -> None:
    labelled_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "label": [1, 2]})
    message = (
        r'a\.parquet, row 2: Class 2 of column "label" has no name; the file names 2 classes: "no", "yes"\.'
    )
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / "a.parquet")


def labelled_parquet(path: Path, columns: dict[str, list]) -> pyarrow.Table:
    """A file whose metadata say that it has texts and classes."""
    stored = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"_type": "ClassLabel", "names": ["no", "yes"]},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": stored}})}
    rows = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(rows, path)
    return rows


@pytest.mark.parametrize("metadata", ["", "[1]", '{"info": null}', '{"info": {"features": [1]}}'])
def test_parquet_with_metadata_that_are_no_features(tmp_path: Path, metadata: str) -> None:
    rows = pyarrow.table({"text": ["a"]}).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    assert list(open_table(tmp_path / "a.parquet").rows) == [(1, {"text": "a"})]


def test_datasets_folder_of_a_later_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "rows"))
    info = tmp_path / "rows" / "dataset_info.json"
    values = json.loads(info.read_text(encoding="utf-8"))
    values["features"]["text"] = {"_type": "Hologram"}
    info.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"rows: datasets \S+ cannot open this folder: .*Hologram.* Upgrade datasets"
    ):
        open_table(tmp_path / "rows")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            "text,label\na,x\nb\n",
            r'a\.csv, line 3: Fields on this line: 1\. The header has 2: "text", "label"',
        ),
        ("a.csv", 'text,label\n"a\nb",x,y\n', r"a\.csv, line 2: Fields on this line: 3"),
        ("a.csv", 'text,label\na,x\n"b,y\n', r"a\.csv, line 3: This is not valid CSV: .* double the quotes"),
        ("a.csv", 'text,label\n"a"b,x\n', r"a\.csv, line 2: This is not valid CSV"),
        ("a.csv", "text,label\na,x\n\nb,y\n", r"a\.csv, line 3: The line is empty\. Remove it\."),
        ("a.csv", "text;label\na;x\n", r"a\.csv, line 1: The header is separated by semicolons\. Use commas"),
        ("a.csv", "text,text\na,x\n", r'a\.csv, line 1: Column "text" is there twice'),
        (
            "a.tsv",
            "text\tlabel\na\tb\tc\n",
            r"a\.tsv, line 2: Fields on this line: 3\. .* needs CSV or JSON lines",
        ),
        ("a.tsv", "text\tlabel\n\na\tb\n", r"a\.tsv, line 2: The line is empty"),
        (
            "a.tsv",
            b"text\tlabel\na\tb\nM\xfcnchen\tb\n",
            r"a\.tsv, line 3: .* not UTF-8 \(0xfc\); .* Windows-1252 .* iconv -f WINDOWS-1252",
        ),
        (
            "a.csv",
            "text,label\na,b\n".encode("utf-16-le"),
            r"a\.csv, line 1: .* seems to be UTF-16LE without",
        ),
        (
            "a.csv",
            "text,label\na\rb,c\n",
            r"a\.csv, line 2: There is a carriage return \(\\r\) outside of quotes",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            r"a\.jsonl, line 2: This is not JSON: .* one JSON object a line",
        ),
        ("a.json", '"a"\n', r"a\.json, line 1: This is not a JSON object"),
        ("a.json", '{\n"text": "a"}\n', r"a\.json, line 1: This is not JSON: .* or an array of objects"),
        (
            "a.json",
            '[{"text": "a"}, 5]',
            r"a\.json, row 2: This is not a JSON object \(line 1\)\. Write an array",
        ),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a\.json, row 2: There is no comma .* \(line 2\)"),
        ("a.json", '[{"text": "a"},', r"a\.json, row 2: This is not JSON: Expecting value"),
        (
            "a.json",
            '[{"text": "a"}',
            r"a\.json, row 2: There is no comma after the object before, and no end",
        ),
        ("a.json", '[{"text": "a"}]\n{}', r"a\.json, row 2: There is something behind the end of the array"),
        ("a.json", '[{"text": "a"}, {"text": "b}]', r"a\.json, row 2: This is not JSON: Unterminated string"),
        ("a.parquet", "PAR?", r"a\.parquet: This is not a Parquet file"),
        ("a.xlsx", "", r'a\.xlsx: The ending "\.xlsx" is not known\. Give a file that ends in \.csv'),
    ],
)
def test_broken_files_say_where_and_what_to_do(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows_of(written(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("name, content", [("a.csv", ""), ("a.tsv", "text\tlabel\n"), ("a.jsonl", "\n\n")])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="There is no row of data in it"):
        open_table(written(tmp_path / name, content)).with_columns()


def test_missing_file_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.csv: There is no such file or folder\. Check the path"):
        open_table(tmp_path / "b.csv")
    with pytest.raises(DataError, match="not a saved datasets folder"):
        open_table(tmp_path)


# Texts to predict


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", 'one, "two"\nthree\n\n', [('one, "two"',), ("three",)]),
        ("a", "a\tb\nc\td", [("a", "b"), ("c", "d")]),
        ("a.txt", '{"text": "not JSON here"}\n', [('{"text": "not JSON here"}',)]),
        ("a.csv", 'id,text\n1,"a, b"\n', [("a, b",)]),
        ("a.tsv", "index\tquestion\tsentence\tlabel\n0\tq\ts\t?\n", [("q", "s")]),
        ("a.jsonl", '{"text_a": "a", "text_b": "b"}\n', [("a", "b")]),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "n": 1}\n', [("a", "b")]),
        ("a.ndjson", '{"text": "a"}\n', [("a",)]),
    ],
)
def test_read_texts_of_files(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, ...]]
) -> None:
    assert list(read_texts(written(tmp_path / name, content))) == expected


def test_read_texts_with_columns_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text,body,title\nx,y,z\n")
    assert list(read_texts(path, ["title", "body"])) == [("z", "y")]
    with pytest.raises(
        DataError, match=r'line 2: There is no column "head"\. Columns here: "text", "body", "title"'
    ):
        list(read_texts(path, ["head"]))
    with pytest.raises(ValueError, match="one column or two, got 3"):
        read_texts(path, ["a", "b", "c"])


@pytest.mark.parametrize("name", ["a.tab", "a.txt", "a"])
def test_plain_text_has_no_columns_to_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "text\tlabel\none\t1\n")
    message = rf"{name}: It is plain text, with a text on each line and no columns\. Name none, or give a file .*\.tsv"
    with pytest.raises(DataError, match=message):
        read_texts(path, ["text"], pairs=False)
    with pytest.raises(DataError, match=message):
        read_prompts(path, prompt_column="text")
    assert list(read_texts(path, pairs=False)) == [("text\tlabel",), ("one\t1",)]
    assert list(read_texts(io.BytesIO(path.read_bytes()), ["text"])) == [("one",)]


def test_read_texts_of_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a", "b"]}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == [("a",), ("b",)]


@pytest.mark.parametrize(
    "content, columns, expected",
    [
        ("one\ntwo\n", None, [("one",), ("two",)]),
        ("a\tb\n", None, [("a", "b")]),
        ('{"text": "a"}\n{"text": "b"}\n', None, [("a",), ("b",)]),
        ('{"x": "a"}\n', ["x"], [("a",)]),
        ('[{"text": "a"},\n {"text": "b"}]\n', None, [("a",), ("b",)]),
        ('[\n  {"text": "a"}\n]', None, [("a",)]),
        ("[Music] plays\n[]\n", None, [("[Music] plays",), ("[]",)]),
        ("x,y\na,b\n", ["y"], [("b",)]),
        ("x\ty\na\tb\n", ["y", "x"], [("b", "a")]),
    ],
)
@pytest.mark.parametrize("kind", ["text", "bytes", "stdin", "stdin as text"])
def test_read_texts_of_streams(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    content: str,
    columns: list[str] | None,
    expected: list[tuple[str, ...]],
) -> None:
    stream = io.StringIO(content) if "text" in kind else io.BytesIO(content.encode())
    if kind.startswith("stdin"):
        monkeypatch.setattr(sys, "stdin", stream if "text" in kind else io.TextIOWrapper(stream))
    assert list(read_texts("-" if kind.startswith("stdin") else stream, columns)) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("columns, expected", [(None, [("x,y",), ("a,b",)]), (["y"], [("b",)])])
def test_read_texts_of_a_pipe(
    tmp_path: Path, columns: list[str] | None, expected: list[tuple[str, ...]]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_text, "x,y\na,b\n")
        assert is_stream(str(tmp_path / "pipe"))
        assert list(read_texts(tmp_path / "pipe", columns)) == expected


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="descriptors by name")
def test_a_descriptor_by_name_is_the_stream_itself(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "one"}\n')
    with path.open("rb") as stream:
        for name in (f"/dev/fd/{stream.fileno()}", f"/proc/self/fd/{stream.fileno()}"):
            assert is_stream(name)
            assert list(read_texts(name)) == [("one",)]
            assert list(read_texts(name, ["text"])) == [("one",)]


def test_read_texts_of_a_datasets_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "rows")
    assert list(read_texts(tmp_path / "rows")) == [("a",)]
    assert caplog.messages == [f'Of the splits of {tmp_path / "rows"}, "test" is read.']
    assert list(read_texts(tmp_path / "rows" / "train")) == [("a",), ("b",)]
    assert may_have_columns(str(tmp_path / "rows"))


def test_read_texts_never_holds_the_input() -> None:
    class Endless(io.RawIOBase):
        def __iter__(self) -> Iterator[bytes]:
            return (f"text {number}\n".encode() for number in itertools.count())

    assert list(itertools.islice(read_texts(Endless()), 3)) == [("text 0",), ("text 1",), ("text 2",)]


def test_read_texts_complains_only_when_it_gets_there() -> None:
    texts = read_texts(io.StringIO("a\n\nb\n"))
    assert next(texts) == ("a",)
    with pytest.raises(DataError, match="the stream, line 2: The line is empty"):
        next(texts)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "a\nb\tc\n", r"line 2: There are 2 texts separated by tabs, but the first line has 1\."),
        ("a.txt", "a\tb\nc\n", r"line 2: There is 1 text, but the first line has 2\."),
        ("a.txt", "a\tb\tc\n", r"line 1: There are 3 texts separated by tabs\. Give one text a line"),
        ("a.txt", b"ok\n\xff\n", r"a\.txt, line 2: .* not UTF-8 \(0xff\)"),
        ("a.txt", "\n", "There is no row of data in it"),
        ("a.csv", "id,body\n1,x\n", r'known to hold the text; it has "id", "body"\. Name the text columns\.'),
        (
            "a.csv",
            'id,text\n1,"  "\n',
            r'line 2: The text in column "text" is empty\. Fill it in or remove the line',
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b"}\n',
            r'line 2: There is no column "text"\. Columns here: "txt"',
        ),
        ("a.jsonl", '{"text": null}\n', r"line 1: The text .* is empty"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: Column \"text\" must hold text, got int '5'"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', r"line 1: .* half a surrogate pair"),
    ],
)
def test_read_texts_errors(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_texts(written(tmp_path / name, content)))


def test_read_texts_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"There is no such file\. .* standard input"):
        read_texts(tmp_path / "missing.txt")
    with pytest.raises(
        DataError, match=r"is not a saved datasets folder\. Give a file, or a folder written by"
    ):
        read_texts(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(DataError, match="standard input: There is no row of data in it"):
        list(read_texts("-"))


def test_bytes_of_a_text_stream_that_are_not_utf8() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"ok\n\xff\n"), encoding="utf-8")
    with pytest.raises(DataError, match=r"the stream: .* not UTF-8"):
        list(read_texts(stream))


@pytest.mark.parametrize(
    "content, expected",
    [
        ('text,label\n"a, b",x\nc,y\n', ["a, b", "c"]),
        ("id\ttext\n1\ta\n", ["a"]),
        ('"text","label"\r\na,x\r\n', ["a"]),
        ("text\na\n", ["text", "a"]),  # a word
        ("text, and more\na\n", ["text, and more", "a"]),  # a sentence
        ("label,score\na,1\n", ["label,score", "a,1"]),  # nothing that is known
        ("text,text\na,b\n", ["text,text", "a,b"]),
    ],
)
def test_a_stream_that_begins_with_a_header_is_a_table(
    content: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Else header and labels would be taken for texts, which a file of the same bytes is not."""
    found = [texts[0] for texts in read_texts(io.StringIO(content), pairs=False)]
    assert found == expected
    is_table = len(expected) < len(content.splitlines())
    assert any("is a table's header: read as" in message for message in caplog.messages) == is_table


def test_so_does_one_of_prompts() -> None:
    prompts = read_prompts(io.StringIO("prompt,category\nTell me.,x\n"))
    assert list(prompts) == [{"prompt": "Tell me.", "input": ""}]
    assert [row["prompt"] for row in read_prompts(io.StringIO("prompt, please\nb\n"))] == [
        "prompt, please",
        "b",
    ]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {number} {'x' * 40}" for number in range(3000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=2048, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start + 40 : start + 400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: It is damaged behind row \d+: .* Write the file anew"):
        list(open_table(path).rows)


def test_a_column_that_is_there_twice_is_one_too_many_in_parquet_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match='Column "text" is there twice'):
        open_table(path)
