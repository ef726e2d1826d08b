"""Pooling, internal classifiers and policy networks: shapes, padding, and that each layer has its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consistentee.functional.exits import NUM_SIGNALS
from consistentee.functional.signals import confidence_scores
from consistentee.heads.classifiers import (
    AttentionPooling,
    InternalClassifiers,
    pool_tokens,
)
from consistentee.heads.policy import PolicyNetwork, exit_feature_map

LAYERS, HIDDEN, CLASSES = 3, 8, 4
HEADS = pytest.mark.parametrize(
    "head, pooling", [("attention", "mean"), ("shared_pooler", "mean"), ("shared_pooler", "cls")]
)
INPUTS = pytest.mark.parametrize(
    "policy_input", ["state", "log_odds", "state+log_odds", "signals", "state+signals"]
)


def classifiers(
    head: str, pooling: str = "mean", dropout: float = 0.0, width: int = HIDDEN
) -> InternalClassifiers:
    return InternalClassifiers(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_labels=CLASSES,
        head=head,
        pooling=pooling,
        num_queries=2,
        width=width,
        dropout=dropout,
    )


def policy(policy_input: str, **values: float) -> PolicyNetwork:
    settings = {"policy_hidden_size": 5, "dropout": 0.0, "initial_exit_bias": -1.0, **values}
    return PolicyNetwork(num_layers=LAYERS, hidden_size=HIDDEN, policy_input=policy_input, **settings)


@pytest.fixture
def hidden_states() -> Tensor:
    return torch.randn(3, 5, HIDDEN)


@pytest.fixture
def attention_mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def test_pool_tokens_by_hand():
    hidden_states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    attention_mask = torch.tensor([[1, 1, 0]])
    assert pool_tokens(hidden_states, attention_mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool_tokens(hidden_states, attention_mask, "mean").tolist() == [[2.0, 4.0]]


def test_pool_tokens_of_a_row_without_real_tokens_is_finite():
    assert torch.isfinite(pool_tokens(torch.randn(1, 3, 2), torch.zeros(1, 3), "mean")).all()


def test_pool_tokens_names_an_unknown_pooling(hidden_states: Tensor, attention_mask: Tensor):
    with pytest.raises(ValueError, match='pooling must be "cls" or "mean", got "max"'):
        pool_tokens(hidden_states, attention_mask, "max")


def test_attention_pooling_is_a_weighted_mean_of_the_normed_tokens(
    hidden_states: Tensor, attention_mask: Tensor
):
    pooling = AttentionPooling(HIDDEN, 2)
    pooled = pooling(hidden_states, attention_mask)
    assert pooled.shape == (3, 2 * HIDDEN)
    for row in range(3):
        tokens = pooling.norm(hidden_states[row, : attention_mask[row].sum()])
        for query in range(2):
            weights = (tokens @ pooling.queries[query]).softmax(0)
            torch.testing.assert_close(pooled[row].view(2, HIDDEN)[query], weights @ tokens)


@HEADS
def test_padding_has_no_influence(head: str, pooling: str, hidden_states: Tensor, attention_mask: Tensor):
    heads = classifiers(head, pooling).eval()
    elsewhere = torch.where(
        attention_mask[..., None] == 1, hidden_states, torch.full_like(hidden_states, 50.0)
    )
    for layer in range(LAYERS):
        pooled, logits = heads(layer, hidden_states, attention_mask)
        assert pooled.shape == (3, HIDDEN)
        assert logits.shape == (3, CLASSES)
        same_pooled, same_logits = heads(layer, elsewhere, attention_mask)
        torch.testing.assert_close(same_pooled, pooled)
        torch.testing.assert_close(same_logits, logits)
        alone, _ = heads(
            layer, hidden_states[1:2, :3], attention_mask[1:2, :3]
        )  # the row without its padding
        torch.testing.assert_close(alone, pooled[1:2])


@HEADS
def test_every_layer_has_its_own_classifier(
    head: str, pooling: str, hidden_states: Tensor, attention_mask: Tensor
):
    heads = classifiers(head, pooling).eval()
    outputs = [heads(layer, hidden_states, attention_mask) for layer in range(LAYERS)]
    assert not torch.allclose(outputs[0][1], outputs[1][1])
    shared = torch.equal(outputs[0][0], outputs[1][0])
    assert shared == (head == "shared_pooler")  # the paper's pooler is one for all layers


@HEADS
def test_a_layers_loss_reaches_its_own_parameters_only(
    head: str, pooling: str, hidden_states: Tensor, attention_mask: Tensor
):
    heads = classifiers(head, pooling)
    heads(1, hidden_states, attention_mask)[1].sum().backward()
    for name, parameter in heads.named_parameters():
        own = not name.startswith("layers.") or name.startswith("layers.1.")
        assert (parameter.grad is not None) == own, name


@HEADS
def test_pooled_states_lie_within_half_precisions_reach(
    head: str, pooling: str, hidden_states: Tensor, attention_mask: Tensor
):
    pooled, _ = classifiers(head, pooling)(0, hidden_states * 1e4, attention_mask)
    assert pooled.abs().max() <= 1


# --- Policy network ---


@INPUTS
def test_policy_on_all_layers_equals_layer_by_layer(policy_input: str):
    network = policy(policy_input).eval()
    pooled, features = torch.randn(4, LAYERS, HIDDEN), torch.randn(4, LAYERS, NUM_SIGNALS)
    whole = network(pooled, features)
    assert whole.shape == (4, LAYERS)
    for index in range(LAYERS):
        one = network(pooled[:, index : index + 1], features[:, index : index + 1], index)
        torch.testing.assert_close(one, whole[:, index : index + 1])
    torch.testing.assert_close(network(pooled[:, 1:], features[:, 1:], 1), whole[:, 1:])


def test_state_branch_is_the_papers_network():
    network = policy("state").eval()
    pooled = torch.randn(4, LAYERS, HIDDEN)
    for layer in range(LAYERS):
        hidden = pooled[:, layer] @ network.state_weight[layer] + network.state_bias[layer]
        expected = torch.nn.functional.gelu(hidden) @ network.state_output[layer] + network.exit_bias[layer]
        torch.testing.assert_close(network(pooled, None)[:, layer], expected)


def test_the_policy_reads_what_it_is_told_to():
    pooled, features = torch.randn(2, LAYERS, HIDDEN), torch.randn(2, LAYERS, NUM_SIGNALS)
    for policy_input, reads in {
        "state": (True, False),
        "log_odds": (False, True),
        "state+log_odds": (True, True),
        "state+signals": (True, True),
    }.items():
        network = policy(policy_input).eval()
        for parameter in network.parameters():  # beside log-odds the other parts begin at zero
            torch.nn.init.normal_(parameter)
        before = network(pooled, features)
        changes = (network(pooled + 1, features), network(pooled, features + 1))
        assert tuple(not torch.equal(before, after) for after in changes) == reads
        assert (network.reads_state, network.reads_log_odds) == reads


@pytest.mark.parametrize("policy_input", ["log_odds", "state+log_odds"])
def test_an_untrained_policy_with_log_odds_is_the_confidence_criterion(policy_input: str):
    layer_logits = torch.randn(50, LAYERS, 3)
    pooled = torch.randn(50, LAYERS, HIDDEN)
    network = policy(policy_input).eval()
    logits = network(pooled, network.features(layer_logits))
    assert torch.equal(logits.argsort(0), confidence_scores(layer_logits).argsort(0))
    confidence = confidence_scores(layer_logits)
    torch.testing.assert_close(logits, torch.logit(confidence) - 1)  # the initial exit bias


def test_missing_features_are_an_error():
    with pytest.raises(ValueError, match=r'policy_input "state\+log_odds" needs features, got None'):
        policy("state+log_odds")(torch.randn(2, LAYERS, HIDDEN), None)


def test_a_negative_bias_makes_a_young_policy_go_deep():
    pooled = torch.randn(200, LAYERS, HIDDEN)
    shallow = policy("state", initial_exit_bias=3.0)(pooled, None).sigmoid().mean()
    deep = policy("state", initial_exit_bias=-3.0)(pooled, None).sigmoid().mean()
    assert deep < 0.3
    assert shallow > 0.7


@INPUTS
def test_policy_takes_half_precision_states(policy_input: str):
    logits = policy(policy_input)(torch.randn(2, LAYERS, HIDDEN).half(), torch.randn(2, LAYERS, NUM_SIGNALS))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
@pytest.mark.parametrize("policy_input", ["state", "log_odds"])
def test_exit_feature_map_are_logits_and_what_the_policy_makes_of_the_state(
    head: str, policy_input: str
) -> None:
    narrow = classifiers(head, width=6)
    states, mask = torch.randn(2, 5, HIDDEN), torch.ones(2, 5)
    network = PolicyNetwork(
        num_layers=LAYERS,
        hidden_size=6,
        policy_input=policy_input,
        policy_hidden_size=5,
        dropout=0.0,
        initial_exit_bias=0.0,
    )
    for layer in range(LAYERS):
        pooled, logits = narrow(layer, states, mask)
        assert pooled.shape == (2, 6)
        weight, bias = exit_feature_map(narrow, network, layer)
        found = pooled @ weight.T + bias
        torch.testing.assert_close(found[:, :CLASSES], logits)
        if policy_input == "state":
            here = slice(layer, layer + 1)
            torch.nn.init.normal_(network.state_output)
            hidden = torch.nn.functional.gelu(found[:, CLASSES:])
            wanted = (hidden * network.state_output[here]).sum(1) + network.exit_bias[layer]
            torch.testing.assert_close(network(pooled[:, None], None, layer)[:, 0], wanted)
        else:
            assert found.shape == (2, CLASSES)
    assert exit_feature_map(narrow, None, 0)[0].shape == (CLASSES, 6)
