"""Exit rules ready for decoding: which tokens leave, by hand and against the modules that training uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consistentee.inference.decoder.exit_rules import (
    ClassifierRule,
    ForcedRule,
    MarginRule,
    NeverLeave,
    PolicyRule,
    SimilarityRule,
    StaticRule,
)
from tiny_decoders import LAYERS, naive_decide, single_thread, tiny_exit_model

NOTHING = torch.zeros(3, 2)
GELU_OF_1 = 0.8413447  # 1 x the normal distribution's share below 1


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


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
        assert rule.may_leave(layer_index)
        assert rule.leaves(layer_index, NOTHING, NOTHING, normed) == [leaves]


def test_policy_at_its_ends() -> None:
    normed = torch.tensor([[-50.0, 50.0], [0.0, 0.0], [50.0, -50.0]])
    everybody = PolicyRule(policy_by_hand(), 0.0, torch.float32)
    for index in range(2):
        assert everybody.may_leave(index)
        assert everybody.leaves(index, NOTHING, NOTHING, normed) == [True] * 3
    nobody = PolicyRule(policy_by_hand(), 1.0, torch.float32)
    for index in range(2):
        assert not nobody.may_leave(index)
        assert nobody.leaves(index, NOTHING, NOTHING, normed) == [False] * 3


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
        if rule.may_leave(index):
            assert rule.leaves(index, before, after, normed if rule.needs_normed else None) == expected
        else:
            assert not any(expected)


@pytest.mark.parametrize("criterion", ["policy", "confidence_classifier"])
@torch.no_grad()
def test_readings_decide_as_states_do(criterion: str) -> None:
    rule = tiny_exit_model("llama").exit_rule(criterion, 0.4)
    normed = torch.randn(20, 32)
    for index in range(LAYERS - 1):
        readers = rule.readers(index)
        assert readers is not None
        expected = rule.leaves(index, normed, normed, normed)
        assert rule.decide(index, functional.linear(normed, *readers)) == expected
        assert 0 < sum(expected) < 20


@pytest.mark.parametrize(
    "rule", [NeverLeave(), StaticRule(2), SimilarityRule(0.5), MarginRule(None, 0.5)], ids=lambda r: r.name
)
def test_other_rules_have_no_readings(rule: Any) -> None:
    assert rule.readers(0) is None
    with pytest.raises(TypeError, match=rf"^{type(rule).__name__} has no readers.$"):
        rule.decide(0, NOTHING)


def test_nobody_leaves() -> None:
    rule = NeverLeave()
    assert not rule.may_leave(0)
    assert rule.leaves(0, NOTHING, NOTHING, None) == [False] * 3


def test_margin_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.2, and 0.4, 0.4, 0.2: margins 0.2 and 0."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]).log()
    asked: list[int] = []

    def exit_logits(layer_index: int, normed: Tensor) -> Tensor:
        asked.append(layer_index)
        return logits + 7

    model = SimpleNamespace(exit_logits=exit_logits)
    assert MarginRule(model, 0.19).leaves(2, NOTHING, NOTHING, NOTHING) == [True, False]
    assert MarginRule(model, 0.21).leaves(2, NOTHING, NOTHING, NOTHING) == [False, False]
    assert asked == [2, 2]
    assert not MarginRule(model, 1.0).may_leave(0)
    assert MarginRule(model, 0.99).may_leave(0)


def test_similarity_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    after = torch.tensor([[3.0, 4.0], [2.0, 0.0], [-1.0, 0.0]])  # cosines 0.6, 1, -1
    assert SimilarityRule(0.59).leaves(1, before, after, None) == [True, True, False]
    assert SimilarityRule(0.61).leaves(1, before, after, None) == [False, True, False]
    rule = SimilarityRule(-1.0)
    assert [rule.may_leave(index) for index in range(3)] == [False, True, True]
    assert not SimilarityRule(1.0).may_leave(2)


def test_classifier_by_hand() -> None:
    classifier: Any = SimpleNamespace(
        weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]]), bias=torch.tensor([0.0, -1.0])
    )
    normed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    odds = math.log(0.7 / 0.3)  # 0.85: the logits of layer 0 are 1 and 0, those of layer 1 are -1 and 1
    assert 0 < odds < 1
    rule = ClassifierRule(classifier, 0.7, torch.float32)
    assert rule.leaves(0, NOTHING, NOTHING, normed) == [True, False]
    assert rule.leaves(1, NOTHING, NOTHING, normed) == [False, True]
    assert ClassifierRule(classifier, 0.8, torch.float32).leaves(0, NOTHING, NOTHING, normed) == [False] * 2
    assert not ClassifierRule(classifier, 1.0, torch.float32).may_leave(0)
    assert ClassifierRule(classifier, 0.0, torch.float32).leaves(1, NOTHING, NOTHING, normed) == [True] * 2


@pytest.mark.parametrize("threshold, first", [(1, 0), (2, 1), (2.5, 2), (3, 2), (7, 6)])
def test_static_depth_runs_so_many_layers(threshold: float, first: int) -> None:
    rule = StaticRule(threshold)
    assert [rule.may_leave(index) for index in range(8)] == [index >= first for index in range(8)]
    assert rule.leaves(first, NOTHING, NOTHING, None) == [True] * 3
    if first:
        assert rule.leaves(first - 1, NOTHING, NOTHING, None) == [False] * 3


class Counted(NeverLeave):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def leaves(self, layer_index: int, before: Tensor, after: Tensor, normed: Tensor | None) -> list[bool]:
        self.asked.append(layer_index)
        return super().leaves(layer_index, before, after, normed)


def test_forced_exits_by_position_and_row() -> None:
    inner = Counted()
    rule = ForcedRule(inner, [[1, 2, 3], [3, 1, 1]])
    assert (rule.name, rule.needs_normed) == (inner.name, inner.needs_normed)
    rule.begin(0, [0, 1, 2])
    assert rule.leaves(0, NOTHING, NOTHING, None) == [True, False, False]
    assert rule.leaves(1, NOTHING[:2], NOTHING[:2], None) == [True, False]
    assert rule.leaves(2, NOTHING[:1], NOTHING[:1], None) == [True]
    rule.begin(1, [0, 2])  # the second row has ended
    assert rule.leaves(0, NOTHING[:2], NOTHING[:2], None) == [False, True]
    rule.begin(5, [1])  # behind the last position: as there
    assert rule.leaves(0, NOTHING[:1], NOTHING[:1], None) == [True]
    assert inner.asked == [0, 1, 2, 0, 0]  # its cost counts


def test_unknown_thresholds_are_asked_for() -> None:
    model = tiny_exit_model("llama", exit_values={"threshold": 0.25, "thresholds": {"softmax_margin": 0.75}})
    assert model.known_threshold("policy") == 0.25
    assert model.known_threshold("softmax_margin") == 0.75
    assert model.known_threshold("static") is None
    assert isinstance(model.exit_rule("softmax_margin"), MarginRule)
    assert isinstance(model.exit_rule("state_similarity", -0.5), SimilarityRule)
    with pytest.raises(
        ValueError,
        match=r'^There is no saved threshold for criterion "static". Give one with threshold=.$',
    ):
        model.exit_rule("static")
    with pytest.raises(ValueError, match=r'^criterion must be one of policy, .*, got "entropy".$'):
        model.exit_rule("entropy")
    with pytest.raises(ValueError, match=r"^threshold must be in \[0, 1\] for policy, got 1.5.$"):
        model.exit_rule("policy", 1.5)
