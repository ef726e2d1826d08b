"""Certificates against closed forms, scipy, MAPIE, a slow walk, and 1,000 draws of a table whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from consistentee.functional import certificates
from consistentee.functional.bounds import (
    binomial_p_value,
    binomial_upper_bound,
    bounded_losses_allowed,
    hoeffding_bentkus_p_value,
    hoeffding_bentkus_upper_bound,
    losses_allowed,
    paired_interval,
    smallest_certifiable_rows,
)
from consistentee.functional.certificates import bound_at, certify, threshold_for_speedup, threshold_pieces
from consistentee.functional.exits import choose_exit_layer

CONFIDENCE, MAX_LOSS = 0.95, 0.03


def table(rows: int, layers: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores of rows and whether each exit disagrees: sure rows seldom do, the last layer never does."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=(rows, 1))
    depth = np.linspace(-1.0, 1.5, layers)
    scores = 1 / (1 + np.exp(-2 * (ease + depth + rng.normal(scale=0.7, size=(rows, layers)))))
    wrong = rng.random((rows, layers)) < 0.5 / (1 + np.exp(3 * (ease + depth)))
    wrong[:, -1] = False
    return torch.from_numpy(scores).float(), torch.from_numpy(wrong).float()


def expected_loss(scores: Tensor, losses: Tensor, threshold: float) -> float:
    """Mean loss at a threshold, over all rows of a table."""
    return float(losses.gather(1, choose_exit_layer(scores, threshold)[:, None] - 1).double().mean())


class TestBounds:
    @pytest.mark.parametrize("losses, rows", [(0, 1), (0, 244), (7, 2000), (12, 2000), (99, 100), (100, 100)])
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    def test_binomial_bound_is_scipys_exact_interval(self, losses: int, rows: int, confidence: float) -> None:
        interval = stats.binomtest(losses, rows).proportion_ci(2 * confidence - 1, method="exact")
        assert binomial_upper_bound(losses, rows, confidence) == pytest.approx(interval.high, abs=1e-12)

    def test_without_losses_it_has_a_closed_form(self) -> None:
        assert binomial_upper_bound(0, 500, 0.95) == pytest.approx(1 - 0.05 ** (1 / 500), abs=1e-14)

    @pytest.mark.parametrize("losses, rows, max_loss", [(0, 299, 0.01), (13, 77, 0.2), (3, 400, 0.02)])
    def test_p_value_is_scipys_one_sided_test(self, losses: int, rows: int, max_loss: float) -> None:
        expected = stats.binomtest(losses, rows, max_loss, alternative="less").pvalue
        assert float(binomial_p_value(losses, rows, max_loss)) == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize(
        "losses, rows, max_loss, expected, binary",
        [  # MAPIE 1.6.0, mapie.risk_control.methods.compute_hoeffding_bentkus_p_value(losses / rows, rows, max_loss)
            (4.5, 1000, 0.01, 0.14631917, None),
            (0.0, 299, 0.01, 0.04953626, 0.04953626),
            (10.25, 200, 0.1, 0.04252086, None),
            (9.5, 50, 0.3, 0.20764433, None),
            (13.0, 77, 0.2, 0.78370575, 0.30142472),  # with binary=True
            (3.0, 400, 0.02, 0.11131814, 0.04095166),
        ],
    )
    def test_p_values_are_mapies(
        self, losses: float, rows: int, max_loss: float, expected: float, binary: float | None
    ) -> None:
        assert float(hoeffding_bentkus_p_value(losses, rows, max_loss)) == pytest.approx(expected, abs=1e-8)
        if binary is not None:
            assert float(binomial_p_value(losses, rows, max_loss)) == pytest.approx(binary, abs=1e-8)

    @pytest.mark.parametrize("losses, rows", [(0.0, 50), (4.5, 1000), (30.0, 60), (60.0, 60)])
    def test_hoeffding_bentkus_bound_is_where_its_p_value_ends(self, losses: float, rows: int) -> None:
        bound = hoeffding_bentkus_upper_bound(losses, rows, 0.9)
        assert bound >= losses / rows
        if bound < 1:
            assert float(hoeffding_bentkus_p_value(losses, rows, bound)) == pytest.approx(0.1, abs=1e-6)

    @pytest.mark.parametrize("rows", [10, 298, 299, 473, 2000, 40_000])
    @pytest.mark.parametrize("max_loss", [0.01, 0.02, 0.3])
    def test_most_losses_that_certify(self, rows: int, max_loss: float) -> None:
        allowed = losses_allowed(rows, max_loss)
        assert allowed == -1 or stats.binom.cdf(allowed, rows, max_loss) <= 0.05
        assert stats.binom.cdf(allowed + 1, rows, max_loss) > 0.05
        assert allowed == -1 or binomial_upper_bound(allowed, rows) <= max_loss
        assert binomial_upper_bound(allowed + 1, rows) > max_loss
        fractional = bounded_losses_allowed(rows, max_loss)
        assert (fractional == -1) == (allowed == -1)
        if fractional > 0:
            assert fractional < allowed + 1
            assert float(hoeffding_bentkus_p_value(fractional, rows, max_loss)) <= 0.05 + 1e-12
            assert float(hoeffding_bentkus_p_value(fractional + 1e-6, rows, max_loss)) > 0.05

    def test_fewest_rows_that_certify(self) -> None:
        assert smallest_certifiable_rows(0.01, 0.95) == 299
        for max_loss in (0.001, 0.005, 0.01, 0.02, 0.1, 0.5):
            for confidence in (0.8, 0.9, 0.95, 0.999):
                rows = smallest_certifiable_rows(max_loss, confidence)
                assert (1 - max_loss) ** rows <= (1 - confidence) * (1 + 1e-12)
                assert losses_allowed(rows, max_loss, confidence) == 0
                assert losses_allowed(rows - 1, max_loss, confidence) == -1

    def test_paired_interval_covers_as_stated(self) -> None:
        rng, lost, won, rows = np.random.default_rng(0), 0.02, 0.015, 400
        draws = rng.multinomial(rows, [lost, won, 1 - lost - won], size=2000)
        ends = [paired_interval(int(one), int(other), rows) for one, other, _ in draws]
        covered = np.mean([low <= lost - won <= high for low, high in ends])
        assert 0.93 <= covered <= 0.985
        low, high = paired_interval(0, 0, rows)
        assert low == pytest.approx(-high)
        assert high > 0.005  # no loss seen is not: no loss

    def test_an_agreement_is_not_won(self) -> None:
        """Where the first way cannot be wrong the difference is a share, and what is below 0 cannot be."""
        for lost in (0, 2, 40):
            exact = stats.binomtest(lost, 200).proportion_ci(0.95, method="exact")
            assert paired_interval(lost, 0, 200, can_win=False) == pytest.approx((exact.low, exact.high))

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda: losses_allowed(10, 0.0), r"max_loss must be in \(0, 1\), got 0"),
            (lambda: smallest_certifiable_rows(1.0), r"max_loss must be in \(0, 1\), got 1"),
            (lambda: smallest_certifiable_rows(0.1, 1.0), r"confidence must be in \(0, 1\), got 1"),
            (lambda: binomial_upper_bound(0, 0), "num_rows must be at least 1, got 0"),
        ],
    )
    def test_values_out_of_range(self, call: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestPieces:
    @pytest.mark.parametrize("criterion", ["policy", "patience"])
    @pytest.mark.parametrize("layers", [1, 2, 5])
    def test_every_threshold_agrees_with_running_all_layers_and_choosing(
        self, criterion: str, layers: int
    ) -> None:
        rng = np.random.default_rng(layers)
        values = (
            rng.integers(0, 5, (40, layers)) if criterion == "patience" else rng.random((40, layers)).round(1)
        )
        scores = torch.from_numpy(values).float()
        losses = torch.from_numpy(rng.random((40, layers)))
        pieces = threshold_pieces(scores, losses, criterion)
        inside = [pieces.threshold(piece) for piece in range(len(pieces))]
        assert inside == sorted(inside, reverse=True)
        low = 0.25 if criterion == "patience" else 0.0
        for threshold in [*inside, *np.linspace(low, 1 if criterion == "policy" else layers, 41)]:
            piece = pieces.piece_of(threshold)
            chosen = choose_exit_layer(scores, float(threshold))
            expected = losses.gather(1, chosen[:, None] - 1).sum()
            assert pieces.losses[piece] == pytest.approx(float(expected))
            assert pieces.mean_exit_layer(piece) == pytest.approx(float(chosen.double().mean()))
        assert [pieces.piece_of(threshold) for threshold in inside] == list(range(len(pieces)))

    def test_neighbouring_floats_have_thresholds_of_their_own(self) -> None:
        one = np.float32(0.9)
        scores = torch.tensor([[float(one), 1.0], [float(np.nextafter(one, np.float32(1))), 1.0]])
        pieces = threshold_pieces(scores, torch.zeros(2, 2))
        layers = [float(choose_exit_layer(scores, pieces.threshold(piece)).sum()) for piece in range(3)]
        assert layers == [4, 3, 2]
        assert layers == pieces.layers.tolist()

    def test_patience_keeps_its_usual_thresholds(self) -> None:
        scores = torch.tensor([[1.0, 2.0, 3.0]])
        pieces = threshold_pieces(scores, torch.zeros(1, 3), "patience")
        assert [pieces.threshold(piece) for piece in range(3)] == [2.5, 1.5, 0.5]

    def test_what_is_no_table(self) -> None:
        with pytest.raises(ValueError, match="scores and losses must both be"):
            threshold_pieces(torch.zeros(2, 3), torch.zeros(2, 2))
        with pytest.raises(ValueError, match="at least one row"):
            threshold_pieces(torch.zeros(0, 3), torch.zeros(0, 3))
        with pytest.raises(ValueError, match="finite"):
            threshold_pieces(torch.full((2, 3), math.nan), torch.zeros(2, 3))


class TestCertify:
    @pytest.mark.parametrize("seed", range(6))
    def test_it_is_the_slow_walk(self, seed: int) -> None:
        scores, losses = table(700, seed=seed)
        found = certify(scores, losses, max_loss=MAX_LOSS)
        values = sorted({0.0, *scores[:, :-1].flatten().tolist()})
        last = None
        for lower in reversed(values):
            chosen = choose_exit_layer(scores, lower)
            lost = int(losses.gather(1, chosen[:, None] - 1).sum())
            if stats.binom.cdf(lost, 700, MAX_LOSS) > 0.05:
                break
            last = (lower, lost, chosen)
        assert last is not None
        assert found is not None
        assert found.threshold >= last[0]
        assert torch.equal(choose_exit_layer(scores, found.threshold), last[2])
        assert (found.losses, found.mean_exit_layer) == (
            last[1],
            pytest.approx(float(last[2].double().mean())),
        )
        assert found.losses_allowed == losses_allowed(700, MAX_LOSS) >= found.losses
        assert found.bound == pytest.approx(binomial_upper_bound(found.losses, 700))
        assert found.bound <= MAX_LOSS
        assert found.layer_speedup == pytest.approx(6 / found.mean_exit_layer)

    def test_it_stops_at_the_first_failure_whatever_lies_beyond(self) -> None:
        """Losses that go up and down again with the threshold: what lies behind the hump is not certified."""
        scores = torch.tensor([[0.2, 0.8, 1.0]]).expand(1000, 3)
        losses = torch.tensor([[0.0, 1.0, 0.0]]).expand(1000, 3)
        found = certify(scores, losses, max_loss=0.01)
        assert found is not None
        assert found.mean_exit_layer == 3
        assert found.threshold >= 0.8

    def test_too_few_rows(self) -> None:
        scores, losses = torch.ones(298, 2), torch.zeros(298, 2)
        assert certify(scores, losses, max_loss=0.01) is None
        found = certify(torch.ones(299, 2), torch.zeros(299, 2), max_loss=0.01)
        assert found is not None
        assert (found.layer_speedup, found.losses, found.losses_allowed) == (2, 0, 0)

    def test_thresholds_of_other_rows(self) -> None:
        scores, losses = table(2000)
        every = certify(scores, losses, max_loss=MAX_LOSS)
        assert every is not None
        given = [1.0, 0.99, every.threshold, every.threshold - 0.3]
        found = certify(scores, losses, max_loss=MAX_LOSS, thresholds=given[::-1])
        assert found == every
        assert certify(scores, losses, max_loss=MAX_LOSS, thresholds=[0.0]) is None
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
            certify(scores, losses, max_loss=MAX_LOSS, thresholds=[1.5])

    def test_losses_between_0_and_1(self) -> None:
        scores, losses = table(2000)
        with pytest.raises(ValueError, match="losses must be 0 or 1"):
            certify(scores, losses / 2, max_loss=MAX_LOSS)
        with pytest.raises(ValueError, match=r"losses must be in \[0, 1\]"):
            certify(scores, losses * 2, max_loss=MAX_LOSS, bounded=True)
        found = certify(scores, losses / 2, max_loss=MAX_LOSS, bounded=True)
        binary = certify(scores, losses, max_loss=MAX_LOSS)
        assert found is not None
        assert binary is not None
        assert found.losses <= (found.losses_allowed or 0)
        assert found.bound <= MAX_LOSS + 1e-9
        assert found.mean_exit_layer < binary.mean_exit_layer  # half the losses reach further

    def test_bound_at_a_given_threshold(self) -> None:
        scores, losses = table(500)
        found = bound_at(scores, losses, 0.7)
        lost = round(500 * expected_loss(scores, losses, 0.7))
        assert (found.threshold, found.losses, found.max_loss, found.losses_allowed) == (
            0.7,
            lost,
            None,
            None,
        )
        assert found.bound == pytest.approx(binomial_upper_bound(lost, 500))

    def test_safest_threshold_for_a_speedup(self) -> None:
        scores, _ = table(900)
        threshold = threshold_for_speedup(scores, 2.0)
        safer = np.nextafter(np.float32(threshold), np.float32(1))
        pieces = threshold_pieces(scores, torch.zeros_like(scores))
        piece = pieces.piece_of(threshold)
        assert 6 / pieces.mean_exit_layer(piece) >= 2.0 > 6 / pieces.mean_exit_layer(piece - 1)
        assert safer <= pieces.low[piece - 1]
        assert threshold_for_speedup(scores, 2.0, judged_rows=900) < threshold
        assert choose_exit_layer(scores, threshold_for_speedup(scores, 6.0)).max() == 1
        with pytest.raises(ValueError, match=r"min_speedup must be in \[1, 6\] \(layers\), got 7"):
            threshold_for_speedup(scores, 7.0)


class TestThePromise:
    """1,000 times: rows are drawn from a table, a threshold is certified on them, and the table knows the truth."""

    DRAWS, ROWS = 1000, 600

    def broken(self, population: tuple[Tensor, Tensor], judge: tuple[Tensor, Tensor], **how: Any) -> float:
        """Share of draws whose certified threshold loses more than promised on the table `judge`."""
        rng = np.random.default_rng(1)
        truth = threshold_pieces(*judge)
        certifying, total = 0, len(population[0])
        for _ in range(self.DRAWS):
            drawn = torch.from_numpy(rng.integers(0, total, self.ROWS))
            found = certify(population[0][drawn], population[1][drawn], max_loss=MAX_LOSS, **how)
            if found is not None:
                risk = truth.losses[truth.piece_of(found.threshold)] / truth.num_rows
                certifying += risk > MAX_LOSS
        return certifying / self.DRAWS

    def test_it_is_broken_no_more_often_than_stated(self) -> None:
        whole = table(20_000, seed=7)
        error = math.sqrt(0.05 * 0.95 / self.DRAWS)
        assert 0.005 < self.broken(whole, whole) <= 0.05 + 2 * error  # kept, and not by being useless
        assert (
            self.broken(whole, whole, confidence=0.8) > 0.05 + 2 * error
        )  # the stated confidence is what counts

    def test_of_fractional_losses_too(self) -> None:
        scores, losses = table(20_000, seed=8)
        whole = (scores, losses * 0.6)
        error = math.sqrt(0.05 * 0.95 / self.DRAWS)
        assert self.broken(whole, whole, bounded=True) <= 0.05 + 2 * error

    def test_the_best_looking_threshold_breaks_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That the test can fail: to allow as many losses as the promise times the rows is no certificate."""
        monkeypatch.setattr(certificates, "losses_allowed", lambda rows, loss, confidence: int(rows * loss))
        whole = table(20_000, seed=7)
        assert self.broken(whole, whole) > 0.2

    def test_it_ends_where_rows_are_of_another_kind(self) -> None:
        """Rows whose exits are wrong twice as often: the promise was not about them."""
        scores, losses = table(20_000, seed=7)
        drifted = torch.maximum(
            losses, losses[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))]
        )
        drifted[:, -1] = 0
        assert self.broken((scores, losses), (scores, drifted)) > 0.9
