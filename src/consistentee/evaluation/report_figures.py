"""What a report shows beside an evaluation: intervals, exits by class, hardness against exit layer, example texts.

One tensor of right answers serves rows with labels and without: without labels the last layer's class is the target,
and what is then counted is agreement with full depth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from consistentee.data.rows import TextDataset
from consistentee.functional.bounds import binomial_interval, paired_interval
from consistentee.functional.hardness import memorized_layer

INTERVAL_CONFIDENCE = 0.95
MOST_EXAMPLES = 6
"""Texts of each sort that are shown."""

DEFAULT_POINT = "default"


@dataclass(frozen=True)
class RowOutcomes:
    """Every row at one criterion and threshold.

    Args:
        predictions: (rows, layers), int64, the class of an exit at each layer.
        certainty: (rows, layers), the probability of that class.
        scores: (rows, layers), exit scores.
        target: (rows,), int64, the label; without labels the last layer's class.
        exit_layer: (rows,), int64, from 1.
        is_agreement: whether the target is the last layer's class: exits can then win nothing against it.
    """

    predictions: Tensor
    certainty: Tensor
    scores: Tensor
    target: Tensor
    exit_layer: Tensor
    is_agreement: bool = False

    @property
    def right(self) -> Tensor:
        """(rows, layers), bool, whether an exit gives the target."""
        return self.predictions == self.target[:, None]

    def at_exit(self, values: Tensor) -> Tensor:
        """Of values by layer, (rows, layers), those of the exit layer, (rows,)."""
        return values.gather(1, self.exit_layer[:, None] - 1).squeeze(1)


@dataclass(frozen=True)
class ReportedPoint:
    """What one threshold gives on the reported rows.

    Args:
        names: what it is called: `default`, operating points of the model, or "".
        criterion, threshold: of it; the last layer has no criterion.
        quality: accuracy, or without labels agreement with full depth, or with the model that a record names.
        interval: of the quality, exact, at `INTERVAL_CONFIDENCE`.
        difference, difference_interval: quality minus that of full depth, on the same rows; None where not known.
        agreement: share of the rows that get the last layer's class; None where not known.
        mean_exit_layer, layer_speedup, layers_saved: as of an evaluation.
        certificates: of the operating points at this threshold that have one, with their names.
    """

    names: tuple[str, ...]
    criterion: str
    threshold: float | None
    quality: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float] | None
    agreement: float | None
    mean_exit_layer: float
    layer_speedup: float
    layers_saved: float
    certificates: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class ClassExits:
    """Where the rows of one class exit.

    Args:
        label: the class: the rows' label, or without labels what full depth says.
        num_examples: its rows.
        exit_histogram: (layers,) of them.
        mean_exit_layer: None without rows.
        recall, full_depth_recall: share of them that is right at the exit and at the last layer; None without rows.
    """

    label: str
    num_examples: int
    exit_histogram: list[int]
    mean_exit_layer: float | None
    recall: float | None
    full_depth_recall: float | None


@dataclass(frozen=True)
class LayerFigures:
    """What exits at one layer.

    Args:
        layer: from 1.
        exited, share: rows that exit there.
        quality, interval: accuracy or agreement of these; None where none does.
        if_all: the same if every row exited there; None where the layer has no exit.
        alone: accuracy of the classifier without the ensemble; None where that is not known, or there is no exit.
    """

    layer: int
    exited: int
    share: float
    quality: float | None
    interval: tuple[float, float] | None
    if_all: float | None
    alone: float | None


@dataclass(frozen=True)
class HardnessTable:
    """Memorized layer against exit layer.

    Args:
        counts: [memorized layer - 1][exit layer - 1], rows that full depth gets right.
        never: (layers,) by exit layer, rows that full depth gets wrong.
        rank_correlation: Spearman's, of the rows in `counts`; None where one of the two never varies.
    """

    counts: list[list[int]]
    never: list[int]
    rank_correlation: float | None


@dataclass(frozen=True)
class Example:
    """One row as an example.

    Args:
        texts: one, or two of a pair.
        label: its own; None without labels.
        exit_label, exit_score: the exit's class and its probability.
        full_label, full_score: the last layer's.
        exit_layer: layers executed, from 1.
        scores: (layers,) the exit score at each layer.
    """

    texts: tuple[str, ...]
    label: str | None
    exit_label: str
    exit_score: float
    full_label: str
    full_score: float
    exit_layer: int
    scores: list[float]


def layer_figures(evaluation: Mapping[str, Any], quality: str) -> list[LayerFigures]:
    """An evaluation's figures layer by layer, with intervals.

    Args:
        evaluation: as `to_dict` or a training record has it.
        quality: `accuracy` or `agreement`.
    """
    at_exits, if_all = evaluation[f"exit_{quality}"], evaluation[f"per_layer_{quality}"]
    alone = evaluation.get("classifier_accuracy") or [None] * len(if_all)
    found: list[LayerFigures] = []
    for index, exited in enumerate(evaluation["exit_histogram"]):
        share = None if not exited else at_exits[index]
        interval = (
            None if share is None else binomial_interval(round(share * exited), exited, INTERVAL_CONFIDENCE)
        )
        whole = exited / evaluation["num_examples"]
        found.append(LayerFigures(index + 1, exited, whole, share, interval, if_all[index], alone[index]))
    return found


def recorded_point(evaluation: Mapping[str, Any]) -> tuple[str, ReportedPoint]:
    """The quality that a training record's evaluation goes by, and its point; the curve is not recorded.

    Raises:
        KeyError: it lacks a figure.
    """
    quality, rows = "agreement" if "agreement" in evaluation else "accuracy", evaluation["num_examples"]
    value, classes = evaluation[quality], evaluation.get("class_recall")
    difference, interval = value - evaluation[f"per_layer_{quality}"][-1], None
    if classes:
        lost, won = (sum(found[name] for found in classes) for name in ("lost", "gained"))
        interval = _difference_interval(lost, won, rows)
    elif quality == "agreement" and evaluation["per_layer_agreement"][-1] == 1:
        interval = _difference_interval(round((1 - value) * rows), 0, rows, can_win=False)
    return quality, ReportedPoint(
        names=(DEFAULT_POINT,),
        quality=value,
        interval=binomial_interval(round(value * rows), rows, INTERVAL_CONFIDENCE),
        difference=difference,
        difference_interval=interval,
        agreement=evaluation.get("agreement"),
        **{name: evaluation[name] for name in RECORDED},
    )


def _difference_interval(lost: int, won: int, rows: int, *, can_win: bool = True) -> tuple[float, float]:
    """Of (won - lost) / rows."""
    low, high = paired_interval(lost, won, rows, INTERVAL_CONFIDENCE, can_win=can_win)
    return -high, -low


RECORDED = ("criterion", "threshold", "mean_exit_layer", "layer_speedup", "layers_saved")
"""Figures of a point that an evaluation has by the same name."""


def exits_by_class(outcomes: RowOutcomes, label_names: Sequence[str]) -> list[ClassExits]:
    """Where the rows of every class exit, and how many of them are right, in the order of `label_names`."""
    right, num_layers = outcomes.right, outcomes.scores.shape[1]
    right_at_exit = outcomes.at_exit(right)
    found: list[ClassExits] = []
    for index, label in enumerate(label_names):
        of_class = outcomes.target == index
        count, layers = int(of_class.sum()), outcomes.exit_layer[of_class]
        found.append(
            ClassExits(
                label=label,
                num_examples=count,
                exit_histogram=exit_histogram(layers, num_layers),
                mean_exit_layer=float(layers.double().mean()) if count else None,
                recall=float(right_at_exit[of_class].double().mean()) if count else None,
                full_depth_recall=float(right[of_class, -1].double().mean()) if count else None,
            )
        )
    return found


def hardness_table(right: Tensor, exit_layer: Tensor) -> HardnessTable:
    """Memorized layer against exit layer.

    Args:
        right: (rows, layers), bool, whether an exit gives the target.
        exit_layer: (rows,), int64, from 1.

    Example:
        >>> right = torch.tensor([[True, True], [False, True], [True, False]])
        >>> table = hardness_table(right, torch.tensor([1, 2, 1]))
        >>> table.counts, table.never, round(table.rank_correlation, 6)
        ([[1, 0], [0, 1]], [1, 0], 1.0)
    """
    num_layers, known = right.shape[1], right[:, -1]
    hard, exits = memorized_layer(right)[known], exit_layer[known]
    correlation = None
    if len(exits) and len(hard.unique()) > 1 and len(exits.unique()) > 1:
        found: Any = stats.spearmanr(hard.numpy(), exits.numpy())
        correlation = float(found.statistic)
    return HardnessTable(
        counts=[exit_histogram(exits[hard == layer], num_layers) for layer in range(1, num_layers + 1)],
        never=exit_histogram(exit_layer[~known], num_layers),
        rank_correlation=correlation,
    )


def point_of(
    names: tuple[str, ...],
    criterion: str,
    threshold: float | None,
    outcomes: RowOutcomes,
    certificates: tuple[tuple[str, Mapping[str, Any]], ...] = (),
) -> ReportedPoint:
    """What one threshold gives, from every row's outcome; other arguments as of `ReportedPoint`."""
    right, at_full_depth = outcomes.at_exit(outcomes.right), outcomes.right[:, -1]
    lost, won = int((at_full_depth & ~right).sum()), int((right & ~at_full_depth).sum())
    rows, num_layers = outcomes.scores.shape
    mean = float(outcomes.exit_layer.double().mean())
    same = outcomes.at_exit(outcomes.predictions) == outcomes.predictions[:, -1]
    return ReportedPoint(
        names=names,
        criterion=criterion,
        threshold=threshold,
        quality=float(right.double().mean()),
        interval=binomial_interval(int(right.sum()), rows, INTERVAL_CONFIDENCE),
        difference=(won - lost) / rows,
        difference_interval=_difference_interval(lost, won, rows, can_win=not outcomes.is_agreement),
        agreement=float(same.double().mean()),
        mean_exit_layer=mean,
        layer_speedup=num_layers / mean,
        layers_saved=1 - mean / num_layers,
        certificates=certificates,
    )


def choose_examples(outcomes: RowOutcomes, dataset: TextDataset, labelled: bool) -> dict[str, list[Example]]:
    """Texts that exit `early`, that need depth (`deep`), and whose answer the exit has `changed`; each but once."""
    exit_layer = outcomes.exit_layer
    right, last_right = outcomes.at_exit(outcomes.right), outcomes.right[:, -1]
    given = outcomes.at_exit(outcomes.predictions)
    changed = given != outcomes.predictions[:, -1]
    score = outcomes.at_exit(outcomes.scores)
    memorized = memorized_layer(outcomes.right)
    shown: set[tuple[str, ...]] = set()

    def best(among: Tensor, keys: Sequence[Tensor]) -> list[Example]:
        """Of some rows those with the smallest keys, the first counting most, classes in turn."""
        places = among.nonzero().squeeze(1).tolist()
        order = sorted(places, key=lambda row: [float(key[row]) for key in keys])
        turns: dict[int, int] = defaultdict(int)
        ranks: dict[int, int] = {}
        for row in order:
            ranks[row] = turns[int(given[row])]
            turns[int(given[row])] += 1
        found: list[Example] = []
        for row in sorted(order, key=lambda row: ranks[row]):
            if len(found) < MOST_EXAMPLES and dataset.texts[row] not in shown:
                shown.add(dataset.texts[row])
                found.append(_example(outcomes, dataset, row, labelled))
        return found

    certainty = outcomes.certainty[:, -1]
    differ = best(changed, [(~(last_right & ~right)).int(), -certainty])
    early = best((exit_layer < outcomes.scores.shape[1]) & right & ~changed, [exit_layer, -score])
    deep = best((exit_layer > 1) & last_right & ~changed, [-exit_layer, -memorized, -certainty])
    return {"early": early, "deep": deep, "changed": differ}


def _example(outcomes: RowOutcomes, dataset: TextDataset, row: int, labelled: bool) -> Example:
    names, layer = dataset.label_names, int(outcomes.exit_layer[row])
    predictions, certainty = outcomes.predictions[row], outcomes.certainty[row]
    return Example(
        texts=dataset.texts[row],
        label=names[int(outcomes.target[row])] if labelled else None,
        exit_label=names[int(predictions[layer - 1])],
        exit_score=float(certainty[layer - 1]),
        full_label=names[int(predictions[-1])],
        full_score=float(certainty[-1]),
        exit_layer=layer,
        scores=outcomes.scores[row].tolist(),
    )


def exit_histogram(exit_layer: Tensor, num_layers: int) -> list[int]:
    """Rows that exit at each layer, (layers,), from (rows,) exit layers."""
    return torch.bincount(exit_layer - 1, minlength=num_layers).tolist()
