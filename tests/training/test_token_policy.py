"""Policies and rivals on tokens made up so that the best exits are known; folds by text; thresholds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consistentee.config import GenerationTrainingConfig
from consistentee.functional.criteria import GENERATION_CRITERIA
from consistentee.functional.curves import CurvePoint
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.hardness import hardness
from consistentee.functional.losses import exact_policy_loss, sampled_policy_loss
from consistentee.functional.rewards import rewards
from consistentee.functional.token_curves import depth_thresholds, static_curve, token_curve, token_threshold
from consistentee.heads.exit_heads import ConfidenceClassifier
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.token_policy import (
    TokenPolicyChoice,
    choose_token_policy,
    criterion_scores,
    fit_confidence_classifier,
    number_of_fits,
    token_exit_probs,
    token_folds,
    token_losses,
)
from consistentee.training.token_states import TokenStates
from tiny_training import quick_generation_config

LAYERS, HIDDEN = 4, 6
TOY: dict[str, Any] = {
    "policy_epochs": 60,
    "policy_batch_size": 40,
    "policy_learning_rate": 3e-2,
    "layer_costs": (0.05,),
    "reward": "uniform",
}


def toy_config(**changes: Any) -> GenerationTrainingConfig:
    return quick_generation_config(**{**TOY, **changes})


def new_policy() -> PolicyNetwork:
    return PolicyNetwork(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        policy_input="state",
        policy_hidden_size=8,
        dropout=0.0,
        initial_exit_bias=-1.0,
    )


new_classifier = partial(ConfidenceClassifier, LAYERS, HIDDEN)


def telling_states(tokens: int = 240) -> tuple[TokenStates, Tensor]:
    """Tokens of 24 texts whose state says at each layer whether its exit is right, and their first right layer."""
    generator = torch.Generator().manual_seed(1)
    first_right = torch.randint(1, LAYERS + 1, (tokens,), generator=generator)
    right = torch.arange(1, LAYERS + 1) >= first_right[:, None]
    pooled = 0.1 * torch.randn(tokens, LAYERS, HIDDEN, generator=generator)
    pooled[..., 0] = right.float() * 2 - 1
    states = TokenStates(
        labels=torch.randint(2, 50, (tokens,), generator=generator),
        rows=torch.arange(tokens) // (tokens // 24),
        losses=torch.where(right, 0.1, 2.0),
        right=right,
        agrees=right,
        regret=torch.where(right, 0.0, 20.0),
        margin=torch.where(right, 0.9, 0.1) + 0.01 * torch.rand(tokens, LAYERS, generator=generator),
        similarity=torch.full((tokens, LAYERS), 0.9),
        pooled=pooled.half(),
    )
    return states, first_right


def choose(states: TokenStates, config: GenerationTrainingConfig, **options: Any) -> TokenPolicyChoice:
    return choose_token_policy(
        new_policy, new_classifier, states, config=config, layer_costs=config.layer_costs, seed=0, **options
    )


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_policy_finds_the_first_right_layer(estimator: str) -> None:
    states, first_right = telling_states()
    fits: list[None] = []
    config = toy_config(estimator=estimator)
    choice = choose(states, config, on_fit=lambda: fits.append(None))
    found = choose_exit_layer(choice.exit_probs, 0.5)
    assert float((found == first_right).float().mean()) > 0.95  # cross-fitted: on tokens it has not seen
    whole = token_exit_probs(lambda pooled: choice.policy(pooled, None), states)
    assert float((choose_exit_layer(whole, 0.5) == first_right).float().mean()) > 0.95
    assert len(fits) == number_of_fits(config, 1) == 2 + 2 + 2
    assert choice.hits.shape == choice.counts.shape == (24,)
    assert choice.counts.sum() == 240


def test_thresholds_of_all_criteria_hold_the_floor() -> None:
    states, first_right = telling_states()
    config = toy_config(max_accuracy_loss=0.0, layer_costs=(0.01, 0.1))
    choice = choose(states, config)
    assert list(choice.thresholds) == list(GENERATION_CRITERIA)
    assert choice.thresholds["static"] == 4
    for criterion in ("policy", "softmax_margin", "confidence_classifier"):
        point = choice.at_thresholds[criterion]
        assert point.accuracy == pytest.approx(1.0)
        assert point.mean_exit_layer < float(first_right.float().mean()) + 0.2
    assert choice.layer_cost == pytest.approx((0.01 * 0.1) ** 0.5)
    assert choice.to_dict()["thresholds"] == choice.thresholds


def test_nobody_leaves_before_the_first_exit_layer() -> None:
    states, first_right = telling_states()
    config = toy_config(max_accuracy_loss=0.0)
    choice = choose(states, config, min_exit_layer=3)
    assert not choice.exit_probs[:, :2].any()
    found = choose_exit_layer(choice.exit_probs, 0.5)
    assert float((found == first_right.clamp_min(3)).float().mean()) > 0.95
    for criterion in ("policy", "softmax_margin", "confidence_classifier"):
        assert choice.at_thresholds[criterion].mean_exit_layer >= 3
    greedy = toy_config(layer_costs=(5.0,))
    report = choose(states, greedy, min_exit_layer=3).report
    assert report.first_layer_share == 1.0
    assert report.collapsed


def test_more_texts_are_learnt_from_and_not_judged() -> None:
    states, _ = telling_states(480)
    few = replace(states.first_texts(2), labels=states.labels[: len(states.first_texts(2))])
    config = toy_config(policy_epochs=10, policy_min_steps=1)

    alone, filled = choose(few, config), choose(states, config, judged_texts=2)
    assert filled.exit_probs.shape == alone.exit_probs.shape
    assert filled.counts.tolist() == alone.counts.tolist() == [20, 20]
    assert filled.report.reward > alone.report.reward + 0.1
    right = states.right.clone()
    right[len(few) :] = False
    # The same losses: `regret` does not read `right`.
    spoilt = choose(replace(states, right=right), config, judged_texts=2)
    assert torch.equal(spoilt.exit_probs, filled.exit_probs)
    assert spoilt.thresholds == filled.thresholds
    for inside, outside in token_folds(states, 2, seed=0, judged_tokens=len(few)):
        assert set(range(len(few), len(states))) < set(inside.tolist())
        assert int(outside.max()) < len(few)


def test_each_price_has_a_policy_and_the_best_is_chosen() -> None:
    states, _ = telling_states()
    config = toy_config(prices="each", layer_costs=(0.05, 5.0))
    choice = choose(states, config)
    assert [report.layer_cost for report in choice.reports] == [0.05, 5.0]
    assert choice.reports[1].collapsed
    assert choice.layer_cost == 0.05
    assert choice.report.accuracy > 0.95


def test_a_sampled_gradient_is_the_exact_one_on_average() -> None:
    states, _ = telling_states(48)
    torch.manual_seed(0)
    policy = new_policy()
    reward = rewards(
        token_losses("cross_entropy", states), 0.1, hardness("memorized_layer", **states.outcomes)
    )
    pooled = torch.as_tensor(states.pooled).float()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), policy.state_weight)[0]

    exact = gradient(exact_policy_loss(policy(pooled, None), reward))
    generator = torch.Generator().manual_seed(0)
    sampled = gradient(sampled_policy_loss(policy(pooled, None), reward, 20_000, generator))
    assert float((sampled - exact).norm() / exact.norm()) < 0.05


def test_the_classifier_learns_where_exits_agree() -> None:
    states, _ = telling_states()
    classifier = fit_confidence_classifier(new_classifier(), states, config=toy_config(), seed=0)
    probabilities = token_exit_probs(classifier, states)
    assert torch.equal(probabilities > 0.5, states.agrees)
    assert not classifier.training


def test_a_text_is_judged_by_those_that_have_not_seen_it() -> None:
    states, _ = telling_states()
    judged: list[int] = []
    for inside, outside in token_folds(states, 3, seed=0):
        assert not set(states.rows[inside].tolist()) & set(states.rows[outside].tolist())
        judged += outside.tolist()
    assert sorted(judged) == list(range(len(states)))


def test_one_text_cannot_be_folded() -> None:
    states, _ = telling_states()
    object.__setattr__(states, "rows", torch.zeros(len(states), dtype=torch.int64))
    with pytest.raises(ValueError, match="validation texts with response tokens must be at least 2, got 1"):
        token_folds(states, 2, seed=0)


def test_missing_states_are_named() -> None:
    states, _ = telling_states()
    object.__setattr__(states, "pooled", None)
    with pytest.raises(ValueError, match="states must hold pooled states"):
        token_exit_probs(new_classifier(), states)


def test_hardness() -> None:
    states, first_right = telling_states()
    assert torch.equal(hardness("memorized_layer", **states.outcomes), first_right / LAYERS)
    assert float(hardness("final_loss", **states.outcomes).max()) == pytest.approx(1 - 2.718281828**-0.1)
    assert float(hardness("uniform", **states.outcomes).sum()) == 0
    assert torch.equal(token_losses("error", states), (~states.right).float())
    assert token_losses("cross_entropy", states) is states.losses
    doubtful = replace(states, regret=torch.tensor([[25.0, 10.0, 2.5, 0.0]]))
    assert token_losses("regret", doubtful).tolist() == [[1.0, 1.0, 0.25, 0.0]]
    both = token_losses("error", states, "both")
    assert torch.equal(2 * both, (~states.right).float() + (~states.agrees).float())


def test_the_first_layer_does_not_leave_by_similarity() -> None:
    states, _ = telling_states()
    scores = criterion_scores("state_similarity", states, torch.empty(0), torch.empty(0))
    assert (choose_exit_layer(scores, 0.5) == 2).all()


def test_a_curve_reaches_from_the_first_layer_to_the_last() -> None:
    states, _ = telling_states()
    points = token_curve(states.margin, states.right, criterion="softmax_margin")
    assert min(point.mean_exit_layer for point in points) == 1
    assert max(point.mean_exit_layer for point in points) == LAYERS
    assert len(points) <= 202
    similar = token_curve(states.similarity - 1.5, states.right, criterion="state_similarity")
    assert min(point.threshold for point in similar) == -1


def test_thresholds_are_at_equal_steps_of_depth() -> None:
    torch.manual_seed(0)
    scores = torch.rand(500, 30) ** 40  # most scores are nothing; quantiles of them would miss the deep end
    scores[:, -1] = 1.0
    thresholds = depth_thresholds(scores, 100)
    depths = [float(choose_exit_layer(scores, value).float().mean()) for value in thresholds.tolist()]
    steps = torch.tensor(depths).diff()
    assert len(depths) == 100
    assert float(steps.min()) > 0
    assert float(steps.max()) < 1.25 * (30 - depths[0]) / 99
    assert depths[-1] == 30


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 9999))
def test_thresholds_miss_nothing_if_there_are_enough(layers: int, tokens: int, seed: int) -> None:
    scores = torch.randint(0, 4, (tokens, layers), generator=torch.Generator().manual_seed(seed)) / 4
    thresholds = depth_thresholds(scores, 10_000).tolist()

    def exits(threshold: float) -> list[int]:
        return choose_exit_layer(scores, threshold).tolist()

    for tried in (0.0, 0.25, 0.5, 0.75):
        below = [value for value in thresholds if value <= tried]
        assert exits(below[-1] if below else -1.0) == exits(tried)


def test_no_threshold_without_a_choice() -> None:
    assert len(depth_thresholds(torch.rand(3, 1), 9)) == 0
    assert len(depth_thresholds(torch.rand(0, 3), 9)) == 0


def test_a_static_depth_is_the_first_that_is_good_enough() -> None:
    right = torch.tensor(
        [[False, True, True], [False, False, True], [True, True, False], [False, True, True]]
    )
    points = static_curve(right)
    assert points[1] == CurvePoint(2.0, 0.75, 2.0, 1.5)
    assert token_threshold(points, 0.75, criterion="static") == 2
    assert token_threshold(points, 0.76, criterion="static") == 3
