"""The command `benchmark`, and what it does for classifiers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from consistentee.cli.data import known_task
from consistentee.cli.kinds import CLASSIFIERS, GENERATORS, AnyCriterion, Kind, kind_of_model
from consistentee.cli.options import Columns, Flag, check_column_count
from consistentee.cli.terminal import (
    announced,
    check_json_file,
    check_plot_file,
    console,
    save_figures,
    say,
    usage,
)
from consistentee.errors import UsageError
from consistentee.evaluation.time_budget import TimeBudget

SECONDS, REPEATS = 60.0, 5
"""What a benchmark takes, about, and repetitions, unless other things are asked for."""


@Parameter(name="*")
@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and how.

    Args:
        data_file: Texts, or prompts: one a line (a tab separates the two of a pair), CSV, TSV, JSONL or Parquet.
        task: Evaluation rows of a task by name.
        data_dir: The task's local folder; without it the task comes from the model hub.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        label_column: With --against: the column of the label in --data-file.
        config_name: In place of a model: random weights of a shape, such as bert-base, minilm-12l-shape or
            smollm2-135m-shape.
        sequence_length: Tokens of the random rows that go with --config-name. [default: 128; prompts 32]
        new_tokens: Tokens to generate, for text generators. [default: 128, or fewer as --seconds allows]
        labels: Classes of the model that goes with --config-name.
        classifier_hidden_size: Width of its exits. [default: what training gives]
        exit_distribution: Force exits: even, last, or the share of each layer (0.1,0.2,...). [default: the model's
            own rule; even with --config-name]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        batch_sizes: Batch sizes of latency mode, separated by commas. [default: 1,8,32,128; generators 1,8,32; with
            --against 1,32]
        throughput: Throughput mode alone, or beside the --batch-sizes given; classifiers only. [default: both]
        lossless: Measure lossless decoding too, whose drafts exit by the same rule; trained generators only.
        serve: Measure the model behind its server under load, beside full depth and plain transformers behind the same:
            latencies and goodput at several request rates, and an overload. Classifiers with exits only.
        against: What one would take instead, beside the model in float32 and int8, with and without exits, in one table
            of accuracy and milliseconds: plain transformers, ONNX Runtime and its int8 always; and folders of other
            classifiers, such as a smaller one of `consistentee train --method static`. "usual": no others. Classifiers
            with exits only.
        num_rows: Rows to take. [default: at most 512, or enough for four batches, as --seconds allows; generators: the
            largest batch; with --against all, of which as many are timed as --seconds allows; with --serve 1024]
        repeats: Timed repetitions, after one that is not. [default: 5, or fewer as --seconds allows]
        seconds: Time to keep to, about: rows (new tokens), repetitions and batch sizes that are not given are chosen
            for it. [default: 60; with --serve 120]
        backend: What runs the layers: torch, onnxruntime, or auto (with a model; see dtype).
        dtype: Precision: float32, bfloat16, float16, or of classifiers int8 or auto (with a model): compare them on the
            rows, say which is the fastest that keeps the labels of float32, and measure that one.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        threads: Threads of the CPU. [default: what torch takes; with --serve 1 for each server]
        seed: Of random weights, rows and fixed exits.
        json_file: Write all figures to this file.
        plot: Draw throughput and speed-ups into this PNG, PDF or SVG file.
    """

    data_file: Path | None = None
    task: str | None = None
    data_dir: Path | None = None
    text_columns: Columns = None
    label_column: str | None = None
    config_name: str | None = None
    sequence_length: int | None = None
    new_tokens: int | None = None
    labels: int = 2
    classifier_hidden_size: int | None = None
    exit_distribution: str | None = None
    criterion: AnyCriterion | None = None
    threshold: float | None = None
    operating_point: str | None = None
    batch_sizes: str | None = None
    throughput: Flag = False
    lossless: Flag = False
    serve: Flag = False
    against: Columns = None
    num_rows: int | None = None
    repeats: int | None = None
    seconds: float | None = None
    backend: str = "torch"
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    json_file: Annotated[Path | None, Parameter(name="--json")] = None
    plot: Path | None = None

    @property
    def place(self) -> str | None:
        """The device by name, None for the one that suits."""
        return None if self.device == "auto" else self.device

    def given(self) -> dict[str, Any]:
        """Options by name with their values, None for those that are as they are by default."""
        defaults = BenchmarkOptions()
        values = {name: getattr(self, name) for name in vars(defaults)}
        return {name: None if value == getattr(defaults, name) else value for name, value in values.items()}


OF_CLASSIFIERS = (
    "serve",
    "against",
    "label_column",
    "throughput",
    "labels",
    "classifier_hidden_size",
    "backend",
    "text_columns",
    "operating_point",
)
OF_GENERATORS = ("new_tokens", "lossless")
OF_MODELS = ("data_file", "task", "data_dir", "text_columns", "threshold", "operating_point")
OF_SHAPES = ("sequence_length", "labels", "classifier_hidden_size")
LEAST = {
    "repeats": 1,
    "sequence_length": 1,
    "new_tokens": 2,
    "threads": 1,
    "num_rows": 1,
    "labels": 2,
    "classifier_hidden_size": 1,
}


def benchmark(
    model: str | None = None, *, options: BenchmarkOptions | None = None, debug: Flag = False
) -> None:
    """Measure speed: with exits, the same at full depth, and plain transformers, in turn in one run.

    Classifiers are measured in inputs per second, text generators in new tokens per second.

    Args:
        model: Folder of a trained model, or its name on the hub; it needs --data-file or --task.
        debug: Show tracebacks and the messages of other libraries.
    """
    options = options or BenchmarkOptions()
    if (model is None) == (options.config_name is None):
        raise UsageError("Give a model (with --data-file or --task), or --config-name: one of them.")
    kind = _kind(model, options.config_name)
    sizes = _check(options, kind, model)
    budget = _budget(
        options.seconds,
        amount_given=(options.new_tokens if kind is GENERATORS else options.num_rows) is not None,
        repeats_given=options.repeats is not None,
        sizes_given=options.batch_sizes is not None or options.throughput,
    )
    check_json_file(options.json_file)
    check_plot_file(options.plot)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.serve:
        from consistentee.cli.benchmark_serve import benchmark_serving

        benchmark_serving(model, options, _texts(model, options) if model is not None else ())
        return
    if options.against:
        from consistentee.cli.benchmark_against import benchmark_against

        texts = (
            list(_texts(model, options)) if model and options.data_file and not options.label_column else []
        )
        sizes = [] if options.batch_sizes is None else sizes
        benchmark_against(model, options, sizes, options.repeats or REPEATS, budget, texts)
        return
    kind.commands["benchmark"](model, options, sizes, budget)


def benchmark_classifier(
    model: str | None, options: BenchmarkOptions, sizes: list[int], budget: TimeBudget
) -> None:
    """Measure a classifier, or a shape of one, and print what was found.

    Args:
        model: its name or folder; None for a shape.
        options: of the command.
        sizes: batch sizes of latency mode.
        budget: time to keep to.
    """
    from consistentee.config import ClassificationTrainingConfig
    from consistentee.evaluation.speed import exit_distribution_shares
    from consistentee.evaluation.speed_classification import measure_speed, model_workload, shape_workload

    count = options.num_rows or max(512, 4 * max(sizes, default=1))
    distribution = options.exit_distribution
    if model is None:
        width = options.classifier_hidden_size or ClassificationTrainingConfig().classifier_hidden_size
        work = usage(
            lambda: shape_workload(
                options.config_name or "",
                rows=count,
                sequence_length=options.sequence_length or 128,
                num_labels=options.labels,
                classifier_hidden_size=width,
                device=options.place,
                dtype=options.dtype,
                backend=options.backend,
                seed=options.seed,
            )
        )
        distribution = distribution or "even"
    else:
        options = _at_operating_point(model, options)
        work = model_workload(
            model,
            _texts(model, options),
            rows=count,
            device=options.place,
            dtype=options.dtype,
            backend=options.backend,
            criterion=options.criterion,
            threshold=options.threshold,
            seed=options.seed,
        )
    shares = None
    if distribution is not None:
        has_exit = getattr(work.engine.saved.model.config, "has_exit", None)
        shares = usage(
            lambda: exit_distribution_shares(distribution, work.engine.backend.num_layers, has_exit)
        )
    rule = usage(lambda: work.engine.rule(options.criterion, options.threshold))
    with announced() as (announce, tick):
        report = measure_speed(
            work.engine,
            work.rows,
            batch_sizes=sizes,
            throughput=options.throughput or options.batch_sizes is None,
            shares=shares,
            rule=rule,
            repeats=options.repeats or REPEATS,
            seed=options.seed,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    show_speed(report, options, report.workload["model"], work.choice)


def show_speed(report: Any, options: BenchmarkOptions, title: str, choice: Any = None) -> None:
    """Print what was measured, name what there was no time for, and keep the figures.

    Args:
        report: what was measured.
        options: of the command.
        title: of the picture.
        choice: how dtype and backend were chosen, where that was asked for.
    """
    from consistentee.evaluation.plots import plot_speed
    from consistentee.evaluation.reports import speed_table

    console().print(speed_table(report))
    if report.workload["left_out"]:
        names, seconds = ", ".join(report.workload["left_out"]), report.workload["seconds"]
        say(f"Left out, as {seconds:g} seconds are too few: {names}. Give more, or --batch-sizes.")
    figures = report.to_dict()
    if choice is not None:
        say(str(choice))
        figures["choice"] = choice.to_dict()
    title = f"{title}, {report.environment['threads']} thread(s)"
    save_figures(figures, options.json_file, options.plot, lambda path: plot_speed(report, path, title=title))


def _check(options: BenchmarkOptions, kind: Kind, model: str | None) -> list[int]:
    """Raise UsageError for options that contradict each other, have no effect, or make no sense.

    Returns:
        The batch sizes of latency mode.
    """
    given = {name: value for name, value in options.given().items() if value is not None}
    for name in OF_CLASSIFIERS if kind is GENERATORS else OF_GENERATORS:
        if name in given:
            others = CLASSIFIERS if kind is GENERATORS else GENERATORS
            raise UsageError(f"{_option(name)} goes with {others.models} only.")
    if options.criterion is not None and options.criterion not in kind.criteria:
        known = ", ".join(kind.criteria)
        raise UsageError(f'--criterion must be one of {known} here, got "{options.criterion}".')
    usual = [1, 8, 32] if kind is GENERATORS else [] if options.throughput else [1, 8, 32, 128]
    sizes = usual if options.batch_sizes is None else _batch_sizes(options.batch_sizes)
    for name, least in LEAST.items():
        if name in given and given[name] < least:
            raise UsageError(f"{_option(name)} must be at least {least}, got {given[name]}.")
    with_, not_with = ("a model", "--config-name") if model is None else ("--config-name", "a model")
    for name in OF_MODELS if model is None else OF_SHAPES:
        if name in given:
            raise UsageError(f"{_option(name)} goes with {with_}, not with {not_with}.")
    if model is not None:
        if (options.data_file is None) == (options.task is None):
            raise UsageError("A model needs --data-file, or --task with --data-dir: one of them.")
        if options.task is None and options.data_dir is not None:
            raise UsageError("--data-dir goes with --task, not with --data-file.")
        if options.data_file is None and options.text_columns:
            raise UsageError("--text-columns goes with --data-file; a task knows its own.")
    if options.label_column is not None and not (
        options.against and options.data_file and options.text_columns
    ):
        raise UsageError("--label-column goes with --against, --data-file and --text-columns.")
    for name in ("threshold", "operating_point"):
        if options.exit_distribution is not None and name in given:
            raise UsageError(
                f"{_option(name)} and --exit-distribution exclude each other: exits follow one or the other."
            )
    return sizes


def _at_operating_point(model: str, options: BenchmarkOptions) -> BenchmarkOptions:
    """The options with criterion and threshold of the operating point, where one is named."""
    if options.operating_point is None:
        return options
    from consistentee.backbones.loading import read_config
    from consistentee.models.operating_points import point_or_rule

    points = read_config(model, "Model").get("operating_points")
    criterion, threshold = usage(
        lambda: point_or_rule(points, options.operating_point, options.criterion, options.threshold, model)
    )
    rule: Any = {"criterion": criterion, "threshold": threshold}
    return replace(options, **rule)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _budget(
    seconds: float | None, *, amount_given: bool, repeats_given: bool, sizes_given: bool
) -> TimeBudget:
    """The time to keep to, and what is left to choose for it."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds must be above 0, got {seconds:g}.")
    if not (amount_given and repeats_given):
        return TimeBudget(seconds or SECONDS, not amount_given, not repeats_given, not sizes_given)
    if seconds is not None:
        raise UsageError(
            "--seconds chooses rows (new tokens) and --repeats, and both are given: leave one out."
        )
    return TimeBudget(math.inf, amount=False, repeats=False, sizes=False)


def _kind(model: str | None, config_name: str | None) -> Kind:
    """What it is that is to be measured."""
    if model is not None:
        return kind_of_model(model)
    from consistentee.evaluation.speed_generation import GENERATION_SHAPES

    return GENERATORS if config_name in GENERATION_SHAPES else CLASSIFIERS


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f'--batch-sizes must be whole numbers from 1 on, such as 1,8,32, got "{text}".')
    return sizes


def _texts(model: str, options: BenchmarkOptions) -> Iterator[tuple[str, ...]]:
    """The texts that a model is measured on."""
    if options.data_file is not None:
        from consistentee.backbones.loading import read_config
        from consistentee.data.files import read_texts

        pairs = read_config(model, "Model").get("text_pairs")
        check_column_count(options.text_columns, pairs, model)
        return read_texts(str(options.data_file), options.text_columns, pairs=pairs)
    task = known_task(options.task or "", CLASSIFIERS)
    return iter(CLASSIFIERS.load_task(task, options.data_dir)[1].texts)
