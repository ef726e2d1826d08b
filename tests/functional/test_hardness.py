"""Memorized layer and the other measures: edge cases and values worked by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from consistentee.config import HardnessMeasure, TokenHardness
from consistentee.functional.hardness import (
    HARDNESS,
    HARDNESS_MEASURES,
    TOKEN_HARDNESS_MEASURES,
    hardness,
    memorized_layer,
)
from consistentee.functional.losses import layer_losses


def of_logits(measure: str, layer_logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Hardness of rows with these logits, (rows, layers, classes)."""
    return hardness(
        measure,
        losses=layer_losses(layer_logits, labels),
        right=layer_logits.argmax(-1) == labels[:, None],
        last_logits=layer_logits[:, -1],
        labels=labels,
        forgetting_counts=counts,
    )


@pytest.mark.parametrize(
    "right, expected",
    [
        ((0, 0, 0, 0), 4),  # never right
        ((0, 0, 0, 1), 4),  # right at the last layer only
        ((1, 1, 1, 0), 4),  # forgotten at the top
        ((1, 1, 0, 1), 4),  # right, wrong, right
        ((1, 0, 1, 1), 3),
        ((0, 1, 1, 1), 2),
        ((1, 1, 1, 1), 1),  # always right
    ],
)
def test_memorized_layer(right: tuple[int, ...], expected: int):
    layers = memorized_layer(torch.tensor([right]).bool())
    assert layers.tolist() == [expected]
    assert layers.dtype == torch.int64


def test_memorized_layer_is_the_definition():
    right = torch.rand(60, 5) < 0.4
    for row, layer in enumerate(memorized_layer(right).tolist()):
        starts = [t for t in range(1, 6) if right[row, t - 1 :].all()]
        assert layer == (min(starts) if starts else 5)


def test_memorized_layer_of_one_layer():
    assert memorized_layer(torch.tensor([[False], [True]])).tolist() == [1, 1]


@pytest.mark.parametrize("measure", HARDNESS_MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_every_measure_lies_between_zero_and_one(measure: str, scale: float):
    layer_logits, labels = torch.randn(200, 4, 3) * scale, torch.randint(3, (200,))
    values = of_logits(measure, layer_logits, labels, torch.randint(5, (200,)))
    assert values.shape == (200,)
    assert values.dtype == torch.float32
    assert (values >= 0).all()
    assert (values <= 1).all()


def test_measures_by_hand():
    probabilities = torch.tensor(
        [[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.1, 0.9]], [[0.5, 0.5], [0.3, 0.7]]]
    )
    labels = torch.tensor([0, 1, 0])
    layer_logits = probabilities.log()

    def of(measure: str, counts: Tensor | None = None) -> list[float]:
        return of_logits(measure, layer_logits, labels, counts).tolist()

    assert of("memorized_layer") == [0.5, 0.5, 1.0]
    assert of("uniform") == [0.0, 0.0, 0.0]
    assert of("final_loss") == pytest.approx([0.4, 0.1, 0.7], abs=1e-6)
    assert of("el2n") == pytest.approx(
        [0.4, 0.1, 0.7], abs=1e-6
    )  # two classes: both coordinates miss by as much
    entropies = [-(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in (0.6, 0.9, 0.7)]
    assert of("entropy") == pytest.approx(entropies, abs=1e-6)
    assert of("forgetting_events", torch.tensor([0, 1, 4])) == [0.0, 0.25, 1.0]


def test_forgetting_events_never_seen_are_no_hardness():
    counts = torch.zeros(3, dtype=torch.int64)
    assert hardness("forgetting_events", forgetting_counts=counts).tolist() == [0.0, 0.0, 0.0]


def test_forgetting_events_need_counts():
    with pytest.raises(
        ValueError, match=r'^hardness "forgetting_events" needs forgetting_counts, got None.$'
    ):
        hardness("forgetting_events", losses=torch.zeros(1, 2))


def test_an_unknown_measure_is_named():
    with pytest.raises(ValueError, match=r'hardness must be one of memorized_layer, .*uniform, got "mood"'):
        hardness("mood", losses=torch.zeros(1, 2))


def test_the_settings_name_what_the_table_has():
    assert get_args(HardnessMeasure) == HARDNESS_MEASURES
    assert get_args(TokenHardness) == TOKEN_HARDNESS_MEASURES
    assert {*HARDNESS_MEASURES, *TOKEN_HARDNESS_MEASURES} == set(HARDNESS)
