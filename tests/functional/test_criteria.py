"""Exit criteria by hand, and that all that is known of them comes from one table."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consistentee.config import Criterion, GenerationCriterion
from consistentee.functional.criteria import (
    CRITERIA,
    EXIT_CRITERIA,
    GENERATION_CRITERIA,
    check_threshold,
    confidence_scores,
    entropy_scores,
    exit_scores,
    patience_scores,
    policy_scores,
    softmax_margin_scores,
    state_similarity_scores,
    static_scores,
)
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.tables import GENERATION


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """One row whose layers predict with these class probabilities: (1, layers, classes)."""
    return torch.tensor([probabilities]).log()


def test_the_settings_name_what_the_table_has() -> None:
    assert get_args(Criterion) == CRITERIA
    assert get_args(GenerationCriterion) == GENERATION_CRITERIA
    assert {*CRITERIA, *GENERATION_CRITERIA} == set(EXIT_CRITERIA)


@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_ends_of_the_range_of_thresholds(criterion: str) -> None:
    thresholds, layers = EXIT_CRITERIA[criterion].thresholds, 5
    highest = thresholds.highest(layers)
    assert thresholds.check(highest, criterion) == highest
    assert thresholds.lets_nobody_exit(highest, layers)
    assert not thresholds.lets_nobody_exit(highest - 1, layers)


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


def test_a_patience_of_p_minus_a_half_waits_for_p_layers():
    logits = logits_of((0.9, 0.1), (0.1, 0.9), (0.2, 0.8), (0.3, 0.7))
    scores = patience_scores(logits)
    assert [choose_exit_layer(scores, p - 0.5).item() for p in (1, 2, 3, 4)] == [1, 3, 4, 4]


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


def test_margin_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]]])
    scores = softmax_margin_scores(probabilities.log() + 3)
    torch.testing.assert_close(scores, torch.tensor([[0.2, 0.7], [0.0, 1.0]]), atol=1e-5, rtol=0)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9))
def test_margin_is_a_difference_of_probabilities(logits: list[float]) -> None:
    values = torch.tensor(logits)
    first, second = values.softmax(-1).sort(descending=True).values[:2]
    score = softmax_margin_scores(values)
    torch.testing.assert_close(score, first - second, atol=1e-5, rtol=0)
    assert 0 <= score <= 1


def test_margin_of_half_precision_is_computed_in_float32() -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0]])
    assert softmax_margin_scores(logits.to(torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(
        softmax_margin_scores(logits.to(torch.bfloat16)), softmax_margin_scores(logits)
    )


def test_similarity_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 5.0]])
    after = torch.tensor([[0.6, 0.8], [3.0, 3.0], [-7.0, 0.0], [1.0, 0.0]])
    scores = state_similarity_scores(before, after)
    torch.testing.assert_close(scores, torch.tensor([0.6, 1.0, -1.0, 0.0]))
    half = state_similarity_scores(before.half(), after.half())
    assert half.dtype == torch.float32


def test_static_scores_reach_whole_thresholds() -> None:
    layers = torch.arange(1, 10)
    assert static_scores(layers)[:2].tolist() == [1.5, 2.5]
    exits = [int(choose_exit_layer(static_scores(layers)[None], threshold)) for threshold in (1, 2, 5)]
    assert exits == [1, 2, 5]


@pytest.mark.parametrize(
    "criterion, good, bad",
    [
        ("policy", (0, 0.5, 1), (-0.1, 1.01, math.nan, math.inf)),
        ("softmax_margin", (0, 1), (-1, 2)),
        ("confidence_classifier", (0, 1), (-0.01, 1.01)),
        ("state_similarity", (-1, 0, 0.975, 1), (-1.01, 1.01, math.nan)),
        ("static", (1, 2.5, 100), (0, 0.99, -3, math.nan)),
    ],
)
def test_thresholds(criterion: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        checked = check_threshold(value, criterion, GENERATION)
        assert checked == value
        assert isinstance(checked, float)
    for value in bad:
        with pytest.raises(ValueError, match=r"^threshold must be ") as raised:
            check_threshold(value, criterion, GENERATION)
        assert str(raised.value).endswith(f", got {value}.")
        assert criterion in str(raised.value)


def test_ranges_are_told() -> None:
    with pytest.raises(ValueError, match=r"^threshold must be in \[-1, 1\] for state_similarity, got 2.$"):
        check_threshold(2, "state_similarity")
    with pytest.raises(
        ValueError, match=r"^threshold must be at least 1 for static \(layers to run\), got 0.5.$"
    ):
        check_threshold(0.5, "static")
    with pytest.raises(ValueError, match=r'^criterion must be one of policy, .*static, got "entropy".$'):
        check_threshold(0.5, "entropy", GENERATION)
