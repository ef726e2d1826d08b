"""Compare methods: run the cells that are not there yet, say how long the others will take, and sum all up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from consistentee.atomic_files import user_path, write_text
from consistentee.errors import SettingError
from consistentee.evaluation.comparison.cells import (
    CELLS,
    Cell,
    check_comparable,
    clear_discarded,
    discard_note,
    finished_cell,
    planned_identity,
    read_cells,
    require_folder,
    run_cell,
    run_folder,
    takes_over,
)
from consistentee.evaluation.comparison.claims import is_shared_now, is_taken, taken_in_turns
from consistentee.evaluation.comparison.plan import (
    OUR_METHOD,
    ComparedSet,
    PlannedCell,
    backbone_name,
    begin_alike,
    compared_methods,
    planned_cells,
    sharing_cells,
    work_left,
)
from consistentee.evaluation.comparison.reading import check_kept_baseline, check_reading
from consistentee.evaluation.comparison.summary import summarise
from consistentee.evaluation.comparison.tables import markdown_page
from consistentee.progress import duration
from consistentee.training.run import Report
from consistentee.training.warm_ups import discard

SUMMARY_FILE, PAGE_FILE, PICTURE_FILE = "compare.json", "compare.md", "compare.png"
WARM_UPS = "warm-ups"


def compare(
    *,
    methods: Sequence[str],
    backbones: Sequence[str],
    sets: Sequence[ComparedSet],
    output_dir: str | Path,
    seeds: Sequence[int] = (1,),
    settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    recipes: str | Path | None = None,
    baseline: str = OUR_METHOD,
    criteria: Sequence[str] = (),
    also: Sequence[str] = (),
    resamples: int = 1000,
    keep_models: bool = True,
    keep_warm_ups: bool = False,
    dry_run: bool = False,
    report: Report = lambda message: None,
) -> dict[str, Any]:
    """Train and measure every method on every backbone, set and seed, with what is there left alone, and sum it up.

    A cell that was interrupted goes on from its run's folder. First steps that cells have in common are taken
    once (`train`'s `warm_up_dir`); the seconds of each are those that it would take alone. Several processes may share
    an output folder and even a plan: each takes cells that no other works on, and at last waits for those that others
    do.

    Args:
        methods: `NAME` of a training method that learns from labels, or `NAME:VARIANT`; `plain` is always among them.
        backbones: hub names or folders of encoders.
        sets: data sets.
        output_dir: gets `cells/`, `runs/`, `warm-ups/` where some are shared, compare.json and compare.md.
        seeds: of split, order, initial weights.
        settings: training settings of all methods, where they are not defaults.
        overrides: settings of single methods, by label; rows, split, budget and validation are shared by all.
        recipes: folder where the settings of `NAME:VARIANT` are looked for, as `VARIANT/NAME.yaml` or
            `NAME_VARIANT.yaml`.
        baseline: what differences are taken to: `METHOD`, or `METHOD/CRITERION`.
        criteria: beside each method's own, those that are evaluated on everybody's exits; "all" takes all.
        also: further rows of the first tables and lines of the picture, `METHOD/CRITERION`: methods whose exits are
            another's.
        resamples: draws of the bootstrap.
        keep_models: whether trained models stay, and first steps that were shared, which else go as soon as no cell of
            the plan needs them; a cell has what tables and pictures need.
        keep_warm_ups: whether first steps that no other cell of the plan shares are kept as well, for further plans.
        dry_run: say what would be run, and stop.
        report: is given lines of text to show.

    Returns:
        What compare.json holds, of all cells in the folder; empty after a dry run.

    Raises:
        DataError: a kept file is no cell, or cells cannot be compared.
        SettingError: methods or settings that make no sense, a kept cell that was made with others, a baseline,
            criterion or method of `also` that no cell will have, or an output folder that is none.
        ValueError: a run's folder with other settings, backbone or data.
    """
    output_dir, shared = user_path(output_dir), dict(settings or {})
    require_folder(output_dir)
    described = compared_methods(methods, shared, overrides or {}, None if recipes is None else Path(recipes))
    cells = planned_cells(backbones, sets, described, seeds, shared)
    reading: dict[str, Any] = {
        "baseline": baseline,
        "criteria": criteria,
        "also": also,
        "resamples": resamples,
    }
    check_reading(cells, read_cells(output_dir), **reading)
    if keep_models and not dry_run:
        for cell in cells:
            discard_note(output_dir, cell).unlink(missing_ok=True)
    run_cells(
        cells,
        output_dir,
        keep_models=keep_models,
        keep_warm_ups=keep_warm_ups,
        dry_run=dry_run,
        report=report,
    )
    if dry_run:
        return {}
    return render(output_dir, **reading)


def run_cells(
    cells: Sequence[PlannedCell],
    output_dir: Path,
    *,
    keep_models: bool = True,
    keep_warm_ups: bool = False,
    dry_run: bool = False,
    report: Report,
) -> None:
    """Train and measure what is not there yet, and sum up nothing; arguments and errors as of `compare`."""
    finished = {cell.name: finished_cell(cell, output_dir) for cell in cells}
    left = [cell for cell in cells if finished[cell.name] is None]
    done = [cell for cell in finished.values() if cell is not None]
    kept_cells = read_cells(output_dir)
    if kept_cells:  # before anything is trained that could not be shown beside them
        check_comparable([*kept_cells, *map(planned_identity, left)])
    report(_plan_line(len(cells), left, done))
    if dry_run:
        for cell in cells:
            report(f"  {cell.name}: {_state(cell, finished[cell.name], output_dir)}")
        return
    if not keep_models:
        for cell in cells:
            clear_discarded(output_dir, cell)
    warm_up_dir = output_dir / WARM_UPS
    shares = keep_warm_ups or warm_up_dir.is_dir()
    sharing = {cell.name for cell in (left if shares else sharing_cells(left)) if cell.shared}
    before: list[PlannedCell] = []
    work = {cell.name: cell for cell in left}
    alike = begin_alike(left)

    def is_begun(name: str) -> bool:  # by another process, which will leave first steps to it
        return any(is_taken(other, output_dir) for other in alike[name])

    with closing(taken_in_turns(work, output_dir, report, better_later=is_begun)) as turns:
        for name, cell in turns:
            title = f"== {name} ({len(done) + 1} of {len(cells)})"
            kept = finished_cell(cell, output_dir)
            report(title if kept is None else f"{title} is finished, by another command.")
            if kept is None:
                shared = warm_up_dir if name in sharing else None
                kept = run_cell(cell, output_dir, keep_model=keep_models, warm_up_dir=shared, report=report)
            done.append(kept)
            before.append(cell)
            behind = [other for other in left if other not in before]
            if not keep_warm_ups and not is_shared_now(output_dir, name):
                _discard_moments(warm_up_dir, behind, sharing_cells(cells) if keep_models else [])
            report(f"{kept['seconds']:.0f} s. {_left_line(behind, done, before)}")
    if not keep_models and not is_shared_now(output_dir):
        discard(warm_up_dir)


def _discard_moments(
    warm_up_dir: Path, behind: Sequence[PlannedCell], sharing: Sequence[PlannedCell]
) -> None:
    """Remove moments that no cell behind goes on from, and not two of those that share."""

    def is_needed(moment: Mapping[str, Any]) -> bool:
        return any(takes_over(cell, moment) for cell in behind) or (
            sum(takes_over(cell, moment) for cell in sharing) > 1
        )

    discard(warm_up_dir, is_needed)


def render(
    output_dir: str | Path,
    *,
    methods: Sequence[str] = (),
    baseline: str = OUR_METHOD,
    criteria: Sequence[str] = (),
    also: Sequence[str] = (),
    resamples: int = 1000,
) -> dict[str, Any]:
    """Write compare.json and compare.md from the cells that are kept, without training.

    Args:
        output_dir: where they are.
        methods: labels of those to show beside models without exits; none given: all.
        baseline, criteria, also, resamples: as of `compare`.

    Raises:
        DataError: a file is no cell, or cells cannot be compared.
        SettingError: there is no cell, or none of a method, of the baseline or of a criterion.
    """
    output_dir = user_path(output_dir)
    cells = read_cells(output_dir)
    missing = sorted(set(methods) - {cell["label"] for cell in cells})
    if cells and missing:
        raise SettingError(f"{output_dir / CELLS} has no cell of {', '.join(missing)}.")
    if methods:
        cells = [cell for cell in cells if cell["label"] in methods or not cell["criterion"]]
    if not cells:
        raise SettingError(f"{output_dir / CELLS} must hold at least one finished cell, got none.")
    check_kept_baseline(cells, baseline)
    summary = summarise(cells, baseline=baseline, criteria=criteria, also=also, resamples=resamples)
    write_text(output_dir / SUMMARY_FILE, _json_text(summary))
    write_text(output_dir / PAGE_FILE, markdown_page(summary))
    return summary


def seconds_left(
    left: Sequence[PlannedCell], done: Sequence[Cell], before: Sequence[PlannedCell] = ()
) -> float | None:
    """How long cells will take, from finished ones of the same backbone, and the same method where there are any.

    A cell's time is taken to be proportional to the rows that its training goes through, less those of first steps that
    another has taken. Those that were interrupted say nothing, as they were timed from their last start.

    Args:
        left: the cells, in their order.
        done: finished ones.
        before: those of the same plan that have run before.

    Returns:
        Seconds; None where nothing is finished that would tell.
    """
    timed = [cell for cell in done if not cell["resumed"]]
    total = 0.0
    for cell, work in zip(left, work_left([*before, *left])[len(before) :], strict=True):
        alike = [one for one in timed if one["backbone"] == backbone_name(cell.backbone)]
        alike = [one for one in alike if one["label"] == cell.method.label] or alike
        if not alike:
            return None
        total += work * sum(one["seconds"] for one in alike) / sum(one["work"] for one in alike)
    return total


def _plan_line(count: int, left: Sequence[PlannedCell], done: Sequence[Cell]) -> str:
    return f"{count} cells, {len(done)} of them finished. {_left_line(left, done)}"


def _left_line(left: Sequence[PlannedCell], done: Sequence[Cell], before: Sequence[PlannedCell] = ()) -> str:
    if not left:
        return "None left."
    seconds = seconds_left(left, done, before)
    time = "nobody knows how long until one of each backbone is finished"
    return f"{len(left)} left, {time if seconds is None else f'about {duration(seconds)}'}."


def _state(cell: PlannedCell, kept: Cell | None, output_dir: Path) -> str:
    if kept is not None:
        return "finished"
    return "interrupted, goes on" if run_folder(output_dir, cell).exists() else "to be run"


def _json_text(summary: Mapping[str, Any]) -> str:
    """JSON with one run, or one entry of the summary, a line."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines: list[str] = []
    for key, value in summary.items():
        if key in ("runs", "summary"):
            inner = ",\n".join(f"  {text(entry)}" for entry in value)
            lines.append(f'"{key}": [\n{inner}\n]')
        else:
            lines.append(f'"{key}": {text(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
