"""Free memory goes back to the system: now and then, where the C library can, from what runs for long."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from consistentee.inference import memory
from consistentee.inference.encoder import layer_pool
from consistentee.inference.encoder.layer_pool import GIVE_BACK_STEPS, PoolRow
from consistentee.inference.memory import EVERY_SECONDS, give_back_memory
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines import classifier
from consistentee.pipelines.classifier import Engine
from tiny import tiny_backbone, tiny_dataset, tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("memory")
    folder = tiny_model(root / "model", tiny_backbone(root / "backbone", layers=2))
    return Engine(load_model(folder, LoadedClassifier, device="cpu"))


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [1000.0], list[int]()
    monkeypatch.setattr(memory, "_last", 0.0)
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory, "_malloc_trim", lambda: calls.append)
    assert [give_back_memory(), give_back_memory()] == [True, False]
    now[0] += EVERY_SECONDS
    assert give_back_memory()
    assert calls == [0, 0]


def test_nothing_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._malloc_trim.cache_clear()
    monkeypatch.setattr(memory, "_last", 0.0)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    try:
        assert not give_back_memory()
    finally:
        memory._malloc_trim.cache_clear()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_gaps_between_what_is_in_use_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(100_000) for _ in range(1000)]  # too small for pages of their own
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    kept = blocks[::50]
    for block in set(blocks) - set(kept):
        library.free(block)
    monkeypatch.setattr(memory, "_last", 0.0)
    before = resident_kb()
    assert give_back_memory()
    assert before - resident_kb() > 50_000
    for block in kept:
        library.free(block)


def test_a_pool_does_it_every_so_many_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(layer_pool, "give_back_memory", lambda: calls.append(pool._steps))
    rows, _ = engine.tokenize(tiny_dataset(4).texts)
    pool = engine.pool()
    for step in range(2 * GIVE_BACK_STEPS):
        pool.add([PoolRow(step, rows[0], 2.0)], None)
        pool.step()
    assert calls == [GIVE_BACK_STEPS, 2 * GIVE_BACK_STEPS]


def test_a_stream_does_it_after_full_windows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(classifier, "WINDOW_ROWS", 64)
    monkeypatch.setattr(classifier, "give_back_memory", lambda: calls.append(1))
    assert len(list(engine.stream(tiny_dataset(150).texts))) == 150
    assert len(calls) == 3
