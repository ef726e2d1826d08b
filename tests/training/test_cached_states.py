"""States that are computed once: the right ones, no more of them than fit, in an order that resumes."""

from __future__ import annotations

import errno
import io
import math
import os
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consistentee.data.batches import collate
from consistentee.data.spooled import SpooledRows, SpooledTexts
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.training.cached_states import (
    CachedStates,
    ChunkedBatches,
    StatesInFile,
    StatesInMemory,
    chunks_of,
    collate_states,
)
from tiny import all_hidden_states, tiny_classifier, tiny_dataset, tiny_tokenizer

ROWS = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitForSequenceClassification:
    folder = tiny_classifier(tmp_path_factory.mktemp("original"), layers=3)
    return EarlyExitForSequenceClassification.from_classifier(folder, classifier_hidden_size=8)


def cache(model: EarlyExitForSequenceClassification, memory_mb: float = 0.03, **options: Any) -> CachedStates:
    tokenizer = tiny_tokenizer()
    texts = SpooledTexts.read(tiny_dataset(ROWS).texts, tokenizer, 64, source="tiny")
    values = {"passes": 3, "batch_size": 8, "seed": 0, **options}
    rows = SpooledRows(texts, range(len(texts)))
    return CachedStates(
        model, rows, collate=partial(collate, tokenizer=tokenizer), memory_mb=memory_mb, **values
    )


@torch.no_grad()
def test_states_and_logits_are_the_models(model: EarlyExitForSequenceClassification) -> None:
    cached = cache(model)
    assert len(cached.chunks) > 2
    for row in (7, 0, 31, len(cached) - 1, 7):
        item = cached[row]
        ids = torch.tensor([cached._rows[row]["input_ids"]])
        expected = torch.stack(all_hidden_states(model.backbone, ids)[:-1], dim=2)[0]
        torch.testing.assert_close(item["states"].float(), expected, rtol=2e-3, atol=2e-3)
        logits = model(ids, criterion="confidence", threshold=1.0).logits[0]
        torch.testing.assert_close(item["labels"], logits, rtol=1e-5, atol=1e-5)
    batch = collate_states([cached[3], cached[4]])
    assert batch["states"].shape[1] == max(cached.lengths[3], cached.lengths[4])
    assert batch["attention_mask"].sum(1).tolist() == [cached.lengths[3], cached.lengths[4]]
    assert batch["states"].dtype == torch.float32


def test_each_chunk_runs_once_in_all_its_passes(
    model: EarlyExitForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, loads = cache(model), Counter[int]()
    load = CachedStates._load

    def counted(self: CachedStates, number: int) -> Any:
        loads[number] += 1
        return load(self, number)

    monkeypatch.setattr(CachedStates, "_load", counted)
    seen = Counter[int]()
    for batch in cached.batches:
        for row in batch:
            seen[cached[row]["index"]] += 1
    assert set(seen.values()) == {3}
    assert len(seen) == len(cached)
    assert loads == Counter(range(len(cached.chunks)))


def test_states_that_are_given_back_come_again(model: EarlyExitForSequenceClassification) -> None:
    for disk_mb in (0.0, 100.0):
        cached = cache(model, disk_mb=disk_mb)
        before = cached[7]["states"].clone()
        store = weakref.ref(cached._store)
        cached.release()
        assert cached._loaded is None
        assert store() is None  # nothing holds them any more
        assert torch.equal(cached[7]["states"], before)


def test_a_file_takes_what_memory_cannot(
    model: EarlyExitForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, in_file, alone = cache(model), cache(model, disk_mb=100.0), cache(model, 100.0, disk_mb=200.0)
    in_file.folder = tmp_path / "new"
    assert len(in_memory.chunks) > 2
    assert len(in_file.chunks) == 1  # so that a pass is over all rows
    for row in (7, 0, 31, 7):
        for name in ("states", "labels"):
            assert torch.equal(in_file[row][name], alone[row][name])
    assert isinstance(in_file._store, StatesInFile)
    assert isinstance(alone._store, StatesInMemory)  # all rows fit
    assert isinstance(in_memory._store or in_memory._room(), StatesInMemory)
    assert list(in_file.folder.iterdir()) == []  # it has no name
    wanted = in_file[3]["states"].clone()
    in_file[3]["states"].zero_()  # a copy
    assert torch.equal(in_file[3]["states"], wanted)
    small = cache(model, memory_mb=0.001, disk_mb=0.02)
    assert len(small.chunks) > 1
    tokens, exits, hidden = small._shape
    assert 2 * tokens * exits * hidden <= 0.02 * 1e6

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"states take 0 MB in .*, where .* MB are free. .* lower max_disk_mb"):
        cache(model, disk_mb=100.0)[0]


def test_a_file_that_takes_and_gives_a_part_at_a_time() -> None:
    class Reluctant(io.BytesIO):
        def write(self, values: Any) -> int:
            return super().write(values[:7])

        def readinto(self, room: Any) -> int:
            return super().readinto(room[:5])

    file = StatesInFile((6, 2, 3), None)
    file._file = Reluctant()
    states = torch.arange(36, dtype=torch.float16).reshape(6, 2, 3)
    file.write(2, states[2:])
    file.write(0, states[:2])
    assert torch.equal(file.read(0, 6), states)
    assert torch.equal(file.read(3, 2), states[3:5])
    with pytest.raises(EOFError, match="shorter than"):
        file.read(5, 2)


def test_a_chunk_is_loaded_ahead(
    model: EarlyExitForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = cache(model)
    places = [cached._chunk_of[batch[0]] for batch in cached.batches]
    for batch in (0, len(places) - 1, places.index(1)):
        cached.load_for(batch, shown=True)
        assert cached._loaded == places[batch]
    monkeypatch.setattr(CachedStates, "_load", lambda *_: pytest.fail("it is there"))
    cached.batches.set_epoch(0, places.index(1))
    assert cached[next(iter(cached.batches))[0]]["index"] >= 0


def test_memory_is_bounded_by_what_was_allowed(model: EarlyExitForSequenceClassification) -> None:
    whole = cache(model, memory_mb=100.0)
    assert len(whole.chunks) == 1
    for memory_mb in (0.02, 0.05):
        cached = cache(model, memory_mb=memory_mb)
        assert 2 * math.prod(cached._shape) <= memory_mb * 1e6
        assert sorted(np.concatenate(cached.chunks).tolist()) == list(range(len(cached)))


@pytest.mark.parametrize("done", [0, 1, 5, 13, 20, 29])
def test_batches_go_on_where_they_stopped(done: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 60)
    chunks = chunks_of(np.random.default_rng(1).permutation(60), lengths, 120)

    def batches() -> ChunkedBatches:
        return ChunkedBatches(chunks, lengths, 8, passes=2, seed=3)

    every, rest = batches(), batches()
    rest.set_epoch(0, done)
    assert len(list(every)) == len(every)
    assert list(rest) == list(every)[done:]


@pytest.mark.parametrize("min_steps,steps", [(0, 10), (10, 10), (11, 15), (38, 40)])
def test_few_steps_become_more_passes(min_steps: int, steps: int) -> None:
    chunks, lengths = [np.arange(20), np.arange(20, 32)], np.full(32, 3)
    batches = ChunkedBatches(chunks, lengths, 8, passes=2, min_steps=min_steps, seed=0)  # 5 steps a pass
    assert len(batches) == len(list(batches)) == steps
    counts = np.bincount([row for batch in batches for row in batch])
    assert counts.tolist() == [steps // 5] * 32


def test_passes_over_a_chunk_have_orders_of_their_own() -> None:
    lengths = np.full(32, 4)
    found = list(ChunkedBatches([np.arange(32)], lengths, 8, passes=2, seed=0))
    assert found[:4] != found[4:]
    assert sorted(row for batch in found[:4] for row in batch) == list(range(32))


def test_a_row_longer_than_the_memory_has_a_chunk_of_its_own() -> None:
    chunks = chunks_of(np.arange(3), np.array([2, 50, 2]), 10)
    assert [chunk.tolist() for chunk in chunks] == [[0], [1], [2]]


def test_states_that_half_precision_cannot_hold_are_clamped(
    model: EarlyExitForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consistentee.backbones import encoders

    run_layer = encoders.run_layer

    def huge(*arguments: Any) -> Any:
        state = run_layer(*arguments)
        state.hidden_states = state.hidden_states * 1e6
        return state

    monkeypatch.setattr(encoders, "run_layer", huge)
    assert cache(model)[0]["states"].isfinite().all()


def test_every_part_of_the_model_stays_in_its_mode(model: EarlyExitForSequenceClassification) -> None:
    for whole, exits in ((True, True), (False, True), (True, False), (False, False)):
        model.train(whole)
        model.classifiers.train(exits)
        before = {name: module.training for name, module in model.named_modules()}
        cache(model)[0]
        assert {name: module.training for name, module in model.named_modules()} == before
        assert before["classifiers.layers.0"] == exits
        assert not before["classifiers.layers.2"]  # the original's
    model.eval()
