"""The reward formula, plain and hardness-guided."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from consistentee.config import RewardLoss, TokenRewardLoss
from consistentee.functional.rewards import (
    REWARD_LOSSES,
    REWARDS,
    TOKEN_REWARD_LOSSES,
    reward_losses,
    rewards,
)


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
    losses = torch.rand(6, 3)
    right = torch.rand(6, 3) < 0.5
    assert reward_losses("cross_entropy", losses=losses) is losses
    assert torch.equal(reward_losses("error", losses=losses, right=right), (~right).float())
    halves = reward_losses("error", right=torch.tensor([[0.0, 0.5, 1.0]]))
    assert halves.tolist() == [[1.0, 0.5, 0.0]]
    assert reward_losses("regret", regret=torch.tensor([[25.0, 10.0, 2.5, 0.0]])).tolist() == [
        [1, 1, 0.25, 0]
    ]


def test_unknown_and_missing_reward_losses_are_named():
    with pytest.raises(
        ValueError, match=r'^reward_loss must be one of cross_entropy, error, regret, got "hinge"'
    ):
        reward_losses("hinge", losses=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r'^reward_loss "regret" needs regret, got None.$'):
        reward_losses("regret", losses=torch.zeros(1, 2))


def test_the_settings_name_what_the_table_has():
    assert get_args(RewardLoss) == REWARD_LOSSES
    assert sorted(get_args(TokenRewardLoss)) == sorted(TOKEN_REWARD_LOSSES)
    assert {*REWARD_LOSSES, *TOKEN_REWARD_LOSSES} == set(REWARDS)
