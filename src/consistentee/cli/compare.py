"""The command `compare`: methods side by side, on the same backbone, rows, split, seeds, budget and validation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from consistentee.cli.data import training_data
from consistentee.cli.kinds import CLASSIFIERS
from consistentee.cli.options import (
    DATA,
    NOT_GIVEN,
    ClassifierSettingOptions,
    Columns,
    Flag,
    TrainingDataOptions,
    read_recipe,
    training_config,
)
from consistentee.cli.terminal import check_plot_file, say, show_tables
from consistentee.data.recipes import Recipe
from consistentee.errors import MissingExtraError, UsageError

Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
DATA_SEED = 0
"""Of the rows that are drawn or held out: the same for all methods and seeds."""


@Parameter(name="*", group=DATA)
@dataclass(frozen=True)
class ComparedDataOptions:
    """Which rows to compare on.

    Args:
        task: Tasks by name, one set each: sst2, mrpc, rte, qnli, qqp, mnli, cola, m-cid, stackoverflow.
        data_dir: The task's local folder, or one that holds a folder for each; without it they come from the model hub.
        train_file: In place of tasks, rows to train on: CSV, TSV, JSON, Parquet, a `datasets` folder or hf:user/name.
        eval_file: Rows to report on. [default: a tenth of the training file]
        text_columns: The column of the text, or the two columns of a pair.
        label_column: The column of the label.
        max_train_samples: Train on at most so many rows, every class with its share; the same rows for all.
    """

    task: Names = None
    data_dir: Path | None = None
    train_file: Path | None = None
    eval_file: Path | None = None
    text_columns: Columns = None
    label_column: str | None = None
    max_train_samples: int | None = None


def compare_command(
    *,
    output_dir: Path,
    methods: Names = None,
    backbone: Names = None,
    seeds: Annotated[list[int] | None, Parameter(consume_multiple=True, negative=())] = None,
    baseline: str = "consistent",
    criteria: Names = None,
    also: Names = None,
    config: Path | None = None,
    method_settings: Annotated[Path | None, Parameter(name="--settings")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative=())] = None,
    recipes: Path | None = None,
    resamples: int = 1000,
    plot: Path | None = None,
    discard_models: Flag = False,
    dry_run: Flag = False,
    render: Flag = False,
    data: ComparedDataOptions | None = None,
    settings: ClassifierSettingOptions | None = None,
    debug: Flag = False,
) -> None:
    """Compare ways to train exits: same backbone, rows, split, seeds, budget and validation for all.

    Cells (a backbone, set, method and seed) that are finished are left alone, an interrupted one goes on: run the same
    command again. The output folder gets a file for each cell, a folder for each run, compare.json, compare.md and
    compare.png.

    Args:
        output_dir: Where all of it goes. Several commands may fill one folder at the same time, also the same one: each
            takes cells that no other works on.
        methods: Training methods; `plain` is always among them. NAME:VARIANT is one with settings of its own;
            static:6 is the plain model of the first 6 layers.
        backbone: Encoders to start from: names on the model hub or local folders.
        seeds: Seeds of split, order and initial weights. [default: 1]
        baseline: What differences are taken to: METHOD, with its own criterion, or METHOD/CRITERION.
        criteria: Besides each method's own criterion, those to evaluate on everybody's exits; all takes all.
        also: METHOD/CRITERION: further rows of the first tables and lines of the picture, such as methods that share
            another's exits.
        config: Recipe (YAML) with settings of all methods; options given here override it.
        method_settings: YAML file of settings by method: `deebert: {head: shared_pooler}`. One file may serve several
            commands: what it says of methods that are not compared is left aside.
        set_: One setting of one method each: METHOD.key=value.
        recipes: Folder where NAME:VARIANT is looked for, as VARIANT/NAME.yaml or NAME_VARIANT.yaml.
        resamples: Draws of the bootstrap.
        plot: The picture, PNG, PDF or SVG. [default: compare.png in the output folder]
        discard_models: Remove the folder of each run of this command once its cell is measured.
        dry_run: List the cells and what state they are in, and stop.
        render: Write all tables and the picture anew from the cells that are there, without training; of --methods
            alone where these are given.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_plot_file(plot)
    data = data or ComparedDataOptions()
    reading: dict[str, Any] = {
        "baseline": baseline,
        "criteria": criteria or (),
        "also": also or (),
        "resamples": resamples,
    }
    if render:
        check_nothing_to_train(
            data,
            backbone=backbone,
            seeds=seeds,
            config=config,
            settings=method_settings,
            set=set_,
            recipes=recipes,
            discard_models=discard_models or None,
            dry_run=dry_run or None,
            **given_settings(settings),
        )
        from consistentee.evaluation.comparison.compare import render as render_cells

        summary = render_cells(output_dir, methods=methods or (), **reading)
    else:
        if not methods or not backbone:
            raise UsageError("Give --methods and --backbone, or --render for the cells that are there.")
        shared = shared_settings(settings, config)
        check_one_process("compare")
        from consistentee.evaluation.comparison.compare import compare

        summary = compare(
            methods=methods,
            backbones=backbone,
            sets=compared_sets(data),
            output_dir=output_dir,
            seeds=seeds or (1,),
            settings=shared,
            overrides=_overrides(method_settings, set_ or (), methods),
            recipes=recipes,
            keep_models=not discard_models,
            dry_run=dry_run,
            report=say,
            **reading,
        )
    if summary:
        _show(summary, output_dir, plot)


def _show(summary: Mapping[str, Any], output_dir: Path, plot: Path | None) -> None:
    """Print the tables and draw the picture; one that was not asked for needs no matplotlib."""
    from consistentee.evaluation.comparison.compare import PAGE_FILE, PICTURE_FILE, SUMMARY_FILE
    from consistentee.evaluation.comparison.picture import plot_comparison
    from consistentee.evaluation.comparison.tables import terminal_tables

    show_tables(terminal_tables(summary))
    say(f"Figures written to {output_dir / SUMMARY_FILE}, tables to {output_dir / PAGE_FILE}")
    try:
        say(f"Picture written to {plot_comparison(summary, plot or output_dir / PICTURE_FILE)}")
    except MissingExtraError as error:
        say(f"No picture. {error}")


def check_one_process(command: str) -> None:
    """Raise UsageError where a launcher has started several."""
    from accelerate.utils import get_int_from_env

    # Not accelerate's state: on the CPU that takes each process for a lone one.
    if get_int_from_env(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1) > 1:
        raise UsageError(
            f"{command} runs in one process. Start one for each part of the cells, such as one seed; they can share an "
            "output folder."
        )


def check_nothing_to_train(data: ComparedDataOptions, **options: Any) -> None:
    """Raise UsageError where what only training reads is given beside --render; None is what is not given."""
    for name, value in {**options, **vars(data)}.items():
        if value is not None:
            raise UsageError(
                f"--render shows the cells that are there, and --{name.replace('_', '-')} goes without it."
            )


def given_settings(settings: Any) -> dict[str, Any]:
    """Training settings that the command line gives."""
    values = {} if settings is None else vars(settings)
    return {name: value for name, value in values.items() if value is not NOT_GIVEN}


def shared_settings(settings: Any, recipe_file: Path | None) -> dict[str, Any]:
    """Settings of all methods, as far as they are given."""
    given = given_settings(settings)
    if "seed" in given:
        raise UsageError("--seed is of a single training. Give --seeds.")
    recipe = read_recipe(recipe_file, TrainingDataOptions()) if recipe_file is not None else Recipe()
    chosen = training_config(settings, Recipe(settings=recipe.settings)).to_dict()
    named = given.keys() | recipe.settings.keys()
    return {name: value for name, value in chosen.items() if name in named and name != "seed"}


def compared_sets(data: ComparedDataOptions) -> list[Any]:
    """The data sets, read.

    Raises:
        UsageError: options contradict each other, or neither tasks nor a training file is given.
        DataError: a file is missing or broken.
    """
    from consistentee.evaluation.comparison.plan import ComparedSet

    found: list[Any] = []
    for task in data.task or [None]:
        options = TrainingDataOptions(
            task=task,
            data_dir=data.data_dir,
            train_file=data.train_file,
            eval_file=data.eval_file,
            text_columns=data.text_columns,
            label_column=data.label_column,
            max_train_samples=data.max_train_samples,
        )
        kind = options.kind()
        if kind is not CLASSIFIERS:
            raise UsageError(f"compare is for classifiers, and these are of {kind.rows}.")
        rows = training_data(options, Recipe(), kind, DATA_SEED)
        name = rows.task or re.sub(r"[^\w.-]+", "-", Path(str(data.train_file)).stem)
        found.append(ComparedSet(name, rows.train, rows.evaluation, rows.task))
    return found


def _overrides(path: Path | None, lines: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by method: those of the file for these methods, then METHOD.key=value.

    Raises:
        UsageError: one of them is not of this form, or the file has settings of what is no method.
    """
    from consistentee.evaluation.comparison.plan import REFERENCE
    from consistentee.training.methods import method_of

    compared = {REFERENCE, *methods}
    found: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"--settings {path} must be UTF-8: {error}. Save it so.") from error
        values = _yaml(text, f"--settings {path}")
        if not isinstance(values, dict) or not all(isinstance(inner, dict) for inner in values.values()):
            raise UsageError(f"--settings {path} must map methods to their settings, each a mapping.")
        labels = [str(label) for label in values]
        try:
            for label in labels:
                method_of(label.partition(":")[0])
        except ValueError as error:
            raise UsageError(f"--settings {path}, which has {', '.join(labels)}: {error}") from error
        found = {str(label): dict(inner) for label, inner in values.items() if label in compared}
        if aside := [label for label in labels if label not in compared]:
            say(f"--settings {path}: settings of {', '.join(aside)} left aside, not compared here.")
    for line in lines:
        match = re.fullmatch(r"([^=]+)\.(\w+)=(.*)", line, re.DOTALL)
        if match is None:
            raise UsageError(f'--set must be METHOD.key=value, got "{line}".')
        method, key, value = match.groups()
        found.setdefault(method, {})[key] = _yaml(value, f"--set {line}")
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
