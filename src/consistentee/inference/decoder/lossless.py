"""Lossless early exit: exits draft, the full model verifies several tokens in one pass, greedy text stays the same.

A token that exits early is a draft. Drafting goes on until the policy wants to go deeper than a draft is worth, or
enough tokens wait; that token then takes all pending ones to the last layer (`recompute`), where the full model's
own choice after each of them is known. The first that differs is replaced and what follows it forgotten. Nothing is
computed twice: a draft's lower layers and their keys and values are those of its verification.

Source: self-speculative decoding as in LayerSkip (arXiv:2404.16710). Differences: the draft depth is the policy's,
token by token, and drafting pauses where it does not pay on this machine's clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consistentee.inference.decoder.draws import require_numbers
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.inference.decoder.recompute import RecomputeDecoding

SHORTEST_PAUSE, TRYING = 16, 0.02
"""Tokens of a row without drafts once drafting did not pay, at least, and the share of time that trying may cost."""
TRIAL, SHORTEST_TRIAL = 6, 2
"""Tokens after which drafting is judged, over all rows, and how many of each row at least: a batch says as much
in fewer passes, and a trial that fails costs it more."""
CHECK_EVERY, CHECKED = 128, 4
"""Tokens of a row after which, where drafting pays, full depth is timed again, and for how many."""
SAMPLES = 15
"""Passes at full depth that are remembered."""
WORTH = 0.97
"""Drafting goes on while it takes at most this share of full depth's time: the clock is not that exact."""
MEMORY = 0.9
"""What a cycle still counts after the next one."""

Choose = Callable[[int, Sequence[int], Tensor], int]
"""(row, tokens generated so far, (vocabulary,) logits) -> the next token."""
Chosen = Callable[[int, Sequence[int]], int]
"""(index among the states of a pass, tokens generated so far) -> the next token."""


def trial_tokens(rows: int) -> int:
    """Tokens of each row after which drafting is judged.

    Example:
        >>> [trial_tokens(rows) for rows in (1, 2, 8)]
        [6, 3, 2]
    """
    return max(SHORTEST_TRIAL, math.ceil(TRIAL / rows))


@dataclass
class DraftClock:
    """Whether drafting pays: seconds per token with and without, measured while running.

    Time with drafts, and time in which the policy was asked for some and none was sure enough, is judged by its running
    mean. Once that is slower than full depth there is a pause, long enough that what was lost is a small share of it. A
    clock outlives a text: the next one begins with what is known.
    """

    full_samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    paused_for: int = 2  # the first tokens tell what full depth takes
    drafted_seconds: float = 0.0
    drafted_tokens: float = 0.0
    lost_seconds: float = 0.0
    unchecked_tokens: int = 0

    @property
    def drafts(self) -> bool:
        """Whether to draft now."""
        return self.paused_for <= 0

    @property
    def full_seconds(self) -> float | None:
        """Seconds per token at full depth, the median of what was seen last; None before the first."""
        return statistics.median(self.full_samples) if self.full_samples else None

    def full_depth(self, seconds: float, tokens: int, rows: int) -> None:
        """A pass in a pause: so many seconds for so many tokens of so many rows."""
        self.full_samples.append(seconds / max(1, tokens))
        self.paused_for -= max(1, tokens // max(1, rows))
        self.unchecked_tokens = 0

    def cycle(self, seconds: float, tokens: int, rows: int) -> None:
        """From the first draft to the verification: so many seconds for so many tokens of so many rows that stayed."""
        full_seconds = self.full_seconds
        if full_seconds is None:
            return
        self.drafted_seconds = MEMORY * self.drafted_seconds + seconds
        self.drafted_tokens = MEMORY * self.drafted_tokens + tokens
        self.lost_seconds += seconds - full_seconds * tokens
        self.unchecked_tokens += max(1, tokens // max(1, rows))
        if self.unchecked_tokens < trial_tokens(rows):
            return
        if self.drafted_seconds > WORTH * full_seconds * self.drafted_tokens:
            lost_tokens = self.lost_seconds / max(full_seconds * rows, 1e-9)
            self.paused_for = max(SHORTEST_PAUSE, math.ceil(lost_tokens / TRYING))
            self.drafted_seconds = self.drafted_tokens = self.lost_seconds = 0.0
        elif self.unchecked_tokens >= CHECK_EVERY:  # what full depth takes grows with the text
            self.paused_for = CHECKED


@dataclass
class DraftedRow:
    """A row of the batch.

    Args:
        tokens: generated and certain.
        exit_layers: of these, the layer at which each was drafted, or the last one.
        drafts: generated by an exit, not verified.
        draft_layers: where they exited.
        verified, accepted: drafts so far that were verified, and those that stayed.
    """

    tokens: list[int] = field(default_factory=list[int])
    exit_layers: list[int] = field(default_factory=list[int])
    drafts: list[int] = field(default_factory=list[int])
    draft_layers: list[int] = field(default_factory=list[int])
    verified: int = 0
    accepted: int = 0


class LosslessDecoding:
    """Drafts and verifications of a batch.

    Args:
        decoding: decoding with exact keys and values; its rule says when a draft exits.
        weights: of the model.
        choose: how a token is taken from logits; None takes the most probable one.
        draft_tokens: drafts before a verification, at most.
        room: of each row, the most tokens that it can get; no draft goes beyond.
        clock: decides whether drafting pays; None drafts always.
    """

    def __init__(
        self,
        decoding: RecomputeDecoding,
        weights: ExitWeights,
        choose: Choose | None,
        *,
        draft_tokens: int,
        room: Sequence[float],
        clock: DraftClock | None,
    ) -> None:
        self._decoding, self._weights, self._choose = decoding, weights, choose
        self._draft_tokens, self._room, self._clock = draft_tokens, room, clock
        self.rows = [DraftedRow() for _ in decoding.rows]
        self._numbers = list(range(len(self.rows)))
        self._cycle_seconds, self._cycle_tokens = 0.0, 0

    def prefill(self, input_ids: Tensor) -> None:
        """Run the prompts; the first token comes from the last layer."""
        normed, exit_layers = self._decoding.prefill(input_ids)
        chosen = self._chosen(normed, exit_layers, self._numbers)
        for number, row in enumerate(self.rows):
            row.tokens.append(chosen(number, []))
            row.exit_layers.append(exit_layers[number])

    def round(self) -> list[list[int]]:
        """One pass of every running row: a draft, or a verification.

        Returns:
            For each running row the tokens that became certain, none for a draft.
        """
        start = time.perf_counter()
        running = [self.rows[number] for number in self._numbers]
        drafting = self._clock is None or self._clock.drafts
        had_drafts = any(row.drafts for row in running)
        may_exit = [
            drafting
            and len(row.drafts) < self._draft_tokens
            and len(row.tokens) + len(row.drafts) + 1
            < self._room[number]  # behind a draft comes its verification
            for number, row in zip(self._numbers, running, strict=True)
        ]
        newest = [row.drafts[-1] if row.drafts else row.tokens[-1] for row in running]
        device = self._weights.decoder.device
        advances = self._decoding.advance(torch.tensor(newest, device=device), may_exit)
        last = self._decoding.num_layers
        owners = [
            number for number, advance in zip(self._numbers, advances, strict=True) for _ in advance.normed
        ]
        layers = [advance.exit_layer for advance in advances for _ in advance.normed]
        chosen = self._chosen(torch.cat([advance.normed for advance in advances]), layers, owners)
        certain: list[list[int]] = []
        end = 0
        for position, (row, advance) in enumerate(zip(running, advances, strict=True)):
            end += len(advance.normed)
            if advance.exit_layer < last:
                row.drafts.append(chosen(end - 1, row.tokens + row.drafts))
                row.draft_layers.append(advance.exit_layer)
                certain.append([])
            else:
                certain.append(self._verify(position, row, end, chosen))
        self._time(time.perf_counter() - start, drafting, had_drafts, certain)
        return certain

    def keep(self, running: Sequence[int]) -> None:
        """Go on with these rows, by position among those still running."""
        self._decoding.keep(running)
        self._numbers = [self._numbers[number] for number in running]

    def _chosen(self, normed: Tensor, exit_layers: list[int], owners: list[int]) -> Chosen:
        """The tokens of a pass: at once where nothing depends on the text so far, else one by one when asked for."""
        require_numbers(normed, exit_layers)
        if self._choose is None:
            tokens: list[int] = self._weights.greedy(normed, exit_layers).tolist()
            return lambda index, before: tokens[index]
        choose, logits = self._choose, self._weights.logits(normed, exit_layers)
        return lambda index, before: choose(owners[index], before, logits[index])

    def _verify(self, position: int, row: DraftedRow, end: int, chosen: Chosen) -> list[int]:
        """Keep the drafts that the full model would have chosen, and its own choice after them."""
        last, drafts = self._decoding.num_layers, row.drafts
        first = end - len(drafts) - 1  # a row's other tokens were certain before
        fresh: list[int] = []
        for number, (draft, layer) in enumerate(zip(drafts, row.draft_layers, strict=True)):
            token = chosen(first + number, row.tokens + fresh)
            fresh.append(token)
            row.exit_layers.append(layer if token == draft else last)
            row.verified += 1
            if token != draft:
                break
            row.accepted += 1
        if fresh == drafts:
            fresh.append(chosen(end - 1, row.tokens + fresh))
            row.exit_layers.append(last)
        else:
            state = self._decoding.rows[position]
            # The last certain token is not in the cache yet; the drafts before it are.
            self._decoding.roll_back(position, state.length - len(drafts) + len(fresh) - 1)
        row.tokens += fresh
        row.drafts, row.draft_layers = [], []
        return fresh

    def _time(self, seconds: float, drafting: bool, had_drafts: bool, certain: list[list[int]]) -> None:
        """Tell the clock. In a batch rows draft in turns and cycles need not end: long ones are judged as they are."""
        if self._clock is None:
            return
        tokens, rows = sum(map(len, certain)), len(certain)
        has_drafts = any(self.rows[number].drafts for number in self._numbers)
        if not drafting:
            if not had_drafts:  # else the rest of a cycle that was judged
                self._clock.full_depth(seconds, tokens, rows)
            return
        self._cycle_seconds += seconds
        self._cycle_tokens += tokens
        if not has_drafts or self._cycle_tokens >= trial_tokens(rows) * rows:
            self._clock.cycle(self._cycle_seconds, self._cycle_tokens, rows)
            self._cycle_seconds, self._cycle_tokens = 0.0, 0
