"""With a batch size of 1 every line is answered before the next is asked for: both commands, every format."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from consistentee.data.files import read_texts
from consistentee.data.generation import read_prompts
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.generator import TextGenerator
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_model

PATIENCE = 240  # seconds for a line; a machine that is busy needs many to import torch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streams")
    return {
        "predict": tiny_model(root / "classifier", tiny_backbone(root / "backbone")),
        "generate": generator_folder(root / "generator"),
    }


@pytest.mark.parametrize("command", ["predict", "generate"])
def test_a_pipe_is_answered_line_by_line(command: str, folders: dict[str, Path]) -> None:
    arguments = [command, folders[command], "-", "--batch-size", "1"]
    arguments += ["--max-new-tokens", "3"] if command == "generate" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "consistentee", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for text in ("a good film", "dull", "fine", "bad plot"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], PATIENCE)[0], f"no answer to {text!r}"
            answer = json.loads(process.stdout.readline())
            assert answer["text" if command == "predict" else "prompt"] == text
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    finally:
        process.kill()
        process.wait()


class Watched(io.RawIOBase):
    """A stream of lines that notes how many were asked for."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.asked = 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            self.asked += 1
            yield line.encode()


CASES = [
    (["good\n", "bad\n", "dull\n"], None, 0),
    (['{"text": "good"}\n', '{"text": "bad"}\n', '{"text": "dull"}\n'], None, 0),
    (["id,text\n", "1,good\n", '2,"bad\n', 'film"\n'], ["text"], 1),
    (["text\tid\n", "good\t1\n", "bad\t2\n"], ["text"], 1),
]


@pytest.mark.parametrize("lines, columns, header", CASES)
def test_no_reader_reads_ahead(
    lines: list[str], columns: list[str] | None, header: int, folders: dict[str, Path]
) -> None:
    stream = Watched(lines)
    engine = Engine.from_pretrained(folders["predict"], device="cpu")
    asked = [stream.asked for _ in engine.windows(read_texts(stream, columns), batch_size=1)]
    assert asked[:2] == [1 + header, 2 + header + any(line.startswith('2,"') for line in lines)]


@pytest.mark.parametrize("lines", [case[0] for case in CASES[:2]])
def test_no_prompt_is_read_ahead(lines: list[str], folders: dict[str, Path]) -> None:
    stream = Watched(lines)
    generator = TextGenerator(load_model(folders["generate"], LoadedGenerator, device="cpu"))
    prompts = ((row["prompt"], row["input"]) for row in read_prompts(stream))
    texts = generator.generate_texts(prompts, batch_size=1, max_new_tokens=2)
    assert [stream.asked for _ in texts] == [1, 2, 3]
