"""The commands `train` and `finetune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from consistentee.cli.data import check_held_out, num_copies, save_held_out, training_data
from consistentee.cli.effects import Command
from consistentee.cli.kinds import CLASSIFIERS, GENERATORS
from consistentee.cli.options import (
    DATA,
    Flag,
    SettingOptions,
    TrainingDataOptions,
    read_recipe,
    training_config,
)
from consistentee.cli.terminal import (
    check_folder,
    check_one_reader,
    console,
    is_first_process,
    say,
    say_reading,
    usage,
)
from consistentee.config import TrainingConfig
from consistentee.errors import UsageError
from consistentee.functional.tables import CLASSIFICATION, GENERATION
from consistentee.training.methods import METHODS, check_method, method_of

_LEARNT = ", ".join(name for name, row in METHODS.items() if row.labels)
_Method = Annotated[  # by name, and not by a list of types: what is no method is told what it may mean
    str | None,
    Parameter(
        help="How to train: by ConsistentEE, or by another one to compare with (docs/methods). "
        f"[default: the recipe's, else consistent] [choices: {_LEARNT}]"
    ),
]


def train_command(
    *,
    output_dir: Path,
    backbone: str | None = None,
    config: Path | None = None,
    method: _Method = None,
    unlabelled_file: Annotated[
        list[str] | None, Parameter(consume_multiple=True, negative=(), group=DATA)
    ] = None,
    warm_up_dir: Path | None = None,
    resume: Flag = False,
    data: TrainingDataOptions | None = None,
    settings: SettingOptions | None = None,
    debug: Flag = False,
) -> None:
    """Train a classifier or a text generator with early exits, evaluate it and save it.

    A task decides which of them, or a training file: with --text-columns and --label-column it is a classifier, with
    --prompt-column, --input-column or --response-column, or of a .txt file, a text generator.

    Args:
        output_dir: Where checkpoints and the finished model go.
        backbone: Encoder, or causal language model, to start from: a name on the model hub or a local folder.
        config: Recipe (YAML) with settings; options given here override it.
        method: How to train, by name.
        unlabelled_file: Texts without labels for a classifier's exits and policy, which learn to agree with its last
            layer on them: files in every form that `predict` reads; "-" is standard input. Columns are those of
            --text-columns, or the usual names; standard input is a table if its first line holds the named ones, else
            plain text. Of a data set with several splits, "train" is read. Duplicates and rows that are labelled or
            reported on are dropped.
        warm_up_dir: Folder of first steps that trainings share: settings of policy, reward and rounds are tried
            without warming up again. The first training leaves its warm-up there, others that begin alike go on from
            it, also those of other methods whose first phase is the same.
        resume: Go on from the last checkpoint in the output folder.
        debug: Show tracebacks and the messages of other libraries.
    """
    _run(method, output_dir, backbone, config, resume, data, settings, unlabelled_file, warm_up_dir)


def finetune_command(
    *,
    output_dir: Path,
    backbone: str | None = None,
    config: Path | None = None,
    resume: Flag = False,
    data: TrainingDataOptions | None = None,
    settings: SettingOptions | None = None,
    debug: Flag = False,
) -> None:
    """Fine-tune the plain model by the same recipe: the reference for every claim.

    Args:
        output_dir: Where checkpoints and the finished model go.
        backbone: Encoder, or causal language model, to start from: a name on the model hub or a local folder.
        config: Recipe (YAML) with settings; options given here override it.
        resume: Go on from the last checkpoint in the output folder.
        debug: Show tracebacks and the messages of other libraries.
    """
    _run("plain", output_dir, backbone, config, resume, data, settings)


def _run(
    method: str | None,
    output_dir: Path,
    backbone: str | None,
    recipe_file: Path | None,
    resume: bool,
    data: TrainingDataOptions | None,
    settings: Any,
    unlabelled_files: list[str] | None = None,
    warm_up_dir: Path | None = None,
) -> None:
    """Train or fine-tune, then evaluate on the rows to report on and put the figures into the folder."""
    data = data or TrainingDataOptions()
    recipe = read_recipe(recipe_file, data)
    method = method or recipe.method or "consistent"
    command: Command = "train" if usage(lambda: method_of(method)).exits else "finetune"
    backbone = backbone or recipe.backbone
    if backbone is None:
        raise UsageError("Give --backbone: the name of a model on the hub to start from, or a local folder.")
    kind = data.kind(recipe.task)
    if unlabelled_files is not None and kind is not CLASSIFIERS:
        raise UsageError(f"--unlabelled-file goes with {CLASSIFIERS.rows}, and this trains {kind.model}.")
    if unlabelled_files is not None and not METHODS[method].unlabelled:
        able = ", ".join(name for name, row in METHODS.items() if row.unlabelled)
        raise UsageError(f"--unlabelled-file goes with --method {able}, got {method}. Leave it out.")
    if warm_up_dir is not None and not METHODS[method].begins_with:
        able = ", ".join(name for name, row in METHODS.items() if row.begins_with)
        raise UsageError(f"--warm-up-dir goes with --method {able}, got {method}. Leave it out.")
    config = training_config(settings, recipe, kind, command, method, unlabelled=unlabelled_files is not None)
    usage(lambda: check_method(method, CLASSIFICATION if kind is CLASSIFIERS else GENERATION, config))
    from consistentee.training.run_folders import check_output_dir

    usage(lambda: check_output_dir(output_dir, backbone))  # before the data is read
    if warm_up_dir is not None:
        check_folder("--warm-up-dir", warm_up_dir)
    if kind is GENERATORS:
        from consistentee.evaluation.text_metrics import check_text_metrics

        check_text_metrics()  # which the report at the end has
    rows = training_data(data, recipe, kind, config.seed)
    if rows.held_out:
        check_held_out(output_dir, rows.evaluation, data)
    from accelerate import PartialState

    from consistentee.functional.metrics import check_threshold_metric
    from consistentee.models.record import record_evaluation
    from consistentee.training.train import train

    metric = getattr(config, "threshold_metric", None)
    if metric is not None and command == "train":
        usage(lambda: check_threshold_metric(metric, len(rows.train.label_names)))
    kept, held = rows.train.split(config.validation_fraction, config.seed)
    copies = num_copies(rows.train.select(held), rows.train.select(kept))
    if copies and is_first_process():
        say(
            f"{copies:,} of the {len(held):,} validation rows are also in the rows that the model learns from."
        )
    folder = train(
        backbone=backbone,
        train_data=rows.train,
        output_dir=output_dir,
        config=config,
        task=rows.task,
        method=method,
        unlabelled=None
        if unlabelled_files is None
        else unlabelled_texts(unlabelled_files, data.text_columns, rows.train, rows.evaluation),
        warm_up_dir=warm_up_dir,
        resume=resume,
        report=say,
    )
    # Only now: who asks before the run has set it up is alone for good.
    is_main = PartialState().is_main_process
    evaluation = rows.evaluation.max_samples(kind.reported_rows, config.seed)
    copies = num_copies(evaluation, rows.train)
    if is_main:
        if rows.held_out:
            path = save_held_out(folder, rows.evaluation, data)
            say(f"The rows to report on were cut from the training file; they are in {path}")
        drawn = f" of {len(rows.evaluation):,}" if len(evaluation) < len(rows.evaluation) else ""
        seen = (
            f", {copies:,} of which are also in the training rows"
            if copies
            else " that training has not seen"
        )
        say(f"On {len(evaluation):,}{drawn} rows{seen} ({rows.evaluation.source}):")
    figures = kind.commands["report"](folder, evaluation, command, config, is_main)
    if is_main:
        record_evaluation(folder, {**figures, "num_seen": copies} if copies else figures)


def unlabelled_texts(
    files: list[str], columns: list[str] | None, train: Any, evaluation: Any
) -> Iterator[tuple[str, ...]]:
    """Texts of several files, but for those that are reported on.

    Args:
        files: as `predict` reads them; "-" is standard input.
        columns: of the labelled rows; plain text has none. A stream is a table if its first line holds them.
        train: labelled rows, which are single texts or pairs.
        evaluation: rows to report on.
    """
    from consistentee.data.files import TO_LEARN, may_have_columns, read_texts

    reported, dropped = set(evaluation.texts), 0
    for file in files:
        check_one_reader(file)
        say_reading(file, "texts")
        named, pairs = columns if may_have_columns(file) else None, len(train.texts[0]) == 2
        for text in read_texts(file, named, plain_too=True, pairs=pairs, splits=TO_LEARN):
            if text in reported:
                dropped += 1
            else:
                yield text
    if dropped and is_first_process():
        say(f"{dropped:,} unlabelled texts are among the rows to report on and are left out.")


def report_classifier(
    folder: Path, rows: Any, command: Command, config: TrainingConfig, is_main: bool
) -> dict[str, Any]:
    """Measure a new classifier, in all processes together, and print it in one."""
    from accelerate import PartialState

    from consistentee.evaluation.classification import evaluate_model, evaluate_plain
    from consistentee.evaluation.reports import evaluation_tables

    saved = CLASSIFIERS.load(folder, device=PartialState().device)
    if command == "finetune":
        figures = evaluate_plain(saved, rows, progress=is_main)
        if is_main:
            _say_metrics(figures)
        return figures
    evaluation = evaluate_model(saved, rows, progress=is_main)
    if is_main:
        console().print(evaluation_tables(evaluation))
    return evaluation.summary()


def report_generator(
    folder: Path, rows: Any, command: Command, config: TrainingConfig, is_main: bool
) -> dict[str, Any]:
    """Measure a new text generator in one process, and print it."""
    if not is_main:
        return {}
    from accelerate import PartialState

    from consistentee.evaluation.generation import evaluate_generation, evaluate_plain_generation
    from consistentee.evaluation.reports import evaluation_tables

    saved = GENERATORS.load(folder, device=PartialState().device)
    if command == "finetune":
        figures = evaluate_plain_generation(saved, rows, progress=True)
        _say_metrics(figures)
        return figures
    evaluation = evaluate_generation(saved, rows, progress=True, seed=config.seed)
    console().print(evaluation_tables(evaluation))
    return evaluation.summary()


def _say_metrics(figures: dict[str, Any]) -> None:
    say(", ".join(f"{name} {value:.4f}" for name, value in figures["metrics"].items()))
