"""Prompts and rows that are too long are cut, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consistentee.cli.main import main
from consistentee.data.rows import InstructionDataset
from consistentee.data.tokenization import encode_prompts, encode_rows
from consistentee.evaluation.generation import evaluate_generation, evaluate_plain_generation
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.models.record import read_record
from consistentee.pipelines.generator import TextGenerator
from consistentee.training.train import finetune, train
from saved_generators import BYTES, TEMPLATE, generator_folder, plain_folder, tiny_rows
from tiny_decoders import tiny_decoder
from tiny_tokenizers import byte_tokenizer
from tiny_training import quick_generation_config

pytestmark = pytest.mark.usefixtures("one_thread")


def with_long_rows(count: int, long: int) -> InstructionDataset:
    """Short rows; of the first an input, of the others the response, is long."""
    rows = tiny_rows(count)
    inputs = ["a, b" * 40 if row == 0 else context for row, context in enumerate(rows.inputs)]
    references = [text * 40 if 0 < row < long else text for row, text in enumerate(rows.references)]
    return InstructionDataset(rows.instructions, inputs, references, "with long rows")


def test_rows_that_lose_something_are_counted() -> None:
    def cut(instruction: str, context: str, response: str, **lengths: int) -> int:
        data = InstructionDataset([instruction], [context], [response], "x")
        return encode_rows(data, byte_tokenizer(), TEMPLATE, **{"max_length": 16, **lengths}).num_truncated

    # a token a byte: three of the template and the end of text beside them
    assert cut("abcd", "efg", "hijkl") == 0
    assert cut("abcd", "efgh", "hijkl") == 1  # the input is shorter
    assert cut("abcd", "", "hijklmnopqr") == 1  # the response
    assert cut("abcdefghijklm", "", "h") == 1  # the instruction
    assert cut("abcd", "", "h", max_prompt_length=6) == 0
    assert cut("abcd", "", "h", max_prompt_length=5) == 1


def test_prompts_that_lose_something_are_marked() -> None:
    asked = [("abcd", ""), ("abcde", ""), ("a", "bc"), ("a", "bcdefgh")]
    encoded, cut = encode_prompts(asked, byte_tokenizer(), TEMPLATE, max_prompt_length=6)
    assert cut == [False, True, False, True]
    assert all(len(prompt) <= 6 for prompt in encoded)


@pytest.mark.parametrize("learn", [train, finetune])
def test_training_says_and_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, learn: Any) -> None:
    backbone = tmp_path / "backbone"
    tiny_decoder("llama", **BYTES).save_pretrained(backbone)
    byte_tokenizer(begin=True).save_pretrained(backbone)
    learn(
        backbone=backbone,
        train_data=with_long_rows(16, 3),
        output_dir=tmp_path / "run",
        config=quick_generation_config(rounds=0, max_length=48),
    )
    assert caplog.messages == [
        "3 of 16 texts to train on were longer than 48 tokens and were cut. "
        "Train with a higher --max-length to keep more of them."
    ]
    assert read_record(tmp_path / "run")["data"]["truncated_rows"] == 3


def test_evaluation_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exits = load_model(generator_folder(tmp_path / "exits"), LoadedGenerator, device="cpu")
    evaluation = evaluate_generation(exits, with_long_rows(6, 3), max_new_tokens=4, curve_thresholds=1)
    assert evaluation.num_truncated == evaluation.to_dict()["num_truncated"] == 1
    first, second = caplog.messages
    assert first.startswith(
        f'1 of 6 prompts were longer than the 64 tokens of model "{exits.name}" and were cut.'
    )
    assert second.startswith("3 of 6 prompts with their references were longer than 64 tokens and were cut.")
    caplog.clear()
    assert evaluate_generation(exits, tiny_rows(6), max_new_tokens=4, curve_thresholds=1).num_truncated == 0
    assert caplog.messages == []
    plain = load_model(plain_folder(tmp_path / "plain"), LoadedGenerator, device="cpu")
    assert evaluate_plain_generation(plain, tiny_rows(4), max_new_tokens=4)["num_truncated"] == 0


def test_texts_tell(tmp_path: Path) -> None:
    generator = TextGenerator(load_model(generator_folder(tmp_path / "exits"), LoadedGenerator, device="cpu"))
    prompts = [("go", ""), ("sum up", "word " * 80), ("stop", "a"), ("word " * 80, "")]
    for batch_size in (1, 3):
        texts = list(generator.generate_texts(prompts, batch_size=batch_size, max_new_tokens=5))
        assert [text.truncated for text in texts] == [False, True, False, True]
    streamed = [generator.stream(*prompt, on_token=lambda *_: None, max_new_tokens=5) for prompt in prompts]
    assert [text.truncated for text in streamed] == [False, True, False, True]


def test_generate_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = generator_folder(tmp_path / "exits")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"instruction": "go"}, {"instruction": "sum up", "input": "word " * 80}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["generate", str(folder), str(prompts), "--max-new-tokens", "5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["truncated"] for line in lines] == [False, True]
    said = "prompts were longer than the 251 tokens that 5 new ones leave room for and were cut."
    assert caplog.messages == [f"1 of 2 {said} A lower --max-new-tokens leaves more."]
    caplog.clear()
    assert main(["generate", str(folder), "--prompt", "word " * 80, "--max-new-tokens", "5"]) == 0
    assert caplog.messages == [f"1 of 1 {said} A lower --max-new-tokens leaves more."]
    caplog.clear()
    assert main(["generate", str(folder), "--prompt", "word", "--max-new-tokens", "5"]) == 0
    assert caplog.messages == []
