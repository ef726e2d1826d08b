"""The reward formula, plain and hardness-guided."""

from __future__ import annotations

import pytest
import torch

from consistentee.functional.losses import layer_losses
from consistentee.functional.rewards import REWARD_LOSSES, reward_losses, rewards


def test_uniform_reward_by_hand():
    losses = torch.tensor([[0.5, 0.2, 0.1]])
    torch.testing.assert_close(rewards(losses, 0.1), torch.tensor([[-0.6, -0.4, -0.4]]))


def test_hardness_guided_reward_is_the_papers_formula():
    losses = torch.rand(4, 12)
    memorized = torch.tensor([1, 6, 11, 12])
    result = rewards(losses, 0.05, memorized / 12)
    for row in range(4):
        for layer in range(1, 13):
            expected = -losses[row, layer - 1] - 0.05 * layer * (1 - memorized[row] / 12)
            torch.testing.assert_close(result[row, layer - 1], expected)


def test_the_hardest_instances_use_all_layers_for_nothing():
    losses = torch.rand(3, 5)
    torch.testing.assert_close(rewards(losses, 0.3, torch.ones(3)), -losses)
    torch.testing.assert_close(rewards(losses, 0.3, torch.zeros(3)), rewards(losses, 0.3))
    torch.testing.assert_close(rewards(losses, 0.0), -losses)


def test_a_layer_cost_below_zero_is_an_error():
    with pytest.raises(ValueError, match=r"layer_cost must be >= 0, got -0.1"):
        rewards(torch.zeros(1, 2), -0.1)


def test_reward_losses():
    layer_logits, labels = torch.randn(6, 3, 4), torch.randint(4, (6,))
    torch.testing.assert_close(
        reward_losses("cross_entropy", layer_logits, labels), layer_losses(layer_logits, labels)
    )
    wrong = reward_losses("error", layer_logits, labels)
    assert torch.equal(wrong == 1, layer_logits.argmax(-1) != labels[:, None])
    assert set(wrong.unique().tolist()) <= {0.0, 1.0}
    assert all((reward_losses(kind, layer_logits, labels) >= 0).all() for kind in REWARD_LOSSES)


def test_an_unknown_reward_loss_is_named():
    with pytest.raises(ValueError, match='reward_loss must be one of cross_entropy, error, got "hinge"'):
        reward_losses("hinge", torch.zeros(1, 2, 2), torch.tensor([0]))
