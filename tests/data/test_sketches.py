"""Sketches against the whole sets of texts."""

from __future__ import annotations

import pytest

from consistentee.data.sketches import SKETCH_SIZE, seen_rows, text_sketch


def texts(first: int, count: int) -> list[tuple[str, ...]]:
    return [(f"text {number}", "and more") for number in range(first, first + count)]


@pytest.mark.parametrize("known", [1, 100, SKETCH_SIZE, 20_000])
def test_overlap_is_told(known: int) -> None:
    sketch = text_sketch(texts(0, known))
    assert len(sketch) == 12 * min(known, SKETCH_SIZE)
    assert seen_rows(sketch, texts(known, 5000))[0] == 0
    assert seen_rows(sketch, texts(0, known)) == (min(known, SKETCH_SIZE),) * 2
    half = [*texts(0, known), *texts(known, known)]
    seen, told = seen_rows(sketch, half)
    assert seen / told == pytest.approx(0.5, abs=0.1 if known > SKETCH_SIZE else 1e-9)


def test_order_and_repetition_do_not_count() -> None:
    some = texts(0, 1000)
    assert text_sketch(some) == text_sketch([*some[::-1], *some[:10]])
    assert text_sketch([("a", "b")]) != text_sketch([("ab",)])
    assert seen_rows("", some) == seen_rows(text_sketch(some), []) == (0, 0)


def test_how_many_rows_can_be_told() -> None:
    sketch = text_sketch(texts(0, 20_000))
    seen, told = seen_rows(sketch, texts(20_000, 20_000))
    assert seen == 0
    assert told == pytest.approx(SKETCH_SIZE, rel=0.3)
    assert seen_rows(text_sketch(texts(0, 10)), texts(5, 10)) == (5, 10)
