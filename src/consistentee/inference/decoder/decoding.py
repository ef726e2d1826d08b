"""Decoding with real exits: one token per row and step, each exiting at its own layer.

Rows that exit make room at once, so that deeper layers cost what their survivors cost. The exit states of a step go
through the LM head together, and the keys and values of all layers that were skipped are computed together
(`state_propagation`). Finished sequences are taken out of the batch for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from consistentee.backbones.decoders import SLIDING
from consistentee.inference.decoder.exit_rules import FixedExitRule, TokenExitRule
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.inference.decoder.functional_decoder import Layer, Rotary, Step
from consistentee.inference.decoder.kv_cache import DecoderCache

COMPACT_BELOW = 0.75
"""The cache is copied once no more than this share of its rows still runs."""


class ShrinkingStep(Step, Protocol):
    """Attention of one token per row, of which fewer and fewer go on."""

    def keep(self, inside: Sequence[int], kept: Tensor) -> None:
        """Go on with these tokens of the step, which are the `kept` ones among those before."""
        ...


class PromptStep:
    """Attention of whole prompts, padded on the left: (rows * tokens) states, row by row.

    Args:
        cache: slots 0 to tokens - 1 are written.
        rows, tokens: sizes.
        rotary: angles of all tokens, by attention type.
        padding: (rows, tokens) bool, True for padding; None where there is none.
        window: of sliding layers.
    """

    def __init__(
        self,
        cache: DecoderCache,
        rows: int,
        tokens: int,
        rotary: dict[str, Rotary | None],
        padding: Tensor | None,
        window: int | None,
    ) -> None:
        self._cache, self._shape = cache, (rows, tokens)
        self._rotary, self._padding, self._window = rotary, padding, window
        self._biases: dict[str, Tensor | None] = {}

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of all tokens."""
        return self._rotary[layer_type]

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each token sees itself and what is before it in its row."""
        rows, tokens = self._shape
        keys = key.reshape(rows, tokens, *key.shape[1:]).transpose(1, 2)
        values = value.reshape(rows, tokens, *value.shape[1:]).transpose(1, 2)
        self._cache.keys[layer.index][:, :, :tokens] = keys
        self._cache.values[layer.index][:, :, :tokens] = values
        query = query.reshape(rows, tokens, *query.shape[1:])
        bias = self._bias(layer.layer_type, query)
        if bias is None and layer.softcap is None:
            return layer.causal_attention(query, keys, values)
        if bias is None:
            bias = self._mask(query, None)
        return layer.attention(query, keys, values, bias)

    def _bias(self, layer_type: str, like: Tensor) -> Tensor | None:
        if layer_type not in self._biases:
            window = self._window if layer_type == SLIDING else None
            if window is not None and window >= self._shape[1]:
                window = None
            is_causal = self._padding is None and window is None
            self._biases[layer_type] = None if is_causal else self._mask(like, window)
        return self._biases[layer_type]

    def _mask(self, like: Tensor, window: int | None) -> Tensor:
        rows, tokens = self._shape
        slots = torch.arange(tokens, device=like.device)
        hidden = slots[None, :] > slots[:, None]  # (tokens, slots)
        if window is not None:
            hidden = hidden | (slots[None, :] <= slots[:, None] - window)
        hidden = hidden.expand(rows, tokens, tokens)
        if self._padding is not None:
            hidden = hidden | self._padding[:, None, :]
        # Not minus infinity: padding sees nothing at all, and must not become NaN.
        return torch.zeros(rows, tokens, tokens, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, torch.finfo(like.dtype).min
        )


class TokenStep:
    """Attention of one token per row, all at the same slot.

    Args:
        cache: where keys and values lie.
        slot: of these tokens.
        rows: rows of the cache that take part, in order; None for all.
        rotary: angles, by attention type: one for all tokens, or one each.
        bias: (rows of the cache, slots up to this one), what padding adds to scores; None where there is none.
        window: of sliding layers.
    """

    def __init__(
        self,
        cache: DecoderCache,
        slot: int,
        rows: Tensor | None,
        rotary: dict[str, Rotary | None],
        bias: Tensor | None,
        window: int | None,
    ) -> None:
        self._cache, self._slot, self._window = cache, slot, window
        self._rotary, self._whole_bias, self._all_rows = rotary, bias, rows
        self._take(rows)

    def keep(self, inside: Sequence[int], kept: Tensor) -> None:
        """Go on with these tokens of the step, which are the `kept` ones among those before."""
        rows = torch.tensor(list(inside), device=kept.device)
        self._take(rows if self._all_rows is None else self._all_rows[rows])
        self._rotary = kept_rotary(self._rotary, kept)

    def _take(self, rows: Tensor | None) -> None:
        self._rows = rows
        self._row = int(rows[0]) if rows is not None and len(rows) == 1 else None
        bias = self._whole_bias
        self._bias = bias if bias is None or rows is None else bias[rows]

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of the tokens that have not exited."""
        return self._rotary[layer_type]

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the tokens' keys and values, and let each see its row."""
        keys, values, slot = self._cache.keys[layer.index], self._cache.values[layer.index], self._slot
        first = 0
        if self._window is not None and layer.layer_type == SLIDING:
            first = max(0, slot + 1 - self._window)
        seen = slot + 1 - first
        if self._rows is None:
            keys.select(2, slot).copy_(key)
            values.select(2, slot).copy_(value)
            keys, values = keys.narrow(2, first, seen), values.narrow(2, first, seen)
        elif self._row is not None:
            keys, values = keys.narrow(0, self._row, 1), values.narrow(0, self._row, 1)
            keys.select(2, slot).copy_(key)
            values.select(2, slot).copy_(value)
            keys, values = keys.narrow(2, first, seen), values.narrow(2, first, seen)
        else:
            keys.select(2, slot).index_copy_(0, self._rows, key)
            values.select(2, slot).index_copy_(0, self._rows, value)
            keys = keys.narrow(2, first, seen).index_select(0, self._rows)
            values = values.narrow(2, first, seen).index_select(0, self._rows)
        bias = None if self._bias is None else self._bias[:, None, first:]
        return layer.attention(query.unsqueeze(1), keys, values, bias)


class Decoding:
    """A batch being decoded: prompts go in, then one token per row and step.

    Args:
        weights: of the model.
        rule: when tokens exit.
        attention_mask: (rows, tokens) of the prompts, padding on the left.
        capacity: slots to begin with, prompt and new tokens.
        full_depth_first_token: take the first token from the last layer, which the prompt went through in any case.
    """

    def __init__(
        self,
        weights: ExitWeights,
        rule: TokenExitRule,
        attention_mask: Tensor,
        capacity: int,
        *,
        full_depth_first_token: bool,
    ) -> None:
        self._weights, self._rule = weights, rule
        self._full_depth_first_token = full_depth_first_token
        self.cache = weights.new_cache(len(attention_mask), capacity)
        self._rows = list(range(len(attention_mask)))  # of the batch, by position among those still running
        self._cache_rows: Tensor | None = None  # None: all, in order
        self._slot = 0
        self._generated = 0
        padding = attention_mask == 0
        self._least_padding = int(padding.sum(1).min()) if len(padding) else 0
        self._padding_counts = padding.sum(1) if bool(padding.any()) else None  # (rows of the cache,)
        self._prompt_padding = padding if self._padding_counts is not None else None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._weights.num_layers

    def prefill(self, input_ids: Tensor, more: int = 0) -> tuple[Tensor, list[int]]:
        """Run the prompts through all layers: (rows, tokens) -> as `step`.

        Args:
            input_ids: (rows, tokens), padding on the left.
            more: tokens of the prompts that come in steps behind these.
        """
        rows, tokens = input_ids.shape
        whole = tokens + more - self._least_padding
        held_back = 0 if self._full_depth_first_token or tokens == 1 else 1
        if not self._full_depth_first_token and tokens == 1:
            return self.step(input_ids[:, 0])
        length = tokens - held_back
        padding = None if self._prompt_padding is None else self._prompt_padding[:, :length]
        if padding is None:
            positions = torch.arange(length, device=input_ids.device)
            rotary = self._weights.decoder.rotary(positions, whole)
            rotary = {
                layer_type: None
                if table is None
                else (table[0].repeat(rows, 1, 1), table[1].repeat(rows, 1, 1))
                for layer_type, table in rotary.items()
            }
            flat_positions = positions.repeat(rows)
        else:
            flat_positions = ((~padding).long().cumsum(1) - 1).clamp_min(0).flatten()
            rotary = self._weights.decoder.rotary(flat_positions, whole)
        window = self._weights.decoder.sliding_window
        self.cache.reserve(length)
        step = PromptStep(self.cache, rows, length, rotary, padding, window)
        decoder = self._weights.decoder
        hidden = decoder.embed(input_ids[:, :length].flatten(), flat_positions)
        for layer in decoder.layers:
            hidden = layer(hidden, decoder.unit_norm(hidden), step)
        self._slot = length
        if held_back:
            return self.step(input_ids[:, -1])
        self._generated = 1
        newest = hidden.view(rows, length, -1)[:, -1]
        normed = self._weights.normed(self.num_layers - 1, decoder.unit_norm(newest))
        return normed, [self.num_layers] * rows

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """Run one token of every row that is still running.

        Args:
            tokens: (rows still running,) int64.

        Returns:
            States behind the exits' norms, (rows, hidden), which the head turns into the next tokens, and the layers
            at which they exited, 1-based.
        """
        weights, decoder, rule, slot = self._weights, self._weights.decoder, self._rule, self._slot
        count = len(tokens)
        if isinstance(rule, FixedExitRule):
            rule.begin(self._generated, self._rows)
        self.cache.reserve(slot + 1)
        positions, rotary, bias = self._positions(slot, count, self._cache_rows)
        step = TokenStep(self.cache, slot, self._cache_rows, rotary, bias, decoder.sliding_window)
        states, normed, exit_layers = run_with_exits(weights, rule, decoder.embed(tokens, positions), step)
        self._slot, self._generated = slot + 1, self._generated + 1
        self._propagate_states(states, exit_layers, slot, rotary)
        return normed, exit_layers

    def full_step(self, tokens: Tensor, slot: int, cache_rows: Tensor | None) -> Tensor:
        """Run one token per row through all layers.

        Args:
            tokens: (rows,) int64.
            slot: where they all stand; the cache has room for it.
            cache_rows: their rows of the cache; None for all, in order.

        Returns:
            (rows, hidden), states behind the last norm.
        """
        decoder = self._weights.decoder
        positions, rotary, bias = self._positions(slot, len(tokens), cache_rows)
        step = TokenStep(self.cache, slot, cache_rows, rotary, bias, decoder.sliding_window)
        hidden = decoder.embed(tokens, positions)
        for layer in decoder.layers:
            hidden = layer(hidden, decoder.unit_norm(hidden), step)
        return self._weights.normed(self.num_layers - 1, decoder.unit_norm(hidden))

    def keep(self, running: Sequence[int]) -> None:
        """Go on with these rows, by position among those still running; the others have finished."""
        if len(running) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in running]
        kept = torch.tensor(list(running), device=self._weights.decoder.device)
        self._cache_rows = kept if self._cache_rows is None else self._cache_rows[kept]
        if len(self._rows) <= COMPACT_BELOW * self.cache.storage.shape[2]:
            self.cache.keep(self._cache_rows)
            if self._padding_counts is not None:
                self._padding_counts = self._padding_counts[self._cache_rows]
            self._cache_rows = None

    def _positions(
        self, slot: int, count: int, cache_rows: Tensor | None
    ) -> tuple[Tensor, dict[str, Rotary | None], Tensor | None]:
        """Positions and angles of the running rows' tokens, and the bias of all rows of the cache, at a slot."""
        decoder = self._weights.decoder
        if self._padding_counts is None:
            position = torch.full((1,), slot, device=decoder.device)
            return position.expand(count), decoder.rotary(position, slot + 1), None
        counts = self._padding_counts
        slots = torch.arange(slot + 1, device=decoder.device)
        bias = torch.zeros(len(counts), slot + 1, dtype=decoder.dtype, device=decoder.device)
        bias.masked_fill_(slots[None] < counts[:, None], torch.finfo(decoder.dtype).min)
        positions = slot - (counts if cache_rows is None else counts[cache_rows])
        return positions, decoder.rotary(positions, slot + 1 - self._least_padding), bias

    def _propagate_states(
        self, states: Tensor, exit_layers: list[int], slot: int, rotary: dict[str, Rotary | None]
    ) -> None:
        if min(exit_layers) == self.num_layers:
            return
        device, count = states.device, len(states)
        rows = torch.arange(count, device=device) if self._cache_rows is None else self._cache_rows
        self._weights.state_propagation.write(
            self.cache,
            states,
            torch.tensor(exit_layers, device=device),
            rows=rows,
            slots=torch.full((count,), slot, device=device),
            rotary=rotary,
        )


def run_with_exits(
    weights: ExitWeights, rule: TokenExitRule, embedded: Tensor, step: ShrinkingStep
) -> tuple[Tensor, Tensor, list[int]]:
    """Run tokens through the layers until each has exited.

    Args:
        weights: of the model.
        rule: when they exit.
        embedded: (tokens, hidden), before the first layer.
        step: what they attend to; it is told who goes on.

    Returns:
        Hidden states at the exits, (tokens, hidden); the same behind the exits' norms; and the layers, 1-based.
    """
    decoder, last, count = weights.decoder, weights.num_layers, len(embedded)
    projections = weights.projections(rule)
    before = hidden = embedded
    inside = list(range(count))  # positions among the tokens
    exit_layers = [last] * count
    exited: list[tuple[list[int], Tensor, Tensor]] = []  # tokens, hidden and normed states
    for index, layer in enumerate(decoder.layers):
        unit = decoder.unit_norm(hidden)
        asks = index > 0 and rule.may_exit(index - 1)
        reads = asks and rule.feature_map(index - 1) is not None
        exits: list[bool] = []
        qkv: Tensor | None = None
        if reads:
            qkv = projections[index](unit)
            exits = rule.decide(index - 1, qkv[:, layer.qkv_width :])
        elif asks:
            normed = weights.normed(index - 1, unit) if rule.needs_normed else None
            exits = rule.exits(index - 1, before, hidden, normed)
        if True in exits:
            exiting = [token for token, exits_here in enumerate(exits) if exits_here]
            for token in exiting:
                exit_layers[inside[token]] = index
            if len(exiting) == len(inside):
                exited.append((inside, hidden, weights.normed(index - 1, unit)))
                inside = []
                break
            index_of = torch.tensor(exiting, device=hidden.device)
            normed = weights.normed(index - 1, unit[index_of])
            exited.append(([inside[token] for token in exiting], hidden[index_of], normed))
            stay = [token for token, exits_here in enumerate(exits) if not exits_here]
            inside = [inside[token] for token in stay]
            staying = torch.tensor(stay, device=hidden.device)
            hidden, unit = hidden[staying], unit[staying]
            qkv = None if qkv is None else qkv[staying]
            step.keep(inside, staying)
        if qkv is None:
            qkv = projections[index](unit)
        before, hidden = hidden, layer.finish(hidden, qkv[:, : layer.qkv_width], step)
    if inside:
        exited.append((inside, hidden, weights.normed(last - 1, decoder.unit_norm(hidden))))
    states, normed = _in_order(exited, count)
    return states, normed, exit_layers


def kept_rotary(rotary: dict[str, Rotary | None], kept: Tensor) -> dict[str, Rotary | None]:
    """The angles of the kept tokens; a table of one entry is for all."""
    return {
        layer_type: table if table is None or len(table[0]) == 1 else (table[0][kept], table[1][kept])
        for layer_type, table in rotary.items()
    }


def _in_order(exited: list[tuple[list[int], Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Hidden and normed states of all tokens, in their order."""
    if len(exited) == 1:
        return exited[0][1], exited[0][2]
    order = torch.tensor([token for tokens, _, _ in exited for token in tokens], device=exited[0][1].device)
    back = torch.empty_like(order)
    back[order] = torch.arange(count, device=order.device)
    return torch.cat([states for _, states, _ in exited])[back], torch.cat(
        [normed for _, _, normed in exited]
    )[back]
