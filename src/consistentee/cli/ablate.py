"""The command `ablate`: what each part of the method gives, one switch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from consistentee.cli.compare import (
    ComparedDataOptions,
    Names,
    check_nothing_to_train,
    check_one_process,
    compared_sets,
    shared_settings,
)
from consistentee.cli.options import ClassifierSettingOptions, Flag
from consistentee.cli.terminal import check_plot_file, say, show_tables
from consistentee.errors import MissingExtraError, UsageError


def ablate_command(
    *,
    output_dir: Path,
    questions: Names = None,
    backbone: Names = None,
    seeds: Annotated[list[int] | None, Parameter(consume_multiple=True, negative=())] = None,
    config: Path | None = None,
    resamples: int = 1000,
    plot: Path | None = None,
    discard_models: Flag = False,
    dry_run: Flag = False,
    render: Flag = False,
    data: ComparedDataOptions | None = None,
    settings: ClassifierSettingOptions | None = None,
    debug: Flag = False,
) -> None:
    """Ask what each part of the method gives: one switch at a time, on the same rows, split, seeds and budget.

    Cells are those of `compare`, and may lie in its folder: what is finished is left alone, an interrupted one goes on:
    run the same command again. The output folder gets a file for each cell and study, a folder for each run,
    ablate.json, ablate.md and ablate.png.

    Args:
        output_dir: Where all of it goes. Several commands may fill one folder at the same time, also the same one: each
            takes cells and studies that no other works on.
        questions: reward (with and without hardness, easy, middle and hard rows apart), hardness (measures of it),
            rounds (convergence; one round, twice as many), estimator (exact or sampled gradients), policy_rows
            (held-out or seen, how many), objective (consistent or weighted sum, strong and weak exits). [default: all]
        backbone: Encoders to start from: names on the model hub or local folders.
        seeds: Seeds of split, order and initial weights. [default: 1 2 3]
        config: Recipe (YAML) with settings of all methods; options given here override it.
        resamples: Draws of the bootstrap.
        plot: The picture, PNG, PDF or SVG. [default: ablate.png in the output folder]
        discard_models: Remove the folder of each run of this command once its cell is measured, and studied where a
            question needs that.
        dry_run: List the cells and what state they are in, and stop.
        render: Answer anew from the cells and studies that are there, without training, with the settings that they
            were made with.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_plot_file(plot)
    data = data or ComparedDataOptions()
    shared = shared_settings(settings, config)
    from consistentee.evaluation.ablation.ablate import ablate, render_answers
    from consistentee.evaluation.ablation.questions import QUESTIONS

    asked = questions or QUESTIONS
    if render:
        check_nothing_to_train(
            data,
            backbone=backbone,
            seeds=seeds,
            discard_models=discard_models or None,
            dry_run=dry_run or None,
        )
        summary = render_answers(output_dir, questions=asked, settings=shared, resamples=resamples)
    else:
        if not backbone:
            raise UsageError("Give --backbone, or --render for the cells that are there.")
        check_one_process("ablate")
        summary = ablate(
            questions=asked,
            backbones=backbone,
            sets=compared_sets(data),
            output_dir=output_dir,
            seeds=seeds or (1, 2, 3),
            settings=shared,
            resamples=resamples,
            keep_models=not discard_models,
            dry_run=dry_run,
            report=say,
        )
    if summary:
        _show(summary, output_dir, plot)


def _show(summary: Mapping[str, Any], output_dir: Path, plot: Path | None) -> None:
    """Print the tables and draw the picture; one that was not asked for needs no matplotlib."""
    from consistentee.evaluation.ablation.ablate import ANSWERS_FILE, ANSWERS_PAGE, ANSWERS_PICTURE
    from consistentee.evaluation.ablation.pages import ablation_sheets
    from consistentee.evaluation.ablation.picture import plot_ablation
    from consistentee.evaluation.comparison.tables import terminal_sheets

    show_tables(terminal_sheets(ablation_sheets(summary)))
    say(f"Figures written to {output_dir / ANSWERS_FILE}, tables to {output_dir / ANSWERS_PAGE}")
    try:
        say(f"Picture written to {plot_ablation(summary, plot or output_dir / ANSWERS_PICTURE)}")
    except MissingExtraError as error:
        say(f"No picture. {error}")
