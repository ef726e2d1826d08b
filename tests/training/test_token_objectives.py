"""Losses at exits: the estimate against the exact sum, chunks against no chunks, exits as `exit_pass` takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consistentee.training.tasks import token_objectives as objectives
from consistentee.training.tasks.token_objectives import (
    ResponseTokens,
    chunked_cross_entropy,
    consistent_objective,
    draw_layers,
    exit_token_losses,
    full_depth_objective,
    leaving_positions,
    response_counts,
    weighted_sum_objective,
)
from tiny_training import tiny_batch, tiny_exit_model

WEIGHTED_SUM: dict[str, Any] = {"layers_per_step": 1, "last_layer_share": 0.3, "logit_rows": 3}


def all_layer_losses(model: Any, input_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Every exit's mean loss over each row's response tokens, (layers, batch), the plain way."""
    hidden = model.backbone(
        input_ids=input_ids, attention_mask=mask, output_hidden_states=True
    ).hidden_states[1:]
    result: list[Tensor] = []
    for index, states in enumerate(hidden):
        # Hugging Face's last state is behind the final norm already.
        normed = states if index == len(hidden) - 1 else model.exit_norm(index, states)
        logits = model.exit_logits(index, normed)[:, :-1]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        result.append(losses.sum(1) / (labels[:, 1:] != -100).sum(1))
    return torch.stack(result)


@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
def test_the_weighted_sum_is_estimated_without_bias(exit_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_exit_model(layers=4, exit_head=exit_head), tiny_batch()
    exact = all_layer_losses(model, *batch)
    wanted = 0.3 * exact[3] + 0.7 * (exact[0] + 2 * exact[1] + 3 * exact[2]) / 6
    objective = weighted_sum_objective(**WEIGHTED_SUM)
    estimates: list[Tensor] = []
    for point in (torch.arange(6) + 0.5) / 6:  # all there is to draw: the layers change at sixths
        monkeypatch.setattr(torch, "rand", lambda *size, point=point, **options: point.double())
        estimates.append(objective(model, *batch).losses.detach())
    torch.testing.assert_close(torch.stack(estimates).mean(0), wanted)
    assert len({round(float(estimate[0]), 5) for estimate in estimates}) == 3


def test_drawn_layers_are_in_proportion_to_their_numbers() -> None:
    torch.manual_seed(0)
    totals = torch.zeros(29)
    for _ in range(4000):
        drawn = draw_layers(30, 4)
        assert sum(drawn.values()) == pytest.approx(1)
        assert 1 <= len(drawn) <= 4
        for index, weight in drawn.items():
            totals[index] += weight / 4000
    numbers = torch.arange(1.0, 30)
    torch.testing.assert_close(totals, numbers / numbers.sum(), atol=0.006, rtol=0)


@pytest.mark.parametrize("layers_per_step", [2, 3, 40])
def test_as_many_points_as_layers_take_all_of_them(layers_per_step: int) -> None:
    assert draw_layers(3, layers_per_step) == {0: pytest.approx(1 / 3), 1: pytest.approx(2 / 3)}
    assert draw_layers(1, layers_per_step) == {}


@pytest.mark.parametrize("logit_rows", [1, 2, 5, 100])
def test_chunks_change_neither_losses_nor_gradients(logit_rows: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11)
    states, labels = torch.randn(5, 6, requires_grad=True), torch.tensor([3, 0, 10, 3, 7])
    wanted = functional.cross_entropy(head(states), labels, reduction="none")
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    expected = torch.autograd.grad((wanted * weights).sum(), [states, head.weight])
    losses, right = chunked_cross_entropy(head, states, labels, logit_rows)
    torch.testing.assert_close(losses, wanted)
    assert torch.equal(right, (head(states).argmax(-1) == labels).float())
    found = torch.autograd.grad((losses * weights).sum(), [states, head.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_more_logits_than_allowed_are_made_at_once() -> None:
    seen: list[int] = []

    def logits_of(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk @ torch.ones(4, 9)

    losses, _ = chunked_cross_entropy(
        logits_of, torch.randn(10, 4, requires_grad=True), torch.zeros(10).long(), 4
    )
    losses.sum().backward()
    assert seen[:3] == [4, 4, 2]
    assert max(seen) == 4
    assert len(seen) == 6  # and again in the backward pass


def test_no_response_tokens_give_no_loss() -> None:
    model = tiny_exit_model()
    input_ids, mask, labels = tiny_batch()
    labels[:] = -100
    for objective in (
        full_depth_objective(logit_rows=3),
        weighted_sum_objective(**WEIGHTED_SUM),
        consistent_objective(weighted_sum_share=0.5, **WEIGHTED_SUM),
    ):
        assert objective(model, input_ids, mask, labels).losses.tolist() == [0, 0, 0]


def test_the_full_model_learns_what_hugging_face_would_learn() -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(), tiny_batch()
    output = full_depth_objective(logit_rows=2)(model, input_ids, mask, labels)
    counts = ResponseTokens.of(labels).counts
    mean = (output.losses * counts).sum() / counts.sum()
    torch.testing.assert_close(mean, model(input_ids, mask, labels=labels).loss)


def test_prompt_and_padding_are_not_learned() -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(), tiny_batch()
    tokens = ResponseTokens.of(labels)
    assert tokens.counts.tolist() == [4, 2, 1]
    assert list(zip(tokens.rows.tolist(), tokens.positions.tolist(), strict=True))[:5] == [
        (0, 2),
        (0, 3),
        (0, 4),
        (0, 5),
        (1, 2),
    ]
    assert response_counts(torch.tensor([7, 5, 6, 3]), torch.tensor([3, 3, 5, 0])).tolist() == [4, 2, 1, 2]
    objective = weighted_sum_objective(**{**WEIGHTED_SUM, "layers_per_step": 2})
    before = objective(model, input_ids, mask, labels).losses
    changed = input_ids.clone()
    changed[1, 5:] = 7  # padding
    torch.testing.assert_close(objective(model, changed, mask, labels).losses, before)


@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
def test_the_consistent_loss_is_that_of_the_exits_taken(exit_head: str) -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(layers=4, exit_head=exit_head), tiny_batch()
    taken: dict[str, Tensor] = {}
    exit_pass = model.exit_pass

    def noting(*args: Any) -> tuple[Tensor, Tensor]:
        taken["normed"], taken["exit_layer"] = exit_pass(*args)
        return taken["normed"], taken["exit_layer"]

    model.exit_pass = noting
    torch.manual_seed(3)
    with torch.no_grad():
        model.policy.exit_bias.fill_(-0.5)
    output = consistent_objective(weighted_sum_share=0.0, **WEIGHTED_SUM)(model, input_ids, mask, labels)
    tokens = ResponseTokens.of(labels)
    layers, states = tokens.take(taken["exit_layer"][..., None]).squeeze(1), tokens.take(taken["normed"])
    assert len(set(layers.tolist())) > 1
    losses = [
        functional.cross_entropy(model.exit_logits(int(layer) - 1, state), label)
        for layer, state, label in zip(layers, states, tokens.labels, strict=True)
    ]
    torch.testing.assert_close(output.losses, tokens.row_means(torch.stack(losses)))
    torch.testing.assert_close(output.figures["exit_layer"], tokens.row_means(layers.float()))
    torch.testing.assert_close(output.figures["reward"], -output.losses.detach())


def test_exits_are_drawn_from_the_policy() -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(layers=3), tiny_batch()
    objective = consistent_objective(weighted_sum_share=0.0, **WEIGHTED_SUM)
    for bias, depth in ((-40.0, 3.0), (40.0, 1.0)):
        with torch.no_grad():
            model.policy.exit_bias.fill_(bias)
        exit_layer = objective(model, input_ids, mask, labels).figures["exit_layer"]
        first_is_full = model.config.full_depth_first_token
        wanted = [(3 + 3 * depth) / 4, (3 + depth) / 2, 3] if first_is_full else [depth] * 3
        assert exit_layer.tolist() == pytest.approx(wanted)


def test_nobody_leaves_before_the_first_exit_layer() -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(layers=4), tiny_batch()
    model.config.min_exit_layer, model.config.full_depth_first_token = 3, False
    with torch.no_grad():
        model.policy.exit_bias.fill_(40.0)
    objective = consistent_objective(weighted_sum_share=0.0, **WEIGHTED_SUM)
    assert objective(model, input_ids, mask, labels).figures["exit_layer"].tolist() == [3.0] * 3


def test_where_tokens_may_leave() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100]])
    assert leaving_positions(labels, False).tolist() == [[False, True, True, True, False, False]]
    assert leaving_positions(labels, True).tolist() == [[False, False, True, True, False, False]]


def test_a_share_of_the_rows_learns_the_weighted_sum_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (input_ids, mask, labels) = tiny_exit_model(layers=4), tiny_batch()
    options = {**WEIGHTED_SUM, "layers_per_step": 3}  # exact
    weighted_sum = weighted_sum_objective(**options)(model, input_ids, mask, labels)
    everything = consistent_objective(weighted_sum_share=1.0, **options)(model, input_ids, mask, labels)
    torch.testing.assert_close(everything.losses, weighted_sum.losses)
    assert everything.figures["exit_layer"].isnan().all()

    monkeypatch.setattr(objectives, "_draw_rows", lambda count, share: torch.tensor([False, True, False]))
    with torch.no_grad():
        model.policy.exit_bias.fill_(40.0)
    mixed = consistent_objective(weighted_sum_share=0.3, **options)(model, input_ids, mask, labels)
    monkeypatch.setattr(objectives, "_draw_rows", lambda count, share: torch.zeros(count, dtype=torch.bool))
    leaving = consistent_objective(weighted_sum_share=0.3, **options)(model, input_ids, mask, labels)
    torch.testing.assert_close(mixed.losses[1], weighted_sum.losses[1])
    torch.testing.assert_close(mixed.losses[[0, 2]], leaving.losses[[0, 2]])
    assert mixed.figures["accuracy"].isnan().tolist() == [False, True, False]


def test_every_row_has_its_share_of_being_drawn() -> None:
    torch.manual_seed(0)
    draws = torch.stack([objectives._draw_rows(5, 0.3) for _ in range(3000)]).float()
    assert set(draws.sum(1).tolist()) == {1.0, 2.0}
    torch.testing.assert_close(draws.mean(0), torch.full((5,), 0.3), atol=0.03, rtol=0)


@pytest.mark.parametrize("phase", ["full", "weighted_sum", "consistent"])
def test_gradient_reaches_what_the_phase_trains_and_nothing_else(phase: str) -> None:
    model, batch = tiny_exit_model(layers=3, exit_head="low_rank"), tiny_batch()
    objective = {
        "full": full_depth_objective(logit_rows=3),
        "weighted_sum": weighted_sum_objective(**{**WEIGHTED_SUM, "layers_per_step": 2}),
        "consistent": consistent_objective(weighted_sum_share=0.0, **WEIGHTED_SUM),
    }[phase]
    objective(model, *batch).losses.sum().backward()

    def moved(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())

    assert moved(model.backbone)
    assert moved(model.exit_heads) is (phase != "full")
    assert not moved(model.policy)
    assert not moved(model.confidence_classifier)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    model, batch = tiny_exit_model(layers=3), tiny_batch()
    found: list[Tensor] = []
    for checkpointed in (False, True):
        model.checkpoint_layers = checkpointed
        torch.manual_seed(0)
        losses = consistent_objective(weighted_sum_share=0.4, **WEIGHTED_SUM)(model, *batch).losses
        embeddings = dict(model.get_input_embeddings().named_parameters())["weight"]
        found.append(torch.autograd.grad(losses.sum(), embeddings)[0])
    torch.testing.assert_close(found[0], found[1])


def test_losses_of_exits_keep_the_tokens_order() -> None:
    model = tiny_exit_model(layers=3, exit_head="separate")
    torch.manual_seed(0)
    normed, labels = torch.randn(6, 32), torch.randint(0, 258, (6,))
    exit_layer = torch.tensor([3, 1, 2, 3, 1, 1])
    model.requires_grad_(False)
    losses, right = exit_token_losses(model, exit_layer, normed, labels, 2)
    for token in range(6):
        logits = model.exit_logits(int(exit_layer[token]) - 1, normed[token])
        assert float(losses[token]) == pytest.approx(
            float(functional.cross_entropy(logits, labels[token])), rel=1e-5
        )
        assert float(right[token]) == float(logits.argmax() == labels[token])
