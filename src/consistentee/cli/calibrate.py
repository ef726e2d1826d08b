"""The command `calibrate`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from consistentee.atomic_files import user_path
from consistentee.cli.data import evaluation_data, read_all_texts
from consistentee.cli.kinds import CLASSIFIERS, kind_of_model
from consistentee.cli.options import Flag, RowOptions, check_one_or_two
from consistentee.cli.terminal import (
    at_least_one,
    check_folder,
    check_json_file,
    save_figures,
    say,
    tuned_note,
    usage,
)
from consistentee.config import Criterion
from consistentee.data.files import TO_CERTIFY
from consistentee.errors import UsageError

EXITS_CHOSEN_BY = 0.5
"""Of the rows, where exits are chosen: these choose, the others judge."""


def calibrate(
    model: str,
    *,
    file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    data: RowOptions | None = None,
    max_disagreement: float | None = None,
    max_accuracy_loss: float | None = None,
    min_speedup: float | None = None,
    confidence: float = 0.95,
    criterion: Criterion | None = None,
    reference: str | None = None,
    name: str = "calibrated",
    overwrite: Flag = False,
    exit_layers: str | None = None,
    output_dir: Path | None = None,
    clock: int | None = None,
    backend: str = "torch",
    batch_size: int | None = None,
    max_samples: int | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    debug: Flag = False,
) -> None:
    """Find a threshold with a certificate, and keep it in the model's folder as an operating point with a name.

    One goal: --max-disagreement, --max-accuracy-loss or --min-speedup. The rows must be drawn as the inputs to come
    will be, and nothing may have been chosen on them. Where they prove nothing the exit code is 1; nothing is kept.

    Args:
        model: Folder of a trained classifier.
        file: Texts without labels, in every form that predict reads; "-" is standard input. Of a data set with several
            splits, "validation" is read, else "test"; that of the training would certify nothing.
        max_disagreement: Share of inputs, such as 0.01, that may get another class than at full depth. Needs no labels.
        max_accuracy_loss: Share of inputs that may be wrong where full depth is right. Needs labels.
        min_speedup: Layers over mean exit layer, such as 2, or with --clock time; the certificate says what is lost at
            most.
        confidence: How sure the certificate is.
        criterion: Exit rule. [default: the saved one]
        reference: Folder or hub name of the model to be compared with in place of full depth, as it was saved: of a
            tuned model (`retrofit --tune-backbone`) the original.
        name: Of the operating point, for --operating-point; `full-depth` and `saved` are the server's own.
        overwrite: Replace an operating point of that name.
        exit_layers: Layers that keep an exit, such as 3,5,12, or auto: half of the rows choose them, by the time that
            layers and exits take here, and the other half certifies. A copy of the model with these exits alone goes to
            --output-dir; the model itself stays as it is.
        output_dir: New folder for that copy.
        clock: Inputs that start together: --min-speedup is then one in time on this machine, and --exit-layers auto is
            to be fast for so many. [default: layers count; 1]
        backend: Engine that --clock and --exit-layers auto time: torch or onnxruntime.
        batch_size: Inputs per step; does not change the result. [default: 64]
        max_samples: Take at most so many rows, drawn at random.
        json_file: Write all figures to this file.
        debug: Show tracebacks and the messages of other libraries.
    """
    at_least_one(batch_size=batch_size, max_samples=max_samples)
    check_json_file(json_file)
    goal, target = _goal(max_disagreement, max_accuracy_loss, min_speedup, confidence)
    data = data or RowOptions()
    _check_rows(file, data, goal)
    if kind_of_model(model) is not CLASSIFIERS:
        raise UsageError(
            f'calibrate goes with classifiers, and model "{model}" is a text generator: tokens exit one by one, and '
            "no certificate of whole texts follows from theirs."
        )
    from consistentee.functional.criteria import check_fitted
    from consistentee.models.operating_points import (
        check_point_name,
        read_operating_points,
        save_operating_point,
    )

    usage(lambda: check_point_name(name))
    saved = CLASSIFIERS.load(model)
    network, folder = saved.early_exit_model, user_path(model)
    usage(lambda: check_fitted(criterion or network.config.criterion, network.config))
    if not folder.is_dir():
        raise UsageError(f'Model "{model}" is not a folder here, so that it cannot keep an operating point.')
    subset = _exit_layers(exit_layers, output_dir, goal, network.num_layers)
    if subset is None:
        _check_writable(folder)
    at_least_one(clock=clock)
    if clock is not None and min_speedup is None and subset != "auto":
        raise UsageError(
            "--clock goes with --min-speedup or --exit-layers auto: nothing else is told in time."
        )
    if backend != "torch" and clock is None and subset != "auto":
        raise UsageError("--backend goes with --clock or --exit-layers auto: nothing else is timed.")
    if overwrite and subset is not None:
        raise UsageError("--overwrite goes without --exit-layers, whose --output-dir is new.")
    if subset is None and name in read_operating_points(folder) and not overwrite:
        raise UsageError(
            f'Model "{model}" has an operating point "{name}". Give another --name, or --overwrite to replace it.'
        )
    if min_speedup is not None and not 1 < min_speedup <= network.num_layers:
        raise UsageError(
            f"--min-speedup must be above 1 and at most {network.num_layers} (layers), got {min_speedup:g}."
        )
    from consistentee.evaluation.calibration import NO_PROMISE, calibrate_model, calibration_lines

    compared = None if reference is None else CLASSIFIERS.load(reference)
    if compared is None and network.config.is_tuned:
        say(tuned_note(network.config))
    rows, source = _rows(file, data, saved, max_samples)
    judged, choice = saved, None
    if subset is not None:
        from consistentee.models.exit_subsets import at_full_depth

        judged, rows, choice = _with_subset(
            saved, rows, source, subset, goal, target, criterion, confidence, clock or 1, backend
        )
        if network.config.original_head is None and compared is None:
            compared = at_full_depth(saved)  # what the last layer says leans on the exits before it
    found = calibrate_model(
        judged,
        rows,
        goal=goal,
        target=target,
        criterion=criterion,
        confidence=confidence,
        reference=compared,
        clock_batch_size=clock if goal == "min_speedup" else None,
        backend=backend,
        batch_size=batch_size or 64,
        source=source,
        progress=True,
    )
    lines, chosen = calibration_lines(found), {} if choice is None else {"exit_choice": choice.to_dict()}
    figures = {**found.to_dict(), "name": name, **chosen}
    if not found.certified:
        save_figures(figures, json_file)
        raise ValueError(lines[0])
    if subset is not None and output_dir is not None:
        from consistentee.models.exit_subsets import save_with_exit_layers

        layers = judged.early_exit_model.config.exit_layers
        save_with_exit_layers(folder, output_dir, layers, name, found.operating_point())
        folder = user_path(output_dir)
        model = str(folder)
    else:
        save_operating_point(folder, name, found.operating_point(), overwrite=overwrite)
    for line in (*lines, NO_PROMISE):
        say(line)
    from consistentee.models.card import enter_operating_points

    enter_operating_points(folder)
    example = f"consistentee predict {shlex.quote(model)} --operating-point {name}"
    say(f'Kept as operating point "{name}": {example}')
    save_figures(figures, json_file)


def _check_writable(folder: Path) -> None:
    """Raise UsageError unless the model's folder can keep an operating point."""
    from consistentee.models.operating_points import CONFIG_FILE

    written = Path(os.path.realpath(folder / CONFIG_FILE)).parent
    if not os.access(written, os.W_OK):
        raise UsageError(
            f'The model\'s folder must be writable to keep an operating point, and "{written}" is not. Give a copy of '
            "the model."
        )


def _exit_layers(
    text: str | None, output_dir: Path | None, goal: str, num_layers: int
) -> list[int] | Literal["auto"] | None:
    """The layers that are to keep an exit.

    Raises:
        UsageError: they are none, or go with no folder or another goal.
    """
    if (text is None) != (output_dir is None):
        raise UsageError(
            "--exit-layers and --output-dir go together: the copy with these exits needs a folder."
        )
    if text is None or output_dir is None:
        return None
    from consistentee.models.exit_subsets import require_new_folder

    usage(lambda: require_new_folder(user_path(output_dir)))
    check_folder("--output-dir", output_dir)
    if text == "auto":
        if goal == "min_speedup":
            raise UsageError(
                "--exit-layers auto looks for the fastest exits at a loss allowed, and goes with --max-disagreement or "
                "--max-accuracy-loss; with --min-speedup name the layers."
            )
        return "auto"
    from consistentee.models.configuration import check_exit_layers

    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f'--exit-layers must be auto or layers such as 3,5,12, got "{text}".') from None
    usage(lambda: check_exit_layers(layers, num_layers))
    return layers


def _with_subset(
    saved: Any,
    rows: Any,
    source: str,
    subset: list[int] | Literal["auto"],
    goal: str,
    target: float,
    criterion: Criterion | None,
    confidence: float,
    batch_size: int,
    backend: str,
) -> tuple[Any, Any, Any]:
    """The model with exits on some layers, the rows that may judge it, and how the layers were chosen."""
    from consistentee.models.exit_subsets import with_exit_layers

    if subset != "auto":
        return with_exit_layers(saved, subset), rows, None
    from consistentee.data.rows import TextDataset, split_rows
    from consistentee.evaluation.agreement import unlabelled_rows
    from consistentee.evaluation.exit_choice import choice_lines, choose_exit_layers, time_choice

    labelled = isinstance(rows, TextDataset)
    dataset = rows if isinstance(rows, TextDataset) else unlabelled_rows(rows, saved.label_names, source)
    judging, choosing = split_rows(len(dataset), EXITS_CHOSEN_BY, seed=0)
    judges = dataset.select(judging)
    timing: dict[str, Any] = {"criterion": criterion, "backend": backend, "progress": True}
    choice = choose_exit_layers(
        saved,
        dataset.select(choosing),
        goal=goal,
        target=target,
        confidence=confidence,
        batch_size=batch_size,
        **timing,
    )
    choice = time_choice(
        saved, choice, judges, batch_sizes=sorted({1, 32, batch_size}), labelled=labelled, **timing
    )
    for line in choice_lines(choice):
        say(line)
    say(
        f"{len(choosing):,} of the {len(dataset):,} rows chose the exits; "
        f"what is certified is by the other {len(judging):,}."
    )
    return with_exit_layers(saved, choice.exit_layers), judges if labelled else judges.texts, choice


def _goal(
    max_disagreement: float | None,
    max_accuracy_loss: float | None,
    min_speedup: float | None,
    confidence: float,
) -> tuple[str, float]:
    """The one goal that is given, and its value.

    Raises:
        UsageError: none or several are given, or a value is out of its range.
    """
    goals = {
        "max_disagreement": max_disagreement,
        "max_accuracy_loss": max_accuracy_loss,
        "min_speedup": min_speedup,
    }
    given = [(name, value) for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise UsageError("Give --max-disagreement, --max-accuracy-loss or --min-speedup: one of them.")
    ((goal, value),) = given
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence must be above 0 and below 1, got {confidence:g}.")
    if goal != "min_speedup" and not 0 < value < 1:
        option = goal.replace("_", "-")
        raise UsageError(f"--{option} must be above 0 and below 1 (0.01 is a point), got {value:g}.")
    return goal, value


def _check_rows(file: str | None, data: RowOptions, goal: str) -> None:
    """Raise UsageError for rows in two ways, or without the labels that a goal needs."""
    check_one_or_two(data.text_columns)
    if file is None:
        return
    if data.task is not None or data.data_dir is not None or data.eval_file is not None:
        raise UsageError("--file excludes --task, --data-dir and --eval-file: give one or the other.")
    if goal == "max_accuracy_loss":
        raise UsageError("--max-accuracy-loss needs labels: give --eval-file with --label-column, or --task.")
    if data.label_column is not None:
        raise UsageError("--label-column goes with --eval-file; --file reads no labels.")
    data.check_kind(CLASSIFIERS)


def _rows(file: str | None, data: RowOptions, saved: Any, max_samples: int | None) -> tuple[Any, str]:
    """Labelled rows, or texts, drawn at random where there are more than are wanted; and where they come from."""
    if file is not None:
        return read_all_texts(file, data.text_columns, saved, max_samples, TO_CERTIFY)
    from consistentee.data.rows import split_rows

    rows = evaluation_data(data, CLASSIFIERS, saved.task, label_names=saved.label_names)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.select(split_rows(len(rows), max_samples / len(rows), seed=0)[1])
    return rows, rows.source
