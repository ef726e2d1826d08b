"""Bounds that hold at all times: against simulation, and against the martingale that they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from consistentee.functional.confidence_sequences import (
    LossBounds,
    claims_grid,
    guessed_loss,
    log_growth,
)


@pytest.mark.parametrize("mean", [0.002, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("above", [True, False])
def test_a_true_claim_is_rejected_at_any_time_as_rarely_as_promised(mean: float, above: bool) -> None:
    sequences, steps, confidence = 800, 1500, 0.9
    rng = np.random.default_rng(3)
    losses, capital = np.zeros(sequences), np.zeros(sequences)
    ever = np.zeros(sequences, dtype=bool)
    for rows in range(steps):
        loss = rng.random(sequences) < mean  # the claim's own edge: its worst case
        capital += log_growth(loss, guessed_loss(losses, rows), mean, above=above)
        losses += loss
        ever |= capital >= -math.log(1 - confidence)
    error = math.sqrt(confidence * (1 - confidence) / sequences)
    assert ever.mean() <= 1 - confidence + 3 * error
    if mean >= 0.01:
        assert ever.any()  # not so careful that it never speaks


def test_looking_at_a_fixed_size_bound_again_and_again_breaks_it() -> None:
    """What the sequence is for: an exact binomial test after every row is wrong much more often than it says."""
    from consistentee.functional.bounds import binomial_p_value

    rng, sequences, mean = np.random.default_rng(4), 400, 0.05
    losses, ever = np.zeros(sequences), np.zeros(sequences, dtype=bool)
    for rows in range(1, 800):
        losses += rng.random(sequences) < mean
        ever |= 1 - binomial_p_value(losses - 1, rows, mean) <= 0.05
    assert ever.mean() > 0.2


def test_expected_growth_is_at_most_one() -> None:
    guess, means = np.linspace(0.01, 0.9, 30)[:, None], np.linspace(0.005, 0.95, 40)
    for above in (True, False):
        won, lost = (np.exp(log_growth(loss, guess, means, above=above)) for loss in (1, 0))
        for share in (1.0, 0.5) if above else (1.0,):  # at the claim's edge it is 1, inside at most 1
            expected = share * means * won + (1 - share * means) * lost
            assert expected.max() <= 1 + 1e-12
        assert np.allclose(means * won + (1 - means) * lost, 1)


def test_bounds_hold_together_and_close_in() -> None:
    rng, mean = np.random.default_rng(5), 0.04
    wrong = 0
    for _ in range(40):
        bounds = LossBounds(0.9, claims_grid(200))
        broken = False
        for loss in rng.random(600) < mean:
            before = bounds.lower, bounds.upper
            bounds.add(bool(loss))
            assert before[0] <= bounds.lower <= 1
            assert before[1] >= bounds.upper
            broken = broken or bounds.lower > mean or bounds.upper < mean
        wrong += broken
        assert bounds.upper < 0.2
    assert wrong / 40 <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 40)


def test_a_broken_promise_is_noticed() -> None:
    rng, bounds = np.random.default_rng(6), LossBounds(0.95)
    rows = 0
    while bounds.lower <= 0.01:
        bounds.add(bool(rng.random() < 0.1))
        rows += 1
    assert rows < 200
    assert bounds.losses <= bounds.rows == rows


def test_only_losses_drive_the_bounds_to_the_end() -> None:
    bounds = LossBounds()
    for _ in range(100):
        bounds.add(True)
    assert bounds.lower > 0.8
    assert bounds.upper == 1.0
    with pytest.raises(ValueError, match="confidence must be in"):
        LossBounds(1.0)
