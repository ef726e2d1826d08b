"""Continuous batching: rows join a batch that is being decoded, between two tokens, and make room where they end.

Rows have different lengths, so each begins at slot 0 of a row of the cache and goes on at a slot of its own: nothing is
padded, positions are those of a text by itself, and a row ends by what its text takes, whoever is beside it. The rows
that run are the first ones of the cache, in order, so that attention reads them in place; the last row takes the place
of one that ends. The cache has room for the longest row times the most rows that there were.

Newcomers go through the prompt's pass in a batch of their own (`Decoding`, padded on the left), and their keys and
values are copied from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from consistentee.backbones.decoders import SLIDING
from consistentee.data.batches import pad_left
from consistentee.inference.decoder.decoding import Decoding, kept_rotary, run_with_exits
from consistentee.inference.decoder.exit_rules import TokenExitRule
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.inference.decoder.functional_decoder import FunctionalDecoder, Layer, Rotary
from consistentee.inference.decoder.kv_cache import DecoderCache
from consistentee.inference.decoder.recompute import RecomputeDecoding, RowState

Newcomers = TypeVar("Newcomers", Decoding, RecomputeDecoding)


class ContinuousDecoding(Protocol):
    """Rows that come and go."""

    def join(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Run prompts through the model; they are the last rows from now on.

        Args:
            prompts: (newcomers, tokens), not padded, at least one token each.

        Returns:
            Of the newcomers, as `Decoding.step`. Where it raises, the other rows are as they were.
        """
        ...

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """Run the newest token of every row, (rows,) int64; as `Decoding.step`."""
        ...

    def remove(self, row: int) -> None:
        """A row has ended: the last one takes its place."""
        ...


class OwnSlotStep:
    """Attention of one token per row, each at a slot of its own; rows are the first ones of the cache.

    Args:
        cache: where keys and values lie.
        slots: (rows,) of the tokens.
        rotary: angles, by attention type, one for each.
        window: of sliding layers.
    """

    def __init__(
        self, cache: DecoderCache, slots: Sequence[int], rotary: dict[str, Rotary | None], window: int | None
    ) -> None:
        self._cache, self._all_slots, self._window = cache, slots, window
        self._rotary = rotary
        self._take(range(len(slots)))

    def keep(self, inside: Sequence[int], kept: Tensor) -> None:
        """Go on with these tokens, which are the `kept` ones among those before."""
        self._take(inside)
        self._rotary = kept_rotary(self._rotary, kept)

    def _take(self, rows: Sequence[int]) -> None:
        device = self._cache.storage.device
        self._slots = [self._all_slots[row] for row in rows]
        self._rows_index = torch.tensor(list(rows), device=device)
        self._slots_index = torch.tensor(self._slots, device=device)
        in_line = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._span = (rows[0], len(rows)) if in_line else None
        self._biases: dict[bool, Tensor | None] = {}

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of the tokens that have not exited."""
        return self._rotary[layer_type]

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the tokens' keys and values, and let each see its row up to itself."""
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        if len(self._slots) == 1 and self._span is not None:
            keys[self._span[0], :, self._slots[0]] = key[0]
            values[self._span[0], :, self._slots[0]] = value[0]
        else:
            keys[self._rows_index, :, self._slots_index] = key
            values[self._rows_index, :, self._slots_index] = value
        slides = self._window is not None and layer.layer_type == SLIDING
        first = max(0, min(self._slots) + 1 - self._window) if slides and self._window is not None else 0
        seen = max(self._slots) + 1 - first
        keys, values = keys.narrow(2, first, seen), values.narrow(2, first, seen)
        if self._span is not None:
            keys, values = keys.narrow(0, *self._span), values.narrow(0, *self._span)
        else:
            keys, values = keys.index_select(0, self._rows_index), values.index_select(0, self._rows_index)
        if slides not in self._biases:
            self._biases[slides] = self._bias(first, seen, self._window if slides else None, query.dtype)
        return layer.attention(query.unsqueeze(1), keys, values, self._biases[slides])

    def _bias(self, first: int, seen: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if len(set(self._slots)) == 1:  # `first` and `seen` are right for all
            return None
        slots = torch.arange(first, first + seen, device=self._slots_index.device)
        own = self._slots_index[:, None, None]
        hidden = slots > own  # (rows, 1, slots)
        if window is not None:
            hidden = hidden | (slots <= own - window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return bias.masked_fill_(hidden, torch.finfo(dtype).min)


class CopiedStates:
    """Rows that come and go; skipped layers get the state at the exit.

    Args:
        weights: of the model.
        rule: when tokens exit.
        full_depth_first_token: as in `Decoding`.
    """

    def __init__(self, weights: ExitWeights, rule: TokenExitRule, *, full_depth_first_token: bool) -> None:
        self._weights, self._rule, self._first_token = weights, rule, full_depth_first_token
        self.cache = weights.new_cache(0, 0)
        self._lengths: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """As `ContinuousDecoding.join`."""
        entered: list[tuple[Tensor, list[int]]] = []
        lengths: list[int] = []
        for group in _groups(self._weights.decoder, prompts):
            input_ids, mask = _padded(self._weights, group)
            batch = Decoding(
                self._weights,
                self._rule,
                mask,
                input_ids.shape[1],
                full_depth_first_token=self._first_token,
            )
            entered.append(batch.prefill(input_ids))
            place = len(self._lengths) + len(lengths)
            self.cache.reserve(input_ids.shape[1], place + len(group))
            for number, prompt in enumerate(group):
                padding = input_ids.shape[1] - len(prompt)
                self.cache.copy_row(place + number, batch.cache, number, padding, len(prompt))
            lengths += [len(prompt) for prompt in group]
        outputs = _together(entered)
        self._lengths += lengths
        return outputs

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """As `ContinuousDecoding.step`."""
        weights, decoder, slots = self._weights, self._weights.decoder, list(self._lengths)
        self.cache.reserve(max(slots) + 1)
        positions = torch.tensor(slots, device=decoder.device)
        rotary = decoder.rotary(positions, [slot + 1 for slot in slots])
        step = OwnSlotStep(self.cache, slots, rotary, decoder.sliding_window)
        states, normed, exit_layers = run_with_exits(
            weights, self._rule, decoder.embed(tokens, positions), step
        )
        if min(exit_layers) < weights.num_layers:
            weights.state_propagation.write(
                self.cache,
                states,
                torch.tensor(exit_layers, device=decoder.device),
                rows=torch.arange(len(slots), device=decoder.device),
                slots=positions,
                rotary=rotary,
            )
        self._lengths = [slot + 1 for slot in slots]
        return normed, exit_layers

    def remove(self, row: int) -> None:
        """As `ContinuousDecoding.remove`."""
        self.cache.remove_row(row, self._lengths)
        last = self._lengths.pop()
        if row < len(self._lengths):
            self._lengths[row] = last


class ExactStates:
    """Rows that come and go; skipped layers are computed when a later token goes there.

    Args:
        weights, rule, full_depth_first_token: as in `CopiedStates`.
    """

    def __init__(self, weights: ExitWeights, rule: TokenExitRule, *, full_depth_first_token: bool) -> None:
        self._weights, self._rule, self._first_token = weights, rule, full_depth_first_token
        self._batch = self._new_batch([])
        self.cache = self._batch.cache

    def _new_batch(self, prompts: Sequence[Sequence[int]]) -> RecomputeDecoding:
        mask = _padded(self._weights, prompts)[1]
        return RecomputeDecoding(
            self._weights, self._rule, mask, mask.shape[1], full_depth_first_token=self._first_token
        )

    def join(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """As `ContinuousDecoding.join`."""
        entered: list[tuple[Tensor, list[int]]] = []
        joined: list[RowState] = []
        for group in _groups(self._weights.decoder, prompts):
            batch = self._new_batch(group)
            entered.append(batch.prefill(_padded(self._weights, group)[0]))
            place = len(self._batch.rows) + len(joined)
            self.cache.reserve(max(map(len, group)), place + len(group))
            for number, row in enumerate(batch.rows):
                length = row.length - row.padding
                self.cache.copy_row(place + number, batch.cache, row.cache_row, row.padding, length)
                pending = [replace(token, slot=token.slot - row.padding) for token in row.pending]
                joined.append(RowState(place + number, 0, length, pending))
        outputs = _together(entered)
        self._batch.rows += joined
        return outputs

    def step(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """As `ContinuousDecoding.step`."""
        return self._batch.step(tokens)

    def remove(self, row: int) -> None:
        """As `ContinuousDecoding.remove`."""
        rows = self._batch.rows
        self.cache.remove_row(row, [state.length for state in rows])
        last = rows.pop()
        if row < len(rows):
            rows[row] = replace(last, cache_row=row)


def _groups(decoder: FunctionalDecoder, prompts: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Prompts that go through the model together: each alone where its angles depend on how long the others are."""
    return [[prompt] for prompt in prompts] if decoder.rotary_depends_on_length else [prompts]


def _padded(weights: ExitWeights, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, (prompts, longest) each; padding is any token."""
    device = weights.decoder.device
    if not prompts:
        nothing = torch.zeros(0, 0, dtype=torch.int64, device=device)
        return nothing, nothing
    input_ids, mask = pad_left(prompts, 0)
    return input_ids.to(device), mask.to(device)


def _together(entered: Sequence[tuple[Tensor, list[int]]]) -> tuple[Tensor, list[int]]:
    normed = torch.cat([normed for normed, _ in entered])
    return normed, [layer for _, layers in entered for layer in layers]
