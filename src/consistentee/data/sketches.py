"""Whether texts have been seen before, by a sketch that is small whatever the number of texts.

The sketch of a set of texts is its smallest hashes. Of other texts, those whose hash lies in the sketch's range are in
the set exactly if their hash is in the sketch: their share estimates the whole overlap.

Source: bottom-k sketches, Cohen and Kaplan, "Summarizing data using bottom-k sketches" (PODC 2007).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable

SKETCH_SIZE = 256
"""Hashes of a sketch, at most."""

_DIGITS = 12  # of a hash, hexadecimal: two different texts share one with a chance of 4e-15


def text_sketch(texts: Iterable[tuple[str, ...]]) -> str:
    """The sketch of a set of texts: its smallest hashes, ascending, written one behind the other.

    Example:
        >>> text_sketch([("a",), ("b",)]) == text_sketch([("b",), ("a",), ("b",)])
        True
    """
    return "".join(heapq.nsmallest(SKETCH_SIZE, {_hash(parts) for parts in texts}))


def seen_rows(sketch: str, texts: Iterable[tuple[str, ...]]) -> tuple[int, int]:
    """How many texts are in the set of a sketch, and of how many this can be told: all, or those in its range.

    Example:
        >>> seen_rows(text_sketch([("a",), ("b",)]), [("a",), ("c",)])
        (1, 2)
    """
    known = {sketch[start : start + _DIGITS] for start in range(0, len(sketch), _DIGITS)}
    if not known:
        return 0, 0
    highest = max(known) if len(known) >= SKETCH_SIZE else "g"  # beyond all hexadecimal digits
    in_range = [found for found in map(_hash, texts) if found <= highest]
    return sum(found in known for found in in_range), len(in_range)


def _hash(parts: tuple[str, ...]) -> str:
    content = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest()
