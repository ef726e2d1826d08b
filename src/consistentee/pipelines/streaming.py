"""A text as it is written: every token is told as soon as it is certain to belong to the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from consistentee.pipelines.pieces import PieceDecoder
from consistentee.pipelines.stops import cut_at_stop, find_stop, possible_stop

OnToken = Callable[[str, int], object]
"""Is told every token as it is generated: its piece of the text, and the layer at which it exited."""


@dataclass
class PieceStreamer:
    """Hears of tokens from `generate`, of one row; the first thing it is given is the prompt.

    Args:
        decoder: of the text.
        on_token: is told.
        num_layers: the layer of tokens of a model without exits.
        stops: stop strings; what may begin one is held back.
    """

    decoder: PieceDecoder
    on_token: OnToken
    num_layers: int
    stops: Sequence[str] = ()
    _layers: list[int] = field(default_factory=list[int])
    _held: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    _prompt_is_over: bool = False

    def put_exit_layers(self, layers: Tensor) -> None:
        """The layers of the tokens that come next."""
        self._layers = layers.tolist()

    @property
    def holds_stop(self) -> bool:
        """Whether a stop string is complete: the text ends before it."""
        if not self.stops:
            return False
        text = "".join(piece for piece, _ in self._held) + self.decoder.begun()
        return find_stop(text, self.stops) is not None

    def put(self, tokens: Tensor) -> None:
        """The next tokens."""
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        layers = self._layers or [self.num_layers] * tokens.numel()
        for token, layer in zip(tokens.flatten().tolist(), layers, strict=True):
            self._held.append((self.decoder.put(token), layer))
            self._tell()

    def end(self) -> bool:
        """The text is complete: tell of what was held back, up to a stop string.

        Returns:
            Whether there was one.
        """
        if not self._held:
            return False
        piece, layer = self._held[-1]
        self._held[-1] = (piece + self.decoder.end(), layer)
        pieces = [piece for piece, _ in self._held]
        kept = cut_at_stop(pieces, self.stops)
        for piece, (_, layer) in zip(pieces if kept is None else kept, self._held, strict=kept is None):
            self.on_token(piece, layer)
        self._held = []
        return kept is not None

    def _tell(self) -> None:
        """Tell of what is certain. Held back: what may begin a stop string, and a last token that gets what is left."""
        text = "".join(piece for piece, _ in self._held)
        if find_stop(text, self.stops) is not None:
            return
        certain = len(text) - possible_stop(text, self.stops)
        told = 0
        while self._held and (len(self._held) > 1 or self._held[0][0]):
            told += len(self._held[0][0])
            if told > certain:
                return
            self.on_token(*self._held.pop(0))
