"""Token ids as pieces of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

BEFORE = 8
"""Tokens that are looked at before a text that goes on with another."""

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
        before: of the text that this one goes on with; some tokenizers drop the space that a text begins with.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._without_text = {*tokens_without_text(tokenizer, ends).values(), *ends}
        self._ids = text_before(tokenizer, before, self._without_text)
        self._start = 0  # decoding begins here, so that a space before a word is not lost
        self._read = len(self._ids)  # the pieces so far are of the ids before here

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
        before = _decoded(self._tokenizer, self._ids[self._start : self._read])
        return _decoded(self._tokenizer, self._ids[self._start :])[len(before) :]


def text_before(tokenizer: Any, token_ids: Sequence[int], without_text: Collection[int]) -> list[int]:
    """The last tokens of a text that another one goes on with, from a whole character on.

    Args:
        tokenizer: a Hugging Face tokenizer.
        token_ids: of the text.
        without_text: token ids that are no text.
    """
    newest = [token for token in token_ids[-BEFORE:] if token not in without_text]
    while newest and _decoded(tokenizer, newest).startswith(_BROKEN):
        newest.pop(0)  # part of a character, which would break the bytes behind it as well
    return newest


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)) if token_ids else ""


def decode_pieces(
    tokenizer: Any, token_ids: Sequence[int], ends: Collection[int] = (), before: Sequence[int] = ()
) -> list[str]:
    """Pieces of a whole text, one for each token id, see `PieceDecoder`."""
    decoder = PieceDecoder(tokenizer, ends, before)
    pieces = [decoder.put(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += decoder.end()
    return pieces
