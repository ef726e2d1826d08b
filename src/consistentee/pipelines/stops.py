"""Stop strings: where they end a text, and how much of a text may yet turn out to be the beginning of one.

What counts is the text and not its tokens: a stop string may lie inside one token or begin in one and end in another.
The text ends before the stop string; the tokens that it took were generated and count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from consistentee.inference.decoder.known_processors import TextCriteria
from consistentee.pipelines.pieces import decode_pieces, text_before, tokens_without_text

WIDER = 16
"""Tokens that are looked at beside those that a stop string can take: a text's first ones may decode to less."""


def split_stops(
    tokenizer: Any, stop: Sequence[str], ends: Collection[int] = ()
) -> tuple[list[str], set[int]]:
    """Stop strings, and the tokens without text (see `tokens_without_text`) whose names are among them."""
    names = tokens_without_text(tokenizer, ends)
    return [text for text in stop if text not in names], {names[text] for text in stop if text in names}


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    r"""Where the stop string begins and ends that comes to its end first; of several, the longest. None without one.

    Example:
        >>> find_stop("a river.\n\nIt", ["It", "\n\n"])
        (8, 10)
    """
    found = [(text.find(stop), stop) for stop in stops]
    ends = [(start + len(stop), start) for start, stop in found if start >= 0]
    if not ends:
        return None
    end, start = min(ends)
    return start, end


def possible_stop(text: str, stops: Sequence[str]) -> int:
    r"""Characters at the end of a text that may be the beginning of a stop string.

    Example:
        >>> possible_stop("one, two\n", ["\n\n", "two\nthree"])
        4
    """
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(len(stop) > length and stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def cut_at_stop(pieces: Sequence[str], stops: Sequence[str]) -> list[str] | None:
    """The pieces of a text up to the token that completes a stop string, without it; None where there is none.

    Args:
        pieces: (tokens,) the text token by token.
        stops: stop strings.

    Returns:
        As many pieces as tokens were needed; those of the stop string itself are cut, to "" where nothing is left.

    Example:
        >>> cut_at_stop(["one", ", t", "wo", " three"], [", two"])
        ['one', '', '']
    """
    found = find_stop("".join(pieces), stops)
    if found is None:
        return None
    start, end = found
    cut: list[str] = []
    place = 0
    for piece in pieces:
        cut.append(piece[: max(0, start - place)])
        place += len(piece)
        if place >= end:
            break
    return cut


class StopTexts(TextCriteria):
    """Ends a row once its new text holds a stop string.

    Args:
        tokenizer: of the text.
        stops: stop strings, none empty.
        prompt_length: tokens before the new ones, padding among them.
        ends: token ids that end a text.
        before: (rows, tokens) of the texts that the rows go on with; none for texts of their own.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        prompt_length: int,
        ends: Collection[int] = (),
        before: Sequence[Sequence[int]] = (),
    ) -> None:
        self._tokenizer, self._stops, self._prompt_length = tokenizer, stops, prompt_length
        self._ends = ends
        self._without_text = {*tokens_without_text(tokenizer, ends).values(), *ends}
        self._before = [text_before(tokenizer, row, self._without_text) for row in before]
        self._window = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops) + WIDER

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, (rows,) bool."""
        rows: list[list[int]] = input_ids[:, self._prompt_length :].tolist()
        before = self._before or [[]] * len(rows)
        ended = [self._ended(row, of_row) for row, of_row in zip(rows, before, strict=True)]
        return torch.tensor(ended, device=input_ids.device)

    def _ended(self, token_ids: list[int], before: Sequence[int]) -> bool:
        written = [token for token in token_ids if token not in self._without_text]
        newest = [*before, *written][-self._window :]
        text = str(self._tokenizer.decode(newest, clean_up_tokenization_spaces=False)) if newest else ""
        if find_stop(text, self._stops) is None:
            return False
        pieces = decode_pieces(self._tokenizer, token_ids, self._ends, before)
        return find_stop("".join(pieces), self._stops) is not None
