"""Exit scores of token-level criteria, by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consistentee.config import GenerationCriterion
from consistentee.functional.token_criteria import (
    GENERATION_CRITERIA,
    check_generation_threshold,
    softmax_margin_scores,
    state_similarity_scores,
    static_scores,
)


def test_every_criterion_is_named() -> None:
    assert get_args(GenerationCriterion) == GENERATION_CRITERIA
    assert GENERATION_CRITERIA == (
        "policy",
        "softmax_margin",
        "state_similarity",
        "confidence_classifier",
        "static",
    )


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
    like = torch.zeros(2, 3)
    assert static_scores(0, like).tolist() == [1.5, 1.5]
    leaves_at = [
        next(index + 1 for index in range(9) if static_scores(index, like)[0] > threshold)
        for threshold in (1, 2, 5)
    ]
    assert leaves_at == [1, 2, 5]


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
        checked = check_generation_threshold(value, criterion)
        assert checked == value
        assert isinstance(checked, float)
    for value in bad:
        with pytest.raises(ValueError, match=r"^threshold must be ") as raised:
            check_generation_threshold(value, criterion)
        assert str(raised.value).endswith(f", got {value}.")
        assert criterion in str(raised.value)


def test_ranges_are_told() -> None:
    with pytest.raises(ValueError, match=r"^threshold must be in \[-1, 1\] for state_similarity, got 2.$"):
        check_generation_threshold(2, "state_similarity")
    with pytest.raises(
        ValueError, match=r"^threshold must be at least 1 for static \(layers to run\), got 0.5.$"
    ):
        check_generation_threshold(0.5, "static")
    with pytest.raises(ValueError, match=r'^criterion must be one of policy, .*static, got "entropy".$'):
        check_generation_threshold(0.5, "entropy")
