"""What each phase learns: losses of response tokens at exits, computed inside `EarlyExitForCausalLM.forward`.

An objective is called as `objective(model, input_ids, attention_mask, labels)` and gives `ObjectiveOutput`. The state
of a token is what predicts the next one, so a label belongs to the position before it.

Logits are what takes the memory of a language model's training: tokens x vocabulary, here times layers. They are made a
few rows at a time inside `torch.utils.checkpoint`, and made again in the backward pass; never are those of more than
`logit_rows` (token, layer) pairs held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from consistentee.backbones import decoders
from consistentee.data.batches import IGNORED
from consistentee.models.causal_lm import EarlyExitForCausalLM


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective gives.

    Attributes:
        losses: (batch,), mean over the row's response tokens; 0 for a row without any. Weighted by the rows' numbers of
            response tokens they give the mean over all response tokens of a batch.
        figures: further means over each row's response tokens, (batch,) each and without gradient, to be shown; NaN for
            a row that has none.
    """

    losses: Tensor
    figures: dict[str, Tensor]


TokenObjective = Callable[[EarlyExitForCausalLM, Tensor, Tensor | None, Tensor], ObjectiveOutput]


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a batch, flat.

    Attributes:
        rows, positions: (tokens,), where the states lie that predict them.
        labels: (tokens,), the tokens.
        counts: (batch,), tokens of every row.
    """

    rows: Tensor
    positions: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> ResponseTokens:
        """Those of labels (batch, tokens), IGNORED where nothing is to be learnt."""
        learnt = labels[:, 1:] != IGNORED
        rows, positions = learnt.nonzero(as_tuple=True)
        return cls(rows, positions, labels[rows, positions + 1], learnt.sum(1))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which: Tensor) -> ResponseTokens:
        """Some of the tokens, by a mask (tokens,); `counts` stay those of whole rows."""
        return ResponseTokens(self.rows[which], self.positions[which], self.labels[which], self.counts)

    def take(self, states: Tensor) -> Tensor:
        """Their states, (batch, tokens, hidden) -> (tokens, hidden)."""
        return states[self.rows, self.positions]

    def row_means(self, values: Tensor) -> Tensor:
        """Mean of values (tokens,) over each row's tokens, (batch,)."""
        sums = torch.zeros(len(self.counts), dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.rows, values) / self.counts.clamp_min(1)


def response_counts(lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
    """How many tokens of each row an objective learns, (rows,): those of the response that have one before them."""
    return lengths - prompt_lengths.clamp_min(1)


def chunked_cross_entropy(
    logits_of: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor, logit_rows: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token without holding all logits, in either direction.

    Args:
        logits_of: (rows, hidden) -> (rows, vocabulary).
        states: (tokens, hidden).
        labels: (tokens,), int64.
        logit_rows: rows of logits at once.

    Returns:
        Losses, (tokens,) float32, and whether the likeliest token is the label, (tokens,) float32.
    """

    def of_chunk(chunk: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(chunk)
        losses = functional.cross_entropy(logits.float(), target, reduction="none")
        return losses, (logits.detach().argmax(-1) == target).float()

    losses: list[Tensor] = [states.new_zeros(0, dtype=torch.float32)]
    right: list[Tensor] = [states.new_zeros(0, dtype=torch.float32)]
    for chunk, target in zip(states.split(logit_rows), labels.split(logit_rows), strict=True):
        if len(chunk) == 0:
            continue
        if torch.is_grad_enabled():
            # Heads draw no random numbers, so none need be kept for the second time.
            part = checkpoint(of_chunk, chunk, target, use_reentrant=False, preserve_rng_state=False)
        else:
            part = of_chunk(chunk, target)
        losses.append(part[0])
        right.append(part[1])
    return torch.cat(losses), torch.cat(right)


def layer_token_losses(
    model: EarlyExitForCausalLM, layer_index: int, states: Tensor, labels: Tensor, logit_rows: int
) -> tuple[Tensor, Tensor]:
    """Losses of tokens at one layer's exit, from states before its norm, and whether they are right, (tokens,) each."""

    def logits_of(chunk: Tensor) -> Tensor:
        return model.exit_logits(layer_index, model.exit_norm(layer_index, chunk))

    return chunked_cross_entropy(logits_of, states, labels, logit_rows)


def exit_token_losses(
    model: EarlyExitForCausalLM, exit_layer: Tensor, normed: Tensor, labels: Tensor, logit_rows: int
) -> tuple[Tensor, Tensor]:
    """Losses of tokens each at its own exit, and whether they are right.

    Args:
        model: the model.
        exit_layer: (tokens,), 1-based.
        normed: (tokens, hidden), states behind the norms of those exits.
        labels: (tokens,), int64.
        logit_rows: rows of logits at once.

    Returns:
        (tokens,) float32 each.
    """
    last = model.num_layers - 1
    heads = model.exit_heads
    if heads.kind == "shared":
        return chunked_cross_entropy(partial(model.exit_logits, last), normed, labels, logit_rows)
    places = [(exit_layer == index + 1).nonzero().squeeze(1) for index in range(model.num_layers)]
    if heads.head_is_shared:  # adapters layer by layer, then one head for all; the last layer has no adapter
        parts = [heads.adapted(index, normed[place]) for index, place in enumerate(places)]
        adapted = torch.cat(parts)[torch.cat(places).argsort()]
        return chunked_cross_entropy(partial(model.exit_logits, last), adapted, labels, logit_rows)
    results = [
        chunked_cross_entropy(partial(model.exit_logits, index), normed[place], labels[place], logit_rows)
        for index, place in enumerate(places)
    ]
    order = torch.cat(places).argsort()
    return torch.cat([loss for loss, _ in results])[order], torch.cat([right for _, right in results])[order]


def draw_layers(num_layers: int, layers_per_step: int) -> dict[int, float]:
    """Layers below the last, and weights with which their losses estimate the mean weighted by layer number.

    Systematic sampling: points one `layers_per_step`-th apart, from a random start, on the cumulated layer numbers. A
    layer is hit with probability proportional to its number, and the hits are spread over the depth. Where there are no
    more layers than that, all are taken with their exact weights.

    Args:
        num_layers: layers, the last among them.
        layers_per_step: points.

    Returns:
        Layer index (0-based) -> weight; the weights sum to one. Drawn with torch's own generator.
    """
    numbers = torch.arange(1, num_layers, dtype=torch.float64)
    if len(numbers) == 0:
        return {}
    shares = numbers / numbers.sum()
    if layers_per_step >= len(numbers):
        return dict(enumerate(shares.tolist()))
    points = (torch.arange(layers_per_step) + torch.rand((), dtype=torch.float64)) / layers_per_step
    ends = shares.cumsum(0)
    hits = torch.searchsorted(ends, points, right=True).clamp_max(len(numbers) - 1).tolist()
    return {index: hits.count(index) / layers_per_step for index in dict.fromkeys(hits)}


def full_depth_objective(*, logit_rows: int) -> TokenObjective:
    """The last layer's loss alone: plain fine-tuning.

    Args:
        logit_rows: rows of logits at once.
    """

    def objective(
        model: EarlyExitForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        tokens = ResponseTokens.of(labels)
        state = decoders.decoder_state(model.backbone, input_ids, attention_mask)
        for index in range(model.num_layers):
            state.hidden_states = decoders.run_decoder_layer(
                model.backbone, index, state, checkpointed=model.checkpoint_layers
            )
        losses, right = layer_token_losses(
            model, model.num_layers - 1, tokens.take(state.hidden_states), tokens.labels, logit_rows
        )
        return ObjectiveOutput(tokens.row_means(losses), {"accuracy": tokens.row_means(right)})

    return objective


def weighted_sum_objective(
    *, layers_per_step: int, last_layer_share: float, logit_rows: int
) -> TokenObjective:
    """Every exit learns every token, deeper ones more: an unbiased estimate of a layer-weighted sum of losses.

    The sum is `last_layer_share * CE_L + (1 - last_layer_share) * sum_{t<L} t * CE_t / sum_{t<L} t`, the estimate
    comes from the last layer and a few drawn ones (`draw_layers`): all heads at every step would cost several times
    the model.

    Args:
        layers_per_step: layers drawn.
        last_layer_share: weight of the last layer. By number it would be 2 / (L + 1), a fifteenth of the whole in a
            model of 30 layers, too little to keep up the layer that all exits are measured against.
        logit_rows: rows of logits at once.

    Source: ConsistentEE (arXiv:2312.11882), initialisation: weights proportional to the layer number. Differences: the
    last layer's share, and the estimate.
    """

    def objective(
        model: EarlyExitForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        tokens = ResponseTokens.of(labels)
        last = model.num_layers - 1
        drawn = draw_layers(model.num_layers, layers_per_step)
        weights = {index: (1 - last_layer_share) * weight for index, weight in drawn.items()}
        weights[last] = last_layer_share if drawn else 1.0
        total: Tensor | float = 0.0
        right = torch.zeros(())
        state = decoders.decoder_state(model.backbone, input_ids, attention_mask)
        for index in range(model.num_layers):
            state.hidden_states = decoders.run_decoder_layer(
                model.backbone, index, state, checkpointed=model.checkpoint_layers
            )
            if index in weights:
                losses, right = layer_token_losses(
                    model, index, tokens.take(state.hidden_states), tokens.labels, logit_rows
                )
                total = total + weights[index] * losses
        figures = {"accuracy": tokens.row_means(right)}
        return ObjectiveOutput(tokens.row_means(torch.as_tensor(total)), figures)

    return objective


def consistent_objective(
    *, weighted_sum_share: float, layers_per_step: int, last_layer_share: float, logit_rows: int
) -> TokenObjective:
    """A token's loss comes from where it exits, and later tokens attend to what an exit there leaves behind.

    Exits are drawn from the policy, layer by layer with its exit probabilities, without gradient to it. Tokens that
    have exited keep their state through the deeper layers, as in decoding. One head row per token.

    A share of the texts, drawn anew at each step, runs without exits instead and learns the weighted sum. In
    expectation that is `weighted_sum_share` times that loss plus the rest times the consistent one, for one pass.

    Args:
        weighted_sum_share: probability with which a text learns the weighted sum.
        layers_per_step, last_layer_share: of the weighted sum, see `weighted_sum_objective`.
        logit_rows: rows of logits at once.

    Source: ConsistentEE (arXiv:2312.11882), training objective. Difference: the weighted sum mixed in.
    """

    def objective(
        model: EarlyExitForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        tokens = ResponseTokens.of(labels)
        plain_rows = _draw_rows(len(labels), weighted_sum_share).to(labels.device)  # (batch,) bool
        is_plain = plain_rows[tokens.rows]
        plain, exiting = tokens.select(is_plain), tokens.select(~is_plain)
        drawn = draw_layers(model.num_layers, layers_per_step) if bool(plain_rows.any()) else {}
        plain_losses = torch.zeros(len(plain), device=labels.device)

        def decide(layer_index: int, before: Tensor, after: Tensor, normed: Tensor) -> Tensor:
            nonlocal plain_losses
            if layer_index in drawn:  # texts without exits have the full model's states here
                losses, _ = layer_token_losses(
                    model, layer_index, plain.take(after), plain.labels, logit_rows
                )
                plain_losses = plain_losses + (1 - last_layer_share) * drawn[layer_index] * losses
            if layer_index + 1 < model.config.min_exit_layer:
                return torch.zeros_like(may_leave)
            with torch.no_grad():
                flat = normed.detach().flatten(0, 1)[:, None]  # (batch * tokens, 1, hidden)
                exit_probs = model.policy(flat, None, layer_index).sigmoid().view(labels.shape)
            return torch.rand_like(exit_probs) < exit_probs

        may_leave = leaving_positions(labels, model.config.full_depth_first_token) & ~plain_rows[:, None]
        normed, exit_layer = model.exit_pass(input_ids, attention_mask, may_leave, decide)
        layer = tokens.take(exit_layer[..., None]).squeeze(1)  # of every response token
        losses, right = exit_token_losses(model, layer, tokens.take(normed), tokens.labels, logit_rows)
        at_last = last_layer_share if drawn else 1.0
        at_exit = losses
        if len(plain):
            weight = torch.where(is_plain, at_last, 1.0)
            losses = (weight * losses).index_add(0, is_plain.nonzero().squeeze(1), plain_losses)
        missing = torch.where(plain_rows, math.nan, 0.0)
        figures = {
            "exit_layer": exiting.row_means(layer[~is_plain].float()) + missing,
            "accuracy": exiting.row_means(right[~is_plain]) + missing,
            "reward": -exiting.row_means(at_exit.detach()[~is_plain]) + missing,
        }
        return ObjectiveOutput(tokens.row_means(losses), figures)

    return objective


def leaving_positions(labels: Tensor, full_depth_first_token: bool) -> Tensor:
    """Positions at which decoding lets a token exit, (batch, tokens) bool: those that predict one of the response.

    Args:
        labels: (batch, tokens), IGNORED where nothing is to be learnt.
        full_depth_first_token: whether the first token of the response comes from the last layer, which the prompt went
            through in any case.
    """
    predicts = functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    if full_depth_first_token:
        predicts = predicts & (predicts.long().cumsum(1) > 1)
    return predicts


def _draw_rows(count: int, share: float) -> Tensor:
    """Rows, each drawn with probability `share`, as evenly many as that allows, (count,) bool."""
    number = math.floor(share * count + float(torch.rand(())))
    return torch.randperm(count) < number
