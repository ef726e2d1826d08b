"""One pass over a data set against one model call a row, in memory and in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import tiny
from consistentee.data.batches import TokenizedDataset, collate
from consistentee.data.tokenization import tokenize
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.training.states import LayerStates, run_all_layers, run_full_depth

LAYERS, HIDDEN, ROWS = 3, 32, 11
TOO_SMALL_MB = ROWS * LAYERS * HIDDEN * 2 / 1e6 * 0.9  # a little less than what the states need


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=LAYERS)


@pytest.fixture
def model(backbone_folder: Path) -> EarlyExitForSequenceClassification:
    return EarlyExitForSequenceClassification.from_backbone(backbone_folder, num_labels=2).eval()


@pytest.fixture(scope="module")
def dataset() -> TokenizedDataset:
    return tokenize(tiny.tiny_dataset(ROWS), tiny.tiny_tokenizer(), 32)


@pytest.fixture
def run(model: EarlyExitForSequenceClassification, dataset: TokenizedDataset) -> Callable[..., LayerStates]:
    return partial(
        run_all_layers,
        model,
        dataset,
        collate=partial(collate, tokenizer=tiny.tiny_tokenizer()),
        batch_size=4,
    )


@torch.no_grad()
def row_by_row(model: Any, dataset: TokenizedDataset, **options: Any) -> list[Any]:
    outputs = []
    for row in range(len(dataset)):
        batch = collate([dataset[row]], tiny.tiny_tokenizer())
        outputs.append(model(**{k: v for k, v in batch.items() if k not in ("labels", "index")}, **options))
    return outputs


def test_every_row_gets_what_a_call_of_its_own_gives(
    run: Callable[..., LayerStates], model: EarlyExitForSequenceClassification, dataset: TokenizedDataset
):
    states = run(keep_pooled=True)
    assert len(states) == ROWS
    assert len(set(dataset.lengths.tolist())) > 2
    for row, output in enumerate(row_by_row(model, dataset, all_layers=True)):
        for name in ("classifier_logits", "layer_logits", "exit_probs"):
            torch.testing.assert_close(getattr(states, name)[row], output[name][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states.pooled[row].float(), output.pooled[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(states.labels, dataset.labels)
    assert states.pooled.dtype == torch.float16


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(run: Callable[..., LayerStates], batch_size: int):
    first, second = run(), run(batch_size=batch_size)
    torch.testing.assert_close(second.layer_logits, first.layer_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.exit_probs, first.exit_probs, atol=1e-5, rtol=1e-4)


def test_states_are_kept_when_asked_for_only(run: Callable[..., LayerStates]):
    assert run().pooled is None


def test_the_model_stays_in_its_mode_and_gets_no_gradient(
    run: Callable[..., LayerStates], model: EarlyExitForSequenceClassification
):
    model.classifiers.train()
    model.train()
    states = run(accelerator=Accelerator(cpu=True))
    assert model.training
    assert not states.layer_logits.requires_grad
    model.eval()
    torch.testing.assert_close(run().layer_logits, states.layer_logits)  # dropout was off all the same
    assert not model.training


def test_states_above_the_limit_are_mapped_and_stay_the_same(
    run: Callable[..., LayerStates], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    in_memory = run(keep_pooled=True)
    sizes: list[int] = []
    memmap = np.memmap

    def noting(*arguments: Any, **options: Any) -> np.memmap:
        mapped = memmap(*arguments, **options)
        sizes.append(mapped.nbytes)
        return mapped

    monkeypatch.setattr(np, "memmap", noting)
    mapped = run(keep_pooled=True, memory_limit_mb=TOO_SMALL_MB, scratch_dir=tmp_path / "states")
    assert sizes == [ROWS * LAYERS * HIDDEN * 2]
    assert torch.equal(mapped.pooled, in_memory.pooled)
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(mapped.pooled[rows], in_memory.pooled[rows])
    del mapped
    assert list((tmp_path / "states").iterdir()) == []  # the file goes with its states


def test_states_below_the_limit_need_no_file(run: Callable[..., LayerStates], tmp_path: Path):
    run(keep_pooled=True, memory_limit_mb=2 * TOO_SMALL_MB, scratch_dir=tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_a_second_mapped_pass_leaves_the_first_alone(
    run: Callable[..., LayerStates], model: EarlyExitForSequenceClassification, tmp_path: Path
):
    options = {"keep_pooled": True, "memory_limit_mb": TOO_SMALL_MB, "scratch_dir": tmp_path}
    first = run(**options)
    expected = first.pooled.clone()
    with torch.no_grad():
        for parameter in model.classifiers.parameters():
            parameter.mul_(3)
    second = run(**options)
    assert not torch.equal(second.pooled, expected)
    assert torch.equal(first.pooled, expected)


def test_states_above_the_limit_need_a_place(run: Callable[..., LayerStates]):
    with pytest.raises(
        ValueError, match=r"shape \(11, 3, 32\) exceed .* MB and there is no scratch_dir.*memory_limit_mb"
    ):
        run(keep_pooled=True, memory_limit_mb=TOO_SMALL_MB)


def test_run_full_depth(backbone_folder: Path, dataset: TokenizedDataset):
    plain = FullDepthForSequenceClassification.from_backbone(backbone_folder, num_labels=2).eval()
    logits = run_full_depth(
        plain, dataset, collate=partial(collate, tokenizer=tiny.tiny_tokenizer()), batch_size=4
    )
    expected: Tensor = torch.cat([output.logits for output in row_by_row(plain, dataset)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
