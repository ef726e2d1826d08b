"""Exit criteria by hand, and that all that is known of them comes from one table."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmark_scripts import read
from consistentee.config import Criterion, GenerationCriterion
from consistentee.functional.criteria import (
    CRITERIA,
    EXIT_CRITERIA,
    GENERATION_CRITERIA,
    check_threshold,
    digits,
    exit_scores,
)
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.signals import (
    confidence_scores,
    confident_patience_scores,
    energy_scores,
    entropy_scores,
    expert_sum_scores,
    jensen_shannon,
    patience_scores,
    policy_scores,
    quantile_scores,
    similar_patience_scores,
    softmax_margin_scores,
    state_similarity_scores,
    static_scores,
)
from consistentee.functional.tables import GENERATION
from tiny import random_signals


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """One row whose layers predict with these class probabilities: (1, layers, classes)."""
    return torch.tensor([probabilities]).log()


def test_the_settings_name_what_the_table_has() -> None:
    assert get_args(Criterion) == CRITERIA
    assert get_args(GenerationCriterion) == GENERATION_CRITERIA
    assert {*CRITERIA, *GENERATION_CRITERIA} == set(EXIT_CRITERIA)


def test_a_threshold_that_is_read_and_typed_is_the_one_that_was_shown() -> None:
    """Of chosen thresholds, between their neighbours on measured curves, some of which lie close."""
    curves = 0
    for name in ("e5-12l_rte_sweet-published_1", "e5-12l_rte_consistent-published_1"):
        for figures in read("compare", f"{name}.json")["criteria"].values():
            thresholds = [-math.inf, *(point[0] for point in figures["curve"]), math.inf]
            place = figures["at_validation_threshold"]["point"] + 1
            typed = float(digits(thresholds[place]))
            is_between = thresholds[place - 1] < typed < thresholds[place + 1]
            assert is_between or typed == thresholds[place]  # some of the kept ones are alike, as kept
            curves += 1
    assert curves > 20


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


def test_entropy_scores_stay_between_zero_and_one():
    scores = entropy_scores(torch.linspace(-1e-3, 1e-3, 2000)[:, None] * torch.linspace(-1, 1, 7))
    assert scores.min() >= 0
    assert entropy_scores(torch.zeros(20, 3, 11)).eq(0).logical_not().sum() == 0


def test_entropy_scores_span_zero_to_one():
    scores = entropy_scores(torch.tensor([[[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]]))
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_look_ahead(criterion: str):
    logits, exit_probs = torch.randn(5, 6, 3), torch.rand(5, 6)
    signals = random_signals(5, 6, 3)
    whole = exit_scores(criterion, logits, exit_probs, **signals)
    assert whole.shape == (5, 6)
    for layers in range(1, 6):
        passed = {name: values[:, :layers] for name, values in signals.items()}
        found = exit_scores(criterion, logits[:, :layers], exit_probs[:, :layers], **passed)
        torch.testing.assert_close(found, whole[:, :layers])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_scores_are_in_the_range_of_their_thresholds(criterion: str, scale: float):
    logits, exit_probs = scale * torch.randn(50, 24, 4), (scale * torch.randn(50, 24)).sigmoid()
    signals = random_signals(50, 24, 4) | {"classifier_logits": logits}
    scores = exit_scores(criterion, logits, exit_probs, **signals)
    thresholds = EXIT_CRITERIA[criterion].thresholds
    assert scores.isfinite().all()
    assert float(scores.min()) >= thresholds.low - 1e-6
    assert float(scores[:, :-1].max()) <= thresholds.highest(24)


def test_exit_scores_rejects_what_it_cannot_use():
    logits = torch.randn(1, 2, 2)
    with pytest.raises(ValueError, match='criterion "policy" needs exit_probs, got None'):
        exit_scores("policy", logits, None)
    with pytest.raises(ValueError, match='criterion "energy" needs classifier_logits, got None'):
        exit_scores("energy", logits, None)
    with pytest.raises(ValueError, match=r'must be one of policy, confidence, .*, static, got "luck"'):
        exit_scores("luck", logits, None)


def test_a_patience_of_p_minus_a_half_waits_for_p_layers():
    logits = logits_of((0.9, 0.1), (0.1, 0.9), (0.2, 0.8), (0.3, 0.7))
    scores = patience_scores(logits)
    assert [choose_exit_layer(scores, p - 0.5).item() for p in (1, 2, 3, 4)] == [1, 3, 4, 4]


def first_exits(layers_of_row: list[int | None], layers: int) -> list[int]:
    return [layers if layer is None else layer for layer in layers_of_row]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_confident_patience_counts_sure_layers(threshold: float):
    """PCEE's counter: sure layers in a row, back to 0 at one that is not; the row exits at 2."""
    logits = 2 * torch.randn(60, 6, 3, generator=torch.Generator().manual_seed(1))
    sure = (entropy_scores(logits) > threshold).tolist()
    wanted: list[int | None] = []
    for row in sure:
        counter, exit_layer = 0, None
        for layer, is_sure in enumerate(row, start=1):
            counter = counter + 1 if is_sure else 0
            if counter == 2 and exit_layer is None:
                exit_layer = layer
        wanted.append(exit_layer)
    found = choose_exit_layer(confident_patience_scores(logits), threshold)
    assert found.tolist() == first_exits(wanted, 6)
    assert len(set(found.tolist())) > 2


@pytest.mark.parametrize("threshold", [0.85, 0.95])
def test_similar_patience_counts_layers_like_the_one_before(threshold: float):
    """F-PABEE's counter: comparisons in a row whose divergence is small enough; the row exits at 1."""
    logits = torch.randn(60, 8, 3, generator=torch.Generator().manual_seed(2))
    probs = logits.softmax(-1).double()
    wanted: list[int | None] = []
    for row in probs:
        counter, exit_layer = 0, None
        for layer in range(1, 8):
            middle = (row[layer] + row[layer - 1]) / 2
            divergence = sum(float((p * (p / middle).log2()).sum()) / 2 for p in (row[layer], row[layer - 1]))
            counter = counter + 1 if 1 - divergence > threshold else 0
            if counter == 1 and exit_layer is None:
                exit_layer = layer + 1
        wanted.append(exit_layer)
    found = choose_exit_layer(similar_patience_scores(logits), threshold)
    assert found.tolist() == first_exits(wanted, 8)
    assert len(set(found.tolist())) > 2


def test_patience_of_one_layer_models():
    logits = torch.randn(4, 1, 3)
    for scores in (confident_patience_scores(logits), similar_patience_scores(logits)):
        assert scores.tolist() == [[0.0]] * 4


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(0, 99))
def test_divergence_is_symmetric_and_between_0_and_1(weights: list[float], seed: int) -> None:
    first = torch.tensor(weights).log().log_softmax(-1)
    second = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    found = jensen_shannon(first, second)
    torch.testing.assert_close(found, jensen_shannon(second, first), atol=1e-6, rtol=0)
    assert 0 <= float(found) <= 1


def test_likeness_stays_within_its_range_where_layers_hardly_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 1, 2, generator=generator)
    scores = similar_patience_scores(logits + 1e-3 * torch.randn(2000, 12, 2, generator=generator))
    assert float(scores.max()) == 1
    assert (choose_exit_layer(scores, 1.0) == 12).all()
    states = torch.randn(2000, 64, generator=generator)
    assert float(state_similarity_scores(states, states).max()) <= 1
    assert float(state_similarity_scores(states, -states).min()) >= -1


def test_expert_sum_starts_anew_where_layers_disagree():
    logits = torch.randn(60, 7, 2, generator=torch.Generator().manual_seed(3))
    wanted = torch.zeros(60, 7, dtype=torch.float64)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(4))
    confidence, classes = logits.softmax(-1).amax(-1).double(), logits.argmax(-1)
    for layer in range(7):
        own = weights[layer].double() * confidence[:, layer]
        agrees = classes[:, layer] == classes[:, layer - 1] if layer else torch.zeros(60, dtype=torch.bool)
        wanted[:, layer] = own + torch.where(agrees, wanted[:, layer - 1], 0)
    scores = expert_sum_scores(logits, weights.expand(60, -1)).double()
    torch.testing.assert_close(scores / (1 - scores), wanted, atol=1e-5, rtol=1e-5)


def test_energy_is_one_minus_theirs():
    logits = 4 * torch.randn(50, 3, 5)
    theirs = 1 / (1 + logits.double().exp().sum(-1))
    torch.testing.assert_close(energy_scores(logits).double(), 1 - theirs, atol=1e-6, rtol=0)


def test_quantile_is_the_cumulative_exit_distribution():
    exit_probs = torch.rand(50, 6)
    wanted = exit_distribution(exit_probs).cumsum(1)
    torch.testing.assert_close(quantile_scores(exit_probs)[:, :-1], wanted[:, :-1])
    sure = quantile_scores(torch.tensor([[0.2, 1.0, 0.3]]))
    torch.testing.assert_close(sure, torch.tensor([[0.2, 1.0, 1.0]]))


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
