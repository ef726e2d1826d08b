"""Tokens of texts that come and go: what `generate` does for one batch, for rows that join it and end in their time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from consistentee.inference.decoder.continuous import ContinuousDecoding, CopiedStates, ExactStates
from consistentee.inference.decoder.draws import tokens_from
from consistentee.inference.modes import inference_without_autocast
from consistentee.models.generate import GenerationOptions, decoding_rule

RowToken = tuple[int, int]
"""A token, and the layer at which it exited, 1-based; a row whose token is `NO_TOKEN` is to be removed."""


class ContinuousTokens:
    """Greedy or drawn tokens of rows that join and end between two steps, each with exits of its own.

    Args:
        model: an `EarlyExitForCausalLM`.
        options: how, in mode `full` or `early-exit`.
        processors: of the logits, that read a row's scores and nothing else (temperature, top-k, top-p).
        do_sample: whether tokens are drawn, from the options' generator; else the likeliest is taken.

    Raises:
        ValueError: mode `lossless`, or exits that are given in advance.
    """

    def __init__(
        self, model: Any, options: GenerationOptions, *, processors: LogitsProcessorList, do_sample: bool
    ) -> None:
        if options.mode == "lossless" or options.fixed_exit_layers is not None:
            raise ValueError(
                'Rows join in mode "full" or "early-exit" and without fixed_exit_layers, got '
                f'mode "{options.mode}". Generate them by themselves.'
            )
        self._weights, self._processors, self._do_sample = model.exit_weights(), processors, do_sample
        self._generator = options.generator
        exits = options.mode == "early-exit"
        kind = ExactStates if exits and options.skipped_states == "recompute" else CopiedStates
        with inference_without_autocast():
            self._decoding: ContinuousDecoding = kind(
                self._weights,
                decoding_rule(model, options),
                full_depth_first_token=options.full_depth_first_token or not exits,
            )
        self._newest: list[int] = []

    def __len__(self) -> int:
        return len(self._newest)

    def join(self, prompts: Sequence[Sequence[int]]) -> list[RowToken]:
        """Take in prompts, (newcomers, tokens), as the last rows: their first tokens.

        Raises:
            ValueError: a prompt without a token.
            Exception: whatever computing raises. None has joined then, and the other rows are as they were.
        """
        if not all(prompts):
            raise ValueError("prompts must hold at least one token each, got none.")
        with inference_without_autocast():
            outputs = self._decoding.join(prompts)
            try:
                found = self._tokens(*outputs)
            except BaseException:
                for place in reversed(range(len(prompts))):
                    self._decoding.remove(len(self) + place)
                raise
        self._newest += [token for token, _ in found]
        return found

    def step(self) -> list[RowToken]:
        """The next token of every row."""
        with inference_without_autocast():
            newest = torch.tensor(self._newest, device=self._weights.decoder.device)
            found = self._tokens(*self._decoding.step(newest))
        self._newest = [token for token, _ in found]
        return found

    def remove(self, row: int) -> None:
        """A row has ended: the last one takes its place."""
        with inference_without_autocast():
            self._decoding.remove(row)
        last = self._newest.pop()
        if row < len(self._newest):
            self._newest[row] = last

    def _tokens(self, normed: Tensor, exit_layers: list[int]) -> list[RowToken]:
        if self._processors or self._do_sample:
            logits = self._weights.logits(normed, exit_layers).float()
            logits = self._processors(torch.empty(len(logits), 0), logits)  # pyright: ignore[reportArgumentType]
            tokens = tokens_from(logits, do_sample=self._do_sample, generator=self._generator)
        else:
            tokens = self._weights.greedy(normed, exit_layers)
        return list(zip(tokens.tolist(), exit_layers, strict=True))
