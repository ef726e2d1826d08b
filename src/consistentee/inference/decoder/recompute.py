"""Decoding with exact keys and values: what a token skipped is computed once a later token goes there.

A token that exited early is *pending*: its state waits at its exit. When a later token of its row goes deeper, it takes
all pending tokens along, as more queries of the same pass, so that every key and value it attends to is what the full
model would have. Earlier tokens are therefore never shallower than later ones, and a token that reaches the last layer
brings its whole row there: the same pass that makes it exact also verifies what was drafted before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consistentee.backbones.decoders import SLIDING
from consistentee.inference.decoder.decoding import Decoding
from consistentee.inference.decoder.exit_rules import FixedExitRule, NeverExit, TokenExitRule
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.inference.decoder.functional_decoder import FunctionalDecoder, Layer, Rotary


@dataclass
class Pending:
    """A token whose state waits after some layer.

    Args:
        slot: in the cache.
        depth: layers it went through.
        hidden: (hidden,), its state there.
    """

    slot: int
    depth: int
    hidden: Tensor


@dataclass
class RowState:
    """A row of the batch.

    Args:
        cache_row: its row in the cache.
        padding: slots of padding before its first token.
        length: slots in use; the next token goes there.
        pending: tokens that exited early, by slot; depths never rise.
    """

    cache_row: int
    padding: int
    length: int
    pending: list[Pending] = field(default_factory=list[Pending])


@dataclass(frozen=True)
class Advance:
    """Where one row came to in a pass.

    Args:
        exit_layer: of its newest token, 1-based.
        normed: (tokens, hidden), states behind the exit's norm: of the newest token, or where it reached the last
            layer, of all tokens that came there, by slot.
    """

    exit_layer: int
    normed: Tensor


class FlatStep:
    """Attention of tokens of several rows, any number each.

    Args:
        decoder: whose layers run.
        cache: where keys and values lie.
        rows: the row of each token.
        slots: the slot of each token.
    """

    def __init__(
        self,
        decoder: FunctionalDecoder,
        decoding: RecomputeDecoding,
        rows: Sequence[RowState],
        slots: Sequence[int],
    ) -> None:
        device = decoder.device
        self._cache, self._window = decoding.cache, decoder.sliding_window
        positions = [slot - row.padding for row, slot in zip(rows, slots, strict=True)]
        lengths = [slot + 1 - decoding.least_padding for slot in slots]
        self._rotary = decoder.rotary(torch.tensor(positions, device=device), lengths)
        self._cache_rows = torch.tensor([row.cache_row for row in rows], device=device)
        self._slots = torch.tensor(list(slots), device=device)
        distinct = list(dict.fromkeys(row.cache_row for row in rows))
        padding = {row.cache_row: row.padding for row in rows}
        members = {
            cache_row: [i for i, row in enumerate(rows) if row.cache_row == cache_row]
            for cache_row in distinct
        }
        self._most = max(len(tokens) for tokens in members.values())
        self._seen = max(slots) + 1
        self._single = distinct[0] if len(distinct) == 1 else None
        in_line = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self._span = (slots[0], len(slots)) if self._single is not None and in_line else None
        self._distinct = torch.tensor(distinct, device=device)
        self._are_first = distinct == list(range(len(distinct)))
        # (rows, most tokens of a row): which token stands there; rows with fewer repeat their last one
        grid = [
            members[cache_row] + members[cache_row][-1:] * (self._most - len(members[cache_row]))
            for cache_row in distinct
        ]
        self._grid = torch.tensor(grid, device=device)
        back = [0] * len(rows)
        for number, cache_row in enumerate(distinct):
            for column, token in enumerate(members[cache_row]):
                back[token] = number * self._most + column
        self._is_grid = back == list(range(len(distinct) * self._most))
        self._back = torch.tensor(back, device=device)
        self._padding = torch.tensor([padding[cache_row] for cache_row in distinct], device=device)
        self._sees_all = len(rows) == 1 and padding[distinct[0]] == 0
        self._biases: dict[bool, Tensor | None] = {}

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of the tokens."""
        return self._rotary[layer_type]

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the tokens' keys and values, and let each see its row up to itself."""
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        if self._span is not None and self._single is not None:  # no index, no lookup
            keys[self._single].narrow(1, *self._span).copy_(key.transpose(0, 1))
            values[self._single].narrow(1, *self._span).copy_(value.transpose(0, 1))
        else:
            keys[self._cache_rows, :, self._slots] = key
            values[self._cache_rows, :, self._slots] = value
        sliding = self._window is not None and layer.layer_type == SLIDING
        if self._single is not None:
            keys, values = keys.narrow(0, self._single, 1), values.narrow(0, self._single, 1)
        elif self._are_first:
            keys, values = keys.narrow(0, 0, len(self._distinct)), values.narrow(0, 0, len(self._distinct))
        else:
            keys, values = keys.index_select(0, self._distinct), values.index_select(0, self._distinct)
        keys, values = keys.narrow(2, 0, self._seen), values.narrow(2, 0, self._seen)
        if sliding not in self._biases:
            self._biases[sliding] = self._bias(sliding, query.dtype)
        if self._is_grid:
            grouped = query.reshape(len(self._grid), self._most, *query.shape[1:])
            return layer.attention(grouped, keys, values, self._biases[sliding])
        return layer.attention(query[self._grid], keys, values, self._biases[sliding])[self._back]

    def _bias(self, sliding: bool, dtype: torch.dtype) -> Tensor | None:
        if self._sees_all and (not sliding or self._seen <= (self._window or 0)):
            return None
        slots = torch.arange(self._seen, device=self._slots.device)
        own = self._slots[self._grid][:, :, None]  # (rows, tokens, 1)
        hidden = (slots > own) | (slots < self._padding[:, None, None])
        if sliding and self._window is not None:
            hidden = hidden | (slots <= own - self._window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return bias.masked_fill_(hidden, torch.finfo(dtype).min)


class RecomputeDecoding:
    """A batch whose tokens exit early and whose keys and values are exact all the same.

    Args:
        weights, rule, attention_mask, capacity: as in `Decoding`.
        full_depth_first_token: as in `Decoding`.
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
        self._first_token = full_depth_first_token
        self._prompts = Decoding(weights, NeverExit(), attention_mask, capacity, full_depth_first_token=True)
        self.cache = self._prompts.cache
        paddings: list[int] = (attention_mask == 0).sum(1).tolist()
        self.least_padding = min(paddings, default=0)
        self.rows = [RowState(row, padding, 0) for row, padding in enumerate(paddings)]
        self._numbers = list(range(len(paddings)))
        self._generated = 0

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._weights.num_layers

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, list[int]]:
        """As `Decoding.prefill`."""
        tokens = input_ids.shape[1]
        if self._first_token:
            exits = self._prompts.prefill(input_ids)
            for row in self.rows:
                row.length = tokens
            self._generated = 1
            return exits
        if tokens > 1:
            self._prompts.prefill(input_ids[:, :-1], more=1)
        for row in self.rows:
            row.length = tokens - 1
        return self.step(input_ids[:, -1])

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """As `Decoding.step`."""
        advances = self.advance(tokens, [True] * len(self.rows))
        exit_layers = [advance.exit_layer for advance in advances]
        return torch.stack([advance.normed[-1] for advance in advances]), exit_layers

    def advance(self, tokens: Tensor, may_exit: Sequence[bool]) -> list[Advance]:
        """Run one new token of every row, with the pending ones it meets.

        Args:
            tokens: (rows,) int64.
            may_exit: whether a row's token may exit early; False takes the row to the last layer.

        Returns:
            Where each row came to, in order.
        """
        decoder, rule = self._weights.decoder, self._rule
        if isinstance(rule, FixedExitRule):
            rule.begin(self._generated, self._numbers)
        self._generated += 1
        self.cache.reserve(max(row.length for row in self.rows) + 1)
        slots = [row.length for row in self.rows]
        if not any(may_exit) and len(set(slots)) == 1 and not any(row.pending for row in self.rows):
            return self._full_depth(tokens, slots[0])
        positions = [slot - row.padding for row, slot in zip(self.rows, slots, strict=True)]
        hidden = decoder.embed(tokens, torch.tensor(positions, device=decoder.device))
        for row in self.rows:
            row.length += 1
        inside = list(range(len(self.rows)))  # rows whose newest token is still running
        flat: list[tuple[int, int]] = [
            (number, slot) for number, slot in enumerate(slots)
        ]  # (row, slot) of `hidden`
        waiting = {number: list(row.pending) for number, row in enumerate(self.rows)}  # those not yet met
        advances: dict[int, Advance] = {}
        step: FlatStep | None = None
        for index, layer in enumerate(decoder.layers):
            met = [(number, token) for number in inside for token in waiting[number] if token.depth == index]
            if met:
                hidden = torch.cat([torch.stack([token.hidden for _, token in met]), hidden])
                flat = [(number, token.slot) for number, token in met] + flat
                for number in inside:
                    waiting[number] = [token for token in waiting[number] if token.depth != index]
            if met or step is None:
                step = FlatStep(
                    decoder, self, [self.rows[number] for number, _ in flat], [s for _, s in flat]
                )
            before, hidden = hidden, layer(hidden, decoder.unit_norm(hidden), step)
            if index == self.num_layers - 1:
                self._finish(inside, flat, hidden, advances)
                break
            exiting = self._exiting(index, inside, flat, before, hidden, may_exit)
            if not exiting:
                continue
            self._exit(index, exiting, flat, hidden, advances)
            inside = [number for number in inside if number not in exiting]
            if not inside:
                break
            stay = [token for token, (number, _) in enumerate(flat) if number not in exiting]
            flat = [flat[token] for token in stay]
            hidden = hidden[torch.tensor(stay, device=hidden.device)]
            step = None
        return [advances[number] for number in range(len(self.rows))]

    def _full_depth(self, tokens: Tensor, slot: int) -> list[Advance]:
        """All rows at one slot, to the last layer, with nothing pending: what decoding at full depth does."""
        cache_rows = [row.cache_row for row in self.rows]
        whole = cache_rows == list(range(self.cache.storage.shape[2]))
        normed = self._prompts.full_step(
            tokens, slot, None if whole else torch.tensor(cache_rows, device=tokens.device)
        )
        for row in self.rows:
            row.length += 1
        return [Advance(self.num_layers, normed[number][None]) for number in range(len(self.rows))]

    def roll_back(self, number: int, length: int) -> None:
        """Forget a row's tokens from a slot on."""
        row = self.rows[number]
        row.length = length
        row.pending = [token for token in row.pending if token.slot < length]

    def keep(self, running: Sequence[int]) -> None:
        """Go on with these rows, by position among those still running."""
        self.rows = [self.rows[number] for number in running]
        self._numbers = [self._numbers[number] for number in running]

    def _normed(self, layer_index: int, hidden: Tensor) -> Tensor:
        return self._weights.normed(layer_index, self._weights.decoder.unit_norm(hidden))

    def _exiting(
        self,
        index: int,
        inside: list[int],
        flat: list[tuple[int, int]],
        before: Tensor,
        hidden: Tensor,
        may_exit: Sequence[bool],
    ) -> set[int]:
        """Rows whose newest token exits after this layer."""
        if not self._rule.may_exit(index) or not any(may_exit[number] for number in inside):
            return set()
        newest = {slot_of: token for token, slot_of in enumerate(flat)}
        tokens = torch.tensor(
            [newest[number, self.rows[number].length - 1] for number in inside], device=hidden.device
        )
        after = hidden[tokens]
        normed = self._normed(index, after) if self._rule.needs_normed else None
        exits = self._rule.exits(index, before[tokens], after, normed)
        return {number for number, here in zip(inside, exits, strict=True) if here and may_exit[number]}

    def _exit(
        self,
        index: int,
        exiting: set[int],
        flat: list[tuple[int, int]],
        hidden: Tensor,
        advances: dict[int, Advance],
    ) -> None:
        """Let rows wait after a layer with all their tokens that came this far."""
        for number in exiting:
            row = self.rows[number]
            came = {slot: hidden[token] for token, (other, slot) in enumerate(flat) if other == number}
            deeper = [token for token in row.pending if token.slot not in came]
            row.pending = deeper + [Pending(slot, index + 1, came[slot]) for slot in sorted(came)]
            advances[number] = Advance(index + 1, self._normed(index, came[row.length - 1][None]))

    def _finish(
        self, inside: list[int], flat: list[tuple[int, int]], hidden: Tensor, advances: dict[int, Advance]
    ) -> None:
        """Rows that came to the last layer have nothing pending any more."""
        normed = self._normed(self.num_layers - 1, hidden)
        for number in inside:
            came = sorted((slot, token) for token, (other, slot) in enumerate(flat) if other == number)
            tokens = torch.tensor([token for _, token in came], device=hidden.device)
            self.rows[number].pending = []
            advances[number] = Advance(self.num_layers, normed[tokens])
