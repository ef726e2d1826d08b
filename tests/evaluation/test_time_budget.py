"""What is measured in a given time, planned from what a row costs; no clock runs here."""

from __future__ import annotations

import math

import pytest

from consistentee.evaluation.time_budget import LEAST_REPEATS, Planner, TimeBudget

ALL, NOTHING = TimeBudget(60.0), TimeBudget(math.inf, amount=False, repeats=False, sizes=False)


def planner(budget: TimeBudget | None, sizes: int = 3, repeats: int = 5, passed: float = 0.0) -> Planner:
    times = iter([0.0])
    return Planner(budget, sizes, repeats, clock=lambda: next(times, passed))


def test_time_is_shared_out_among_what_is_left() -> None:
    plan = planner(ALL, passed=30.0)
    assert plan.share() == 10
    plan.next_size()
    assert plan.share() == 15
    assert planner(ALL, passed=99.0).share() == 0


@pytest.mark.parametrize(
    "cost, wanted",
    [
        (0.001, (512, 5)),  # 3 s of 20: all of it
        (0.01, (320, 5)),  # whole batches of 32 in six passes
        (0.1, (32, 5)),
        (0.125, (32, 4)),  # one batch in five passes
        (1.0, (32, LEAST_REPEATS)),  # takes longer than it should: fewer would say nothing
    ],
)
def test_rows_go_first_then_repetitions(cost: float, wanted: tuple[int, int]) -> None:
    assert planner(ALL).plan(cost, least=32, most=512, step=32) == wanted


def test_what_is_given_stays() -> None:
    assert planner(TimeBudget(60.0, amount=False)).plan(0.1, least=32, most=512, step=32) == (
        512,
        LEAST_REPEATS,
    )
    assert planner(TimeBudget(60.0, repeats=False), repeats=9).plan(0.1, least=32, most=512, step=1) == (
        32,
        9,
    )
    for budget in (NOTHING, None):
        assert planner(budget).plan(99.0, least=32, most=512, step=32) == (512, 5)
        assert planner(budget).fits(1e9, 32)


def test_a_part_of_a_batch_is_kept_whole_where_there_are_too_few_rows() -> None:
    assert planner(ALL).plan(9.0, least=20, most=20, step=128) == (20, LEAST_REPEATS)
    assert planner(ALL).plan(0.0, least=20, most=20, step=128) == (20, 5)


def test_what_every_pass_costs_counts() -> None:
    assert planner(ALL).plan(0.1, least=16, most=128) == (33, 5)
    assert planner(ALL).plan(0.1, least=16, most=128, fixed=1.0) == (23, 5)


def test_sizes_that_would_take_too_long_are_left_out() -> None:
    plan = planner(ALL)  # 20 s, of which it may be half as many more
    assert plan.fits(0.23, 32)
    assert not plan.fits(0.24, 32)
    assert not plan.fits(0.23, 32, fixed=0.5)
    assert planner(TimeBudget(60.0, sizes=False)).fits(99.0, 32)
    assert not planner(TimeBudget(60.0, repeats=False)).fits(0.23, 32)


def test_what_is_said_beforehand() -> None:
    assert planner(ALL).expected(1000, 0.001) == pytest.approx(6.0)
    assert planner(ALL).expected(1000, 0.1) == 60
    assert planner(NOTHING).expected(1000, 0.1) == pytest.approx(600.0)
    assert planner(NOTHING).expected(1000, 0.1, passes=10.0) == pytest.approx(660.0)
