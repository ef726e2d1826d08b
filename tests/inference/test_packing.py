"""Rows without padding: where their tokens lie, groups for attention, rows taken out and put together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from consistentee.inference.encoder.packing import (
    MAX_GROUP_WASTE,
    MOST_PADDED,
    Layout,
    PackedBatch,
    pack,
    padded_count,
    similar_rows,
)

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> PackedBatch:
    """A batch whose token states are (row, position)."""
    states = [(row, position) for row, length in enumerate(lengths) for position in range(length)]
    return pack(torch.tensor(states, dtype=torch.float32), lengths)


def rows_of(batch: PackedBatch) -> list[list[tuple[int, ...]]]:
    """The states row by row."""
    flat = [tuple(int(value) for value in state) for state in batch.hidden_states.tolist()]
    starts = batch.layout.starts.tolist()
    return [flat[start : start + n] for start, n in zip(starts, batch.layout.lengths, strict=True)]


@given(LENGTHS)
def test_rows_that_are_padded_together_are_similar(lengths: list[int]) -> None:
    groups = similar_rows(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    padded = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    assert padded <= MOST_PADDED * sum(lengths)
    if len(lengths) * max(lengths) <= MOST_PADDED * sum(lengths):
        assert groups == [list(range(len(lengths)))]


def test_one_long_row_pads_no_other() -> None:
    assert similar_rows([6, 512, 6, 6]) == [[0, 2, 3], [1]]


@given(LENGTHS)
def test_groups_cover_every_token_once_and_waste_little(lengths: list[int]) -> None:
    layout = Layout(lengths, CPU)
    assert sum(group.rows for group in layout.groups) == len(lengths)
    row = token = 0
    for group in layout.groups:
        inside = lengths[row : row + group.rows]
        assert (group.start, group.end, group.width) == (token, token + sum(inside), max(inside))
        assert 1 - sum(inside) / (group.rows * group.width) <= MAX_GROUP_WASTE + 1e-9
        if group.padding is None:
            assert set(inside) == {group.width}
        else:
            gather, scatter, mask = group.padding
            assert mask.sum(1).tolist() == inside
            assert gather[scatter].tolist() == list(range(group.start, group.end))
            assert int(gather.min()) >= group.start
            assert int(gather.max()) < group.end
        row, token = row + group.rows, group.end


@given(LENGTHS, st.data())
def test_select_and_merge_keep_rows_whole(lengths: list[int], data: st.DataObject) -> None:
    batch = numbered(lengths)
    every = rows_of(batch)
    kept = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    selected = batch.select(kept)
    assert rows_of(selected) == [every[row] for row in kept]
    assert rows_of(PackedBatch.merge([selected, batch])) == [*(every[row] for row in kept), *every]


def test_first_tokens_and_rows_of_tokens() -> None:
    layout = Layout([2, 1, 3], CPU)
    assert layout.first_tokens.tolist() == [0, 2, 3]
    assert layout.row_of_token.tolist() == [0, 0, 1, 2, 2, 2]
    assert layout.tokens_of([0, 2]).tolist() == [0, 1, 3, 4, 5]


def test_few_kernels_are_enough() -> None:
    counts = [padded_count(tokens) for tokens in range(1, 4097)]
    assert all(count >= tokens for tokens, count in enumerate(counts, start=1))
    assert counts == sorted(counts)
    assert all(count - tokens <= 0.25 * tokens for tokens, count in enumerate(counts, start=1))
    assert len(set(counts)) < 200


def test_filler_is_finite_and_beyond_the_rows() -> None:
    batch = pack(torch.ones(65, 4), [60, 5])
    assert batch.hidden_states.shape == (80, 4)
    assert batch.layout.tokens == 65
    assert torch.isfinite(batch.hidden_states).all()
    assert len(pack(torch.ones(208, 4), [208]).hidden_states) == 208
