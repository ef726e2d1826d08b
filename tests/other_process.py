"""Answers in another process than that which opened the models: python other_process.py HOW KIND=PATH...

HOW is `fork` (KIND opened here from the folder PATH, asked here, then asked in a forked process) or `pickle` (KIND read
from the pickle PATH). Prints the answers by kind as JSON, for each first those of the opener where there are any.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.generator import TextGenerator

TEXTS = [f"good {'film ' * (row % 7)}and a bad plot {row}" for row in range(200)]
PROMPTS = [(f"do {row} {'again ' * 6}", "") for row in range(64)]


def open_it(kind: str, folder: Path) -> Any:
    """An engine on the backend that `kind` names, or a generator."""
    if kind == "generator":
        return TextGenerator(load_model(folder, LoadedGenerator, device="cpu"))
    return Engine.from_pretrained(folder, device="cpu", backend=kind)


def answers(it: Any) -> list[list[Any]]:
    """Labels and exit layers, or tokens and exit layers."""
    if isinstance(it, Engine):
        return [[answer.label, answer.exit_layer] for answer in it.predict(TEXTS)]
    written = it.generate_texts(PROMPTS, batch_size=64, max_new_tokens=3)
    return [[text.token_ids, text.exit_layers] for text in written]


def in_a_fork(it: Any) -> list[list[Any]] | str:
    """Its answers in a forked process, or what it says instead."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as stream:
            try:
                found = answers(it)
            except RuntimeError as error:
                found = str(error)
            json.dump(found, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = json.load(stream)
    os.waitpid(child, 0)
    return found


if __name__ == "__main__":
    how, paths = sys.argv[1], dict(argument.split("=", 1) for argument in sys.argv[2:])
    found: dict[str, list[Any]] = {}
    if how == "fork":
        torch.set_num_threads(2)
        torch.rand(2000, 2000).exp().sum()  # torch has started its threads
    for kind, path in paths.items():
        if how == "pickle":
            found[kind] = [answers(pickle.loads(Path(path).read_bytes()))]  # noqa: S301
        else:
            it = open_it(kind, Path(path))
            found[kind] = [answers(it), in_a_fork(it)]
    print(json.dumps(found))  # noqa: T201
