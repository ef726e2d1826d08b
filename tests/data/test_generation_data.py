"""Instructions and responses: tasks and own files, what training rows look like when they are too long, prompts."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch

from consistentee.data.batches import (
    IGNORED,
    LengthGroupedBatches,
    TokenizedPrompts,
    collate,
    pad_left,
    with_more_tokens,
)
from consistentee.data.generation import load_generation_files, load_generation_task, read_prompts
from consistentee.data.rows import InstructionDataset, TextDataset, require_rows, split_rows
from consistentee.data.tasks import GenerationTask, get_task
from consistentee.data.templates import ALPACA, PLAIN, PromptTemplate, prompt_template
from consistentee.data.tokenization import encode_prompts, encode_rows
from consistentee.errors import DataError
from consistentee.training.train import train
from tiny import tiny_tokenizer
from tiny_tokenizers import byte_tokenizer

SHORT = PromptTemplate("short", "<{instruction}|{input}>", "<{instruction}>")


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path, *(json.dumps(row) for row in rows))


def alpaca_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"instruction": f"do {row}", "input": "", "output": f"done {row}"}
        for row in range(start, start + count)
    ]


def numbered(count: int) -> InstructionDataset:
    names = [str(row) for row in range(count)]
    return InstructionDataset(names, [f"i{name}" for name in names], [f"r{name}" for name in names], "here")


# InstructionDataset


@pytest.mark.parametrize(
    "like",
    [tuple, np.array, pandas.Series, lambda texts: datasets.Dataset.from_dict({"text": texts})["text"]],
)
def test_columns_are_what_is_like_a_list(like: Any) -> None:
    asked, about, answered = ([f"{name}{row}" for row in range(4)] for name in ("ask", "about", "answer"))
    expected = InstructionDataset(asked, about, answered, "here")
    data = InstructionDataset(like(asked), like(about), like(answered), "here")
    assert len(data) == 4
    assert data == expected
    assert data.select([2]) == expected.select([2])
    history: Any = ((), (("a", "b"),), (), ())
    talks = InstructionDataset(like(asked), like(about), like(answered), "here", history, like([0, 0, 1, 1]))
    assert talks.select([1, 2]).history == [(("a", "b"),), ()]
    assert [list(part) for part in talks.split(0.5, seed=0)] in ([[0, 1], [2, 3]], [[2, 3], [0, 1]])


@pytest.mark.parametrize(
    "columns, message",
    [
        ((["a", None], ["", ""], ["b", "c"]), "here, row 2: instructions must be strings, got None"),
        ((["a"], [""], [3]), "here, row 1: references must be strings, got 3"),
        (("ab", ["", ""], ["b", "c"]), "texts must be a list of texts, got one text"),
    ],
)
def test_columns_that_are_no_texts(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionDataset(columns[0], columns[1], columns[2], "here")


def test_rows_of_another_library_are_named() -> None:
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    message = r"rows must be a TextDataset\(texts, labels, label_names, source\), got a Dataset\. Make one of its col"
    with pytest.raises(TypeError, match=message):
        require_rows("rows", table, TextDataset)
    both = r"InstructionDataset\(instructions, inputs, references, source\), got a Dataset"
    with pytest.raises(TypeError, match=both):
        train(backbone="none", train_data=cast(Any, table), output_dir="none")
    require_rows("rows", numbered(1), TextDataset, InstructionDataset)


def test_selected_rows_stay_whole() -> None:
    assert numbered(5).select([3, 0]) == InstructionDataset(["3", "0"], ["i3", "i0"], ["r3", "r0"], "here")
    with pytest.raises(ValueError, match=r"must be equally many, got \(1, 0, 1\)"):
        InstructionDataset(["a"], [], ["b"], "here")


def test_max_samples() -> None:
    data = numbered(50)
    few = data.max_samples(10, seed=1)
    order = [int(name) for name in few.instructions]
    assert len(set(order)) == 10
    assert order == sorted(order) != list(range(10))
    assert few == data.max_samples(10, seed=1) != data.max_samples(10, seed=2)
    assert data.max_samples(None) is data.max_samples(50) is data
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data.max_samples(0)


@pytest.mark.parametrize("fraction, size", [(0.01, 1), (0.1, 3), (0.99, 29)])
def test_split_rows(fraction: float, size: int) -> None:
    kept, held = split_rows(30, fraction, seed=3)
    assert sorted(kept + held) == list(range(30))
    assert (kept, held) == (sorted(kept), sorted(held)) == split_rows(30, fraction, seed=3)
    assert len(held) == size
    assert held != split_rows(30, fraction, seed=4)[1]


def test_split_errors() -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\), got 1\.0"):
        split_rows(9, 1.0, 0)
    with pytest.raises(DataError, match=r"Rows that are to be split: 1\. Give at least two"):
        split_rows(1, 0.5, 0)


# Tasks from local folders


@pytest.mark.parametrize("given", ["parent", "itself"])
def test_a_single_file_is_split_at_its_end(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "Alpaca"
    file = write_jsonl(folder / "alpaca_some.jsonl", *alpaca_rows(1003))
    write_jsonl(tmp_path / "notes.jsonl", {"text": "of another kind"})
    train, evaluation = load_generation_task("alpaca", tmp_path if given == "parent" else folder)
    assert (train.instructions[-1], evaluation.instructions[0]) == ("do 502", "do 503")
    assert evaluation.references[-1] == "done 1002"
    assert (len(train), len(evaluation)) == (503, 500)
    assert evaluation.source == f"{file}, the last 500 rows"
    assert train.source == f"{file}, all but the last 500 rows"


@pytest.mark.parametrize("rows, held", [(999, 99), (40, 4), (9, 1), (1, 1)])
def test_of_few_rows_a_tenth_is_held_out(tmp_path: Path, rows: int, held: int) -> None:
    write_jsonl(tmp_path / "train_some.jsonl", *alpaca_rows(rows))
    train, evaluation = load_generation_task("alpaca", tmp_path)
    assert (0 if train is None else len(train), len(evaluation)) == (rows - held, held)
    assert evaluation.references[-1] == f"done {rows - 1}"


def test_files_by_their_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "cnn_dailymail"
    write_jsonl(folder / "train_100.jsonl", {"id": "0", "article": " a ", "highlights": "b .\nc ."})
    write_jsonl(folder / "validation_15.jsonl", {"article": "d", "highlights": "e", "id": "1"})
    train, evaluation = load_generation_task("cnndm", tmp_path, need_train=True)
    instruction = get_task("cnndm", GenerationTask).instruction
    assert train == InstructionDataset([instruction], ["a"], ["b .\nc ."], str(folder / "train_100.jsonl"))
    assert (evaluation.inputs, evaluation.references) == (["d"], ["e"])
    write_jsonl(folder / "test_9.jsonl", {"article": "f", "highlights": "g"})
    assert load_generation_task("cnndm", folder)[1].inputs == ["f"]  # as on the hub, the test set is reported
    write_jsonl(folder / "test_8.jsonl", {"article": "h", "highlights": "i"})
    with pytest.raises(
        DataError, match=r'Several files begin with test: "test_8.jsonl", "test_9.jsonl"\. Keep'
    ):
        load_generation_task("cnndm", folder)
    write_jsonl(folder / "test.jsonl", {"article": "j", "highlights": "k"})
    assert load_generation_task("cnndm", folder)[1].inputs == ["j"]


def test_dolly_prompts_are_taken_apart(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "dolly.jsonl",
        {"prompt": ALPACA.render("Who?"), "answer": "Me.###eos_token###"},
        {"prompt": ALPACA.render("What?", "It is\n\nthis."), "answer": "This"},
    )
    train, evaluation = load_generation_task("dolly", tmp_path)
    assert (train.instructions, train.inputs, train.references) == (["Who?"], [""], ["Me."])
    assert (evaluation.instructions, evaluation.inputs) == (["What?"], ["It is\n\nthis."])
    write_jsonl(tmp_path / "dolly.jsonl", {"prompt": ALPACA.render("Who?"), "answer": "###eos_token###"})
    with pytest.raises(
        DataError, match=r'dolly\.jsonl, line 1: The text in column "answer" is empty\. Fill it'
    ):
        load_generation_task("dolly", tmp_path)
    write_jsonl(tmp_path / "dolly.jsonl", {"instruction": "Who?", "context": None, "response": "Me."})
    assert load_generation_task("dolly", tmp_path)[1].references == ["Me."]


def test_xsum_articles_are_unwrapped(tmp_path: Path) -> None:
    article = "###\nArticle: It rained.\n\nSummarize the above article in 1 sentence.\n"
    write_jsonl(tmp_path / "dev.jsonl", {"article": article, "summary_gt": "Rain."})
    train, evaluation = load_generation_task("xsum", tmp_path)
    assert train is None
    assert (evaluation.inputs, evaluation.references) == (["It rained."], ["Rain."])
    with pytest.raises(DataError, match=r'no training file of task "xsum" to train on\. Put train\.tsv or'):
        load_generation_task("xsum", tmp_path, need_train=True)


def test_few_rows_without_a_response_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = alpaca_rows(200)
    rows[20]["output"] = " "
    write_jsonl(tmp_path / "train.jsonl", *rows)
    with caplog.at_level(logging.WARNING):
        train, evaluation = load_generation_task("alpaca", tmp_path)
    assert len(train) + len(evaluation) == 199
    assert "do 20" not in train.instructions
    assert "Broken rows skipped: 1. The first" in caplog.text
    rows[21]["output"] = rows[22]["output"] = None
    write_jsonl(tmp_path / "train.jsonl", *rows)
    with pytest.raises(DataError, match=r'train\.jsonl, line 21: The text in column "output" is empty'):
        load_generation_task("alpaca", tmp_path)


def test_folders_without_the_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: There is no such folder\. Check --data-dir"):
        load_generation_task("alpaca", tmp_path / "none")
    write_jsonl(tmp_path / "a.jsonl", *alpaca_rows(2))
    write_jsonl(tmp_path / "b.jsonl", *alpaca_rows(2))
    with pytest.raises(
        DataError, match=r'There is no file of task "alpaca" in it .* one of train\.tsv, test\.tsv'
    ):
        load_generation_task("alpaca", tmp_path)
    write_jsonl(tmp_path / "train.jsonl", {"text": "a", "label": 1})
    with pytest.raises(
        DataError,
        match=r'line 1: There is no column "instruction", "output"\. Columns here: "text"',
    ):
        load_generation_task("alpaca", tmp_path)


# The hub


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_dataset(path: str, config: str | None) -> datasets.DatasetDict:
        asked.append((path, config))
        if path == "tatsu-lab/alpaca":
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(alpaca_rows(20))})
        columns = ("document", "summary") if "xsum" in path else ("article", "highlights")
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list([dict.fromkeys(columns, split)])
                for split in ("train", "validation", "test")
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, evaluation = load_generation_task("alpaca")
    assert (len(train), len(evaluation)) == (18, 2)
    assert evaluation.source == "tatsu-lab/alpaca train, the last 2 rows"
    for name in ("cnndm", "xsum"):
        train, evaluation = load_generation_task(name)
        assert (train.inputs, evaluation.references) == (["train"], ["test"])
    assert asked == [
        ("tatsu-lab/alpaca", None),
        ("abisee/cnn_dailymail", "3.0.0"),
        ("EdinburghNLP/xsum", None),
    ]


# Files of one's own


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "folder"])
@pytest.mark.parametrize("columns", [("question", "context", "answer"), ("ask", "about", "say")])
def test_own_files_of_every_format(tmp_path: Path, ending: str, columns: tuple[str, str, str]) -> None:
    rows = [dict(zip(columns, values, strict=True)) for values in (("a", "", "b"), ("c", "d", "e"))]
    path = tmp_path / f"train.{ending}"
    if ending in ("csv", "tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "jsonl":
        del rows[0][columns[1]]
        write_jsonl(path, *rows[::-1])
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    named = dict(zip(("prompt_column", "input_column", "response_column"), columns, strict=True))
    files = (None, path) if ending == "folder" else (path, None)
    data = next(filter(None, load_generation_files(*files, **(named if columns[0] == "ask" else {}))))
    expected = InstructionDataset(["a", "c"], ["", "d"], ["b", "e"], data.source)
    assert data == (expected.select([1, 0]) if ending == "jsonl" else expected)


def test_a_named_column_has_one_role(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "why", "text": "sky", "output": "blue"})
    train, _ = load_generation_files(path, None, input_column="question")
    assert (train.instructions, train.inputs) == (["sky"], ["why"])
    with pytest.raises(ValueError, match='Columns must differ, got "text", "text"'):
        load_generation_files(path, None, prompt_column="text", response_column="text")
    with pytest.raises(ValueError, match="train_file or eval_file must be given, got neither"):
        load_generation_files(None, None)


@pytest.mark.parametrize(
    "named, prompts",
    [
        ({"prompt_column": "input"}, [("a", ""), ("b", "about")]),
        ({"prompt_column": "question"}, [("q", "a"), ("r", "b")]),
        ({"prompt_column": "question", "response_column": "input"}, [("q", ""), ("r", "about")]),
        ({"prompt_column": "question", "input_column": "context"}, [("q", ""), ("r", "about")]),
    ],
)
def test_the_input_is_found_row_by_row_among_columns_without_a_role(
    tmp_path: Path, named: dict[str, str], prompts: list[tuple[str, str]]
) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"question": "q", "input": "a", "output": "x"},
        {"question": "r", "input": "b", "output": "y", "context": "about"},
    )
    train, _ = load_generation_files(path, None, **named)
    assert list(zip(train.instructions, train.inputs, strict=True)) == prompts
    asked = {name: column for name, column in named.items() if name != "response_column"}
    if asked == named:  # what a model is asked is what it has learned
        assert [(row["prompt"], row["input"]) for row in read_prompts(path, **asked)] == prompts


def test_an_input_that_the_first_row_lacks(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "output": "b"}, {"prompt": "c", "context": "d", "output": "e"})
    train, _ = load_generation_files(write_jsonl(tmp_path / "a.jsonl", *rows), None)
    assert train.inputs == ["", "d"]


@pytest.mark.parametrize(
    "row, named, message",
    [
        (
            {"q": "a", "output": "b"},
            {},
            r'known to hold the instruction: "q", "output"\. Name the column, or',
        ),
        (
            {"prompt": "a", "o": "b"},
            {},
            r'line 1: None of its columns is known to hold the response: "prompt", "o"',
        ),
        (
            {"prompt": "a", "output": "b"},
            {"input_column": "x"},
            r'There is no column "x"\. Columns here: "prompt"',
        ),
        (
            {"prompt": "a", "output": "b"},
            {"prompt_column": "y"},
            r'There is no column "y"\. Columns here: "prompt"',
        ),
        (
            {"prompt": "a", "output": "\n"},
            {},
            r'line 1: The text in column "output" is empty\. Fill it in or remove',
        ),
        ({"prompt": " ", "output": "b"}, {}, r'line 1: The text in column "prompt" is empty'),
        ({"prompt": "a", "output": 3}, {}, r'Column "output" must hold text, got int'),
    ],
)
def test_errors_of_own_files(
    tmp_path: Path, row: dict[str, Any], named: dict[str, str], message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=message):
        load_generation_files(path, None, **named)


def test_plain_texts(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines.txt", "one", " two\t2", "")
    blocks = write(tmp_path / "blocks.txt", "", "one", " two", "  ", "", "three", end="\r\n")
    by_line, by_block = load_generation_files(lines, blocks)
    assert by_line == InstructionDataset(["", ""], ["", ""], ["one", " two\t2"], str(lines))
    assert by_block.references == ["one\n two", "three"]
    lone = write(tmp_path / "lone.txt", " ", "one", " two", "", "")
    assert load_generation_files(lone, None)[0].references == ["one\n two"]
    for content, message in (("\n \n", "There is no text in it"), (None, "There is no such file")):
        path = tmp_path / "none.txt" if content is None else write(tmp_path / "empty.txt", content)
        with pytest.raises(DataError, match=message):
            load_generation_files(path, None)


# Training rows


@pytest.mark.parametrize("begin, end", [(False, False), (True, False), (True, True)])
def test_a_row_is_prompt_response_and_end(begin: bool, end: bool) -> None:
    tokenizer = byte_tokenizer(begin=begin, end=end)
    data = InstructionDataset(["do", "go"], ["it", ""], ["yes, é", "x"], "here")
    rows = encode_rows(data, tokenizer, SHORT, max_length=64)
    for row, (prompt, response) in enumerate((("<do|it>", "yes, é"), ("<go>", "x"))):
        item = rows[row]
        beginning = [0] if begin else []
        assert item["input_ids"][: len(beginning)] == beginning
        assert tokenizer.decode(item["input_ids"][len(beginning) :]) == f"{prompt}{response}</s>"
        learned = [token for token in item["labels"] if token != IGNORED]
        assert tokenizer.decode(learned) == f"{response}</s>"
        assert item["labels"][-len(learned) :] == learned == item["input_ids"][-len(learned) :]
        assert item["index"] == row
    assert rows.lengths.tolist() == [len(rows[0]["input_ids"]), len(rows[1]["input_ids"])]
    assert rows.prompt_lengths.tolist() == [7 + begin, 4 + begin]
    assert encode_prompts(data, tokenizer, SHORT, max_prompt_length=64)[0] == [
        rows[row]["input_ids"][: rows.prompt_lengths[row]] for row in range(2)
    ]


def test_a_chat_prompt_brings_its_own_special_tokens() -> None:
    tokenizer = byte_tokenizer(begin=True)
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>:"
    template = prompt_template("chat", tokenizer)
    (prompt,) = encode_prompts([("a", "b")], tokenizer, template, max_prompt_length=9)[0]
    assert tokenizer.decode(prompt) == "<s>a\n\nb</s>:"
    assert prompt.count(0) == prompt.count(1) == 1


def test_a_text_to_learn_has_no_prompt() -> None:
    data = InstructionDataset([""], [""], ["abc"], "here")
    for template in (ALPACA, PLAIN):
        item = encode_rows(data, byte_tokenizer(), template, max_length=9)[0]
        assert item["labels"] == item["input_ids"]
        assert len(item["labels"]) == 4
        assert encode_rows(data, byte_tokenizer(begin=True), template, max_length=9).prompt_lengths == [1]
    assert encode_rows(data, byte_tokenizer(), PLAIN, max_length=2).lengths == [2]


@pytest.mark.parametrize(
    "instruction, context, response, lengths, expected",
    [
        ("do", "abcdef", "xyz", {"max_length": 15}, "<do|abcdef>xyz$"),  # it just fits
        ("do", "abcdef", "xyz", {"max_length": 14}, "<do|abcde>xyz$"),  # the input's end
        ("do", "ab def", "xyz", {"max_length": 12}, "<do|ab>xyz$"),  # no blank is left at the end
        ("do", "abcdef", "xyz", {"max_length": 8}, "<do>xyz$"),  # all of the input
        ("do", "abcdef", "xyz", {"max_length": 7}, "<do>xyz"),  # then the response, and there is no end
        ("do", "", "uvwxyz", {"max_length": 8}, "<do>uvwx"),
        ("do something", "", "uvwxyz", {"max_length": 8}, "<do s>uv"),  # a quarter of the response is kept
        ("do", "aéé", "x", {"max_length": 8}, "<do|a>x$"),  # half a letter is none
        ("do", "abcdef", "xyz", {"max_length": 30, "max_prompt_length": 7}, "<do|ab>xyz$"),
        ("do something", "", "xyz", {"max_length": 16, "max_prompt_length": 6}, "<do s>xyz$"),
    ],
)
def test_rows_that_are_too_long(
    instruction: str, context: str, response: str, lengths: dict[str, int], expected: str
) -> None:
    data = InstructionDataset([instruction], [context], [response], "here")
    tokenizer = byte_tokenizer()
    item = encode_rows(data, tokenizer, SHORT, **lengths)[0]
    assert tokenizer.decode(item["input_ids"]).replace("</s>", "$") == expected
    assert item["labels"].count(IGNORED) == expected.index(">") + 1


def test_whole_words_are_cut_where_tokens_are_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    data = InstructionDataset(["the film"], ["good plot very dull"], ["fine"], "here")
    template = PromptTemplate("t", "{instruction} : {input} : ")
    item = encode_rows(data, tokenizer, template, max_length=9)[0]
    assert tokenizer.decode(item["input_ids"]) == "[CLS] the film : good plot : fine [SEP]"


def test_lengths_that_leave_no_room() -> None:
    tokenizer = byte_tokenizer()
    data = InstructionDataset(["do"], ["it"], ["x"], "here")
    with pytest.raises(
        ValueError, match=r"length must be above the 2 tokens of the prompt template, got 2\. Raise"
    ):
        encode_rows(data, tokenizer, SHORT, max_length=64, max_prompt_length=2)
    assert tokenizer.decode(encode_prompts(data, tokenizer, SHORT, max_prompt_length=3)[0][0]) == "<d>"
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode_rows(data, tokenizer, SHORT, max_length=1)
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1, got 0"):
        encode_rows(data, tokenizer, SHORT, max_length=9, max_prompt_length=0)
    with pytest.raises(ValueError, match="must have an end-of-text token, got none"):
        encode_rows(data, tiny_tokenizer(), SHORT, max_length=9)
    with pytest.raises(DataError, match=r"prompt 2: The prompt has no token"):
        encode_prompts([("a", ""), ("", "")], tokenizer, PLAIN, max_prompt_length=9)[0]
    half = InstructionDataset(["do", "do"], ["it", "it"], ["x", "x\ud83d"], "here")
    with pytest.raises(DataError, match=r"row 2: Character 2 is half a surrogate pair"):
        encode_rows(half, tokenizer, SHORT, max_length=64)


def test_tokenized_rows_make_batches() -> None:
    rows = TokenizedPrompts([[5, 6], [], [7]], [[8], np.array([9, 10], dtype=np.int32), [11, 12, 13]])
    assert (len(rows), rows.lengths.tolist(), rows.lengths.dtype) == (3, [3, 2, 4], np.int64)
    (batch,) = LengthGroupedBatches(rows.lengths, 3)
    assert sorted(batch) == [0, 1, 2]
    batch = collate([rows[index] for index in (2, 1)], SimpleNamespace(pad_token_id=0, pad_token_type_id=0))
    assert batch["input_ids"].tolist() == [[7, 11, 12, 13], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 11, 12, 13], [9, 10, -100, -100]]
    assert batch["index"].tolist() == [2, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"index must be in \[0, 3\), got {index}"):
            rows[index]
    with pytest.raises(ValueError, match="equally many, got 1 and 0"):
        TokenizedPrompts([[1]], [])
    assert len(TokenizedPrompts([], [])) == 0


@pytest.mark.parametrize("tokens, fits", [(0, 0), (3, 0), (4, 0), (5, 1), (9, 3), (100, 4)])
def test_rows_are_filled_up_to_a_number_of_tokens(tokens: int, fits: int) -> None:
    rows = TokenizedPrompts([[5, 6], []], [[8], [9, 10]])
    source = TokenizedPrompts([[1], [2], [3], [4]], [[21, 22], [31, 32], [41, 42], [51, 52]])
    filled = with_more_tokens(rows, source, tokens, seed=3)
    assert len(filled) == 2 + fits
    assert int((filled.lengths - filled.prompt_lengths).sum()) <= max(tokens, 3)
    assert [filled[row]["labels"] for row in (0, 1)] == [rows[row]["labels"] for row in (0, 1)]
    drawn = [filled[row]["input_ids"][0] for row in range(2, len(filled))]
    assert len(set(drawn)) == fits
    assert [filled[2 + place]["labels"] for place in range(fits)] == [
        source[row - 1]["labels"] for row in drawn
    ]
    if fits == 1:
        firsts = {with_more_tokens(rows, source, tokens, seed)[2]["input_ids"][0] for seed in range(20)}
        assert firsts == {1, 2, 3, 4}


def test_pad_left() -> None:
    input_ids, mask = pad_left([[5], [6, 0, 7]], 9)
    assert input_ids.tolist() == [[9, 9, 5], [6, 0, 7]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert input_ids.dtype == mask.dtype == torch.int64


# Prompts to respond to


def test_prompts_of_files(tmp_path: Path) -> None:
    rows = ({"instruction": "a", "input": "b"}, {"prompt": "c"}, {"prompt": "d", "input": None})
    expected = [{"prompt": "a", "input": "b"}, {"prompt": "c", "input": ""}, {"prompt": "d", "input": ""}]
    assert list(read_prompts(write_jsonl(tmp_path / "a.jsonl", *rows))) == expected
    lines = [{"prompt": "a\tb", "input": ""}, {"prompt": " {c", "input": ""}]
    assert list(read_prompts(write(tmp_path / "a.txt", "a\tb", " {c", "", end="\r\n"))) == lines
    table = write(tmp_path / "a.csv", "x,prompt", "a,b")
    assert list(read_prompts(table)) == [{"prompt": "b", "input": ""}]
    swapped = read_prompts(table, prompt_column="x", input_column="prompt")
    assert list(swapped) == [{"prompt": "a", "input": "b"}]


def test_prompts_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert [row["prompt"] for row in read_prompts("-")] == ["one", "two"]
    stream = io.BytesIO(b'{"prompt": "one"}\n{"question": "two"}\n')
    assert [row["prompt"] for row in read_prompts(stream)] == ["one", "two"]

    def endless() -> Any:
        yield "first\n"
        yield "second\n"
        raise AssertionError("it was read ahead")

    prompts = read_prompts(endless())
    assert next(prompts)["prompt"] == "first"
    assert next(prompts)["prompt"] == "second"


def test_errors_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no\.txt: There is no such file\. Check the path, or give "-"'):
        read_prompts(tmp_path / "no.txt")
    for content, message in (
        ("", r"a\.txt: There is no row of data in it"),
        ("a\n\nb\n", r"a\.txt, line 2: The line is empty\. Remove it"),
    ):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(DataError, match=message):
            list(read_prompts(tmp_path / "a.txt"))
    for row, message in (
        ({"prompt": ""}, r'a\.jsonl, line 2: The text in column "prompt" is empty'),
        (
            {"label": "b"},
            r'a\.jsonl, line 2: None of its columns is known to hold the prompt: "label"\. Name',
        ),
        ({"prompt": "a", "input": 3}, r'a\.jsonl, line 2: Column "input" must hold text, got int'),
    ):
        prompts = read_prompts(write_jsonl(tmp_path / "a.jsonl", {"prompt": "fine"}, row))
        assert next(prompts)["prompt"] == "fine"
        with pytest.raises(DataError, match=message):
            next(prompts)
    with pytest.raises(DataError, match="the stream: There is no row of data in it"):
        next(read_prompts(io.StringIO("")))


# Real data, where it lies beside the repository

REAL = {  # training rows, evaluation rows
    "alpaca": (3_999, 500),  # one of the 4,500 has no output
    "dolly": (100, 51),
    "cnndm": (100, 15),
    "xsum": (900, 100),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(shared_dir: Path, name: str) -> None:
    train, evaluation = load_generation_task(name, shared_dir / "data")
    assert (len(train), len(evaluation)) == REAL[name]
    for data in (train, evaluation):
        texts = [*data.instructions, *data.inputs, *data.references]
        assert not any("###" in text or text != text.strip() for text in texts)
        assert not any("Summarize the above article" in text for text in data.inputs)
        assert all(data.instructions)
        assert any(data.inputs)


def test_texts_of_a_file_are_learnt_as_they_are_written(tmp_path: Path) -> None:
    """Words would be glued together by `plain`, and code lose its indentation."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "The sky is", "input": " now:", "completion": " blue."},
        {"prompt": "def f(x):\n", "input": " ", "completion": "    return x\n"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data, _ = load_generation_files(path, None)
    assert data is not None
    assert data.instructions == [row["prompt"] for row in rows]
    assert data.inputs == [" now:", ""]
    assert data.references == [row["completion"] for row in rows]
    blank = tmp_path / "blank.jsonl"
    blank.write_text(json.dumps({"prompt": "a", "completion": " \n"}), encoding="utf-8")
    with pytest.raises(DataError, match='"completion" is empty'):
        load_generation_files(blank, None)
