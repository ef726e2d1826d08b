"""Decoding with real exits: one token per row and step, each leaving at its own layer.

Rows that leave make room at once, so that deeper layers cost what their survivors cost. The exit states of a step go
through the LM head together, and the keys and values of all layers that were skipped are computed together
(`skipped.SkippedKeysValues`). Finished sequences leave the batch for good.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consistentee.backbones import decoders
from consistentee.backbones.decoders import SLIDING
from consistentee.heads.exit_heads import ExitHeads
from consistentee.inference.decoder.exit_rules import ExitRule, FixedExitRule
from consistentee.inference.decoder.functional_decoder import (
    Affine,
    Layer,
    Map,
    PackedDecoder,
    Rotary,
    affine_norm,
    weight_signature,
)
from consistentee.inference.decoder.kv_cache import DecoderCache
from consistentee.inference.decoder.screened_argmax import GreedyHead
from consistentee.inference.decoder.state_propagation import SkippedKeysValues

COMPACT_BELOW = 0.75
"""The cache is copied once no more than this share of its rows still runs."""


class ExitWeights:
    """A model's weights, laid out for decoding.

    Args:
        model: an `EarlyExitForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = PackedDecoder(model.backbone)
        self.heads: ExitHeads = model.exit_heads
        kind = self.decoder.norm_kind
        norms = [*self.heads.norms, decoders.final_norm(model.backbone)]
        self._norms = [affine_norm(norm, kind) for norm in norms]
        self._projections: dict[str, list[Map]] = {}
        self._skipped: SkippedKeysValues | None = None
        self._greedy_head: GreedyHead | None = None
        self.draft_clocks: dict[Hashable, Any] = {}
        """What lossless decoding learnt about its speed, by how it was asked to draft; gone when the weights change."""

    def signature(self) -> tuple[Any, ...]:
        """Tells whether these are still the model's weights, see `weight_signature`."""
        return weight_signature(self.model, _copied_weights(self.model))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._norms)

    def normed(self, layer_index: int, unit: Tensor) -> Tensor:
        """States behind the norm of a layer's exit, from those behind `unit_norm`: (tokens, hidden)."""
        factor, shift = self._norms[layer_index]
        return unit * factor if shift is None else torch.addcmul(shift, unit, factor)

    def projections(self, rule: ExitRule) -> list[Map]:
        """Every layer's projection, with what the rule reads of the state before it."""
        if rule.name not in self._projections:
            readers = [self._unit_readers(rule, index) for index in range(self.num_layers - 1)]
            self._projections[rule.name] = self.decoder.fused([None, *readers])
        return self._projections[rule.name]

    def _unit_readers(self, rule: ExitRule, layer_index: int) -> Affine | None:
        """A rule's map of normed states as a map of states behind `unit_norm`."""
        readers = rule.feature_map(layer_index)
        if readers is None:
            return None
        (weight, bias), (factor, shift) = readers, self._norms[layer_index]
        bias = bias if shift is None else bias + (weight.float() @ shift.float()).to(bias.dtype)
        return (weight.float() * factor.float()).to(weight.dtype), bias

    @property
    def skipped(self) -> SkippedKeysValues:
        """Stacked key and value projections, made when first needed."""
        if self._skipped is None:
            self._skipped = SkippedKeysValues(self.model.backbone)
        return self._skipped

    def new_cache(self, rows: int, capacity: int) -> DecoderCache:
        """An empty cache."""
        layer = self.decoder.layers[0]
        return DecoderCache(
            num_layers=len(self.decoder.layers),
            rows=rows,
            num_key_value_heads=layer.num_key_value_heads,
            head_size=layer.head_size,
            capacity=capacity,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )

    def greedy(self, normed: Tensor, exit_layers: Sequence[int]) -> Tensor:
        """The most probable token of each exit, (tokens,); arguments as in `logits`."""
        if not self.heads.head_is_shared:
            return self.logits(normed, exit_layers).argmax(-1)
        if self._greedy_head is None:
            backbone = self.model.backbone
            self._greedy_head = GreedyHead(
                decoders.lm_head(backbone), lambda logits: decoders.soften_logits(backbone, logits)
            )
        if self.heads.kind == "low_rank":
            normed = self._each_layer(normed, exit_layers, self.heads.adapted)
        return self._greedy_head(normed)

    def logits(self, normed: Tensor, exit_layers: Sequence[int]) -> Tensor:
        """Logits of exits at any layers: (tokens, hidden) normed states and their 1-based layers -> (tokens, words).

        A `shared` head reads all tokens at once, `separate` ones are read layer by layer.
        """
        if self.heads.kind == "shared":
            return self.model.exit_logits(self.num_layers - 1, normed)
        if self.heads.kind == "low_rank":
            normed = self._each_layer(normed, exit_layers, self.heads.adapted)
            return self.model.exit_logits(self.num_layers - 1, normed)
        return self._each_layer(normed, exit_layers, self.model.exit_logits)

    @staticmethod
    def _each_layer(normed: Tensor, exit_layers: Sequence[int], run: Any) -> Tensor:
        distinct = set(exit_layers)
        if len(distinct) == 1:
            return run(distinct.pop() - 1, normed)
        layers = torch.tensor(exit_layers, device=normed.device)
        places = [(layers == layer).nonzero().squeeze(1) for layer in sorted(distinct)]
        parts = [run(layer - 1, normed[place]) for layer, place in zip(sorted(distinct), places, strict=True)]
        return torch.cat(parts)[torch.cat(places).argsort()]


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
            plain = self._padding is None and window is None
            self._biases[layer_type] = None if plain else self._mask(like, window)
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
        self._rotary, self._whole_bias = rotary, bias
        self.keep(rows, None)

    def keep(self, rows: Tensor | None, kept: Tensor | None) -> None:
        """Go on with these rows of the cache, the `kept` ones among those before; None for all."""
        self._rows = rows
        self._row = int(rows[0]) if rows is not None and len(rows) == 1 else None
        bias = self._whole_bias
        self._bias = bias if bias is None or rows is None else bias[rows]
        if kept is not None:
            self._rotary = {
                kind: table if table is None or len(table[0]) == 1 else (table[0][kept], table[1][kept])
                for kind, table in self._rotary.items()
            }

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of the tokens that are still inside."""
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
    """A batch on its way: prompts go in, then one token per row and step.

    Args:
        weights: of the model.
        rule: when tokens leave.
        attention_mask: (rows, tokens) of the prompts, padding on the left.
        capacity: slots to begin with, prompt and new tokens.
        full_depth_first_token: take the first token from the last layer, which the prompt went through in any case.
    """

    def __init__(
        self,
        weights: ExitWeights,
        rule: ExitRule,
        attention_mask: Tensor,
        capacity: int,
        *,
        full_depth_first_token: bool,
    ) -> None:
        self._weights, self._rule = weights, rule
        self._full_depth_first_token = full_depth_first_token
        self.cache = weights.new_cache(len(attention_mask), capacity)
        self._rows = list(range(len(attention_mask)))  # of the batch, by position among those still running
        self._places: Tensor | None = None  # their rows in the cache; None: all, in order
        self._slot = 0
        self._generated = 0
        padding = attention_mask == 0
        self._least_padding = int(padding.sum(1).min())
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
                kind: None if table is None else (table[0].repeat(rows, 1, 1), table[1].repeat(rows, 1, 1))
                for kind, table in rotary.items()
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
            at which they left, 1-based.
        """
        weights, decoder, rule, slot = self._weights, self._weights.decoder, self._rule, self._slot
        count = len(tokens)
        if isinstance(rule, FixedExitRule):
            rule.begin(self._generated, self._rows)
        self.cache.reserve(slot + 1)
        positions, rotary, bias = self._placing(slot, count, self._places)
        step = TokenStep(self.cache, slot, self._places, rotary, bias, decoder.sliding_window)
        projections = weights.projections(rule)
        before = hidden = decoder.embed(tokens, positions)
        inside = list(range(count))  # positions among the tokens
        exit_layers = [self.num_layers] * count
        left: list[tuple[list[int], Tensor, Tensor]] = []  # tokens, hidden and normed states
        for index, layer in enumerate(decoder.layers):
            unit = decoder.unit_norm(hidden)
            looks = index > 0 and rule.may_exit(index - 1)
            reads = looks and rule.feature_map(index - 1) is not None
            going: list[bool] = []
            qkv: Tensor | None = None
            if reads:
                qkv = projections[index](unit)
                going = rule.decide(index - 1, qkv[:, layer.qkv_width :])
            elif looks:
                normed = weights.normed(index - 1, unit) if rule.needs_normed else None
                going = rule.exits(index - 1, before, hidden, normed)
            if True in going:
                out = [place for place, goes in enumerate(going) if goes]
                for place in out:
                    exit_layers[inside[place]] = index
                if len(out) == len(inside):
                    left.append((inside, hidden, weights.normed(index - 1, unit)))
                    inside = []
                    break
                leaving = torch.tensor(out, device=hidden.device)
                exits = weights.normed(index - 1, unit[leaving])
                left.append(([inside[place] for place in out], hidden[leaving], exits))
                stay = [place for place, goes in enumerate(going) if not goes]
                inside = [inside[place] for place in stay]
                staying = torch.tensor(stay, device=hidden.device)
                hidden, unit = hidden[staying], unit[staying]
                qkv = None if qkv is None else qkv[staying]
                places = torch.tensor(inside, device=hidden.device)
                step.keep(places if self._places is None else self._places[places], staying)
            if qkv is None:
                qkv = projections[index](unit)
            before, hidden = hidden, layer.finish(hidden, qkv[:, : layer.qkv_width], step)
        if inside:
            left.append((inside, hidden, weights.normed(self.num_layers - 1, decoder.unit_norm(hidden))))
        self._slot, self._generated = slot + 1, self._generated + 1
        states, normed = _in_order(left, count)
        self._fill_skipped(states, exit_layers, slot, rotary)
        return normed, exit_layers

    def full_step(self, tokens: Tensor, slot: int, places: Tensor | None) -> Tensor:
        """Run one token per row through all layers.

        Args:
            tokens: (rows,) int64.
            slot: where they all stand; the cache has room for it.
            places: their rows of the cache; None for all, in order.

        Returns:
            (rows, hidden), states behind the last norm.
        """
        decoder = self._weights.decoder
        positions, rotary, bias = self._placing(slot, len(tokens), places)
        step = TokenStep(self.cache, slot, places, rotary, bias, decoder.sliding_window)
        hidden = decoder.embed(tokens, positions)
        for layer in decoder.layers:
            hidden = layer(hidden, decoder.unit_norm(hidden), step)
        return self._weights.normed(self.num_layers - 1, decoder.unit_norm(hidden))

    def keep(self, running: Sequence[int]) -> None:
        """Go on with these rows, by position among those still running; the others have finished."""
        if len(running) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in running]
        kept = torch.tensor(list(running), device=self._weights.decoder.device)
        self._places = kept if self._places is None else self._places[kept]
        if len(self._rows) <= COMPACT_BELOW * self.cache.storage.shape[2]:
            self.cache.keep(self._places)
            if self._padding_counts is not None:
                self._padding_counts = self._padding_counts[self._places]
            self._places = None

    def _placing(
        self, slot: int, count: int, places: Tensor | None
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
        positions = slot - (counts if places is None else counts[places])
        return positions, decoder.rotary(positions, slot + 1 - self._least_padding), bias

    def _fill_skipped(
        self, states: Tensor, exit_layers: list[int], slot: int, rotary: dict[str, Rotary | None]
    ) -> None:
        if min(exit_layers) == self.num_layers:
            return
        device, count = states.device, len(states)
        rows = torch.arange(count, device=device) if self._places is None else self._places
        self._weights.skipped.write(
            self.cache,
            states,
            torch.tensor(exit_layers, device=device),
            rows=rows,
            slots=torch.full((count,), slot, device=device),
            rotary=rotary,
        )


def _copied_weights(model: Any) -> list[Tensor]:
    """Weights that are kept a second time, in another form: all but those of large maps that are read in place."""
    parts = decoders.decoder_architecture(model.backbone.config).parts
    paths = [path for path in (parts.attention_output, parts.gate, parts.up, parts.down) if path]
    in_place: list[nn.Module] = [
        layer.get_submodule(path) for layer in decoders.decoder_layers(model.backbone) for path in paths
    ]
    in_place.append(model.backbone.get_input_embeddings())
    if not model.exit_heads.head_is_shared:
        in_place += [model.exit_heads.heads, decoders.lm_head(model.backbone)]
    left_out = {id(weight) for module in in_place for weight in module.parameters()}
    if model.exit_heads.head_is_shared:  # also where it is the embeddings
        left_out -= {id(weight) for weight in decoders.lm_head(model.backbone).parameters()}
    return [weight for weight in model.parameters() if id(weight) not in left_out]


def _in_order(left: list[tuple[list[int], Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Hidden and normed states of all tokens, in their order."""
    if len(left) == 1:
        return left[0][1], left[0][2]
    order = torch.tensor([token for tokens, _, _ in left for token in tokens], device=left[0][1].device)
    back = torch.empty_like(order)
    back[order] = torch.arange(count, device=order.device)
    return torch.cat([states for _, states, _ in left])[back], torch.cat([normed for _, _, normed in left])[
        back
    ]
