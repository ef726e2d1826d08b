"""Bootstrap intervals: they cover, and what is paired is drawn together."""

from __future__ import annotations

import numpy as np
import pytest

from consistentee.functional.resampling import mean_over_seeds, percentile_interval, row_weights


def test_every_draw_has_as_many_rows_and_the_same_seed_gives_the_same_draws() -> None:
    weights = row_weights(50, 200, seed=3)
    assert (weights.sum(1) == 50).all()
    assert weights.var() == pytest.approx(1, abs=0.1)  # nearly Poisson
    assert (weights == row_weights(50, 200, seed=3)).all()
    assert (weights != row_weights(50, 200, seed=4)).any()


def test_an_interval_of_a_paired_difference_is_that_of_the_normal_approximation() -> None:
    generator = np.random.default_rng(0)
    one = generator.random(400) < 0.8
    other = np.where(generator.random(400) < 0.1, ~one, one)  # differ on a tenth of the rows
    difference = one.astype(float) - other.astype(float)
    weights = row_weights(400, 4000, seed=0)
    draws = (weights @ one) / 400 - (weights @ other) / 400
    low, high = percentile_interval(draws)
    error = difference.std() / 20
    assert (low, high) == pytest.approx(
        (difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=0.004
    )
    unpaired = (weights @ one) / 400 - (row_weights(400, 4000, seed=1) @ other) / 400
    assert np.ptp(percentile_interval(unpaired)) > 1.5 * (high - low)


def test_seeds_are_drawn_too_and_widen_the_interval() -> None:
    draws = np.stack(
        [np.zeros(2000), np.ones(2000), np.full(2000, 2.0)]
    )  # three trainings, rows change nothing
    means = mean_over_seeds(draws, seed=0)
    assert set(np.round(means * 3).astype(int)) == set(range(7))
    assert means.mean() == pytest.approx(1, abs=0.03)
    assert means.std() == pytest.approx((2 / 3 / 3) ** 0.5, abs=0.02)
    # Two methods with the same number of seeds share the draws of these: a constant difference has no width.
    assert np.ptp(mean_over_seeds(draws + 0.5, seed=0) - means) == pytest.approx(0)
    assert (mean_over_seeds(draws[:1], seed=0) == 0).all()


def test_what_is_not_there_has_no_interval() -> None:
    low, high = percentile_interval(np.array([[0.0, np.nan], [1.0, 1.0]]), 0.5)
    assert low[0] == 0.25
    assert high[0] == 0.75
    assert np.isnan([low[1], high[1]]).all()
