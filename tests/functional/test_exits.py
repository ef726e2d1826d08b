"""Exit distribution, signals and criteria against simulation, loops and figures worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from consistentee.functional.exits import (
    NUM_SIGNALS,
    SIGNAL_NAMES,
    choose_exit_layer,
    classifier_signals,
    exit_distribution,
    log_exit_distribution,
    prediction_streak,
)


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """One row whose layers predict with these class probabilities: (1, layers, classes)."""
    return torch.tensor([probabilities]).log()


# --- Exit distribution ---


def test_exit_distribution_sums_to_one_and_ignores_the_last_column():
    exit_probs = torch.rand(50, 6)
    distribution = exit_distribution(exit_probs)
    torch.testing.assert_close(distribution.sum(1), torch.ones(50))
    exit_probs[:, -1] = 0
    assert torch.equal(exit_distribution(exit_probs), distribution)


def test_exit_distribution_by_hand():
    distribution = exit_distribution(torch.tensor([[0.5, 0.2, 0.9], [0.0, 0.0, 0.0], [1.0, 0.3, 0.3]]))
    expected = torch.tensor([[0.5, 0.1, 0.4], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(distribution, expected)


def test_exit_distribution_of_one_layer_is_certain():
    assert exit_distribution(torch.tensor([[0.3]])).tolist() == [[1.0]]
    assert log_exit_distribution(torch.tensor([[-5.0]])).tolist() == [[0.0]]


def test_exit_distribution_matches_simulation(seed: int):
    exit_probs = torch.tensor([0.1, 0.5, 0.3, 0.2])
    episodes = 40_000
    draws = torch.rand(episodes, 4, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(4)
    leaves = draws < exit_probs
    inside = torch.ones(episodes, dtype=torch.bool)
    for layer in range(4):
        leaving = inside if layer == 3 else inside & leaves[:, layer]
        counts[layer] = leaving.sum()
        inside = inside & ~leaving
    expected = exit_distribution(exit_probs[None])[0]
    standard_error = (expected * (1 - expected) / episodes).sqrt()
    assert ((counts / episodes - expected).abs() < 4 * standard_error).all()


def test_log_exit_distribution_is_the_logarithm():
    exit_logits = torch.randn(20, 5, dtype=torch.double)
    expected = exit_distribution(exit_logits.sigmoid()).log()
    torch.testing.assert_close(log_exit_distribution(exit_logits), expected)


def test_log_exit_distribution_and_its_gradient_stay_finite_at_extreme_logits():
    exit_logits = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, 0.0], [200.0, 200.0, 0.0]], requires_grad=True)
    log_probs = log_exit_distribution(exit_logits)
    log_probs.sum().backward()
    assert torch.isfinite(log_probs).all()
    assert exit_logits.grad is not None
    assert torch.isfinite(exit_logits.grad).all()
    torch.testing.assert_close(log_probs.detach().exp().sum(1), torch.ones(3))


# --- Signals ---


@pytest.mark.parametrize("classes", [2, 5])
def test_signals_do_not_look_ahead(classes: int):
    logits = torch.randn(7, 6, classes) * 3
    signals = classifier_signals(logits)
    assert signals.shape == (7, 6, NUM_SIGNALS)
    for layers in range(1, 6):
        torch.testing.assert_close(classifier_signals(logits[:, :layers]), signals[:, :layers])


def test_signals_by_hand():
    layers = ((0.9, 0.1), (0.4, 0.6), (0.3, 0.7))
    signals = classifier_signals(logits_of(*layers))[0]  # (layers, signals)
    by_name = dict(zip(SIGNAL_NAMES, signals.T, strict=True))

    def entropy(p: float) -> float:
        return -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)

    expected = {
        "log_odds": [math.log(9) / 5, math.log(1.5) / 5, math.log(7 / 3) / 5],
        "margin": [0.8, 0.2, 0.4],
        "entropy": [entropy(0.9), entropy(0.6), entropy(0.7)],
        "energy": [0.0, 0.0, 0.0],  # probabilities sum to 1
        "agreement": [1.0, 0.0, 0.5],
        "streak": [1.0, 1 / 2, 2 / 3],
        "previous_probability": [0.9, 0.1, 0.6],
        "mean_probability": [0.9, 0.1, (0.1 + 0.6) / 2],
        "depth": [1 / 12, 2 / 12, 3 / 12],
    }
    assert set(expected) == set(by_name)
    for name, values in expected.items():
        torch.testing.assert_close(by_name[name], torch.tensor(values), atol=1e-6, rtol=1e-5, msg=name)


def test_signals_stay_finite_when_the_classifier_is_certain():
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]])
    signals = classifier_signals(logits)
    assert torch.isfinite(signals).all()
    assert signals[..., SIGNAL_NAMES.index("log_odds")].abs().max() <= 2


def test_signals_of_half_precision_logits_are_float32():
    assert classifier_signals(torch.randn(2, 3, 4).half()).dtype == torch.float32


def test_signals_need_two_classes():
    with pytest.raises(ValueError, match="layer_logits must have at least 2 classes, got 1"):
        classifier_signals(torch.zeros(2, 3, 1))


def test_prediction_streak():
    predictions = torch.tensor([[2, 2, 2, 2], [0, 1, 0, 1], [1, 0, 0, 0]])
    assert prediction_streak(predictions).tolist() == [[1, 2, 3, 4], [1, 1, 1, 1], [1, 1, 2, 3]]


# --- Choosing ---


def test_choose_exit_layer_takes_the_first_above_else_the_last():
    scores = torch.tensor(
        [[0.2, 0.7, 0.9], [0.1, 0.1, 0.1], [0.9, 0.1, 0.9], [0.5, 0.5, 0.5], [0.1, 0.2, 0.9]]
    )
    before = scores.clone()
    assert choose_exit_layer(scores, 0.5).tolist() == [2, 3, 1, 3, 3]  # at the threshold is not above it
    assert torch.equal(scores, before)


def test_choose_exit_layer_at_the_ends():
    scores = torch.rand(10, 4) * 0.98 + 0.01
    assert (choose_exit_layer(scores, 0.0) == 1).all()
    assert (choose_exit_layer(scores, 1.0) == 4).all()
    assert choose_exit_layer(scores, 0.5).dtype == torch.int64


def test_a_higher_threshold_never_leaves_earlier():
    scores = torch.rand(30, 8)
    layers = torch.stack([choose_exit_layer(scores, threshold) for threshold in (0.0, 0.3, 0.6, 0.9, 1.0)])
    assert (layers.diff(dim=0) >= 0).all()
