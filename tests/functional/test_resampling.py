"""Bootstrap intervals: they cover, and what is paired is drawn together."""

from __future__ import annotations

import numpy as np
import pytest

from consistentee.functional.resampling import Draws, Means, percentile_interval, row_weights


def mean_over_seeds(draws: Draws, seed: int) -> Draws:
    return Means.over_trainings(draws).with_trainings(seed)


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


def test_where_rows_change_nothing_the_interval_is_students() -> None:
    trainings = np.array([0.0, 1.0, 2.5])
    draws = np.repeat(trainings[:, None], 2000, axis=1)
    means = mean_over_seeds(draws, seed=0)
    reach = 4.3027 * trainings.std(ddof=1) / 3**0.5  # the 97.5 % quantile of t with 2 degrees
    assert percentile_interval(means) == pytest.approx((7 / 6 - reach, 7 / 6 + reach), rel=0.02)
    # Two methods with the same number of seeds have the same order: a constant difference has no width.
    assert np.ptp(mean_over_seeds(draws + 0.5, seed=0) - means) == pytest.approx(0)
    assert (mean_over_seeds(draws[:1], seed=0) == 0).all()


def test_where_trainings_agree_the_interval_is_that_of_rows() -> None:
    draws = np.random.default_rng(0).normal(size=(1, 500, 2)).repeat(3, axis=0)
    assert mean_over_seeds(draws, seed=0) == pytest.approx(draws[0])


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.5])
def test_intervals_over_few_seeds_cover(seeds: int, deviation: float) -> None:
    """From rows alone to trainings alone; 95 % of 400 intervals are 380, give or take 4.4."""
    generator = np.random.default_rng([seeds, int(100 * deviation)])
    rows, draws, trials = 100, 200, 400
    weights = row_weights(rows, draws, seed=0) / rows
    hits = 0
    for _ in range(trials):
        trainings = generator.normal(0, deviation, seeds)
        hard = generator.normal(0, 0.2, rows)  # rows are as hard for all trainings
        values = trainings[:, None] + hard + generator.normal(0, 0.2, (seeds, rows))
        low, high = percentile_interval(mean_over_seeds(values @ weights.T, seed=1))
        hits += low <= 0 <= high
    assert hits / trials >= 0.925


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("sets", [2, 8])
def test_means_over_sets_are_the_surer_the_more_there_are(seeds: int, sets: int) -> None:
    generator = np.random.default_rng([seeds, sets])
    hits, widths, alone = 0, [], []
    for _ in range(400):
        parts = []
        for place in range(sets):
            trainings = generator.normal(0, 1 + place % 2, seeds)
            parts.append(Means.over_trainings(np.repeat(trainings[:, None], 400, axis=1)))
        low, high = percentile_interval(Means.over_sets(parts).with_trainings(seed=1))
        hits += low <= 0 <= high
        widths.append(high - low)
        alone.append(np.ptp(percentile_interval(parts[0].with_trainings(seed=1))))
    assert hits / 400 >= 0.93
    if sets == 8:
        assert np.median(widths) < np.median(alone)


def test_sets_of_one_training_add_their_rows_alone() -> None:
    draws = np.random.default_rng(0).normal(size=(2, 1, 500, 3))
    means = Means.over_sets([Means.over_trainings(one) for one in draws])
    assert means.with_trainings(seed=1) == pytest.approx(means.draws)
    assert means.draws.std(0) == pytest.approx(draws.std((0, 1, 2)) / 2**0.5, rel=0.1)


def test_what_is_not_there_has_no_interval() -> None:
    low, high = percentile_interval(np.array([[0.0, np.nan], [1.0, 1.0]]), 0.5)
    assert low[0] == 0.25
    assert high[0] == 0.75
    assert np.isnan([low[1], high[1]]).all()
