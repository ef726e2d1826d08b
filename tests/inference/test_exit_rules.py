"""Exit rules ready for decoding: which tokens exit, by hand and against the modules that training uses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consistentee.inference.decoder.exit_rules import (
    ClassifierRule,
    FixedExitRule,
    NeverExit,
    PolicyRule,
    ScoreRule,
    StaticRule,
    TokenExitRule,
    exit_rule,
)
from tiny_decoders import LAYERS, naive_decide, tiny_exit_model

NOTHING = torch.zeros(3, 2)
GELU_OF_1 = 0.8413447  # 1 x the normal distribution's share below 1


def no_logits(layer_index: int, normed: Tensor) -> Tensor:
    raise AssertionError("no head is needed")


def similarity_rule(threshold: float) -> TokenExitRule:
    parts: dict[str, Any] = {"policy": None, "confidence_classifier": None, "exit_logits": no_logits}
    return exit_rule("state_similarity", threshold, min_exit_layer=1, dtype=torch.float32, **parts)


pytestmark = pytest.mark.usefixtures("one_thread")


def policy_by_hand() -> Any:
    """Two layers on states of two entries, one hidden unit: the first entry, and the second one's double less one."""
    return SimpleNamespace(
        state_weight=torch.tensor([[[1.0], [0.0]], [[0.0], [2.0]]]),
        state_bias=torch.tensor([[0.0], [-1.0]]),
        state_output=torch.tensor([[2.0], [-1.0]]),
        exit_bias=torch.tensor([-1.0, 0.5]),
    )


@pytest.mark.parametrize(
    "layer_index, state, logit",
    [
        (0, [1.0, 9.0], 2 * GELU_OF_1 - 1),
        (0, [0.0, 9.0], -1.0),
        (1, [9.0, 1.0], 0.5 - GELU_OF_1),
        (1, [9.0, 0.5], 0.5),
    ],
)
def test_policy_by_hand(layer_index: int, state: list[float], logit: float) -> None:
    probability = 1 / (1 + math.exp(-logit))
    normed = torch.tensor([state])
    for threshold, leaves in ((probability - 1e-3, True), (probability + 1e-3, False)):
        rule = PolicyRule(policy_by_hand(), threshold, torch.float32)
        assert rule.may_exit(layer_index)
        assert rule.exits(layer_index, NOTHING, NOTHING, normed) == [leaves]


def test_policy_at_its_ends() -> None:
    normed = torch.tensor([[-50.0, 50.0], [0.0, 0.0], [50.0, -50.0]])
    everybody = PolicyRule(policy_by_hand(), 0.0, torch.float32)
    for index in range(2):
        assert everybody.may_exit(index)
        assert everybody.exits(index, NOTHING, NOTHING, normed) == [True] * 3
    nobody = PolicyRule(policy_by_hand(), 1.0, torch.float32)
    for index in range(2):
        assert not nobody.may_exit(index)
        assert nobody.exits(index, NOTHING, NOTHING, normed) == [False] * 3


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "criterion", ["policy", "softmax_margin", "state_similarity", "confidence_classifier"]
)
@torch.no_grad()
def test_rules_decide_as_their_definitions_do(criterion: str, threshold: float) -> None:
    model = tiny_exit_model("llama", "low_rank")
    rule = model.exit_rule(criterion, threshold)
    before, after = torch.randn(20, 32), torch.randn(20, 32)
    after = after + 0.5 * before
    decide = naive_decide(model, criterion, threshold)
    for index in range(LAYERS - 1):
        normed = functional.rms_norm(after, (32,))
        expected = decide(index, before, after, normed).tolist()
        if rule.may_exit(index):
            assert rule.exits(index, before, after, normed if rule.needs_normed else None) == expected
        else:
            assert not any(expected)


@pytest.mark.parametrize("criterion", ["policy", "confidence_classifier"])
@torch.no_grad()
def test_exit_features_decide_as_states_do(criterion: str) -> None:
    rule = tiny_exit_model("llama").exit_rule(criterion, 0.4)
    normed = torch.randn(20, 32)
    for index in range(LAYERS - 1):
        feature_map = rule.feature_map(index)
        assert feature_map is not None
        expected = rule.exits(index, normed, normed, normed)
        assert rule.decide(index, functional.linear(normed, *feature_map)) == expected
        assert 0 < sum(expected) < 20


@pytest.mark.parametrize(
    "rule", [NeverExit(), StaticRule(2), ScoreRule("state_similarity", 0.5, no_logits)], ids=lambda r: r.name
)
def test_other_rules_have_no_feature_map(rule: Any) -> None:
    assert rule.feature_map(0) is None
    with pytest.raises(TypeError, match=rf"^{type(rule).__name__} has no feature map.$"):
        rule.decide(0, NOTHING)


def test_nobody_exits() -> None:
    rule = NeverExit()
    assert not rule.may_exit(0)
    assert rule.exits(0, NOTHING, NOTHING, None) == [False] * 3


def test_margin_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.2, and 0.4, 0.4, 0.2: margins 0.2 and 0."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]).log()
    asked: list[int] = []

    def exit_logits(layer_index: int, normed: Tensor) -> Tensor:
        asked.append(layer_index)
        return logits + 7

    assert ScoreRule("softmax_margin", 0.19, exit_logits).exits(2, NOTHING, NOTHING, NOTHING) == [True, False]
    assert ScoreRule("softmax_margin", 0.21, exit_logits).exits(2, NOTHING, NOTHING, NOTHING) == [
        False,
        False,
    ]
    assert asked == [2, 2]
    assert not ScoreRule("softmax_margin", 1.0, exit_logits).may_exit(0)
    assert ScoreRule("softmax_margin", 0.99, exit_logits).may_exit(0)


def test_similarity_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    after = torch.tensor([[3.0, 4.0], [2.0, 0.0], [-1.0, 0.0]])  # cosines 0.6, 1, -1
    assert similarity_rule(0.59).exits(1, before, after, None) == [True, True, False]
    assert similarity_rule(0.61).exits(1, before, after, None) == [False, True, False]
    rule = similarity_rule(-1.0)
    assert [rule.may_exit(index) for index in range(3)] == [False, True, True]
    assert not similarity_rule(1.0).may_exit(2)


def test_classifier_by_hand() -> None:
    classifier: Any = SimpleNamespace(
        weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]]), bias=torch.tensor([0.0, -1.0])
    )
    normed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    odds = math.log(0.7 / 0.3)  # 0.85: the logits of layer 0 are 1 and 0, those of layer 1 are -1 and 1
    assert 0 < odds < 1
    rule = ClassifierRule(classifier, 0.7, torch.float32)
    assert rule.exits(0, NOTHING, NOTHING, normed) == [True, False]
    assert rule.exits(1, NOTHING, NOTHING, normed) == [False, True]
    assert ClassifierRule(classifier, 0.8, torch.float32).exits(0, NOTHING, NOTHING, normed) == [False] * 2
    assert not ClassifierRule(classifier, 1.0, torch.float32).may_exit(0)
    assert ClassifierRule(classifier, 0.0, torch.float32).exits(1, NOTHING, NOTHING, normed) == [True] * 2


@pytest.mark.parametrize("threshold, first", [(1, 0), (2, 1), (2.5, 2), (3, 2), (7, 6)])
def test_static_depth_runs_so_many_layers(threshold: float, first: int) -> None:
    rule = StaticRule(threshold)
    assert [rule.may_exit(index) for index in range(8)] == [index >= first for index in range(8)]
    assert rule.exits(first, NOTHING, NOTHING, None) == [True] * 3
    if first:
        assert rule.exits(first - 1, NOTHING, NOTHING, None) == [False] * 3


class Counted(NeverExit):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def exits(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        self.asked.append(layer_index)
        return super().exits(layer_index, before, after, normed)


def test_fixed_exits_by_position_and_row() -> None:
    inner = Counted()
    rule = FixedExitRule(inner, [[1, 2, 3], [3, 1, 1]])
    assert (rule.name, rule.needs_normed) == (inner.name, inner.needs_normed)
    rule.begin(0, [0, 1, 2])
    assert rule.exits(0, NOTHING, NOTHING, None) == [True, False, False]
    assert rule.exits(1, NOTHING[:2], NOTHING[:2], None) == [True, False]
    assert rule.exits(2, NOTHING[:1], NOTHING[:1], None) == [True]
    rule.begin(1, [0, 2])  # the second row has ended
    assert rule.exits(0, NOTHING[:2], NOTHING[:2], None) == [False, True]
    rule.begin(5, [1])  # behind the last position: as there
    assert rule.exits(0, NOTHING[:1], NOTHING[:1], None) == [True]
    assert inner.asked == [0, 1, 2, 0, 0]  # its cost counts


def test_unknown_thresholds_are_asked_for() -> None:
    model = tiny_exit_model("llama", exit_values={"threshold": 0.25, "thresholds": {"softmax_margin": 0.75}})
    assert model.known_threshold("policy") == 0.25
    assert model.known_threshold("softmax_margin") == 0.75
    assert model.known_threshold("static") is None
    for criterion, threshold in (("softmax_margin", None), ("state_similarity", -0.5)):
        assert model.exit_rule(criterion, threshold).name == criterion
    with pytest.raises(
        ValueError,
        match=r'^criterion "static" has no saved threshold. Give one with threshold=.$',
    ):
        model.exit_rule("static")
    with pytest.raises(ValueError, match=r'^criterion must be one of policy, .*, got "entropy".$'):
        model.exit_rule("entropy")
    with pytest.raises(ValueError, match=r"^threshold must be in \[0, 1\] for policy, got 1.5.$"):
        model.exit_rule("policy", 1.5)
