"""The commands of the pages that bear no mark run, page after page, on tiny models.

What they name on the hub are tiny folders here, and tiny data sets. A command of several pages runs once. `serve`
listens on a free port in a thread, and the `curl` below it asks that. `pip`, `make` and the like are not run here.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import pytest

from compared_cells import cell_of
from consistentee.cli.main import main
from consistentee.serving.server import HttpServer
from tiny import tiny_backbone, tiny_classifier, tiny_dataset, tiny_model, write_csv
from tiny_training import tiny_decoder, tiny_instructions
from typed_commands import PAGES, blocks

RUN = [
    (page, line)
    for page in PAGES
    for block in blocks(page)
    if block.needs is None
    for line in block.lines
    if re.search(r"\b(consistentee|curl) ", line)
]
MODELS = {"docs/report.md": "fast"}
"""What a page means by MODEL, where it is not any model with exits."""


def load_dataset(path: str, config: str | None) -> datasets.DatasetDict:
    """In place of the hub's data sets."""
    if path == "tatsu-lab/alpaca":
        rows = tiny_instructions(40)
        columns = {"instruction": rows.instructions, "input": rows.inputs, "output": rows.references}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
    names = ["entailment", "not_entailment"]
    features = {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
    parts = {}
    for split, count in (("train", 80), ("validation", 30)):
        rows = tiny_dataset(count, seed=count)
        first = [texts[0] for texts in rows.texts]
        columns = {"sentence1": first, "sentence2": first[::-1], "label": rows.labels}
        parts[split] = datasets.Dataset.from_dict(
            columns, features=datasets.Features({**features, "label": datasets.ClassLabel(names=names)})
        )
    return datasets.DatasetDict(parts)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with all that the pages name."""
    folder = tmp_path
    backbone = tiny_backbone(folder / "google-bert" / "bert-base-uncased", max_position_embeddings=130)
    tiny_decoder(folder / "HuggingFaceTB" / "SmolLM2-135M", max_position_embeddings=640)
    tiny_model(folder / "exits-of-rows", backbone)
    tiny_classifier(folder / "CLASSIFIER", layers=3)
    for number, (name, count) in enumerate(
        {"traffic.txt": 400, "more.txt": 400, "texts.txt": 800}.items(), 1
    ):
        rows = tiny_dataset(count, seed=number).texts
        (folder / name).write_text("".join(f"{text}\n" for (text,) in rows), encoding="utf-8")
    write_csv(folder / "rows.csv", tiny_dataset(400, seed=5))
    prompts = '{"prompt": "say a:"}\n{"prompt": "say b:"}\n'
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    (folder / "OUT" / "cells").mkdir(parents=True)
    for label in ("plain", "consistent", "deebert"):
        kept = folder / "OUT" / "cells" / f"small_rte_{label}_1.json"
        kept.write_text(json.dumps(cell_of(label)), encoding="utf-8")
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HttpServer]]:
    """Servers that commands have started, the last one last; all end with the test."""
    servers: list[HttpServer] = []
    threads: list[threading.Thread] = []
    listen = HttpServer.run

    def run(self: HttpServer) -> None:
        servers.append(self)
        threads.append(threading.Thread(target=listen, args=(self,)))
        threads[-1].start()

    monkeypatch.setattr(HttpServer, "run", run)
    yield servers
    for server, thread in zip(servers, threads, strict=True):
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def ask(words: list[str], url: str) -> Any:
    """What a `curl` of a page brings."""
    for _ in range(500):
        if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
            break
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    words = [word.replace("localhost:8000", url.removeprefix("http://")) for word in words]
    return json.loads(
        subprocess.run([*words, "--silent"], capture_output=True, check=True, timeout=60).stdout
    )


@pytest.mark.slow
def test_commands_run(
    place: Path,
    served: list[HttpServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("consistentee.cli.benchmark.SECONDS", 1.0)  # in place of the minute
    done: set[str] = set()
    asked = 0
    for page, line in RUN:
        (place / "MODEL").unlink(missing_ok=True)
        (place / "MODEL").symlink_to(place / MODELS.get(page, "exits-of-rows"))
        before, _, command = line.rpartition(" | ")
        words = shlex.split(command, comments=True)
        key = " ".join([before, *words])
        if words[0] == "curl":
            ((answer, *_), *_) = [ask(words, served[-1].url)]
            assert {"label", "score", "exit_layer"} <= set(answer)
            asked += 1
        elif words[0] == "consistentee" and key not in done:
            said = shlex.split(before, comments=True)[1:]
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in said)))
            code = main([*words[1:], *(["--port", "0"] if words[1] == "serve" else [])])
            assert code == 0, (page, line, capsys.readouterr().err)
        done.add(key)
    assert asked >= 3
    assert all((place / name).is_file() for name in ("rte.png", "rte.html", "speed.json", "speed.png"))
