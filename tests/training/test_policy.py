"""Fitting policies on instances made up so that the best exits are known; cross-fitting, prices, collapse, thresholds.

Rows and tokens are the same table here; what makes instances of them is tested with the tasks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, GENERATION_CRITERIA, exit_scores
from consistentee.functional.curves import TOLERANCES
from consistentee.functional.exits import choose_exit_layer, exit_distribution, log_odds
from consistentee.functional.losses import exact_policy_loss, sampled_policy_loss
from consistentee.functional.metrics import METRICS
from consistentee.functional.recall import recall_by_class, recall_warnings
from consistentee.functional.rewards import rewards
from consistentee.heads.exit_heads import ConfidenceClassifier
from consistentee.heads.exit_signals import LearntToExit
from consistentee.heads.policy import PolicyNetwork
from consistentee.training.criterion_fits import (
    CriterionFit,
    accuracy_weights,
    fit_criteria,
    foretelling,
    temperature_calibration,
)
from consistentee.training.instances import Instances, group_folds
from consistentee.training.policy import fit_foretelling, fit_policy, policy_exit_probs
from consistentee.training.policy_choice import (
    PolicyChoice,
    PolicySearch,
    choose_policy,
)
from consistentee.training.tasks.classification import FITTED

LAYERS, HIDDEN = 4, 6
FIT: dict[str, Any] = {"epochs": 10, "min_steps": 1, "batch_size": 40, "learning_rate": 3e-2}


def new_policy(policy_input: str = "state", dropout: float = 0.0) -> PolicyNetwork:
    return PolicyNetwork(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        policy_input=policy_input,
        policy_hidden_size=8,
        dropout=dropout,
        initial_exit_bias=-1.0,
    )


def logits_of(correct: Tensor, labels: Tensor) -> Tensor:
    """Logits of classifiers that are right (True) or wrong about each row, (rows, layers, 2), all as sure of it."""
    predictions = torch.where(correct, labels[:, None], 1 - labels[:, None])
    return nn.functional.one_hot(predictions, 2).float()


def instances_of(
    correct: Tensor, states: Tensor, *, hardness: Tensor | None = None, texts: int | None = None
) -> Instances:
    """Instances of classes, each a group of its own, or of so many texts."""
    count = len(correct)
    labels = torch.randint(2, (count,), generator=torch.Generator().manual_seed(9))
    logits = logits_of(correct, labels)
    noise = 0.01 * torch.rand(correct.shape, generator=torch.Generator().manual_seed(8))
    signals = {"classifier_logits": logits, "null_shares": torch.zeros(correct.shape)}
    known = {
        name: exit_scores(name, logits, None, **signals)
        for name in CRITERIA
        if not EXIT_CRITERIA[name].reads_policy and name not in FITTED
    }
    return Instances(
        correct=correct,
        exit_cost=(~correct).float(),
        hardness=torch.zeros(count) if hardness is None else hardness,
        group=torch.arange(count) if texts is None else torch.arange(count) // (count // texts),
        states=states.half(),
        features=log_odds(logits)[..., None],
        scores={
            **known,
            "softmax_margin": torch.where(correct, 0.9, 0.1) + noise,
            "state_similarity": torch.full(correct.shape, 0.9),
        },
        layer_logits=logits,
        labels=labels,
        targets={"confidence_classifier": correct, "learnt_to_exit": correct},
    )


def telling(count: int = 240, seed: int = 1, **options: Any) -> tuple[Instances, Tensor]:
    """Instances whose state says at each layer whether an exit is right, and their first right layer (1-based)."""
    generator = torch.Generator().manual_seed(seed)
    first_right = torch.randint(1, LAYERS + 1, (count,), generator=generator)
    correct = torch.arange(1, LAYERS + 1) >= first_right[:, None]
    states = 0.1 * torch.randn(count, LAYERS, HIDDEN, generator=generator)
    states[..., 0] = correct.float() * 2 - 1
    return instances_of(correct, states, **options), first_right


def majority(count: int = 240, seed: int = 1) -> Instances:
    """Instances that shallow layers get right in 7 of 10 cases and the last always, and whose state says nothing."""
    generator = torch.Generator().manual_seed(seed)
    correct = (torch.rand(count, generator=generator) < 0.7)[:, None].repeat(1, LAYERS)
    correct[:, -1] = True
    return instances_of(correct, 0.1 * torch.randn(count, LAYERS, HIDDEN, generator=generator))


def search(
    costs: tuple[float, ...] = (0.05,),
    *,
    fit: Callable[..., PolicyNetwork] = fit_policy,
    as_range: bool = False,
    folds: int = 2,
    max_loss: float = 0.0,
    criteria: tuple[str, ...] = CRITERIA,
    min_exit_layer: int = 1,
    **settings: Any,
) -> PolicySearch:
    steps = {name: value for name, value in {**FIT, **settings}.items() if name in FIT}
    return PolicySearch(
        fit=partial(fit, **{**FIT, **settings}),
        fit_network=partial(fit_foretelling, weight_decay=0.01, **{**steps, "epochs": 60}),
        layer_costs=costs,
        as_range=as_range,
        folds=folds,
        seed=0,
        criteria=criteria,
        max_loss=max_loss,
        min_exit_layer=min_exit_layer,
    )


FITS = {
    "learnt_to_exit": partial(LearntToExit, HIDDEN),
    "confidence_classifier": partial(ConfidenceClassifier, LAYERS, HIDDEN),
}


def fits_of(how: PolicySearch) -> dict[str, CriterionFit]:
    """What has to be fitted for the criteria of a search."""
    networks = {name: foretelling(name, FITS[name], how.foretell) for name in FITS if name in how.criteria}
    numbers = {"calibrated_confidence": temperature_calibration(), "expert_sum": accuracy_weights()}
    return networks | {name: fit for name, fit in numbers.items() if name in how.criteria}


def choose(
    instances: Instances, how: PolicySearch | None = None, judged: Instances | None = None, **options: Any
) -> PolicyChoice:
    how = how or search()
    groups, fitted = options.get("judged_groups"), judged or instances
    num_judged = None if groups is None else len(fitted.first_groups(groups))
    folds = group_folds(fitted.group, how.folds, how.seed, num_judged)
    fits = fit_criteria(fits_of(how), fitted, folds)
    return choose_policy(instances, how, new_policy=new_policy, judged=judged, fits=fits, **options)


# --- Fitting ---


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("hard", [False, True])
def test_a_policy_learns_to_exit_at_the_first_right_layer(estimator: str, hard: bool):
    instances, first_right = telling()
    if hard:
        instances = replace(instances, hardness=first_right / LAYERS)
    policy = fit_policy(new_policy(), instances, layer_cost=0.05, estimator=estimator, **FIT)
    fresh, first_right = telling(seed=2)
    exit_layer = choose_exit_layer(policy_exit_probs(policy, fresh), 0.5)
    assert (exit_layer == first_right).float().mean() > 0.97
    assert not policy.training
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("policy_input", ["log_odds", "state+log_odds"])
def test_a_policy_with_log_odds_is_fitted_too(policy_input: str):
    instances, first_right = telling()
    policy = fit_policy(new_policy(policy_input), instances, layer_cost=0.05, **{**FIT, "epochs": 20})
    probs = policy_exit_probs(policy, instances, batch_size=50)
    assert probs.shape == (240, LAYERS)
    torch.testing.assert_close(probs, policy_exit_probs(policy, instances))
    if "state" in policy_input:
        assert (choose_exit_layer(probs, 0.5) == first_right).float().mean() > 0.95


def priced(count: int = 1200, seed: int = 1) -> tuple[Instances, Tensor]:
    """Instances wrong before the last layer with a probability that their state tells, and right there."""
    generator = torch.Generator().manual_seed(seed)
    risk = torch.rand(count, generator=generator)
    correct = (torch.rand(count, generator=generator) >= risk)[:, None].repeat(1, LAYERS)
    correct[:, -1] = True
    states = torch.zeros(count, LAYERS, HIDDEN)
    states[..., 0] = (2 * risk - 1)[:, None]
    return instances_of(correct, states), risk


def test_a_policy_for_a_range_of_prices_orders_instances_by_the_price_at_which_they_should_exit():
    """Going on from layer 1 to the last is worth the risk and costs 3 prices: exit where risk < 3 * price."""
    low, high = 0.02, 0.3
    policy = fit_policy(
        new_policy(), priced()[0], layer_cost=0.08, layer_cost_range=(low, high), **{**FIT, "epochs": 40}
    )
    fresh, risk = priced(seed=2)
    score = policy_exit_probs(policy, fresh)[:, 0]
    ranks = torch.stack([score.argsort().argsort(), (-risk).argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.97
    exits = score > 0.5  # at the reference price
    assert (exits == (risk < 3 * 0.08)).float().mean() > 0.9
    # Other thresholds, standing for other prices, do not send all instances the same way.
    for threshold in (0.2, 0.8):
        assert 0 < (score > threshold).float().mean() < 1


def test_a_choice_over_a_range_of_prices_is_one_policy_at_their_geometric_mean():
    instances, _ = telling()
    choice = choose(instances, search((0.01, 0.16), as_range=True))
    assert choice.layer_cost == pytest.approx(0.04)
    assert [report.layer_cost for report in choice.reports] == [choice.layer_cost]
    fixed = choose(instances, search((0.04,), as_range=True))
    assert fixed.layer_cost == 0.04
    assert not torch.equal(fixed.exit_probs, choice.exit_probs)
    assert torch.equal(fixed.exit_probs, choose(instances, search((0.04,))).exit_probs)


def test_a_fit_comes_close_to_the_best_reward_there_is():
    instances, first_right = telling()
    reward = rewards(instances.exit_cost, 0.05)
    assert torch.equal(reward.argmax(1) + 1, first_right)
    before = (exit_distribution(policy_exit_probs(new_policy().eval(), instances)) * reward).sum(1).mean()
    policy = fit_policy(new_policy(), instances, layer_cost=0.05, **FIT)
    after = (exit_distribution(policy_exit_probs(policy, instances)) * reward).sum(1).mean()
    assert after > before + 0.8 * (reward.amax(1).mean() - before)


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_the_hard_have_layers_for_nothing(hardness: float):
    """At an absurd price the easy exit at once, right or wrong, and the hard where they should at any price."""
    instances, first_right = telling()
    instances = replace(instances, hardness=torch.full((240,), hardness))
    policy = fit_policy(new_policy(), instances, layer_cost=5.0, **{**FIT, "epochs": 30})
    exit_layer = choose_exit_layer(policy_exit_probs(policy, instances), 0.5)
    if hardness:
        assert (exit_layer >= first_right).float().mean() > 0.97
    else:
        assert (exit_layer == 1).float().mean() > 0.97


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_same_seed_gives_the_same_policy_and_leaves_the_callers_randomness_alone(estimator: str):
    instances, _ = telling(60)
    template = new_policy(dropout=0.5)

    def fitted(seed: int) -> dict[str, Tensor]:
        settings = {**FIT, "epochs": 2, "estimator": estimator, "seed": seed}
        return fit_policy(copy.deepcopy(template), instances, layer_cost=0.05, **settings).state_dict()

    before = torch.get_rng_state()
    first, again, other = fitted(3), fitted(3), fitted(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("rows", [[0], [5, 3, 8, 1], list(range(30, 60))])
def test_fitting_on_some_rows_is_fitting_on_a_table_of_them(rows: list[int]):
    index = torch.tensor(rows)
    instances = replace(telling(60)[0], hardness=torch.rand(60))
    table = Instances(
        correct=instances.correct[index],
        exit_cost=instances.exit_cost[index],
        hardness=instances.hardness[index],
        group=torch.arange(len(rows)),
        states=instances.states[index],
    )
    template, settings = new_policy(), {**FIT, "epochs": 2, "seed": 1, "layer_cost": 0.05}
    some = fit_policy(copy.deepcopy(template), instances, rows=index, **settings)
    alone = fit_policy(copy.deepcopy(template), table, **settings)
    weights, same = some.state_dict(), alone.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    torch.testing.assert_close(policy_exit_probs(some, instances, index), policy_exit_probs(alone, table))


@pytest.mark.parametrize("epochs, min_steps, expected", [(2, 1, 6), (2, 6, 6), (2, 7, 9), (1, 100, 102)])
def test_few_instances_get_more_epochs(
    epochs: int, min_steps: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    steps: list[None] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(None), step(self)))
    settings = {**FIT, "epochs": epochs, "min_steps": min_steps}  # 3 steps an epoch
    fit_policy(new_policy(), telling(100)[0], layer_cost=0.1, **settings)
    assert len(steps) == expected


def test_a_sampled_gradient_is_the_exact_one_on_average():
    instances, first_right = telling(48)
    torch.manual_seed(0)
    policy = new_policy()
    reward = rewards(instances.exit_cost, 0.1, first_right / LAYERS)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), policy.state_weight)[0]

    states = instances.states.float()
    exact = gradient(exact_policy_loss(policy(states, None), reward))
    generator = torch.Generator().manual_seed(0)
    sampled = gradient(sampled_policy_loss(policy(states, None), reward, 20_000, generator))
    assert float((sampled - exact).norm() / exact.norm()) < 0.05


def test_a_network_learns_to_foretell():
    instances, _ = telling()
    settings = {**FIT, "epochs": 60, "weight_decay": 0.01, "seed": 0}
    target = instances.targets["confidence_classifier"]
    network = fit_foretelling(ConfidenceClassifier(LAYERS, HIDDEN), instances.states, target, **settings)
    assert torch.equal(network(instances.states.float()) > 0, target)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_networks_that_a_fit_broke_are_no_result() -> None:
    instances, _ = telling()
    how = {**FIT, "learning_rate": 1e20, "weight_decay": 1e20, "seed": 0}
    message = r"^a policy's weights must be finite, got .* after its fit\. Lower policy_learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        fit_policy(new_policy(), instances, layer_cost=0.1, **how)
    network = ConfidenceClassifier(LAYERS, HIDDEN)
    with pytest.raises(FloatingPointError, match=message):
        fit_foretelling(network, instances.kept_states, instances.correct, **how)


def test_missing_states_are_an_error():
    instances = replace(telling(10)[0], states=None)
    message = r"states must be kept to fit on them, got None\. Run with keep_pooled=True"
    with pytest.raises(ValueError, match=message):
        fit_policy(new_policy(), instances, layer_cost=0.1)
    with pytest.raises(ValueError, match=message):
        policy_exit_probs(new_policy(), instances)


# --- Who is judged by whom ---


class ReadRows:
    """States that note which instances are read; an instance's number stands in its states."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.numbers: set[int] = set()

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.numbers |= set(self.states[rows][:, 0, 0].int().tolist())
        return self.states[rows]


def follow(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[set[int], set[int]]], Any]:
    """Judgements as (numbers its policy was fitted on, numbers it judged), and the fit that notes the former."""
    from consistentee.training import policy_choice as module

    seen: dict[int, set[int]] = {}
    judgements: list[tuple[set[int], set[int]]] = []
    keep_alive: list[PolicyNetwork] = []
    judge_for_real = policy_exit_probs

    def fit(policy: PolicyNetwork, instances: Instances, **options: Any) -> PolicyNetwork:
        read = ReadRows(instances.states)
        fitted = fit_policy(policy, replace(instances, states=read), **options)
        keep_alive.append(fitted)
        seen[id(fitted)] = read.numbers
        return fitted

    def judge(policy: PolicyNetwork, instances: Instances, *arguments: Any) -> Tensor:
        read = ReadRows(instances.states)
        probs = judge_for_real(policy, replace(instances, states=read), *arguments)
        judgements.append((seen[id(policy)], read.numbers))
        return probs

    monkeypatch.setattr(module, "policy_exit_probs", judge)
    return judgements, fit


def numbered(instances: Instances, start: int = 0) -> Instances:
    numbers = torch.arange(start, start + len(instances))
    return replace(instances, states=numbers[:, None, None].expand(-1, LAYERS, HIDDEN).half())


@pytest.mark.parametrize("folds", [2, 5])
def test_cross_fitting_never_judges_an_instance_by_a_policy_that_saw_it(
    folds: int, monkeypatch: pytest.MonkeyPatch
):
    judgements, fit = follow(monkeypatch)
    fits: list[None] = []
    how = search(fit=fit, folds=folds, epochs=1)
    choice = choose(numbered(telling(53)[0]), how, on_fit=lambda: fits.append(None))
    assert len(judgements) == folds
    assert len(fits) == how.number_of_fits(cross_fitted=True) == folds + 1  # one on all, to be kept
    for seen, judged in judgements:
        assert not seen & judged
        assert seen | judged == set(range(53))
    assert sorted(row for _, judged in judgements for row in judged) == list(range(53))
    assert (choice.exit_probs >= 0).all()  # every instance has been judged
    assert (choice.exit_probs <= 1).all()


def test_fewer_instances_than_folds(monkeypatch: pytest.MonkeyPatch):
    judgements, fit = follow(monkeypatch)
    choose(numbered(telling(3)[0]), search(fit=fit, folds=5, epochs=1))
    assert sorted(len(judged) for _, judged in judgements) == [1, 1, 1]


def test_other_instances_judge_but_do_not_teach(monkeypatch: pytest.MonkeyPatch):
    judgements, fit = follow(monkeypatch)
    fits: list[None] = []
    how = search((0.01, 0.05), fit=fit, epochs=1)
    judged = numbered(telling(9)[0], start=500)
    choice = choose(numbered(telling(20)[0]), how, judged, on_fit=lambda: fits.append(None))
    assert len(fits) == how.number_of_fits(cross_fitted=False) == 2
    assert judgements == [(set(range(20)), set(range(500, 509)))] * 2
    assert choice.exit_probs.shape == (9, LAYERS)


def test_a_text_is_judged_by_policies_that_have_not_seen_it():
    group = telling(texts=24)[0].group
    judged: list[int] = []
    for inside, outside in group_folds(group, 3, seed=0):
        assert not set(group[inside].tolist()) & set(group[outside].tolist())
        judged += outside.tolist()
    assert sorted(judged) == list(range(240))


def test_one_group_cannot_be_folded():
    with pytest.raises(
        ValueError, match=r"validation rows to learn from must be at least 2, got 1\. .* more policy_tokens\."
    ):
        group_folds(torch.zeros(9, dtype=torch.int64), 2, seed=0)


def test_more_texts_are_learnt_from_and_not_judged():
    instances, _ = telling(480, texts=24)
    few = instances.first_groups(2)
    how = search(epochs=10)
    alone, filled = choose(few, how), choose(instances, how, judged_groups=2)
    assert filled.exit_probs.shape == alone.exit_probs.shape
    assert filled.counts.tolist() == alone.counts.tolist() == [20, 20]
    assert filled.report.reward > alone.report.reward + 0.1
    correct = instances.correct.clone()
    correct[len(few) :] = False  # what is only learnt from has costs, and is not looked at for anything else
    spoilt = choose(replace(instances, correct=correct), how, judged_groups=2)
    assert torch.equal(spoilt.exit_probs, filled.exit_probs)
    assert spoilt.thresholds == filled.thresholds
    for inside, outside in group_folds(instances.group, 2, 0, len(few)):
        assert set(range(len(few), 480)) < set(inside.tolist())
        assert int(outside.max()) < len(few)


# --- Price and threshold ---


@pytest.mark.parametrize("cross_fitted", [True, False])
def test_an_absurd_price_is_reported_as_a_collapse_and_not_chosen(cross_fitted: bool):
    how = search((5.0, 0.01), learning_rate=0.1)
    choice = choose(majority(), how, None if cross_fitted else majority(seed=2))
    absurd, sensible = choice.reports
    assert absurd.collapsed
    assert absurd.first_layer_share > 0.95
    assert absurd.mean_exit_layer < 1.1
    assert absurd.accuracy == pytest.approx(0.7, abs=0.1)  # the majority's share
    assert not sensible.collapsed
    assert choice.layer_cost == 0.01
    assert choice.report is sensible


def test_if_every_price_collapses_the_report_says_so():
    assert choose(majority(), search((5.0,), learning_rate=0.1)).report.collapsed


def test_exiting_at_once_is_no_collapse_where_the_first_layer_is_as_good():
    correct = torch.ones(240, LAYERS, dtype=torch.bool)
    choice = choose(instances_of(correct, majority().states), search((0.5,)))
    assert choice.report.first_layer_share > 0.95
    assert not choice.report.collapsed


def test_the_price_is_the_one_with_the_best_validation_score():
    choice = choose(telling()[0], search((0.01, 0.05, 0.3)), telling(seed=2)[0])
    standing = {report.layer_cost: report.score for report in choice.reports if not report.collapsed}
    assert choice.layer_cost == max(standing, key=lambda cost: standing[cost])
    assert set(choice.scores) == set(CRITERIA)
    assert choice.scores["policy"] == choice.report.score


def test_the_report_is_that_of_the_judged_instances():
    judged, first_right = telling(seed=2)
    choice = choose(telling()[0], search(), judged)
    exit_layer = choose_exit_layer(choice.exit_probs, 0.5)
    expected_reward = (exit_distribution(choice.exit_probs) * rewards(judged.exit_cost, 0.05)).sum(1).mean()
    assert choice.report.accuracy == pytest.approx((exit_layer >= first_right).float().mean().item())
    assert choice.report.mean_exit_layer == pytest.approx(exit_layer.float().mean().item())
    assert choice.report.reward == pytest.approx(expected_reward.item())
    torch.testing.assert_close(policy_exit_probs(choice.policy, judged), choice.exit_probs)


@pytest.mark.parametrize("allowed", [0.0, 0.1])
def test_thresholds_keep_to_the_allowed_loss(allowed: float):
    instances, _ = telling()
    choice = choose(instances, search(max_loss=allowed))
    assert set(choice.thresholds) == set(CRITERIA)
    exit_layer = choose_exit_layer(choice.exit_probs, choice.thresholds["policy"])
    accuracy = instances.correct.gather(1, exit_layer[:, None] - 1).float().mean()
    assert accuracy >= 1 - allowed
    assert exit_layer.float().mean() < LAYERS - 0.5


def test_a_larger_allowance_never_costs_more_layers():
    instances, _ = telling()
    choices = [choose(instances, search(max_loss=allowed, epochs=4)) for allowed in (0.0, 0.05, 0.2, 0.5)]
    means = [choice.at_thresholds["policy"].mean_exit_layer for choice in choices]
    assert means == sorted(means, reverse=True)


def test_thresholds_within_other_losses_are_those_that_asking_for_them_would_choose():
    instances, _ = telling()
    noted = choose(instances, search(epochs=4)).at_tolerances
    for place, allowed in enumerate(TOLERANCES):
        asked = choose(instances, search(max_loss=allowed, epochs=4)).at_thresholds
        assert {name: points[place] for name, points in noted.items()} == asked


def test_thresholds_of_all_token_criteria_hold_the_floor():
    instances, first_right = telling(texts=24)
    how = search((0.01, 0.1), as_range=True, criteria=GENERATION_CRITERIA, epochs=60)
    fits: list[None] = []
    choice = choose(instances, how, on_fit=lambda: fits.append(None))
    assert len(fits) == how.number_of_fits(cross_fitted=True) == 3
    assert list(choice.thresholds) == list(GENERATION_CRITERIA)
    assert choice.thresholds["static"] == 4
    for criterion in ("policy", "softmax_margin", "confidence_classifier"):
        point = choice.at_thresholds[criterion]
        assert point.accuracy == pytest.approx(1.0)
        assert point.mean_exit_layer < float(first_right.float().mean()) + 0.2
    assert choice.hits.shape == choice.counts.shape == (24,)
    assert choice.counts.sum() == 240
    assert choice.fitted.keys() == {"confidence_classifier"}


def test_nobody_exits_before_the_first_exit_layer():
    instances, first_right = telling(texts=24)
    how = search(criteria=GENERATION_CRITERIA, min_exit_layer=3, epochs=60)
    choice = choose(instances, how)
    assert not choice.exit_probs[:, :2].any()
    found = choose_exit_layer(choice.exit_probs, 0.5)
    assert float((found == first_right.clamp_min(3)).float().mean()) > 0.95
    for criterion in ("policy", "softmax_margin", "confidence_classifier"):
        assert choice.at_thresholds[criterion].mean_exit_layer >= 3
    report = choose(instances, search((5.0,), min_exit_layer=3, epochs=60)).report
    assert report.first_layer_share == 1.0
    assert report.collapsed


def test_the_first_layer_is_no_exit_by_similarity():
    instances, _ = telling(texts=24)
    instances = replace(instances, correct=torch.ones_like(instances.correct))
    choice = choose(instances, search(criteria=GENERATION_CRITERIA))
    assert choice.at_thresholds["state_similarity"].mean_exit_layer == 2
    assert choice.at_thresholds["static"].mean_exit_layer == 1


def unequal(count: int = 1000, seed: int = 1) -> tuple[Instances, Tensor, Tensor]:
    """Of 100 rows 3 are of class 1. Shallow classifiers never say so; the last one finds nine in ten of them.

    It also takes 3 % of class 0 for class 1, so that accuracy is best (97 %) where all exit at once. The state tells
    the rows that may be of class 1. With the rows come labels and predictions.
    """
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(count) % 100
    labels = (row < 3).long()
    correct = (labels == 0)[:, None].repeat(1, LAYERS)
    found = torch.arange(count) % 1000 >= 3  # of class 1
    correct[:, -1] = torch.where(labels == 1, found, row < 97)
    may_be = (row < 3) | (row >= 98)
    states = 0.1 * torch.randn(count, LAYERS, HIDDEN, generator=generator)
    states[..., 0] = may_be.float()[:, None] * 2 - 1
    return instances_of(correct, states), labels, torch.where(correct, labels[:, None], 1 - labels[:, None])


@pytest.mark.parametrize(
    "metric, recall, cross_fitted",
    [
        ("accuracy", 0.0, True),
        ("macro_f1", 0.9, True),
        ("accuracy", 0.0, False),
        ("f1", 0.9, False),
        ("matthews", 0.9, False),
    ],
)
def test_a_rare_class_is_kept_by_a_metric_that_sees_it(metric: str, recall: float, cross_fitted: bool):
    judged, labels, predictions = unequal(seed=1 if cross_fitted else 2)

    def quality(exit_layer: Tensor) -> float:
        return METRICS[metric](
            predictions.gather(1, exit_layer[:, None] - 1).squeeze(1).numpy(), labels.numpy()
        )

    choice = choose(
        unequal()[0],
        search((0.02,), epochs=20, learning_rate=1e-2),
        None if cross_fitted else judged,
        quality=None if metric == "accuracy" else quality,
    )
    exit_layer = choose_exit_layer(choice.exit_probs, choice.thresholds["policy"])
    at_exit = predictions.gather(1, exit_layer[:, None] - 1).squeeze(1)
    _, rare = classes = recall_by_class(at_exit, predictions[:, -1], labels, ["common", "rare"])
    assert (at_exit == labels).float().mean() >= 0.967  # no metric is met by letting nobody exit early
    assert exit_layer.float().mean() < 2.0
    assert rare.full_depth_recall == pytest.approx(0.9)
    assert rare.recall == pytest.approx(recall, abs=0.11)
    said = recall_warnings(classes, choice.thresholds["policy"], threshold_metric=metric)
    assert any('recall of class "rare" (30 rows) falls from 90.0 %' in line for line in said) == (
        recall == 0.0
    )
    assert any('rare among 1,000 rows: "rare" (30)' in line for line in said)


def test_choosing_repeats_with_its_seed_and_leaves_the_callers_randomness_alone():
    instances, _ = telling(60)
    state = torch.get_rng_state()
    first, again = (choose(instances, search((0.01, 0.1), epochs=2)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_dict() == again.to_dict()
    assert torch.equal(first.exit_probs, again.exit_probs)
    weights, same = first.policy.state_dict(), again.policy.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_record_of_a_choice_is_json():
    choice = choose(telling(40)[0], search((0.01, 0.1), epochs=1))
    record = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert record["layer_cost"] == choice.layer_cost
    assert record["policy_input"] == "state"
    assert [price["layer_cost"] for price in record["prices"]] == [0.01, 0.1]
    assert record["thresholds"] == choice.thresholds
