"""Engines and generators in other processes: pickled, forked, and beside threads that use the same tokenizer."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

import other_process
from consistentee.inference.threads import settle_after_fork
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.generator import TextGenerator
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_model

KINDS = ["torch", "onnxruntime", "generator"]
TIMEOUT = 240  # seconds until a process counts as one that waits for ever


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("processes")
    classifier = tiny_model(root / "classifier", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)
    generator = generator_folder(root / "generator")
    return {"torch": classifier, "onnxruntime": classifier, "generator": generator}


def open_kind(kind: str, folders: dict[str, Path]) -> Any:
    if kind == "onnxruntime":
        pytest.importorskip("onnxruntime")
    return other_process.open_it(kind, folders[kind])


def run_elsewhere(how: str, paths: dict[str, Path]) -> dict[str, list[Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", other_process.__file__, how]
    command += [f"{kind}={path}" for kind, path in paths.items()]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_answers_the_same(folders: dict[str, Path], kind: str) -> None:
    it = open_kind(kind, folders)
    before = other_process.answers(it)
    other = pickle.loads(pickle.dumps(it))  # noqa: S301
    assert other_process.answers(other) == before
    if isinstance(it, Engine):
        assert (other.backend.name, other.backend.dtype) == (it.backend.name, it.backend.dtype)
        assert other.saved.name == it.saved.name
    cloudpickle = pytest.importorskip("cloudpickle")
    assert other_process.answers(cloudpickle.loads(cloudpickle.dumps(it))) == before


def test_a_new_process_opens_a_pickle(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = {kind: open_kind(kind, folders) for kind in ("torch", "generator")}
    paths = {kind: tmp_path / kind for kind in opened}
    for kind, it in opened.items():
        paths[kind].write_bytes(pickle.dumps(it))
    found = run_elsewhere("pickle", paths)
    assert found == {kind: [other_process.answers(it)] for kind, it in opened.items()}


@pytest.fixture(scope="module")
def forked(folders: dict[str, Path]) -> dict[str, list[Any]]:
    """By kind the answers of a process, and those of its fork or what that says."""
    if not hasattr(os, "fork"):
        pytest.skip("processes do not fork here")
    known = ["torch", "generator", *(["onnxruntime"] if find_spec("onnxruntime") else [])]
    return run_elsewhere("fork", {kind: folders[kind] for kind in known})


@pytest.mark.parametrize("kind", ["torch", "generator"])
def test_a_forked_process_answers_the_same(forked: dict[str, list[Any]], kind: str) -> None:
    here, there = forked[kind]
    assert there == here
    assert len(here) == len(other_process.PROMPTS if kind == "generator" else other_process.TEXTS)


def test_a_forked_process_says_that_onnxruntime_does_not_fork(forked: dict[str, list[Any]]) -> None:
    pytest.importorskip("onnxruntime")
    here, there = forked["onnxruntime"]
    assert len(here) == len(other_process.TEXTS)
    assert 'with backend "onnxruntime" must be used in the process that opened it' in there


def test_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(
        RuntimeError, match=r'on device "cuda:1" .* must be used in the process that opened it'
    ):
        settle_after_fork(torch.device("cuda", 1))


@pytest.mark.parametrize("kind", ["torch", "generator"])
def test_the_tokenizer_is_its_own(folders: dict[str, Path], kind: str) -> None:
    it = open_kind(kind, folders)
    before = other_process.answers(it)
    tokenizer, stop = it.saved.tokenizer, Event()
    tokenizer.truncation_side = "left"
    tokenizer.add_tokens(["good", "do"])

    def use_it() -> None:
        while not stop.is_set():
            tokenizer(["a film of some length"] * 20, truncation=True, max_length=3, padding="longest")

    other = Thread(target=use_it)
    other.start()
    try:
        for _ in range(5):
            assert other_process.answers(it) == before
    finally:
        stop.set()
        other.join()


def test_a_chat_template_goes_with_the_generators_own_tokenizer(folders: dict[str, Path]) -> None:
    saved = load_model(folders["generator"], LoadedGenerator, device="cpu")
    saved.tokenizer.chat_template = "{{ messages[0]['content'] }}:"
    generator = TextGenerator(saved, template=saved.prompt_template("chat"))
    before = generator.encode([("Add.", "1")])
    saved.tokenizer.chat_template = "{{ messages[0]['content'] }}?"
    assert generator.encode([("Add.", "1")]) == before
    assert pickle.loads(pickle.dumps(generator)).encode([("Add.", "1")]) == before  # noqa: S301
