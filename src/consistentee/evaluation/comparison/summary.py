"""Cells become compare.json: figures of every run, means over seeds and sets with paired bootstrap intervals.

Rows are drawn together for all methods of a set, and a difference is one of the same rows and seeds. The sets are
taken as they are: an average is over these, not over all that might be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consistentee.errors import SettingError
from consistentee.evaluation.comparison.cells import Cell, check_comparable
from consistentee.evaluation.comparison.measuring import rounded, unpack_bits
from consistentee.evaluation.comparison.outcomes import (
    ENDS_OF_DIFFERENCES,
    FIGURES,
    LOSSES,
    SAME_EXITS,
    SPEEDUPS,
    STATIC,
    Outcomes,
    ends_of_figures,
    exit_outcomes,
    figures_of_draws,
    static_outcomes,
)
from consistentee.evaluation.comparison.plan import OUR_METHOD, REFERENCE
from consistentee.evaluation.comparison.reading import check_resamples
from consistentee.functional.curves import TOLERANCES
from consistentee.functional.resampling import Draws, Means, percentile_interval, row_weights
from consistentee.training.methods import METHODS

Key = tuple[str, str]
"""Label of a method, and criterion ("" of a model without exits)."""


@dataclass(frozen=True)
class _Measured:
    """One method and criterion with one seed on one set.

    Attributes:
        cell: where it comes from; of `static` the full-depth model's.
        outcomes: row by row.
        own: whether the criterion is the method's own.
        observed: (figures,), on the rows as they are.
        draws: (draws, figures), on rows drawn with replacement.
        plain_accuracy: of the plain model with this seed; None without one.
    """

    cell: Mapping[str, Any]
    outcomes: Outcomes
    own: bool
    observed: Draws
    draws: Draws
    plain_accuracy: float | None


@dataclass(frozen=True)
class _Figures:
    """Means over seeds, or over sets: (figures,) observed, (draws, figures) of each draw, (2, figures) what may be."""

    observed: Draws
    means: Means
    ends: Draws
    deviation: Draws | None = None


SetRows = dict[Key, dict[int, _Measured]]
"""Of one backbone and set: by key and seed."""


def summarise(
    cells: Sequence[Cell],
    *,
    baseline: str = OUR_METHOD,
    criteria: Sequence[str] = (),
    also: Sequence[str] = (),
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """compare.json of some cells.

    Args:
        cells: of any backbones, sets, methods and seeds.
        baseline: `METHOD`, which takes its own criterion, or `METHOD/CRITERION`: what differences are taken to.
        criteria: besides each method's own, those that are evaluated on everybody's exits; "all" takes all.
        also: `METHOD/CRITERION`, shown beside methods with their own criterion.
        resamples: draws of the bootstrap.
        confidence: of the intervals.

    Returns:
        Plain values: `runs`, one entry a method, set and seed, and `summary`, one a method, criterion and set, those of
        the average over sets with `set` None; see docs/compare.md.

    Raises:
        DataError: cells that cannot be compared.
        SettingError: a criterion that no cell has, or a number of draws below 2.
    """
    check_resamples(resamples)
    check_comparable(cells)
    shown = [_pair(text, cells) for text in also]
    named = [criterion for _, _, criterion in [baseline.partition("/")] if criterion]
    wanted = _wanted(cells, [*criteria, *named, *(criterion for _, criterion in shown)])
    by_set: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_set[cell["backbone"], cell["set"]].append(cell)
    measured = {place: _measure_set(of_set, wanted, resamples) for place, of_set in by_set.items()}
    summary: list[dict[str, Any]] = []
    kept: dict[tuple[str, str], dict[Key, dict[str, _Figures]]] = {}
    for place, rows in measured.items():
        base = _baseline_key(rows, baseline)
        kept[place] = {key: _set_figures(rows, key, base) for key in rows}
        for key, figures in kept[place].items():
            seeds = sorted(rows[key])
            first = rows[key][seeds[0]]
            summary.append(
                {"backbone": place[0], "set": place[1], "method": key[0], "criterion": key[1] or None}
                | {
                    "own_criterion": first.own,
                    "shown": first.own or key in shown,
                    "seeds": seeds,
                    "is_curve": first.outcomes.is_curve,
                }
                | _entry(figures, confidence)
                | {"metrics": _mean_metrics(list(rows[key].values()))}
            )
    averaged = _averages(measured, kept)
    places = _shared_places(measured)
    for key, figures in averaged.items():
        any_row = next(iter(measured[places[0]][key].values()))
        summary.append(
            {"backbone": None, "set": None, "method": key[0], "criterion": key[1] or None}
            | {
                "own_criterion": any_row.own,
                "shown": any_row.own or key in shown,
                "seeds": None,
                "is_curve": any_row.outcomes.is_curve,
            }
            | _entry(figures, confidence)
            | {"metrics": {}}
        )
    return rounded(
        {
            "baseline": baseline,
            "reference": REFERENCE,
            "confidence": confidence,
            "resamples": resamples,
            "speedups": list(SPEEDUPS),
            "losses": list(LOSSES),
            "tolerances": list(TOLERANCES),
            "criteria": list(wanted),
            "also": [list(pair) for pair in shown],
            "averaged_sets": [list(place) for place in places],
            "methods": _methods(cells),
            "environments": environments(cells),
            "runs": [
                _run(place, key, seed, row, rows, shown)
                for place, rows in measured.items()
                for key, of_key in rows.items()
                for seed, row in of_key.items()
                if row.own
            ],
            "summary": summary,
        }
    )


def _pair(text: str, cells: Sequence[Cell]) -> Key:
    """A method and a criterion, `METHOD/CRITERION`, that some cell has."""
    method, _, criterion = text.partition("/")
    if not any(cell["label"] == method and criterion in cell.get("criteria", {}) for cell in cells):
        raise SettingError(f'also must name METHOD/CRITERION of a cell that is there, got "{text}".')
    return method, criterion


def _wanted(cells: Sequence[Cell], criteria: Sequence[str]) -> tuple[str, ...]:
    known = list(dict.fromkeys(name for cell in cells for name in cell.get("criteria", {})))
    if "all" in criteria:
        return tuple(known)
    for name in criteria:
        if name not in known:
            raise SettingError(f'criteria must be all, or among {", ".join(known) or "none"}, got "{name}".')
    return tuple(dict.fromkeys(criteria))


def _measure_set(cells: Sequence[Cell], wanted: Sequence[str], resamples: int) -> SetRows:
    """Everything about one backbone and set, the plain model first."""
    rows_count = int(cells[0]["evaluation"]["num_examples"])
    depth = max(int(cell["num_hidden_layers"]) for cell in cells)
    weights = row_weights(rows_count, resamples, seed=0)
    found: SetRows = defaultdict(dict)
    for seed in sorted({int(cell["seed"]) for cell in cells}):
        of_seed = [cell for cell in cells if cell["seed"] == seed]
        reference = next((cell for cell in of_seed if cell["label"] == REFERENCE), None)
        plain = None if reference is None else unpack_bits(reference["correct"], rows_count, 1)[:, 0]
        for key, cell, outcomes in _all_outcomes(of_seed, wanted, depth):
            found[key][seed] = _Measured(
                cell=cell,
                outcomes=outcomes,
                own=key[1] in ("", cell["criterion"]),
                observed=figures_of_draws(outcomes, np.ones((1, rows_count), dtype=np.float32), plain)[0],
                draws=figures_of_draws(outcomes, weights, plain),
                plain_accuracy=None if plain is None else float(plain.mean()),
            )
    return {key: found[key] for key in sorted(found, key=_order)}


def _order(key: Key) -> tuple[int, int, str]:
    """The plain model, smaller ones, ours, and the others as the table of methods has them."""
    label, name = key[0], key[0].partition(":")[0]
    first = (REFERENCE, STATIC, OUR_METHOD)
    known = list(METHODS)
    return (
        first.index(label) if label in first else len(first),
        known.index(name) if name in known else len(known),
        label,
    )


def _all_outcomes(
    cells: Sequence[Cell], wanted: Sequence[str], depth: int
) -> list[tuple[Key, Cell, Outcomes]]:
    """Of one seed: every model without exits that has all layers, `static` of the smaller ones, every criterion."""
    found: list[tuple[Key, Cell, Outcomes]] = []
    smaller = [cell for cell in cells if not cell["criterion"] and cell["num_hidden_layers"] < depth]
    for cell in cells:
        if not cell["criterion"]:
            if cell not in smaller:
                found.append(((cell["label"], ""), cell, static_outcomes([cell], depth)))
            continue
        own = cell["criterion"]
        names = [own, *(name for name in wanted if name != own and name in cell["criteria"])]
        found += [((cell["label"], name), cell, exit_outcomes(cell, name, depth)) for name in names]
    if smaller:
        whole = [cell for cell in cells if cell["label"] == REFERENCE]
        found.append(((STATIC, ""), [*smaller, *whole][-1], static_outcomes([*smaller, *whole], depth)))
    return found


def _baseline_key(rows: SetRows, baseline: str) -> Key | None:
    label, _, criterion = baseline.partition("/")
    for key, of_key in rows.items():
        if key[0] == label and (key[1] == criterion if criterion else next(iter(of_key.values())).own):
            return key
    return None


def _set_figures(rows: SetRows, key: Key, base: Key | None) -> dict[str, _Figures]:
    """Of one method and criterion: means over seeds, and differences on the seeds that both have."""
    figures = {"figures": _over_seeds(list(rows[key].values()))}
    same = (key[0], SAME_EXITS)
    for name, other in (("difference", base), ("difference_on_same_exits", same)):
        if other is None or other == key or other not in rows:
            continue
        seeds = sorted(rows[key].keys() & rows[other].keys())
        if seeds:
            pairs = [(rows[key][seed], rows[other][seed]) for seed in seeds]
            draws = np.stack([one.draws - two.draws for one, two in pairs])
            observed = np.stack([one.observed - two.observed for one, two in pairs])
            means = Means.over_trainings(draws)
            figures[name] = _Figures(observed.mean(0), means, ENDS_OF_DIFFERENCES, _deviation(observed))
    return figures


def _over_seeds(rows: Sequence[_Measured]) -> _Figures:
    observed = np.stack([row.observed for row in rows])
    means = Means.over_trainings(np.stack([row.draws for row in rows]))
    return _Figures(observed.mean(0), means, ends_of_figures(rows[0].outcomes.depth), _deviation(observed))


def _deviation(observed: Draws) -> Draws | None:
    """Standard deviation over seeds; None of a single one."""
    return observed.std(0, ddof=1) if len(observed) > 1 else None


def _shared_places(measured: Mapping[tuple[str, str], SetRows]) -> list[tuple[str, str]]:
    """Backbones and sets that every method has a run on."""
    labels = {key[0] for rows in measured.values() for key in rows}
    return [place for place, rows in measured.items() if {key[0] for key in rows} == labels]


def _averages(
    measured: Mapping[tuple[str, str], SetRows], kept: Mapping[tuple[str, str], Any]
) -> dict[Key, dict[str, _Figures]]:
    """Means over the shared backbones and sets, of every method and criterion that all of these have."""
    places = _shared_places(measured)
    if len(places) < 2:
        return {}
    averages: dict[Key, dict[str, _Figures]] = {}
    for key in kept[places[0]]:
        if all(key in kept[place] for place in places):
            names = [name for name in kept[places[0]][key] if all(name in kept[p][key] for p in places)]
            averages[key] = {name: _mean([kept[place][key][name] for place in places]) for name in names}
    return averages


def _mean(figures: Sequence[_Figures]) -> _Figures:
    observed = np.mean([one.observed for one in figures], axis=0)
    means = Means.over_sets([one.means for one in figures])
    return _Figures(observed, means, np.mean([one.ends for one in figures], axis=0))


# --- Plain values ---------------------------------------------------------------------------------


def _entry(figures: Mapping[str, _Figures], confidence: float) -> dict[str, Any]:
    own = _plain(figures["figures"], confidence)
    others = {name: _plain(value, confidence) for name, value in figures.items() if name != "figures"}
    for other in others.values():
        for at in (other["at_validation_threshold"], *other["at_tolerance"].values()):
            del at["layer_speedup"]  # a difference of shares is none of ratios
    return {**own, "difference": None, "difference_on_same_exits": None, **others}


def _plain(figures: _Figures, confidence: float) -> dict[str, Any]:
    draws = figures.means.with_trainings(seed=1)
    low, high = (np.clip(end, *figures.ends) for end in percentile_interval(draws, confidence))
    deviation = figures.deviation
    values = {
        name: {
            "mean": _number(figures.observed[place]),
            "interval": [_number(low[place]), _number(high[place])],
            "deviation": None if deviation is None else _number(deviation[place]),
        }
        for place, name in enumerate(FIGURES)
    }

    def chosen(accuracy: str, saved: str, gain: str) -> dict[str, Any]:
        return {
            "accuracy": values[accuracy],
            "difference_to_plain": values[gain],
            "layers_saved": values[saved],
            "layer_speedup": {
                "mean": _speedup(values[saved]["mean"]),
                "interval": [_speedup(end) for end in values[saved]["interval"]],
            },
        }

    return {
        "area": values["area"],
        "accuracy_at_speedup": {f"{s:g}": values[f"accuracy_at_{s:g}x"] for s in SPEEDUPS},
        "layers_saved_at_loss": {f"{x:g}": values[f"layers_saved_at_{100 * x:g}"] for x in LOSSES},
        "at_validation_threshold": chosen(
            "validation_accuracy", "validation_layers_saved", "validation_gain"
        ),
        "at_tolerance": {
            f"{x:g}": chosen(*(f"{name}_within_{100 * x:g}" for name in ("accuracy", "layers_saved", "gain")))
            for x in TOLERANCES
        },
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _speedup(saved: float | None) -> float | None:
    """Layers over mean exit layer, from the share of layers that is saved."""
    return None if saved is None or saved >= 1 else 1 / (1 - saved)


def _mean_metrics(rows: Sequence[_Measured]) -> dict[str, float]:
    """The task's own metrics at the validation threshold, means over seeds."""
    names = rows[0].outcomes.metrics
    return {
        name: float(np.mean([row.outcomes.metrics[name] for row in rows]))
        for name in names
        if all(name in row.outcomes.metrics for row in rows)
    }


def _run(
    place: tuple[str, str], key: Key, seed: int, row: _Measured, rows: SetRows, shown: Sequence[Key]
) -> dict[str, Any]:
    """One method, set and seed: figures of its own criterion, and of the others on its exits."""
    others = {
        name: _run_figures(of_key[seed], with_curve=(label, name) in shown)
        for (label, name), of_key in rows.items()
        if label == key[0] and name != key[1] and seed in of_key
    }
    return {
        "method": key[0],
        "backbone": place[0],
        "set": place[1],
        "task": row.cell["task"],
        "seed": seed,
        "num_examples": row.cell["evaluation"]["num_examples"],
        "num_hidden_layers": row.outcomes.depth,
        "criterion": key[1] or None,
        "plain_accuracy": row.plain_accuracy,
        **_run_figures(row),
        "criteria": others,
    }


def _run_figures(row: _Measured, *, with_curve: bool = True) -> dict[str, Any]:
    values = {name: _number(value) for name, value in zip(FIGURES, row.observed, strict=True)}
    curve = row.outcomes.curve()
    chosen = row.outcomes.chosen
    return {
        "area": values["area"],
        "at_validation_threshold": None
        if chosen is None
        else {**curve[chosen], "metrics": dict(row.outcomes.metrics)},
        "at_tolerance": {
            f"{loss:g}": curve[point] for loss, point in zip(TOLERANCES, row.outcomes.within, strict=False)
        },
        "accuracy_at_speedup": {f"{s:g}": values[f"accuracy_at_{s:g}x"] for s in SPEEDUPS},
        "layers_saved_at_loss": {f"{x:g}": values[f"layers_saved_at_{100 * x:g}"] for x in LOSSES},
        **({"curve": curve} if with_curve else {}),
    }


def _methods(cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        cell["label"]: {
            "method": cell["method"],
            "source": METHODS[cell["method"]].source if cell["method"] in METHODS else None,
            "criterion": cell["criterion"],
            "own_settings": cell["own_settings"],
        }
        for cell in cells
    }


def environments(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Hardware and versions, each once."""
    found: list[dict[str, Any]] = []
    for cell in cells:
        made = {name: value for name, value in (cell["environment"] or {}).items() if name != "seed"}
        if made not in found:
            found.append(made)
    return found
