"""What the final reading of a comparison asks for, held to the plan before anything is trained."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from consistentee.errors import SettingError
from consistentee.evaluation.comparison.cells import Cell
from consistentee.evaluation.comparison.outcomes import STATIC
from consistentee.evaluation.comparison.plan import OUR_METHOD, PlannedCell, backbone_name, has_exits
from consistentee.functional.criteria import CRITERIA

Readable = Mapping[str, set[str]]
"""Criteria by method; none of models without exits."""


def check_reading(
    planned: Sequence[PlannedCell],
    kept: Sequence[Cell],
    *,
    baseline: str,
    criteria: Sequence[str],
    also: Sequence[str],
    resamples: int,
) -> None:
    """Raise SettingError where `summarise` would, once the planned cells are beside the kept ones.

    Args:
        planned: cells to be.
        kept: those that are there.
        baseline, criteria, also, resamples: as of `compare`.
    """
    check_resamples(resamples)
    readable = _readable(planned, kept)
    known = dict.fromkeys(name for names in (CRITERIA, *readable.values()) for name in names)
    for name in criteria:
        if name != "all" and name not in known:
            raise SettingError(f'criteria must be all, or among {", ".join(known)}, got "{name}".')
    _check_baseline(baseline, readable)
    for text in also:
        method, _, criterion = text.partition("/")
        if criterion not in readable.get(method, ()):
            exits = ", ".join(name for name, names in readable.items() if names) or "none"
            raise SettingError(
                f"also must name METHOD/CRITERION, with a method among {exits}, and a criterion among "
                f'{", ".join(known)}, got "{text}".'
            )


def check_resamples(resamples: int) -> None:
    """Raise SettingError where there are too few draws for an interval."""
    if resamples < 2:
        raise SettingError(f"resamples must be at least 2, got {resamples}.")


def check_kept_baseline(kept: Sequence[Cell], baseline: str) -> None:
    """Raise SettingError unless some cell has what differences are taken to; our method may be missing."""
    _check_baseline(baseline, _readable([], kept))


def _check_baseline(baseline: str, readable: Readable) -> None:
    if baseline == OUR_METHOD:  # which nobody need have asked for
        return
    method, _, criterion = baseline.partition("/")
    if method not in readable:
        raise SettingError(f'baseline must be among {", ".join(readable)}, got "{baseline}".')
    if criterion and criterion not in readable[method]:
        theirs = ", ".join(sorted(readable[method])) or "none"
        raise SettingError(f'baseline must name a criterion of "{method}", {theirs}, got "{baseline}".')


def _readable(planned: Sequence[PlannedCell], kept: Sequence[Cell]) -> Readable:
    """Methods as `summarise` names them: plain models of fewer layers than others have are all `static`."""
    found: dict[str, set[str]] = defaultdict(set)
    depths: dict[tuple[str, str], int] = defaultdict(int)
    for cell in kept:
        place = cell["backbone"], cell["set"]
        depths[place] = max(depths[place], cell["num_hidden_layers"])
    planned_depths: dict[tuple[str, str], float] = defaultdict(float, depths)
    for cell in planned:
        place = backbone_name(cell.backbone), cell.data.name
        planned_depths[place] = max(planned_depths[place], _depth(cell))
    for cell in planned:
        if has_exits(cell.method.name):
            found[cell.method.label].update(CRITERIA)
        else:
            place = backbone_name(cell.backbone), cell.data.name
            found[STATIC if _depth(cell) < planned_depths[place] else cell.method.label].update()
    for cell in kept:
        is_smaller = cell["num_hidden_layers"] < depths[cell["backbone"], cell["set"]]
        name = STATIC if is_smaller and not cell["criterion"] else cell["label"]
        found[name].update(cell.get("criteria", ()))
    return found


def _depth(cell: PlannedCell) -> float:
    """Its layers; infinity stands for all that the backbone has."""
    return cell.config().num_layers or math.inf
