"""Losses of the methods that ours is compared with: worked by hand, or by loops over the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from consistentee.functional.exits import exit_distribution
from consistentee.functional.losses import (
    distillation_loss,
    geometric_prior,
    layer_weights_around,
    score_margin_loss,
    variational_exit_loss,
)


def test_distillation_is_the_divergence_of_each_exit_from_the_teacher(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exits, teacher = (torch.randn(*shape, generator=generator) for shape in ((5, 3, 4), (5, 4)))
    found = distillation_loss(exits, teacher)
    for row in range(5):
        for layer in range(3):
            student, top = (Categorical(logits=logits) for logits in (exits[row, layer], teacher[row]))
            torch.testing.assert_close(found[row, layer], kl_divergence(student, top))
            assert not torch.isclose(found[row, layer], kl_divergence(top, student))  # the order matters


def test_distillation_sends_no_gradient_to_the_teacher() -> None:
    exits, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    distillation_loss(exits, teacher).sum().backward()
    assert teacher.grad is None
    assert exits.grad is not None
    assert exits.grad.abs().sum() > 0


def test_the_geometric_prior_keeps_its_tail_at_the_last_layer() -> None:
    expected = [0.1, 0.1 * 0.9, 0.1 * 0.81, 0.9**3]
    torch.testing.assert_close(geometric_prior(4, 0.1), torch.tensor(expected))
    assert float(geometric_prior(12, 0.1).sum()) == pytest.approx(1)
    torch.testing.assert_close(geometric_prior(1, 0.3), torch.tensor([1.0]))


def test_the_variational_loss_is_the_expected_loss_and_the_divergence_from_the_prior(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(6, 5, generator=generator)
    exit_logits = torch.randn(6, 5, generator=generator)
    prior = geometric_prior(5, 0.2)
    found = variational_exit_loss(losses, exit_logits, prior.log(), 0.5)
    posterior = exit_distribution(exit_logits.sigmoid())
    for row in range(6):
        expected = (posterior[row] * losses[row]).sum()
        divergence = kl_divergence(Categorical(probs=posterior[row]), Categorical(probs=prior))
        torch.testing.assert_close(found[row], expected + 0.5 * divergence)


def test_the_prior_itself_costs_nothing_and_gradients_go_to_losses_and_exits() -> None:
    rate = torch.full((1, 4), 0.25)
    losses = torch.ones(1, 4, requires_grad=True)
    exit_logits = rate.logit().requires_grad_()
    loss = variational_exit_loss(losses, exit_logits, geometric_prior(4, 0.25).log(), 3.0)
    torch.testing.assert_close(loss, torch.tensor([1.0]))
    loss.sum().backward()
    torch.testing.assert_close(losses.grad, exit_distribution(rate))
    # At the prior, with equal losses, no change of the exits pays.
    torch.testing.assert_close(exit_logits.grad, torch.zeros(1, 4))
    cheap_first = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    exit_logits = rate.logit().requires_grad_()
    variational_exit_loss(cheap_first, exit_logits, geometric_prior(4, 0.25).log(), 3.0).sum().backward()
    assert exit_logits.grad is not None
    assert exit_logits.grad[0, 0] < 0  # a step against the gradient exits there more often


def test_weights_around_an_exit_by_hand() -> None:
    exit_layer = torch.tensor([1, 3])
    found = layer_weights_around(exit_layer, 3, math.log(2))  # each layer further away weighs half
    torch.testing.assert_close(found, torch.tensor([[4 / 7, 2 / 7, 1 / 7], [1 / 7, 2 / 7, 4 / 7]]))
    torch.testing.assert_close(layer_weights_around(exit_layer, 3, 0.0), torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(
        layer_weights_around(exit_layer, 3, 100.0), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    )


def margin_by_loops(scores: Tensor, correct: Tensor, margin: float) -> float:
    found: list[float] = []
    for layer in range(scores.shape[1]):
        right = [float(s) for s, c in zip(scores[:, layer], correct[:, layer], strict=True) if c]
        wrong = [float(s) for s, c in zip(scores[:, layer], correct[:, layer], strict=True) if not c]
        if right and wrong:
            found.append(max(0.0, sum(wrong) / len(wrong) - sum(right) / len(right) + margin))
    return sum(found) / len(found) if found else 0.0


def test_the_margin_between_right_and_wrong_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(7, 4, generator=generator)
    correct = torch.rand(7, 4, generator=generator) < 0.6
    correct[:, 1] = True  # an exit that got all right says nothing
    found = score_margin_loss(scores, correct, 0.3)
    assert float(found) == pytest.approx(margin_by_loops(scores, correct, 0.3), abs=1e-6)
    assert float(score_margin_loss(scores, torch.ones_like(correct), 0.3)) == 0
    assert float(score_margin_loss(scores, torch.zeros_like(correct), 0.3)) == 0


def test_the_margin_raises_right_scores_and_lowers_wrong_ones_until_it_is_kept() -> None:
    scores = torch.tensor([[0.5], [0.4]], requires_grad=True)
    score_margin_loss(scores, torch.tensor([[True], [False]]), 0.3).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-1.0], [1.0]]))
    kept = torch.tensor([[0.9], [0.4]], requires_grad=True)
    score_margin_loss(kept, torch.tensor([[True], [False]]), 0.3).backward()
    torch.testing.assert_close(kept.grad, torch.zeros(2, 1))
