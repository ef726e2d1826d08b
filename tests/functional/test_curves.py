"""The trade-off curve, its score and the choice of a threshold, on tables small enough to work by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consistentee.functional.criteria import CRITERIA, exit_scores
from consistentee.functional.curves import (
    BUDGETS,
    CurvePoint,
    area_under_curve,
    best_accuracy,
    budget_hits,
    choose_threshold,
    curve_of_thresholds,
    curve_score,
    depth_thresholds,
    effect_error,
    layers_saved,
    score_standard_error,
    threshold_within,
    thresholds_within,
    trade_off_curve,
)
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.metrics import effects_of_changes, macro_f1
from consistentee.functional.signals import confidence_scores, static_scores
from tiny import random_signals


def point(threshold: float, accuracy: float, mean_exit_layer: float) -> CurvePoint:
    return CurvePoint(threshold, accuracy, mean_exit_layer, 12 / mean_exit_layer)


def test_trade_off_curve_by_hand():
    predictions = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    labels = torch.tensor([1, 1, 0])
    layer_logits = torch.nn.functional.one_hot(predictions, 2).float()
    scores = torch.tensor([[0.2, 0.6, 0.1], [0.9, 0.9, 0.9], [0.3, 0.4, 0.5]])
    points = {p.threshold: p for p in trade_off_curve(scores, layer_logits.argmax(-1) == labels[:, None])}

    assert points[0.0].accuracy == pytest.approx(2 / 3)  # all leave at once: wrong, right, right
    assert (points[0.0].mean_exit_layer, points[0.0].layer_speedup) == (1.0, 3.0)
    at_03 = next(p for t, p in points.items() if t == pytest.approx(0.3))
    assert at_03.accuracy == pytest.approx(1.0)  # leave at 2, 1, 2: all right
    assert at_03.mean_exit_layer == pytest.approx(5 / 3)
    assert at_03.layer_speedup == pytest.approx(9 / 5)
    assert points[1.0].accuracy == pytest.approx(2 / 3)  # all at the top: right, right, wrong
    assert (points[1.0].mean_exit_layer, points[1.0].layer_speedup) == (3.0, 1.0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_trade_off_curve_agrees_with_a_loop(criterion: str):
    layer_logits, labels, exit_probs = torch.randn(30, 4, 3), torch.randint(3, (30,)), torch.rand(30, 4)
    scores = exit_scores(criterion, layer_logits, exit_probs, **random_signals(30, 4, 3))
    points = trade_off_curve(scores, layer_logits.argmax(-1) == labels[:, None], criterion)
    assert [p.mean_exit_layer for p in points] == sorted(p.mean_exit_layer for p in points)
    for p in points:
        layers = choose_exit_layer(scores, p.threshold).tolist()
        right = [
            int(layer_logits[row, layer - 1].argmax() == labels[row]) for row, layer in enumerate(layers)
        ]
        assert p.accuracy == pytest.approx(sum(right) / 30)
        assert p.mean_exit_layer == pytest.approx(sum(layers) / 30)
        assert p.layer_speedup == pytest.approx(4 / p.mean_exit_layer)


def test_curve_score_takes_the_best_accuracy_at_each_speed_or_more():
    points = [point(0.0, 0.6, 3.0), point(0.5, 0.8, 6.0), point(0.7, 0.7, 8.0), point(1.0, 0.9, 12.0)]
    # speeds 4x, 2x, 1.5x, 1x; the point at 1.5x is beaten by the one at 2x
    best = {1.25: 0.8, 1.5: 0.8, 2.0: 0.8, 2.5: 0.6, 3.0: 0.6, 4.0: 0.6}
    assert set(best) == set(BUDGETS)
    assert curve_score(points) == pytest.approx(sum(best.values()) / 6)


def test_curve_score_counts_a_speed_never_reached_as_nothing():
    assert curve_score([point(1.0, 0.9, 12.0)]) == 0
    assert curve_score([]) == 0


def test_choose_threshold_takes_the_fewest_layers_above_the_floor():
    points = [point(0.9, 0.90, 10), point(0.3, 0.88, 4), point(0.1, 0.70, 2), point(0.6, 0.89, 7)]
    assert choose_threshold(points, 0.885) == 0.6
    assert choose_threshold(points, 0.88) == 0.3
    assert choose_threshold(points, 0.0) == 0.1


def test_choose_threshold_falls_back_to_the_best():
    points = [point(0.1, 0.70, 2), point(0.6, 0.92, 7), point(1.0, 0.90, 12)]
    assert choose_threshold(points, 0.95) == 0.6


def test_choose_threshold_falls_back_to_full_depth_where_that_reaches_the_floor():
    """Smoothed with the shallower points beside it full depth would not reach it, and others would be smoother."""
    accuracies = [0.5] * 30 + [0.895] * 6 + [0.88] * 3 + [0.9]
    points = [point(i / 40, accuracy, 1 + i / 4) for i, accuracy in enumerate(accuracies)]
    assert choose_threshold(points, 0.9) == 39 / 40
    assert choose_threshold(points, 0.91) == 35 / 40  # nothing reaches it: the best smoothed


def test_choose_threshold_passes_over_a_lucky_bump():
    accuracies = [0.70, 0.71, 0.72, 0.91, 0.74, 0.75, 0.76, *[0.90] * 33]
    points = [point(i / 40, accuracy, 1 + i / 4) for i, accuracy in enumerate(accuracies)]
    chosen = choose_threshold(points, 0.90)
    assert chosen > 6 / 40
    assert chosen < 20 / 40


def test_choose_threshold_accepts_a_flat_curve_at_the_floor():
    points = [point(i / 40, 0.9, 1 + i / 4) for i in range(40)]
    assert choose_threshold(points, 0.9) == 0.0


def test_budget_hits_add_up_to_the_score():
    torch.manual_seed(0)
    layer_logits, labels = torch.randn(60, 5, 3), torch.randint(3, (60,))
    scores, correct = confidence_scores(layer_logits), layer_logits.argmax(-1) == labels[:, None]
    points = trade_off_curve(scores, correct, "confidence")
    hits = budget_hits(scores, correct, points)
    assert hits.shape == (60,)
    assert int(hits.min()) >= 0
    assert int(hits.max()) <= len(BUDGETS)
    assert float(hits.double().mean()) / len(BUDGETS) == pytest.approx(curve_score(points))


def test_thresholds_by_another_quality_agree_with_a_loop():
    torch.manual_seed(3)
    layer_logits, labels = torch.randn(200, 6, 3), torch.randint(3, (200,))
    layer_logits[:, -1, :].scatter_add_(1, labels[:, None], torch.full((200, 1), 2.0))
    predictions, scores = layer_logits.argmax(-1), confidence_scores(layer_logits)
    correct = predictions == labels[:, None]
    points = trade_off_curve(scores, correct, "confidence")

    def f1(exit_layer: torch.Tensor) -> float:
        at_exit = [int(predictions[row, layer - 1]) for row, layer in enumerate(exit_layer.tolist())]
        return macro_f1(at_exit, labels)

    qualities = [f1(choose_exit_layer(scores, p.threshold)) for p in points]
    full, top = macro_f1(predictions[:, -1], labels), float(correct[:, -1].float().mean())
    for loss in (0.0, 0.05, 0.2):
        chosen = threshold_within(points, scores, correct, "confidence", max_loss=loss, quality=f1)
        assert chosen == choose_threshold(points, full - loss, qualities)
    chosen = threshold_within(points, scores, correct, "confidence", max_loss=0.05)
    assert chosen == choose_threshold(points, top - 0.05)


@pytest.mark.parametrize("groups", [[1] * 40, [1, 2, 3, 4, 30]])
def test_the_standard_error_of_a_score_is_that_of_a_mean_or_of_clusters(groups: list[int]):
    counts = torch.tensor(groups)
    hits, others = (torch.randint(7, (len(groups),)) * counts for _ in range(2))
    found = score_standard_error(hits, others, counts)
    if set(groups) == {1}:
        differences = (hits - others).double() / len(BUDGETS)
        assert found == pytest.approx(float(differences.std() / len(groups) ** 0.5))
    else:
        mean = float((hits - others).sum() / counts.sum()) / len(BUDGETS)
        spread = sum(
            (float(h - o) / 6 - mean * float(c)) ** 2 for h, o, c in zip(hits, others, counts, strict=True)
        )
        assert found == pytest.approx(spread**0.5 / 40)


def test_a_curve_reaches_from_the_first_layer_to_the_last():
    scores, correct = torch.rand(240, 4), torch.rand(240, 4) < 0.7
    points = trade_off_curve(scores, correct, "softmax_margin")
    assert min(p.mean_exit_layer for p in points) == 1
    assert max(p.mean_exit_layer for p in points) == 4
    assert len(points) <= 202
    assert min(p.threshold for p in trade_off_curve(scores - 1.5, correct, "state_similarity")) == -1


def test_thresholds_are_at_equal_steps_of_depth():
    torch.manual_seed(0)
    scores = torch.rand(500, 30) ** 40  # most scores are nothing; quantiles of them would miss the deep end
    scores[:, -1] = 1.0
    thresholds = depth_thresholds(scores, 100)
    depths = [float(choose_exit_layer(scores, value).float().mean()) for value in thresholds.tolist()]
    steps = torch.tensor(depths).diff()
    assert len(depths) == 100
    assert float(steps.min()) > 0
    assert float(steps.max()) < 1.25 * (30 - depths[0]) / 99
    assert depths[-1] == 30


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 9999))
def test_thresholds_miss_nothing_if_there_are_enough(layers: int, instances: int, seed: int):
    scores = torch.randint(0, 4, (instances, layers), generator=torch.Generator().manual_seed(seed)) / 4
    thresholds = depth_thresholds(scores, 10_000).tolist()

    def exits(threshold: float) -> list[int]:
        return choose_exit_layer(scores, threshold).tolist()

    for tried in (0.0, 0.25, 0.5, 0.75):
        below = [value for value in thresholds if value <= tried]
        assert exits(below[-1] if below else -1.0) == exits(tried)


def test_no_threshold_without_a_choice():
    assert len(depth_thresholds(torch.rand(3, 1), 9)) == 0
    assert len(depth_thresholds(torch.rand(0, 3), 9)) == 0


def test_a_static_depth_is_the_first_that_is_good_enough():
    correct = torch.tensor(
        [[False, True, True], [False, False, True], [True, True, False], [False, True, True]]
    )
    scores = static_scores(torch.tensor([1.0, 2.0, 3.0])).expand(4, -1)
    points = trade_off_curve(scores, correct, "static")
    assert points[1] == CurvePoint(2.0, 0.75, 2.0, 1.5)
    assert threshold_within(points, scores, correct, "static", max_loss=0.0) == 2
    assert threshold_within(points, scores, correct, "static", max_loss=0.6) == 1


def test_a_longer_text_says_no_more_of_a_score():
    hits, other, counts = torch.tensor([6, 0, 3]), torch.tensor([0, 0, 3]), torch.full((3,), 2)
    assert score_standard_error(hits, hits, counts) == 0
    longer = score_standard_error(2 * hits, 2 * other, 2 * counts)
    assert longer == pytest.approx(score_standard_error(hits, other, counts))


def test_the_area_of_a_curve_by_hand():
    """Four layers: 60 % at 4x, 80 % from 2x down, 70 % at full depth, which the point at 2x tops."""
    accuracy, speedup = torch.tensor([0.6, 0.8, 0.7]).double(), torch.tensor([4.0, 2.0, 1.0]).double()
    assert float(area_under_curve(accuracy, speedup)) == pytest.approx(
        (0.6 + 0.8) / 2
    )  # 1x-2x weighs as 2x-4x
    assert float(area_under_curve(accuracy[:1], speedup[:1])) == pytest.approx(0.6)
    # What no point reaches counts as 0; what lies beyond 4x or is no faster than all layers changes nothing.
    assert float(area_under_curve(accuracy[1:], speedup[1:])) == pytest.approx(0.8 / 2)
    beyond = torch.tensor([12.0, 2.0, 1.0]).double()
    assert float(area_under_curve(accuracy, beyond)) == pytest.approx((0.6 + 0.8) / 2)
    assert float(area_under_curve(accuracy[2:], speedup[2:])) == 0.0


curves = st.lists(
    st.tuples(st.floats(0, 1), st.floats(1, 12)), min_size=1, max_size=12
).map(lambda points: sorted(points, key=lambda point: -point[1]))  # fmt: skip


@given(curves, st.floats(1, 5), st.floats(0, 1))
def test_curves_agree_with_what_their_words_say(
    points: list[tuple[float, float]], at: float, floor: float
) -> None:
    accuracy, speedup = torch.tensor(points, dtype=torch.float64).T
    steps = 500
    grid = [math.exp(math.log(4) * (step + 0.5) / steps) for step in range(steps)]
    best = [max((a for a, s in points if s >= x), default=0.0) for x in grid]
    assert float(area_under_curve(accuracy, speedup)) == pytest.approx(sum(best) / steps, abs=0.02)
    fast = [a for a, s in points if s >= at]
    found = float(best_accuracy(accuracy, speedup, at))
    assert found == max(fast) if fast else math.isnan(found)
    found = float(layers_saved(accuracy, speedup, torch.tensor(floor, dtype=torch.float64)))

    def saved(least: float) -> float:
        return max([0.0, *(1 - 1 / s for a, s in points if a >= least)])

    # An accuracy that misses the floor by rounding alone may count as one that reaches it.
    assert saved(floor) - 1e-12 <= found <= saved(floor - 1e-6) + 1e-12


def _exits_that_lose(lost: int, won: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two layers; all exit at the first below 0.5, where `lost` rows go wrong and `won` come right."""
    correct = torch.ones(rows, 2, dtype=torch.bool)
    correct[:lost, 0] = False
    correct[lost : lost + won, 1] = False
    return torch.tensor([[0.5, torch.inf]]).expand(rows, 2), correct


@pytest.mark.parametrize(
    "lost, won, rows, exits_early",
    [
        (0, 0, 100, True),
        (0, 1, 100, True),  # -1 + 0.5 * (sqrt(2) - 1) < 0
        (1, 1, 100, False),  # 0 + 0.5 * (sqrt(3) - 1) > 0
        (10, 10, 100, False),
        (10, 13, 100, True),  # -3 + 0.5 * (sqrt(24) - 1) < 0
        (10, 11, 100, False),  # -1 + 0.5 * (sqrt(22) - 1) > 0
    ],
)
def test_a_margin_takes_the_loss_to_be_higher_by_its_standard_errors(lost, won, rows, exits_early):
    scores, correct = _exits_that_lose(lost, won, rows)
    points = curve_of_thresholds(scores, correct, [0.0, 1.0])
    chosen = threshold_within(points, scores, correct, "policy", max_loss=0.0, margin=0.5)
    assert (chosen == 0.0) is exits_early

    def quality(exit_layer: torch.Tensor) -> float:
        return float(correct.gather(1, exit_layer[:, None] - 1).float().mean())

    def effects(exit_layer: torch.Tensor) -> torch.Tensor:
        differ = correct.gather(1, exit_layer[:, None] - 1).squeeze(1) != correct[:, -1]
        return torch.full((int(differ.sum()),), 1 / rows)

    how: dict[str, Any] = {"max_loss": 0.0, "margin": 0.5, "quality": quality}
    assert threshold_within(points, scores, correct, "policy", **how) == chosen
    assert threshold_within(points, scores, correct, "policy", **how, effects=effects) == chosen
    assert threshold_within(points, scores, correct, "policy", max_loss=0.0) == (0.0 if won >= lost else 1.0)


def test_the_error_of_another_quality_is_that_of_what_it_loses():
    """Of a rare class a row in a thousand moves macro F1 by points: the spread over samples says by how much."""
    generator = np.random.default_rng(0)
    labels = (generator.random(100_000) < 0.03).astype(int)
    last = np.where(labels == 1, generator.random(len(labels)) < 0.5, generator.random(len(labels)) < 0.005)
    exits = last & (generator.random(len(labels)) > 0.15)
    exits |= (labels == 1) & (generator.random(len(labels)) < 0.03)
    losses, errors = [], []
    for _ in range(200):
        rows = generator.integers(len(labels), size=1000)
        drawn = (exits[rows].astype(int), last[rows].astype(int), labels[rows])
        losses.append(macro_f1(drawn[1], drawn[2]) - macro_f1(drawn[0], drawn[2]))
        errors.append(effect_error(torch.from_numpy(effects_of_changes("macro_f1", *drawn))))
    spread = float(np.std(losses))
    assert spread > 0.01
    assert 0.4 * spread < float(np.mean(errors)) < 1.2 * spread  # the root that is taken is a shy one


@pytest.mark.parametrize("rows, loss", [(200, 0.005), (1000, 0.005), (100, 0.01), (1000, 0.01), (500, 0.02)])
def test_losing_exactly_what_is_allowed_is_allowed(rows: int, loss: float):
    lost = round(rows * loss)
    scores = torch.tensor([[0.75, torch.inf]]).expand(rows, 2)
    for right in range(rows // 2, rows + 1):
        correct = torch.zeros(rows, 2, dtype=torch.bool)
        correct[:right, 1] = True
        correct[: right - lost, 0] = True
        points = curve_of_thresholds(scores, correct, [0.5, 1.0])
        assert points[0].accuracy == (right - lost) / rows
        assert threshold_within(points, scores, correct, "policy", max_loss=loss) == 0.5, right
        assert threshold_within(points, scores, correct, "policy", max_loss=loss - 1e-6) == 1.0, right


def test_several_losses_are_each_what_one_alone_is():
    generator = torch.Generator().manual_seed(3)
    scores, correct = torch.rand(200, 5, generator=generator), torch.rand(200, 5, generator=generator) < 0.7
    points = trade_off_curve(scores, correct, "confidence")
    losses = (0.0, 0.02, 0.3)
    found = thresholds_within(points, scores, correct, "confidence", max_losses=losses, margin=0.5)
    alone = [
        threshold_within(points, scores, correct, "confidence", max_loss=loss, margin=0.5) for loss in losses
    ]
    assert found == alone
    assert len(set(found)) > 1


def test_a_margin_matters_less_with_more_rows():
    allowed = {}
    for rows in (100, 10_000):
        scores, correct = _exits_that_lose(rows // 50, 0, rows)
        points = curve_of_thresholds(scores, correct, [0.0, 1.0])
        allowed[rows] = threshold_within(points, scores, correct, "policy", max_loss=0.022, margin=1.0)
    assert allowed == {100: 1.0, 10_000: 0.0}
