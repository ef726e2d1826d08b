"""Fitting policies on states made up so that the best one is known; cross-fitting, prices, collapse, thresholds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from consistentee.config import ClassificationTrainingConfig
from consistentee.functional.criteria import CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.hardness import hardness, memorized_layer
from consistentee.functional.recall import recall_by_class, recall_warnings
from consistentee.heads.policy import PolicyNetwork
from consistentee.training import policy as policy_training
from consistentee.training.policy import choose_policy, fit_policy, layer_rewards, policy_exit_probs
from consistentee.training.states import LayerStates

LAYERS, HIDDEN = 4, 6
CONFIG = ClassificationTrainingConfig(
    policy_input="state",
    policy_dropout=0.0,
    policy_epochs=10,
    policy_min_steps=1,
    policy_batch_size=40,
    policy_learning_rate=3e-2,
    policy_folds=2,
    reward="uniform",
    prices="each",
)


def new_policy(policy_input: str = "state", dropout: float = 0.0) -> PolicyNetwork:
    return PolicyNetwork(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        policy_input=policy_input,
        policy_hidden_size=8,
        dropout=dropout,
        initial_exit_bias=-1.0,
    )


def states_of(right: Tensor, labels: Tensor, pooled: Tensor) -> LayerStates:
    """States of classifiers that are right (True) or wrong about each row, (rows, layers), all as sure of it."""
    predictions = torch.where(right, labels[:, None], 1 - labels[:, None])
    layer_logits = torch.nn.functional.one_hot(predictions, 2).float()
    return LayerStates(
        classifier_logits=layer_logits,
        layer_logits=layer_logits,
        exit_probs=torch.full(right.shape, 0.5),
        labels=labels,
        pooled=pooled.half(),
    )


def telling_states(rows: int = 240, seed: int = 1) -> tuple[LayerStates, Tensor]:
    """Rows whose state says at each layer whether its classifier is right, and their first right layer (1-based)."""
    generator = torch.Generator().manual_seed(seed)
    first_right = torch.randint(1, LAYERS + 1, (rows,), generator=generator)
    right = torch.arange(1, LAYERS + 1) >= first_right[:, None]
    pooled = 0.1 * torch.randn(rows, LAYERS, HIDDEN, generator=generator)
    pooled[..., 0] = right.float() * 2 - 1
    labels = torch.randint(2, (rows,), generator=generator)
    return states_of(right, labels, pooled), first_right


def majority_states(rows: int = 240, seed: int = 1) -> LayerStates:
    """Rows whose shallow classifiers name the majority class, whose last one is right, and whose state says nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=generator) < 0.7).long()
    right = (labels == 1)[:, None].repeat(1, LAYERS)
    right[:, -1] = True
    return states_of(right, labels, 0.1 * torch.randn(rows, LAYERS, HIDDEN, generator=generator))


def choose(
    states: LayerStates, validation: LayerStates | None = None, **options: Any
) -> policy_training.PolicyChoice:
    values = {"config": CONFIG, "layer_costs": (0.05,), "seed": 0, **options}
    return choose_policy(new_policy, states, validation, **values)


# --- Fitting ---


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("reward", ["uniform", "hardness"])
@pytest.mark.parametrize("reward_loss", ["cross_entropy", "error"])
def test_a_policy_learns_to_leave_at_the_first_right_layer(estimator: str, reward: str, reward_loss: str):
    config = replace(CONFIG, estimator=estimator, reward=reward, reward_loss=reward_loss)
    states, _ = telling_states()
    row_hardness = hardness("memorized_layer", **states.outcomes)
    policy = fit_policy(new_policy(), states, row_hardness, layer_cost=0.05, config=config, seed=0)
    fresh, first_right = telling_states(seed=2)
    exit_layer = choose_exit_layer(policy_exit_probs(policy, fresh), 0.5)
    assert (exit_layer == first_right).float().mean() > 0.97
    assert not policy.training


@pytest.mark.parametrize("policy_input", ["log_odds", "state+log_odds"])
def test_a_policy_with_log_odds_is_fitted_too(policy_input: str):
    states, first_right = telling_states()
    config = replace(CONFIG, policy_epochs=20)
    policy = fit_policy(
        new_policy(policy_input), states, torch.zeros(240), layer_cost=0.05, config=config, seed=0
    )
    probs = policy_exit_probs(policy, states, batch_size=50)
    assert probs.shape == (240, LAYERS)
    torch.testing.assert_close(probs, policy_exit_probs(policy, states))
    if "state" in policy_input:
        assert (choose_exit_layer(probs, 0.5) == first_right).float().mean() > 0.95


def priced_states(rows: int = 1200, seed: int = 1) -> tuple[LayerStates, Tensor]:
    """Rows wrong before the last layer with a probability that their state tells, and right there."""
    generator = torch.Generator().manual_seed(seed)
    risk = torch.rand(rows, generator=generator)
    right = (torch.rand(rows, generator=generator) >= risk)[:, None].repeat(1, LAYERS)
    right[:, -1] = True
    pooled = torch.zeros(rows, LAYERS, HIDDEN)
    pooled[..., 0] = (2 * risk - 1)[:, None]
    return states_of(right, torch.randint(2, (rows,), generator=generator), pooled), risk


def test_a_policy_for_a_range_of_prices_orders_rows_by_the_price_at_which_they_should_leave():
    """Going on from layer 1 to the last is worth the risk and costs 3 prices: leave where risk < 3 * price."""
    states, risk = priced_states()
    config = replace(CONFIG, policy_epochs=40)
    low, high = 0.02, 0.3
    policy = fit_policy(
        new_policy(),
        states,
        torch.zeros(1200),
        layer_cost=0.08,
        price_range=(low, high),
        config=config,
        seed=0,
    )
    fresh, risk = priced_states(seed=2)
    score = policy_exit_probs(policy, fresh)[:, 0]
    ranks = torch.stack([score.argsort().argsort(), (-risk).argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.97
    leaves = score > 0.5  # at the reference price
    assert (leaves == (risk < 3 * 0.08)).float().mean() > 0.9
    # Other thresholds, standing for other prices, do not send all rows the same way.
    for threshold in (0.2, 0.8):
        assert 0 < (score > threshold).float().mean() < 1


def test_a_choice_over_a_range_of_prices_is_one_policy_at_their_geometric_mean():
    config = replace(CONFIG, prices="range")
    choice = choose(telling_states()[0], config=config, layer_costs=(0.01, 0.16))
    assert choice.layer_cost == pytest.approx(0.04)
    assert [report.layer_cost for report in choice.reports] == [choice.layer_cost]
    fixed = choose(telling_states()[0], config=config, layer_costs=(0.04,))
    assert fixed.layer_cost == 0.04
    assert not torch.equal(fixed.exit_probs, choice.exit_probs)
    each = choose(telling_states()[0], layer_costs=(0.04,))
    assert torch.equal(fixed.exit_probs, each.exit_probs)


def test_a_fit_comes_close_to_the_best_reward_there_is():
    states, first_right = telling_states()
    reward = layer_rewards(states, torch.zeros(240), CONFIG, 0.05)
    assert torch.equal(reward.argmax(1) + 1, first_right)
    before = (exit_distribution(policy_exit_probs(new_policy().eval(), states)) * reward).sum(1).mean()
    policy = fit_policy(new_policy(), states, torch.zeros(240), layer_cost=0.05, config=CONFIG, seed=0)
    after = (exit_distribution(policy_exit_probs(policy, states)) * reward).sum(1).mean()
    best = reward.amax(1).mean()
    assert after > before + 0.8 * (best - before)


def test_the_hardness_reward_spares_the_hard():
    states, _ = telling_states()
    row_hardness = hardness("memorized_layer", **states.outcomes)
    guided = layer_rewards(states, row_hardness, replace(CONFIG, reward="hardness"), 0.05)
    hardest = memorized_layer(states.outcomes["right"]) == LAYERS
    assert (guided[hardest, -1] == 0).all()  # right at the top, and all layers are free
    uniform = layer_rewards(states, row_hardness, CONFIG, 0.05)
    torch.testing.assert_close(uniform[:, -1], torch.full((240,), -0.2))


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_same_seed_gives_the_same_policy_and_leaves_the_callers_randomness_alone(estimator: str):
    config = replace(CONFIG, estimator=estimator, policy_dropout=0.5, policy_epochs=2)
    states, _ = telling_states(60)
    template = new_policy(dropout=0.5)

    def fitted(seed: int) -> dict[str, Tensor]:
        policy = copy.deepcopy(template)
        return fit_policy(
            policy, states, torch.zeros(60), layer_cost=0.05, config=config, seed=seed
        ).state_dict()

    before = torch.get_rng_state()
    first, again, other = fitted(3), fitted(3), fitted(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("rows", [[0], [5, 3, 8, 1], list(range(30, 60))])
def test_fitting_on_some_rows_is_fitting_on_a_table_of_them(rows: list[int]):
    states, index = telling_states(60)[0], torch.tensor(rows)
    table = LayerStates(
        classifier_logits=states.classifier_logits[index],
        layer_logits=states.layer_logits[index],
        exit_probs=states.exit_probs[index],
        labels=states.labels[index],
        pooled=states.pooled[index],
    )
    row_hardness = torch.rand(60)
    template = new_policy()
    options = {"layer_cost": 0.05, "config": replace(CONFIG, policy_epochs=2, reward="hardness"), "seed": 1}
    some = fit_policy(copy.deepcopy(template), states, row_hardness, rows=index, **options)
    alone = fit_policy(copy.deepcopy(template), table, row_hardness[index], **options)
    weights, same = some.state_dict(), alone.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    torch.testing.assert_close(policy_exit_probs(some, states, index), policy_exit_probs(alone, table))


@pytest.mark.parametrize("epochs, min_steps, expected", [(2, 1, 6), (2, 6, 6), (2, 7, 9), (1, 100, 102)])
def test_few_rows_get_more_epochs(
    epochs: int, min_steps: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    steps: list[None] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(None), step(self)))
    config = replace(CONFIG, policy_epochs=epochs, policy_min_steps=min_steps)  # 3 steps an epoch
    fit_policy(new_policy(), telling_states(100)[0], torch.zeros(100), layer_cost=0.1, config=config, seed=0)
    assert len(steps) == expected


def test_missing_states_are_an_error():
    states = replace(telling_states(10)[0], pooled=None)
    message = r"states must hold pooled states.* got None\. Run with keep_pooled=True"
    with pytest.raises(ValueError, match=message):
        fit_policy(new_policy(), states, torch.zeros(10), layer_cost=0.1, config=CONFIG, seed=0)
    with pytest.raises(ValueError, match=message):
        policy_exit_probs(new_policy(), states)


# --- Who is judged by whom ---


class ReadRows:
    """Pooled states that note which rows are read; a row's number stands in its states."""

    def __init__(self, pooled: Tensor) -> None:
        self.pooled = pooled
        self.numbers: set[int] = set()

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.numbers |= set(self.pooled[rows][:, 0, 0].int().tolist())
        return self.pooled[rows]


def follow_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], set[int]]]:
    """Note, for each judgement, the rows its policy was fitted on and the rows it judged."""
    seen: dict[int, set[int]] = {}
    judgements: list[tuple[set[int], set[int]]] = []
    keep_alive: list[PolicyNetwork] = []

    fit_for_real, judge_for_real = fit_policy, policy_exit_probs

    def fit(
        policy: PolicyNetwork, states: LayerStates, row_hardness: Tensor, **options: Any
    ) -> PolicyNetwork:
        read = ReadRows(states.pooled)
        fitted = fit_for_real(policy, replace(states, pooled=read), row_hardness, **options)
        keep_alive.append(fitted)
        seen[id(fitted)] = read.numbers
        return fitted

    def judge(policy: PolicyNetwork, states: LayerStates, *arguments: Any) -> Tensor:
        read = ReadRows(states.pooled)
        probs = judge_for_real(policy, replace(states, pooled=read), *arguments)
        judgements.append((seen[id(policy)], read.numbers))
        return probs

    monkeypatch.setattr(policy_training, "fit_policy", fit)
    monkeypatch.setattr(policy_training, "policy_exit_probs", judge)
    return judgements


def numbered(states: LayerStates, start: int = 0) -> LayerStates:
    numbers = torch.arange(start, start + len(states))
    return replace(states, pooled=numbers[:, None, None].expand(-1, LAYERS, HIDDEN).half())


@pytest.mark.parametrize("folds", [2, 5])
def test_cross_fitting_never_judges_a_row_by_a_policy_that_saw_it(
    folds: int, monkeypatch: pytest.MonkeyPatch
):
    judgements = follow_rows(monkeypatch)
    states = numbered(telling_states(53)[0])
    fits: list[None] = []
    config = replace(CONFIG, policy_folds=folds, policy_epochs=1)
    choice = choose(states, config=config, on_fit=lambda: fits.append(None))
    assert len(judgements) == folds
    assert len(fits) == folds + 1  # and one on all rows, to be kept
    for seen, judged in judgements:
        assert not seen & judged
        assert seen | judged == set(range(53))
    assert sorted(row for _, judged in judgements for row in judged) == list(range(53))
    assert (choice.exit_probs >= 0).all()  # every row has been judged
    assert (choice.exit_probs <= 1).all()


def test_fewer_rows_than_folds(monkeypatch: pytest.MonkeyPatch):
    judgements = follow_rows(monkeypatch)
    choose(numbered(telling_states(3)[0]), config=replace(CONFIG, policy_folds=5, policy_epochs=1))
    assert sorted(len(judged) for _, judged in judgements) == [1, 1, 1]


def test_validation_rows_judge_but_do_not_teach(monkeypatch: pytest.MonkeyPatch):
    judgements = follow_rows(monkeypatch)
    fits: list[None] = []
    choice = choose(
        numbered(telling_states(20)[0]),
        numbered(telling_states(9)[0], start=500),
        config=replace(CONFIG, policy_epochs=1),
        layer_costs=(0.01, 0.05),
        on_fit=lambda: fits.append(None),
    )
    assert len(fits) == 2
    assert judgements == [(set(range(20)), set(range(500, 509)))] * 2
    assert choice.exit_probs.shape == (9, LAYERS)


# --- Price and threshold ---


@pytest.mark.parametrize("reward", ["uniform", "hardness"])
@pytest.mark.parametrize("cross_fitted", [True, False])
def test_an_absurd_price_is_reported_as_a_collapse_and_not_chosen(reward: str, cross_fitted: bool):
    validation = None if cross_fitted else majority_states(seed=2)
    config = replace(CONFIG, reward=reward, policy_learning_rate=0.1)
    choice = choose(majority_states(), validation, config=config, layer_costs=(5.0, 0.01))
    absurd, sensible = choice.reports
    assert absurd.collapsed
    assert absurd.first_layer_share > 0.95
    assert absurd.mean_exit_layer < 1.1
    assert absurd.accuracy == pytest.approx(0.7, abs=0.1)  # the majority's share
    assert not sensible.collapsed
    assert choice.layer_cost == 0.01
    assert choice.report is sensible


def test_if_every_price_collapses_the_report_says_so():
    choice = choose(majority_states(), config=replace(CONFIG, policy_learning_rate=0.1), layer_costs=(5.0,))
    assert choice.report.collapsed


def test_leaving_at_once_is_no_collapse_where_the_first_layer_is_as_good():
    states = majority_states()
    right = torch.ones(240, LAYERS, dtype=torch.bool)
    choice = choose(states_of(right, states.labels, states.pooled), layer_costs=(0.5,))
    assert choice.report.first_layer_share > 0.95
    assert not choice.report.collapsed


def test_the_price_is_the_one_with_the_best_validation_score():
    choice = choose(telling_states()[0], telling_states(seed=2)[0], layer_costs=(0.01, 0.05, 0.3))
    standing = {report.layer_cost: report.score for report in choice.reports if not report.collapsed}
    assert choice.layer_cost == max(standing, key=lambda cost: standing[cost])
    assert set(choice.scores) == set(CRITERIA)
    assert choice.scores["policy"] == choice.report.score


def test_the_report_is_that_of_the_judged_rows():
    validation, first_right = telling_states(seed=2)
    choice = choose(telling_states()[0], validation)
    exit_layer = choose_exit_layer(choice.exit_probs, 0.5)
    right = exit_layer >= first_right
    reward = layer_rewards(validation, torch.zeros(240), CONFIG, 0.05)
    expected_reward = (exit_distribution(choice.exit_probs) * reward).sum(1).mean()
    assert choice.report.accuracy == pytest.approx(right.float().mean().item())
    assert choice.report.mean_exit_layer == pytest.approx(exit_layer.float().mean().item())
    assert choice.report.reward == pytest.approx(expected_reward.item())
    torch.testing.assert_close(policy_exit_probs(choice.policy, validation), choice.exit_probs)


@pytest.mark.parametrize("allowed", [0.0, 0.1])
def test_thresholds_keep_to_the_allowed_loss(allowed: float):
    states, _ = telling_states()
    choice = choose(states, config=replace(CONFIG, max_accuracy_loss=allowed))
    assert set(choice.thresholds) == set(CRITERIA)
    scores = exit_scores("policy", states.layer_logits, choice.exit_probs)
    exit_layer = choose_exit_layer(scores, choice.thresholds["policy"])
    right = states.layer_logits.argmax(-1) == states.labels[:, None]
    accuracy = right.gather(1, exit_layer[:, None] - 1).float().mean()
    assert accuracy >= right[:, -1].float().mean() - allowed
    assert exit_layer.float().mean() < LAYERS - 0.5


def test_a_larger_allowance_never_costs_more_layers():
    states, _ = telling_states()
    means = []
    for allowed in (0.0, 0.05, 0.2, 0.5):
        choice = choose(states, config=replace(CONFIG, max_accuracy_loss=allowed, policy_epochs=4))
        means.append(choose_exit_layer(choice.exit_probs, choice.thresholds["policy"]).float().mean().item())
    assert means == sorted(means, reverse=True)


def unequal_states(rows: int = 1000, seed: int = 1) -> LayerStates:
    """Of 100 rows 3 are of class 1. Shallow classifiers never say so; the last one finds nine in ten of them.

    It also takes 3 % of class 0 for class 1, so that accuracy is best (97 %) where all leave at once. The state tells
    the rows that may be of class 1.
    """
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(rows) % 100
    labels = (row < 3).long()
    right = (labels == 0)[:, None].repeat(1, LAYERS)
    found = torch.arange(rows) % 1000 >= 3  # of class 1
    right[:, -1] = torch.where(labels == 1, found, row < 97)
    may_be = (row < 3) | (row >= 98)
    pooled = 0.1 * torch.randn(rows, LAYERS, HIDDEN, generator=generator)
    pooled[..., 0] = may_be.float()[:, None] * 2 - 1
    return states_of(right, labels, pooled)


@pytest.mark.parametrize("cross_fitted", [True, False])
@pytest.mark.parametrize(
    "metric, recall", [("accuracy", 0.0), ("macro_f1", 0.9), ("f1", 0.9), ("matthews", 0.9)]
)
def test_a_rare_class_is_kept_by_a_metric_that_sees_it(metric: str, recall: float, cross_fitted: bool):
    states = unequal_states()
    judged = states if cross_fitted else unequal_states(seed=2)
    config = replace(CONFIG, threshold_metric=metric, policy_epochs=20, policy_learning_rate=1e-2)
    choice = choose(states, None if cross_fitted else judged, config=config, layer_costs=(0.02,))
    exit_layer = choose_exit_layer(choice.exit_probs, choice.thresholds["policy"])
    predictions = judged.layer_logits.argmax(-1)
    at_exit = predictions.gather(1, exit_layer[:, None] - 1).squeeze(1)
    _, rare = classes = recall_by_class(at_exit, predictions[:, -1], judged.labels, ["common", "rare"])
    assert (at_exit == judged.labels).float().mean() >= 0.967  # no metric is met by leaving nobody early
    assert exit_layer.float().mean() < 2.0
    assert rare.full_depth_recall == pytest.approx(0.9)
    assert rare.recall == pytest.approx(recall)
    said = recall_warnings(classes, choice.thresholds["policy"], threshold_metric=metric)
    assert any('recall of class "rare" (30 rows) falls from 90.0 %' in line for line in said) == (
        recall == 0.0
    )
    assert any('rare among 1,000 rows: "rare" (30)' in line for line in said)


@pytest.mark.parametrize("cross_fitted", [True, False])
def test_forgetting_counts_price_the_policys_rows(cross_fitted: bool, monkeypatch: pytest.MonkeyPatch):
    given: list[Tensor] = []
    fit = policy_training.fit_policy

    def noting(
        policy: PolicyNetwork, states: LayerStates, row_hardness: Tensor, **options: Any
    ) -> PolicyNetwork:
        given.append(row_hardness)
        return fit(policy, states, row_hardness, **options)

    monkeypatch.setattr(policy_training, "fit_policy", noting)
    config = replace(CONFIG, reward="hardness", hardness="forgetting_events", policy_epochs=1)
    counts = torch.arange(40) % 5
    states = telling_states(40)[0]
    choose(states, None if cross_fitted else telling_states(20)[0], config=config, forgetting_counts=counts)
    torch.testing.assert_close(given[-1], counts / 4)
    with pytest.raises(ValueError, match="needs forgetting_counts from the warm-up"):
        choose(states, config=config)


def test_choosing_repeats_with_its_seed_and_leaves_the_callers_randomness_alone():
    states, _ = telling_states(60)
    config = replace(CONFIG, policy_epochs=2)
    state = torch.get_rng_state()
    first, again = (choose(states, config=config, layer_costs=(0.01, 0.1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_dict() == again.to_dict()
    assert torch.equal(first.exit_probs, again.exit_probs)
    weights, same = first.policy.state_dict(), again.policy.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_record_of_a_choice_is_json():
    choice = choose(telling_states(40)[0], config=replace(CONFIG, policy_epochs=1), layer_costs=(0.01, 0.1))
    record = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert record["layer_cost"] == choice.layer_cost
    assert record["policy_input"] == "state"
    assert [price["layer_cost"] for price in record["prices"]] == [0.01, 0.1]
    assert record["thresholds"] == choice.thresholds
