"""Training losses: hand-worked values, where gradients go, and the sampled policy gradient against the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.exits import exit_distribution
from consistentee.functional.losses import (
    consistent_loss,
    divergence_losses,
    exact_policy_loss,
    layer_losses,
    policy_entropy,
    sampled_policy_loss,
    weighted_sum_loss,
)


def expected_reward(exit_logits: Tensor, layer_rewards: Tensor) -> Tensor:
    """The definition, written out: walk through the layers and add up what each exit earns."""
    total, reached = torch.zeros(len(exit_logits), dtype=exit_logits.dtype), torch.ones(len(exit_logits))
    last = exit_logits.shape[1] - 1
    for layer in range(last + 1):
        leave = torch.ones(len(exit_logits)) if layer == last else exit_logits[:, layer].sigmoid()
        total = total + reached * leave * layer_rewards[:, layer]
        reached = reached * (1 - leave)
    return total


def test_layer_losses_are_cross_entropies():
    layer_logits, labels = torch.randn(5, 3, 4), torch.randint(4, (5,))
    losses = layer_losses(layer_logits, labels)
    for layer in range(3):
        expected = functional.cross_entropy(layer_logits[:, layer], labels, reduction="none")
        torch.testing.assert_close(losses[:, layer], expected)


def test_divergence_losses_are_of_the_layers_from_the_target():
    layer_logits, target_logits = torch.randn(5, 3, 4), torch.randn(5, 4)
    losses = divergence_losses(layer_logits, target_logits)
    for layer in range(3):
        expected = functional.kl_div(
            layer_logits[:, layer].log_softmax(-1), target_logits.softmax(-1), reduction="none"
        ).sum(-1)
        torch.testing.assert_close(losses[:, layer], expected)


def test_weighted_sum_loss_weighs_by_layer_number():
    losses = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(weighted_sum_loss(losses), torch.tensor([0.5, 1.0, 1.5, 2.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sum_loss_is_of_full_precision_under_autocast(dtype: torch.dtype):
    losses = torch.rand(4, 12, requires_grad=True)
    expected = weighted_sum_loss(losses)
    with torch.autocast("cpu", dtype):
        found = weighted_sum_loss(losses)
    assert found.dtype == torch.float32
    assert found.equal(expected)
    (gradient,) = torch.autograd.grad(found.sum(), losses)
    assert gradient.equal(torch.autograd.grad(expected.sum(), losses)[0])


def test_consistent_loss_is_the_expected_loss_at_the_exit():
    losses = torch.tensor([[1.0, 2.0, 4.0]])
    exit_probs = torch.tensor([[0.5, 0.5, 0.1]])  # leaves with 0.5, 0.25, 0.25
    torch.testing.assert_close(consistent_loss(losses, exit_probs), torch.tensor([2.0]))
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(consistent_loss(losses, certain), torch.tensor([2.0]))


def test_consistent_loss_sends_no_gradient_to_the_policy():
    losses = torch.rand(4, 3, requires_grad=True)
    exit_probs = torch.rand(4, 3, requires_grad=True)
    consistent_loss(losses, exit_probs).sum().backward()
    assert exit_probs.grad is None
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, exit_distribution(exit_probs.detach()))


def test_exact_policy_loss_is_minus_the_expected_reward():
    exit_logits, layer_rewards = torch.randn(9, 5), torch.randn(9, 5)
    torch.testing.assert_close(
        exact_policy_loss(exit_logits, layer_rewards), -expected_reward(exit_logits, layer_rewards)
    )


def test_exact_policy_gradient_is_that_of_the_expected_reward():
    exit_logits = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    layer_rewards = torch.randn(3, 4, dtype=torch.double)
    (gradient,) = torch.autograd.grad(exact_policy_loss(exit_logits, layer_rewards).sum(), exit_logits)
    (by_autograd,) = torch.autograd.grad(-expected_reward(exit_logits, layer_rewards).sum(), exit_logits)
    torch.testing.assert_close(gradient, by_autograd)

    step = 1e-6
    for row in range(3):
        for layer in range(4):
            nudge = torch.zeros_like(exit_logits)
            nudge[row, layer] = step
            above = expected_reward(exit_logits + nudge, layer_rewards).sum()
            below = expected_reward(exit_logits - nudge, layer_rewards).sum()
            assert gradient[row, layer].item() == pytest.approx(
                -((above - below) / (2 * step)).item(), abs=1e-7
            )
    assert (gradient[:, -1] == 0).all()  # whoever reaches the last layer leaves there


@pytest.mark.parametrize("num_rollouts", [1, 2, 8])
def test_sampled_policy_gradient_converges_to_the_exact_one(num_rollouts: int, seed: int):
    exit_logits = torch.tensor([[0.5, -1.0, 0.2, 0.0], [-2.0, 1.0, 0.0, 0.0]], dtype=torch.double)
    layer_rewards = torch.tensor([[-0.9, -0.3, -0.6, -0.5], [-0.1, -2.0, -0.4, -1.0]], dtype=torch.double)
    generator = torch.Generator().manual_seed(seed)
    repeats = 20_000
    many = exit_logits.repeat(repeats, 1).requires_grad_()
    loss = sampled_policy_loss(many, layer_rewards.repeat(repeats, 1), num_rollouts, generator)
    assert loss.shape == (2 * repeats,)
    (estimates,) = torch.autograd.grad(loss.sum(), many)  # one independent estimate a row
    estimates = estimates.view(repeats, 2, 4)
    exit_logits.requires_grad_()
    (exact,) = torch.autograd.grad(exact_policy_loss(exit_logits, layer_rewards).sum(), exit_logits)

    standard_error = estimates.std(0) / repeats**0.5
    assert ((estimates.mean(0) - exact).abs() <= 4 * standard_error).all()
    # The test has power: a gradient shrunk by a tenth would be noticed.
    clear = exact.abs() > 0.05
    assert clear.any()
    assert (0.1 * exact.abs() > 4 * standard_error)[clear].any()


def test_sampled_policy_loss_repeats_with_its_generator_and_leaves_the_global_one(seed: int):
    exit_logits, layer_rewards = torch.randn(5, 4), torch.randn(5, 4)
    state = torch.get_rng_state()
    first, again = (
        sampled_policy_loss(exit_logits, layer_rewards, 4, torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_policy_loss_sends_no_gradient_into_the_rewards():
    exit_logits, layer_rewards = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    sampled_policy_loss(exit_logits, layer_rewards, 4).sum().backward()
    assert layer_rewards.grad is None


def test_sampled_policy_loss_needs_a_rollout():
    with pytest.raises(ValueError, match="num_rollouts must be at least 1, got 0"):
        sampled_policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)


def test_policy_losses_stay_finite_at_extreme_logits():
    exit_logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    layer_rewards = torch.randn(3, 3)
    loss = exact_policy_loss(exit_logits, layer_rewards) + sampled_policy_loss(exit_logits, layer_rewards, 4)
    (loss - policy_entropy(exit_logits)).sum().backward()
    assert torch.isfinite(loss).all()
    assert exit_logits.grad is not None
    assert torch.isfinite(exit_logits.grad).all()


def test_policy_entropy_by_hand():
    uniform = torch.tensor([[1 / 4, 1 / 3, 1 / 2, 0.5]]).logit()  # leaves with 1/4 at each layer
    certain = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    entropies = policy_entropy(torch.cat([uniform, certain]))
    torch.testing.assert_close(entropies, torch.tensor([4.0, 1.0]).log())
