"""Token ids as pieces of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character


def tokens_without_text(tokenizer: Any, ends: Collection[int]) -> dict[str, int]:
    """Tokens that are no text, by their names: special ones, whether they have a role or not, and added ends of text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ends: token ids that end a text. One that is a word of the vocabulary has no name: others may spell it, too.
    """
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.special or index in ends} | named


class PieceDecoder:
    """Token ids into pieces of text, one for each token; the pieces together are the text.

    A character of several tokens belongs to the last of them; special tokens and ends of text have the piece "".

    Args:
        tokenizer: a Hugging Face tokenizer.
        ends: token ids that end a text.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._without_text = {*tokens_without_text(tokenizer, ends).values(), *ends}
        self._ids: list[int] = []
        self._start = 0  # decoding begins here, so that a space before a word is not lost
        self._read = 0  # the pieces so far are of the ids before here

    def put(self, token_id: int) -> str:
        """The text that this token completes; "" where it is part of a character that goes on."""
        if token_id in self._without_text:
            return ""
        self._ids.append(token_id)
        piece = self._rest()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return piece

    def begun(self) -> str:
        """What a character that has not come to its end looks like so far."""
        return self._rest() if self._read < len(self._ids) else ""

    def end(self) -> str:
        """What is left over: the beginning of a character that never came to its end."""
        piece = self.begun()
        self._start, self._read = self._read, len(self._ids)
        return piece

    def _rest(self) -> str:
        before = self._decoded(self._ids[self._start : self._read])
        return self._decoded(self._ids[self._start :])[len(before) :]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)) if token_ids else ""


def decode_pieces(tokenizer: Any, token_ids: Sequence[int], ends: Collection[int] = ()) -> list[str]:
    """Pieces of a whole text, one for each token id, see `PieceDecoder`."""
    decoder = PieceDecoder(tokenizer, ends)
    pieces = [decoder.put(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += decoder.end()
    return pieces
