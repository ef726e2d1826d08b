"""Layers and classifiers on packed rows: what the model itself computes for every row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consistentee.inference.encoder.packed_layers import LAYER_PARTS
from consistentee.inference.encoder.packing import PackedBatch
from consistentee.inference.encoder.prepacked_linear import has_int8
from consistentee.inference.encoder.torch_backend import PackedBackend
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from tiny import all_hidden_states, tiny_backbone, unsettle

CPU = torch.device("cpu")
LAYERS = 4
LENGTHS = (3, 9, 9, 20, 1, 14)


def build(folder: Path, model_type: str, config: dict[str, Any] | None = None, **values: Any) -> Any:
    """A random model, its norms and biases too."""
    path = tiny_backbone(folder, model_type, layers=LAYERS, **(config or {}))
    model = EarlyExitForSequenceClassification.from_backbone(path, num_labels=3, **values).eval()
    unsettle(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_rows(model: Any) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(4, 60, (n,), generator=generator).tolist()} for n in LENGTHS]
    if getattr(model.config.backbone_config, "type_vocab_size", 0) > 1:
        for row in rows:
            row["token_type_ids"] = [int(i > 4) for i in range(len(row["input_ids"]))]
    return rows


def alone(model: Any, row: dict[str, list[int]]) -> tuple[Tensor, ...]:
    """The hidden states of one row after each layer, (tokens, hidden) each."""
    types = torch.tensor([row["token_type_ids"]]) if "token_type_ids" in row else None
    states = all_hidden_states(model.backbone, torch.tensor([row["input_ids"]]), None, types)
    return tuple(state[0] for state in states)


def assert_holds(batch: PackedBatch, rows: list[Tensor], tolerance: float = 2e-5) -> None:
    assert tuple(len(row) for row in rows) == batch.layout.lengths
    found = batch.hidden_states[: batch.layout.tokens]
    torch.testing.assert_close(found, torch.cat(rows), atol=tolerance, rtol=tolerance)


CASES = [(model_type, {}) for model_type in LAYER_PARTS]
CASES += [
    ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
    ("bert", {"hidden_act": "relu"}),
]


@pytest.mark.parametrize("model_type,config", CASES)
@torch.no_grad()
def test_layers_as_each_row_alone(tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    model = build(tmp_path, model_type, config)
    rows = token_rows(model)
    wanted = [alone(model, row) for row in rows]
    backend = PackedBackend(model, "float32")
    batch = backend.start(rows)
    for layer in range(LAYERS):
        batch = backend.run_layer(layer, batch)
        assert_holds(batch, [states[layer] for states in wanted])
        readings = backend.classify(layer, batch)
        for row, states in enumerate(wanted):
            mask = torch.ones(1, len(states[layer]), dtype=torch.int64)
            pooled, logits = model.classifiers(layer, states[layer][None], mask)
            state = pooled[0] @ model.policy.state_weight[layer] + model.policy.state_bias[layer]
            right = torch.cat([logits[0], state])
            torch.testing.assert_close(readings[row], right, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", list(LAYER_PARTS))
@torch.no_grad()
def test_rows_leave_and_batches_join_between_layers(tmp_path: Path, model_type: str) -> None:
    model = build(tmp_path, model_type)
    rows = token_rows(model)
    wanted = [alone(model, row) for row in rows]
    backend = PackedBackend(model, "float32")
    one, other = backend.start(rows[:4]), backend.start(rows[4:])
    one, other = backend.run_layer(0, one), backend.run_layer(0, other)
    kept = backend.select(one, [0, 3])
    kept = backend.run_layer(1, kept)
    other = backend.run_layer(1, other)
    assert backend.can_merge(kept, other)
    joined = backend.merge([kept, other])
    assert_holds(joined, [wanted[row][1] for row in (0, 3, 4, 5)])
    last = backend.run_layer(2, backend.select(joined, [2]))
    assert_holds(last, [wanted[4][2]])
    assert list(backend.lengths(last)) == [LENGTHS[4]]


@pytest.mark.parametrize(
    "values",
    [
        {"head": "attention"},
        {"head": "shared_pooler", "pooling": "cls"},
        {"head": "shared_pooler", "pooling": "mean"},
    ],
)
@pytest.mark.parametrize("dtype,tolerance", [("float32", 5e-5), ("bfloat16", 0.15), ("int8", 0.15)])
@torch.no_grad()
def test_heads_in_every_precision(
    tmp_path: Path, values: dict[str, Any], dtype: str, tolerance: float
) -> None:
    if dtype == "int8" and not has_int8(CPU):
        pytest.skip("no int8 engine")
    model = build(tmp_path, "bert", **values)
    rows = token_rows(model)
    backend = PackedBackend(model, dtype)
    batch = backend.start(rows)
    exact = PackedBackend(model, "float32")
    wanted = exact.start(rows)
    for layer in range(LAYERS):
        batch, wanted = backend.run_layer(layer, batch), exact.run_layer(layer, wanted)
        found, right = backend.classify(layer, batch), exact.classify(layer, wanted)
        assert found.dtype == torch.float32
        assert (found - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))
    for row in range(len(rows)):  # the heads themselves, against the model's own
        states = alone(model, rows[row])[-1][None]
        right = model.classifiers(LAYERS - 1, states, torch.ones(states.shape[:2], dtype=torch.int64))[1]
        logits = exact.classify(LAYERS - 1, wanted)[row, : right.shape[1]]
        torch.testing.assert_close(logits, right[0], atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_relative_positions_of_rows_that_grow(tmp_path: Path) -> None:
    """MPNet's bias is kept for the widest rows seen: short, long, short again."""
    model = build(tmp_path, "mpnet")
    backend = PackedBackend(model, "float32")
    for length in (5, 70, 6):
        row = {"input_ids": [4 + position % 50 for position in range(length)]}
        batch = backend.run_layer(0, backend.start([row]))
        assert_holds(batch, [alone(model, row)[0]])
