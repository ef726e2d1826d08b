"""Ask questions: run the cells that they need, study trained models, and answer from all that is there."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from consistentee.atomic_files import make_folder, user_path, write_text
from consistentee.errors import DataError, SettingError
from consistentee.evaluation.ablation.answers import answer
from consistentee.evaluation.ablation.kept import kept_questions
from consistentee.evaluation.ablation.pages import answers_page
from consistentee.evaluation.ablation.questions import QUESTIONS, Question, check_questions, question
from consistentee.evaluation.ablation.studies import STUDIES, studied
from consistentee.evaluation.comparison.cells import (
    Cell,
    check_same_cell,
    discard_note,
    discard_run,
    finished_cell,
    planned_identity,
    read_cells,
    require_folder,
    run_folder,
)
from consistentee.evaluation.comparison.claims import is_shared_now, is_taken, taken_in_turns
from consistentee.evaluation.comparison.compare import run_cells
from consistentee.evaluation.comparison.measuring import rounded
from consistentee.evaluation.comparison.plan import (
    OUR_METHOD,
    ComparedSet,
    PlannedCell,
    backbone_name,
    compared_methods,
    planned_cells,
)
from consistentee.evaluation.comparison.reading import check_resamples
from consistentee.evaluation.comparison.summary import environments
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.run import Report

STUDIES_FOLDER = "studies"
_OF_CELL = "cell"
"""Key of a study that says which model it is about."""
_OF_STUDY = {"backbone", "set", "seed"}
"""Keys that every study has."""
ANSWERS_FILE, ANSWERS_PAGE, ANSWERS_PICTURE = "ablate.json", "ablate.md", "ablate.png"


def ablate(
    *,
    questions: Sequence[str] = QUESTIONS,
    backbones: Sequence[str],
    sets: Sequence[ComparedSet],
    output_dir: str | Path,
    seeds: Sequence[int] = (1, 2, 3),
    settings: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    keep_models: bool = True,
    dry_run: bool = False,
    report: Report = lambda message: None,
) -> dict[str, Any]:
    """Turn one switch at a time, and say what each gives.

    Cells are those of `compare`, in the same folder and form: what is finished is left alone, an interrupted one goes
    on. Several processes may share an output folder and even the questions: each takes cells and studies that no other
    works on.

    Args:
        questions: names, of `QUESTIONS`.
        backbones: hub names or folders of encoders.
        sets: data sets.
        output_dir: gets `cells/`, `runs/`, `studies/`, ablate.json and ablate.md.
        seeds: of split, order, initial weights.
        settings: training settings of all methods, where they are not defaults.
        resamples: draws of the bootstrap.
        keep_models: whether trained models stay; those that were there before do.
        dry_run: say what would be run, and stop.
        report: is given lines of text to show.

    Returns:
        What ablate.json holds; empty after a dry run.

    Raises:
        SettingError: a question that is not known, or has nothing to compare with these settings; a kept cell or study
            that was made with others; an output folder that is none.
        DataError: a kept file is broken, or a study needs a model that was discarded.
        ValueError: a run's folder with other settings, backbone or data.
    """
    output_dir, shared = user_path(output_dir), dict(settings or {})
    require_folder(output_dir)
    check_resamples(resamples)
    check_questions(questions)
    asked = {name: question(name, shared) for name in questions}
    variants = {label: own for one in asked.values() for label, own in one.settings.items()}

    def planned(labels: Sequence[str], own: Mapping[str, Mapping[str, Any]]) -> list[PlannedCell]:
        return planned_cells(backbones, sets, compared_methods(labels, shared, own), seeds, shared)

    first = planned([OUR_METHOD], {})
    ours = [cell for cell in first if cell.method.name == OUR_METHOD]
    wanted = [name for name, one in asked.items() if one.further in STUDIES]
    left = {
        f"{cell.name}_{name}": (name, cell)
        for name in wanted
        for cell in ours
        if not _is_studied(output_dir, name, cell)
    }
    if wanted:
        report(f"{len(wanted) * len(ours)} studies, {len(wanted) * len(ours) - len(left)} of them finished.")
    for study, (name, cell) in left.items():  # before anything is trained
        if finished_cell(cell, output_dir) is not None and not is_taken(study, output_dir):
            _check_model(name, cell, output_dir)
    if (left or keep_models) and not dry_run:
        _note_discarded(first, output_dir, keep_models)
    if left and not dry_run:  # they need our models, which may go afterwards
        run_cells(first, output_dir, keep_warm_ups=True, report=report)
        with closing(taken_in_turns(left, output_dir, report)) as turns:
            for _, (name, cell) in turns:
                if not _is_studied(output_dir, name, cell):  # nor made by another command
                    report(f"== study {name} of {cell.name}")
                    _study(asked[name], name, cell, output_dir)
        if not keep_models:
            _discard_noted(first, output_dir)
    labels = dict.fromkeys([OUR_METHOD, *(label for one in asked.values() for label in one.labels)])
    cells = planned(list(labels), variants)
    run_cells(cells, output_dir, keep_models=keep_models, dry_run=dry_run, report=report)
    if dry_run:
        return {}
    if not keep_models:
        _discard_noted(first, output_dir)  # another command may have needed them until now
    return write_answers(output_dir, asked, resamples=resamples)


def _note_discarded(cells: Sequence[PlannedCell], output_dir: Path, keep_models: bool) -> None:
    """Note which runs are this command's, to go once their models are studied, however often it is interrupted."""
    unfinished = {cell.name for cell in cells if finished_cell(cell, output_dir) is None}
    for cell in cells:
        note = discard_note(output_dir, cell)
        if keep_models:
            note.unlink(missing_ok=True)
        elif cell.name in unfinished:
            make_folder(note.parent)
            note.touch()


def _discard_noted(cells: Sequence[PlannedCell], output_dir: Path) -> None:
    """Remove the runs that were noted, unless another command works in the folder and may study them yet."""
    if is_shared_now(output_dir):
        return
    for cell in cells:
        if discard_note(output_dir, cell).exists():
            discard_run(output_dir, cell)
            discard_note(output_dir, cell).unlink(missing_ok=True)


def render_answers(
    output_dir: str | Path,
    *,
    questions: Sequence[str] = QUESTIONS,
    settings: Mapping[str, Any] | None = None,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Write ablate.json and ablate.md from what is there, without training.

    Args:
        output_dir: where cells and studies are.
        questions: names, of `QUESTIONS`.
        settings: the kept cells' own are taken; those that are given must be among these.
        resamples: draws of the bootstrap.

    Raises:
        SettingError: as of `kept_questions` and `write_answers`.
        DataError: a file is broken.
    """
    folder = user_path(output_dir)
    asked = kept_questions(questions, read_cells(folder), settings or {})
    return write_answers(folder, asked, resamples=resamples)


def write_answers(output_dir: Path, asked: Mapping[str, Question], *, resamples: int) -> dict[str, Any]:
    """Answer from the cells and studies of a folder, and write ablate.json and ablate.md.

    Args:
        output_dir: of the ablation.
        asked: questions by name; those that no finished cell answers are left out.
        resamples: draws of the bootstrap.

    Raises:
        SettingError: nothing is finished that answers any of them, or a study is of another model than the kept cell.
        DataError: a file is broken.
    """
    cells = read_cells(output_dir)
    found: dict[str, Any] = {}
    for name, one in asked.items():
        value = answer(one, cells, _read_studies(output_dir, name, cells), resamples=resamples)
        if value["differences"] or (one.further is not None and value[one.further]):
            found[name] = value
    if not found:
        raise SettingError(
            f"{output_dir} must hold finished cells that answer {', '.join(asked)}, got none. Run ablate without "
            "--render first."
        )
    summary = {"resamples": resamples, "questions": found, "environments": environments(cells)}
    write_text(output_dir / ANSWERS_FILE, json.dumps(summary, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(output_dir / ANSWERS_PAGE, answers_page(summary))
    return summary


def _study_path(output_dir: Path, name: str, cell: PlannedCell) -> Path:
    return output_dir / STUDIES_FOLDER / f"{cell.name}_{name}.json"


def _study(asked: Question, name: str, cell: PlannedCell, output_dir: Path) -> None:
    """Study one model and keep what is found."""
    folder = _check_model(name, cell, output_dir)
    rows = studied(load_model(folder, LoadedClassifier), cell.data.train, cell.data.evaluation)
    found = {"backbone": backbone_name(cell.backbone), "set": cell.data.name, "seed": cell.seed}
    found |= {_OF_CELL: planned_identity(cell)} | rounded(STUDIES[str(asked.further)](rows))
    write_text(_study_path(output_dir, name, cell), json.dumps(found) + "\n")
    del rows
    gc.collect()


def _check_model(name: str, cell: PlannedCell, output_dir: Path) -> Path:
    """The folder of a trained model, or DataError where it is gone."""
    folder = run_folder(output_dir, cell)
    if not folder.is_dir():
        raise DataError(
            f'The question "{name}" needs the trained model of {cell.name}, which is no longer there.',
            file=folder,
            remedy="Remove its cell, so that it is trained anew, or leave the question out.",
        )
    return folder


def _is_studied(output_dir: Path, name: str, cell: PlannedCell) -> bool:
    """Whether the model of this cell has been studied; SettingError where it was another one."""
    path = _study_path(output_dir, name, cell)
    if not path.is_file():
        return False
    _check_study(path, _read_study(path), planned_identity(cell))
    return True


def _check_study(path: Path, study: Mapping[str, Any], cell: Cell) -> None:
    if _OF_CELL in study:  # those of earlier versions do not say whose they are
        check_same_cell(f"The model of the study {path}", study[_OF_CELL], cell)


def _read_studies(output_dir: Path, name: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Studies of a question, without what says whose they are, which must be what the kept cells are."""
    ours = {
        (cell["backbone"], cell["set"], cell["seed"]): cell for cell in cells if cell["label"] == OUR_METHOD
    }
    found: list[dict[str, Any]] = []
    for path in sorted((output_dir / STUDIES_FOLDER).glob(f"[!.]*_{name}.json")):
        study = _read_study(path)
        cell = ours.get((study["backbone"], study["set"], study["seed"]))
        if cell is not None:
            _check_study(path, study, cell)
        found.append({key: value for key, value in study.items() if key != _OF_CELL})
    return found


def _read_study(path: Path) -> dict[str, Any]:
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(study, dict) or not study.keys() >= _OF_STUDY:
            raise ValueError(f"{', '.join(sorted(_OF_STUDY))} must be in it")
    except ValueError as error:
        remedy = "Remove it; ablate makes it anew."
        raise DataError(f"It is no study ({error}).", file=path, remedy=remedy) from error
    return study
