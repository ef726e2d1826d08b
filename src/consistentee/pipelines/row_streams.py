"""Several texts as they are written: each row is told token by token, and ends where it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from consistentee.inference.decoder.known_processors import TextCriteria
from consistentee.pipelines.pieces import PieceDecoder
from consistentee.pipelines.streaming import PieceStreamer

OnRowToken = Callable[[int, str, int], object]
"""Is told a row, the next piece of its text, and the layer at which that token exited."""

OnRowEnd = Callable[[int, str], object]
"""Is told that a row has ended, and why: `stop`, `end` or `length`, see `GeneratedText`."""


class RowStreams:
    """Hears of the tokens of several rows from `generate`; the first thing it is given are the prompts.

    Args:
        tokenizer: of the texts.
        num_layers: the layer of tokens of a model without exits.
        limits: (rows,) the most tokens of each.
        ends, stop_tokens: token ids that end a text: the end of text, and stop strings that are special tokens.
        stops: other stop strings.
        on_token, on_end: are told.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_layers: int,
        limits: Sequence[int],
        *,
        ends: Collection[int],
        stop_tokens: Collection[int],
        stops: Sequence[str],
        on_token: OnRowToken,
        on_end: OnRowEnd,
    ) -> None:
        self._ends, self._stop_tokens, self._limits = ends, stop_tokens, limits
        self._on_end = on_end
        self._streams = [
            PieceStreamer(
                PieceDecoder(tokenizer),
                lambda piece, layer, row=row: on_token(row, piece, layer),
                num_layers,
                stops,
            )
            for row in range(len(limits))
        ]
        self._counts = [0] * len(limits)
        self._running = set(range(len(limits)))
        self._layers: list[int] = []
        self._prompts_are_over = False
        self._num_layers = num_layers

    def put_exit_layers(self, layers: Tensor) -> None:
        """(rows,) the layers of the tokens that come next."""
        self._layers = layers.tolist()

    def put(self, tokens: Tensor) -> None:
        """(rows,) the next token of each; of rows that have ended it is padding."""
        if not self._prompts_are_over:
            self._prompts_are_over = True
            for stream in self._streams:
                stream.put(tokens)
            return
        for row, token in enumerate(tokens.flatten().tolist()):
            if row in self._running:
                self._put(row, token, self._layers[row] if self._layers else self._num_layers)

    def _put(self, row: int, token: int, layer: int) -> None:
        stream = self._streams[row]
        stream.put_exit_layers(torch.tensor([layer]))
        stream.put(torch.tensor([token]))
        self._counts[row] += 1
        reason = None
        if stream.holds_stop or token in self._stop_tokens:
            reason = "stop"
        elif token in self._ends:
            reason = "end"
        elif self._counts[row] >= self._limits[row]:
            reason = "length"
        if reason is not None:
            self._running.discard(row)
            stream.end()
            self._on_end(row, reason)

    def end(self) -> None:
        """Nothing comes any more: what still runs was ended by `generate`, or by broken characters of a stop string."""
        for row in sorted(self._running):
            self._on_end(row, "stop" if self._streams[row].end() else "length")
        self._running.clear()


class RowLimits(TextCriteria):
    """Ends rows at limits of their own, and those that nobody waits for.

    Args:
        prompt_length: tokens before the new ones, padding among them.
        limits: (rows,) the most new tokens.
        is_gone: whether nobody waits for a row.
    """

    def __init__(self, prompt_length: int, limits: Sequence[int], is_gone: Callable[[int], bool]) -> None:
        self._prompt_length, self._limits, self._is_gone = prompt_length, limits, is_gone

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, (rows,) bool."""
        new = input_ids.shape[1] - self._prompt_length
        ended = [new >= limit or self._is_gone(row) for row, limit in enumerate(self._limits)]
        return torch.tensor(ended, device=input_ids.device)
