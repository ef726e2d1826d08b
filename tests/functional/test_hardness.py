"""Memorized layer and the other measures: edge cases and values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from consistentee.functional.hardness import HARDNESS_MEASURES, hardness, memorized_layer


def logits_that_are(*right: tuple[int, ...]) -> Tensor:
    """Logits whose layers are right (1) or wrong (0) about class 1: (rows, layers, 2)."""
    return torch.nn.functional.one_hot(torch.tensor(right), 2).float()


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
    layers = memorized_layer(logits_that_are(right), torch.tensor([1]))
    assert layers.tolist() == [expected]
    assert layers.dtype == torch.int64


def test_memorized_layer_is_the_definition():
    layer_logits, labels = torch.randn(60, 5, 3), torch.randint(3, (60,))
    right = layer_logits.argmax(-1) == labels[:, None]
    for row, layer in enumerate(memorized_layer(layer_logits, labels).tolist()):
        starts = [t for t in range(1, 6) if right[row, t - 1 :].all()]
        assert layer == (min(starts) if starts else 5)


def test_memorized_layer_of_one_layer():
    assert memorized_layer(logits_that_are((0,), (1,)), torch.tensor([1, 1])).tolist() == [1, 1]


@pytest.mark.parametrize("measure", HARDNESS_MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_every_measure_lies_between_zero_and_one(measure: str, scale: float):
    layer_logits, labels = torch.randn(200, 4, 3) * scale, torch.randint(3, (200,))
    values = hardness(measure, layer_logits, labels, forgetting_counts=torch.randint(5, (200,)))
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
        return hardness(measure, layer_logits, labels, forgetting_counts=counts).tolist()

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
    values = hardness(
        "forgetting_events", torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.int64), forgetting_counts=counts
    )
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_forgetting_events_need_counts():
    with pytest.raises(
        ValueError, match='"forgetting_events" needs forgetting_counts from the warm-up, got None'
    ):
        hardness("forgetting_events", torch.zeros(1, 2, 2), torch.tensor([0]))


def test_an_unknown_measure_is_named():
    with pytest.raises(ValueError, match=r'hardness must be one of memorized_layer, .*uniform, got "mood"'):
        hardness("mood", torch.zeros(1, 2, 2), torch.tensor([0]))
