"""Several texts as they are written: each row is told token by token, and ends where it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistentee.inference.decoder.known_processors import TextCriteria
from consistentee.pipelines.decoding_options import end_tokens
from consistentee.pipelines.pieces import PieceDecoder
from consistentee.pipelines.stops import split_stops
from consistentee.pipelines.streaming import OnToken, PieceStreamer

OnRowToken = Callable[[int, str, int], object]
"""Is told a row, the next piece of its text, and the layer at which that token exited."""

OnRowEnd = Callable[[int, str], object]
"""Is told that a row has ended, and why: `stop`, `end` or `length`, see `GeneratedText`."""


@dataclass(frozen=True)
class TextEnds:
    """What ends a text beside its limit.

    Args:
        ends, stop_tokens: token ids: the end of text, and tokens without text that stop strings name.
        stops: other stop strings.
    """

    ends: Collection[int]
    stop_tokens: Collection[int]
    stops: Sequence[str]


def text_ends(model: Any, tokenizer: Any, stop: Sequence[str]) -> TextEnds:
    """What ends the texts of a model, with these stop strings."""
    ends = end_tokens(model, tokenizer)
    stops, stop_tokens = split_stops(tokenizer, stop, ends)
    return TextEnds(ends, stop_tokens, stops)


class RowStream:
    """One text as it is written.

    Args:
        tokenizer: of the text.
        num_layers: the layer of tokens of a model without exits.
        limit: the most tokens.
        text_ends: what else ends it.
        on_token: is told every token.
        on_end: is told why it has ended.
        before: token ids of the text that it goes on with.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_layers: int,
        limit: int,
        text_ends: TextEnds,
        on_token: OnToken,
        on_end: Callable[[str], object],
        before: Sequence[int] = (),
    ) -> None:
        self._limit, self._text_ends, self._on_end = limit, text_ends, on_end
        self._stream = PieceStreamer(
            PieceDecoder(tokenizer, text_ends.ends, before), on_token, num_layers, text_ends.stops
        )
        self._stream.put(torch.empty(0))  # the prompt, of which nothing is told
        self._count = 0

    def put(self, token: int, layer: int) -> bool:
        """The next token, and its layer; whether the text goes on behind it."""
        self._stream.put_exit_layers(torch.tensor([layer]))
        self._stream.put(torch.tensor([token]))
        self._count += 1
        reason = None
        if self._stream.holds_stop or token in self._text_ends.stop_tokens:
            reason = "stop"
        elif token in self._text_ends.ends:
            reason = "end"
        elif self._count >= self._limit:
            reason = "length"
        if reason is not None:
            self._stream.end()
            self._on_end(reason)
        return reason is None

    def cut(self) -> None:
        """Nothing comes any more."""
        self._on_end("stop" if self._stream.end() else "length")


class RowStreams:
    """Hears of the tokens of several rows from `generate`; the first thing it is given are the prompts.

    Args:
        tokenizer: of the texts.
        num_layers: the layer of tokens of a model without exits.
        limits: (rows,) the most tokens of each.
        text_ends: what else ends them.
        on_token, on_end: are told.
        before: (rows, tokens) of the texts that they go on with; none for texts of their own.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_layers: int,
        limits: Sequence[int],
        text_ends: TextEnds,
        *,
        on_token: OnRowToken,
        on_end: OnRowEnd,
        before: Sequence[Sequence[int]] = (),
    ) -> None:
        self._streams = {
            row: RowStream(
                tokenizer,
                num_layers,
                limit,
                text_ends,
                lambda piece, layer, row=row: on_token(row, piece, layer),
                lambda reason, row=row: on_end(row, reason),
                before[row] if before else (),
            )
            for row, limit in enumerate(limits)
        }
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
            return
        for row, token in enumerate(tokens.flatten().tolist()):
            layer = self._layers[row] if self._layers else self._num_layers
            if row in self._streams and not self._streams[row].put(token, layer):
                del self._streams[row]

    def end(self) -> None:
        """Nothing comes any more: what still runs was ended by `generate`."""
        for stream in self._streams.values():
            stream.cut()
        self._streams.clear()


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
