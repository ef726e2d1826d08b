"""Exit distribution, signals and criteria against simulation, loops and figures worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from consistentee.functional.exits import (
    CRITERIA,
    NUM_SIGNALS,
    SIGNAL_NAMES,
    candidate_thresholds,
    check_threshold,
    choose_exit_layer,
    classifier_signals,
    confidence_scores,
    entropy_scores,
    exit_distribution,
    exit_scores,
    log_exit_distribution,
    patience_scores,
    policy_scores,
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


# --- Criteria ---


def test_criteria_by_hand():
    logits = logits_of((0.8, 0.1, 0.1), (0.2, 0.5, 0.3), (0.1, 0.8, 0.1))
    exit_probs = torch.tensor([[0.1, 0.6, 0.2]])
    assert policy_scores(exit_probs) is exit_probs
    torch.testing.assert_close(confidence_scores(logits), torch.tensor([[0.8, 0.5, 0.8]]))
    entropies = [-sum(p * math.log(p) for p in layer) for layer in ((0.8, 0.1, 0.1), (0.2, 0.5, 0.3))]
    expected = torch.tensor([[1 - value / math.log(3) for value in (*entropies, entropies[0])]])
    torch.testing.assert_close(entropy_scores(logits), expected)
    assert patience_scores(logits).tolist() == [[1.0, 1.0, 2.0]]


def test_entropy_scores_span_zero_to_one():
    scores = entropy_scores(torch.tensor([[[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]]))
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_look_ahead(criterion: str):
    logits, exit_probs = torch.randn(5, 6, 3), torch.rand(5, 6)
    whole = exit_scores(criterion, logits, exit_probs)
    assert whole.shape == (5, 6)
    for layers in range(1, 6):
        torch.testing.assert_close(
            exit_scores(criterion, logits[:, :layers], exit_probs[:, :layers]), whole[:, :layers]
        )


def test_exit_scores_rejects_what_it_cannot_use():
    logits = torch.randn(1, 2, 2)
    with pytest.raises(ValueError, match='criterion "policy" needs exit_probs, got None'):
        exit_scores("policy", logits, None)
    with pytest.raises(ValueError, match='must be one of policy, confidence, entropy, patience, got "luck"'):
        exit_scores("luck", logits, None)


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


def test_a_patience_of_p_minus_a_half_waits_for_p_layers():
    logits = logits_of((0.9, 0.1), (0.1, 0.9), (0.2, 0.8), (0.3, 0.7))
    scores = patience_scores(logits)
    assert [choose_exit_layer(scores, p - 0.5).item() for p in (1, 2, 3, 4)] == [1, 3, 4, 4]


def test_a_higher_threshold_never_leaves_earlier():
    scores = torch.rand(30, 8)
    layers = torch.stack([choose_exit_layer(scores, threshold) for threshold in (0.0, 0.3, 0.6, 0.9, 1.0)])
    assert (layers.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("criterion", ["policy", "confidence", "entropy"])
@pytest.mark.parametrize("value", [-0.1, 1.3, math.nan])
def test_check_threshold_wants_a_share(criterion: str, value: float):
    with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\] for {criterion}, got {value}"):
        check_threshold(value, criterion)


@pytest.mark.parametrize("value", [0.0, -2, math.nan])
def test_check_threshold_of_patience_is_a_number_of_layers(value: float):
    with pytest.raises(ValueError, match=r"threshold must be above 0 for patience \(layers in agreement\)"):
        check_threshold(value, "patience")
    assert check_threshold(3, "patience") == 3.0


def test_check_threshold_returns_a_float():
    assert check_threshold(1) == 1.0
    assert isinstance(check_threshold(0), float)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_candidate_thresholds_run_from_all_at_once_to_none_early(criterion: str):
    scores = exit_scores(criterion, torch.randn(40, 5, 3), torch.rand(40, 5))
    thresholds = candidate_thresholds(scores, criterion, limit=30)
    assert thresholds == sorted(set(thresholds))
    assert len(thresholds) <= 32
    assert (choose_exit_layer(scores, thresholds[0]) == 1).all()
    assert (choose_exit_layer(scores, thresholds[-1]) == 5).all()
    assert all(check_threshold(t, criterion) == t for t in thresholds)
    means = {choose_exit_layer(scores, t).double().mean().item() for t in thresholds}
    assert len(means) == len(thresholds) if criterion == "patience" else len(means) > 10


@pytest.mark.parametrize("criterion", CRITERIA)
def test_candidate_thresholds_of_a_single_layer(criterion: str):
    thresholds = candidate_thresholds(torch.rand(4, 1), criterion)
    assert thresholds
    assert all(check_threshold(t, criterion) == t for t in thresholds)
