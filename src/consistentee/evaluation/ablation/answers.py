"""What cells say to a question: paired differences, and what differs between easy and hard rows and between rounds."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from consistentee.evaluation.ablation.questions import Question
from consistentee.evaluation.comparison.cells import Cell
from consistentee.evaluation.comparison.measuring import rounded, unpack_bits
from consistentee.evaluation.comparison.outcomes import exit_outcomes
from consistentee.evaluation.comparison.plan import REFERENCE
from consistentee.evaluation.comparison.summary import summarise

THIRDS = ("easy", "middle", "hard")
AT_SPEEDUP = 2.0
"""Layer speed-up at which the thirds are compared, beside the threshold that validation chose."""


def answer(
    question: Question, cells: Sequence[Cell], studies: Sequence[Mapping[str, Any]], *, resamples: int
) -> dict[str, Any]:
    """All that the cells and studies say to a question, as plain values.

    Args:
        question: asked.
        cells: of a comparison; those of other methods are left out.
        studies: of this question, one for each backbone, set and seed.
        resamples: draws of the bootstrap.
    """
    found: dict[str, Any] = {
        "question": question.words,
        "differences": differences(question, cells, resamples=resamples),
    }
    if question.further == "thirds":
        found["thirds"] = thirds(question, cells)
    elif question.further == "rounds":
        found["rounds"] = rounds(question, cells)
    elif question.further is not None:
        found[question.further] = list(studies)
    return rounded(found)


def differences(question: Question, cells: Sequence[Cell], *, resamples: int) -> list[dict[str, Any]]:
    """Paired differences of each pair by each criterion, on every set and on their average.

    Returns:
        Plain values: `variant`, `baseline`, `criterion`, `backbone` and `set` (None: the average), `seeds` that both
        have, and on these `figures` of the variant and `difference`, both as in compare.json's summary.
    """
    found: list[dict[str, Any]] = []
    for variant, baseline in question.pairs:
        paired = list(itertools.chain.from_iterable(_by_set((variant, baseline), cells).values()))
        if not paired:
            continue
        both = [*(cell for cell in cells if cell["label"] == REFERENCE), *paired]
        for criterion in question.criteria:
            summary = summarise(
                both, baseline=f"{baseline}/{criterion}", criteria=(criterion,), resamples=resamples
            )
            found += [
                {
                    "variant": variant,
                    "baseline": baseline,
                    **{name: entry[name] for name in ("criterion", "backbone", "set", "seeds")},
                    "figures": _figures(entry),
                    "difference": _figures(entry["difference"]),
                }
                for entry in summary["summary"]
                if (entry["method"], entry["criterion"]) == (variant, criterion) and entry["difference"]
            ]
    return found


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    names = ("area", "accuracy_at_speedup", "layers_saved_at_loss", "at_validation_threshold")
    return {name: entry[name] for name in names}


def thirds(question: Question, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Accuracy and exit layer of easy, middle and hard rows under the policy.

    Rows of a set are put in order by their memorized layer, averaged over all of the question's cells, so that the
    thirds are the same for all of them; rows that are alike stay in the set's order.

    Returns:
        Plain values: `method`, `backbone`, `set`, `seeds`, `third`, `memorized_layer`, and at layer speed-up 2 and at
        the validation threshold `accuracy` and `exit_layer`, means over seeds; left out where a seed's policy never
        gets there.
    """
    found: list[dict[str, Any]] = []
    for (backbone, name), of_set in _by_set(question.labels, cells).items():
        memorized = np.mean([_memorized_layers(cell) for cell in of_set], axis=0)
        parts = np.array_split(np.argsort(memorized, kind="stable"), len(THIRDS))
        for label in question.labels:
            of_label = [cell for cell in of_set if cell["label"] == label]
            for third, rows in zip(THIRDS, parts, strict=True):
                figures = [_figures_of_rows(cell, rows) for cell in of_label]
                found.append(
                    {
                        "method": label,
                        "backbone": backbone,
                        "set": name,
                        "seeds": [cell["seed"] for cell in of_label],
                        "third": third,
                        "rows": len(rows),
                        "memorized_layer": float(memorized[rows].mean()),
                        **_means(figures),
                    }
                )
    return found


def _by_set(labels: Sequence[str], cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of some methods by backbone and set, of the seeds that all of them have."""
    grouped: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell["label"] in labels:
            grouped[cell["backbone"], cell["set"]].append(cell)
    found: dict[tuple[str, str], list[Cell]] = {}
    for place, of_set in grouped.items():
        seeds = [{cell["seed"] for cell in of_set if cell["label"] == label} for label in labels]
        shared = set.intersection(*seeds)
        if shared:
            found[place] = [cell for cell in of_set if cell["seed"] in shared]
    return found


def _memorized_layers(cell: Cell) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(rows,), the first layer from which all predictions are right; the last where that is wrong."""
    layers = int(cell["num_hidden_layers"])
    right = unpack_bits(cell["correct"], int(cell["evaluation"]["num_examples"]), layers)
    right_from = np.flip(np.logical_and.accumulate(np.flip(right, axis=1), axis=1), axis=1)
    return np.where(right_from.any(1), right_from.argmax(1) + 1, layers)


def _figures_of_rows(cell: Cell, rows: np.ndarray[Any, Any]) -> dict[str, float]:
    depth = int(cell["num_hidden_layers"])
    outcomes = exit_outcomes(cell, "policy", depth)
    mean = outcomes.layers.mean(0)
    fast = [point for point in range(len(mean)) if depth / mean[point] >= AT_SPEEDUP]
    points: dict[str, int] = {}
    if fast:
        best = max(fast, key=lambda point: (outcomes.correct[:, point].mean(), -mean[point]))
        points[f"at_{AT_SPEEDUP:g}x"] = best
    if outcomes.chosen is not None:
        points["at_validation"] = outcomes.chosen
    return {
        f"{figure}_{name}": float(values[rows, at].mean())
        for name, at in points.items()
        for figure, values in (("accuracy", outcomes.correct), ("exit_layer", outcomes.layers))
    }


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure that all have."""
    shared = [key for key in figures[0] if all(key in one for one in figures)]
    return {key: float(np.mean([one[key] for one in figures])) for key in shared}


def rounds(question: Question, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What each round came to on validation rows, means over the sets and seeds that all methods which are there have.

    Returns:
        Plain values: `method`, `round`, `runs` (how many got there), `changed_exits` (share of the rows that exit at
        another layer than a round before), `score` of the policy's curve, `reward`, `full_depth_accuracy`.
    """
    found: list[dict[str, Any]] = []
    there = {cell["label"] for cell in cells}
    labels = [label for label in question.labels if label in there]
    paired = list(itertools.chain.from_iterable(_by_set(labels, cells).values()))
    for label in labels:
        histories = [cell["history"] for cell in paired if cell["label"] == label]
        for number in range(max(map(len, histories), default=0)):
            runs = [history[number] for history in histories if len(history) > number]
            figures = {
                "changed_exits": [entry.get("changed_exits") for entry in runs],
                "score": [entry["score"] for entry in runs],
                "reward": [entry["reward"] for entry in runs],
                "full_depth_accuracy": [entry["per_layer_accuracy"][-1] for entry in runs],
            }
            found.append(
                {"method": label, "round": number, "runs": len(runs)}
                | {
                    name: None if None in values else float(np.mean(values))
                    for name, values in figures.items()
                }
            )
    return found
