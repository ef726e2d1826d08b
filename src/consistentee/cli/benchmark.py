"""The command `benchmark`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import Parameter

from consistentee.cli.options import Columns, Flag, UsageError, check_column_count, known_task
from consistentee.cli.terminal import announced, console, say, usage
from consistentee.config import Criterion, GenerationCriterion
from consistentee.evaluation.time_budget import TimeBudget

SECONDS, REPEATS = 60.0, 5
"""What a benchmark takes, about, and repetitions, unless other things are asked for."""


def benchmark(
    model: str | None = None,
    *,
    data_file: Path | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    text_columns: Columns = None,
    config_name: str | None = None,
    sequence_length: int | None = None,
    new_tokens: int | None = None,
    labels: int = 2,
    classifier_hidden_size: int | None = None,
    exit_distribution: str | None = None,
    criterion: Criterion | GenerationCriterion | None = None,
    threshold: float | None = None,
    batch_sizes: str | None = None,
    throughput: Flag = False,
    lossless: Flag = False,
    num_rows: int | None = None,
    repeats: int | None = None,
    seconds: float | None = None,
    backend: str = "torch",
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    debug: Flag = False,
) -> None:
    """Measure speed: with exits, the same at full depth, and plain transformers, in turn in one run.

    Classifiers are measured in inputs per second, text generators in new tokens per second.

    Args:
        model: Folder of a trained model, or its name on the hub; it needs --data-file or --task.
        data_file: Texts, or prompts: one a line (a tab separates the two of a pair), CSV, TSV, JSONL or Parquet.
        task: Evaluation rows of a task by name.
        data_dir: The task's local folder; without it the task comes from the model hub.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
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
        batch_sizes: Batch sizes of latency mode, separated by commas. [default: 1,8,32,128; generators 1,8,32]
        throughput: Throughput mode alone, or beside the --batch-sizes given; classifiers only. [default: both]
        lossless: Measure lossless decoding too; trained generators only.
        num_rows: Rows to take. [default: at most 512, or enough for four batches, as --seconds allows; generators: the
            largest batch]
        repeats: Timed repetitions, after one that is not. [default: 5, or fewer as --seconds allows]
        seconds: Time to keep to, about: rows (new tokens), repetitions and batch sizes that are not given are chosen
            for it. [default: 60]
        backend: What runs the layers: torch, onnxruntime, or auto (with a model; see dtype).
        dtype: Precision: float32, bfloat16, float16, int8, or auto (with a model): compare them on the rows, say which
            is the fastest that keeps the labels of float32, and measure that one.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        threads: Threads of the CPU. [default: what torch takes]
        seed: Of random weights, rows and fixed exits.
        json_file: Write all figures to this file.
        plot: Draw throughput and speed-ups into this PNG, PDF or SVG file.
        debug: Show tracebacks and the messages of other libraries.
    """
    if (model is None) == (config_name is None):
        raise UsageError("Give a model (with --data-file or --task), or --config-name: one of them.")
    generates = _generates(model, config_name)
    for name, value, fits in (
        ("throughput", throughput or None, not generates),
        ("labels", None if labels == 2 else labels, not generates),
        ("classifier-hidden-size", classifier_hidden_size, not generates),
        ("backend", None if backend == "torch" else backend, not generates),
        ("text-columns", text_columns, not generates),
        ("new-tokens", new_tokens, generates),
        ("lossless", lossless or None, generates),
    ):
        if value is not None and not fits:
            raise UsageError(f"--{name} goes with {'classifiers' if generates else 'text generators'} only.")
    known = get_args(GenerationCriterion if generates else Criterion)
    if criterion is not None and criterion not in known:
        raise UsageError(f'--criterion must be one of {", ".join(known)} here, got "{criterion}".')
    sizes = [1, 8, 32] if generates and batch_sizes is None else _batch_sizes(batch_sizes, throughput)
    for name, value in (
        ("repeats", repeats),
        ("sequence-length", sequence_length),
        ("new-tokens", None if new_tokens is None else new_tokens - 1),
        ("threads", threads),
        ("num-rows", num_rows),
        ("labels", labels - 1),
        ("classifier-hidden-size", classifier_hidden_size),
    ):
        if value is not None and value < 1:
            more = name in ("labels", "new-tokens")
            raise UsageError(f"--{name} must be at least {1 + more}, got {value + more}.")
    _check_sources(
        model,
        config_name,
        data_file=data_file,
        task=task,
        data_dir=data_dir,
        text_columns=text_columns,
        sequence_length=sequence_length,
        labels=labels,
        classifier_hidden_size=classifier_hidden_size,
        threshold=threshold,
    )
    if lossless and criterion not in (None, "policy"):
        raise UsageError("--criterion goes without --lossless: what drafts is always the policy.")
    if exit_distribution is not None and threshold is not None:
        raise UsageError(
            "--threshold and --exit-distribution exclude each other: exits follow one or the other."
        )
    budget = _budget(
        seconds,
        amount_given=(new_tokens if generates else num_rows) is not None,
        repeats_given=repeats is not None,
        sizes_given=batch_sizes is not None or throughput,
    )
    if plot is not None:  # before the work, not after it
        from consistentee.evaluation.plots import check_plot

        usage(lambda: check_plot(plot))
    import torch

    from consistentee.atomic_files import write_json
    from consistentee.config import ClassificationTrainingConfig
    from consistentee.evaluation.reports import speed_table
    from consistentee.evaluation.speed import exit_distribution_shares
    from consistentee.evaluation.speed_classification import measure_speed, model_workload, shape_workload

    if threads is not None:
        torch.set_num_threads(threads)
    place = None if device == "auto" else device
    if generates:
        from consistentee.cli.generation_commands import benchmark_generator

        benchmark_generator(
            model,
            config_name,
            data_file=data_file,
            task=task,
            data_dir=data_dir,
            sequence_length=sequence_length or 32,
            new_tokens=new_tokens or 128,
            batch_sizes=sizes,
            exit_distribution=exit_distribution,
            criterion=criterion,
            threshold=threshold,
            lossless=lossless,
            num_rows=num_rows or max(sizes),
            repeats=repeats or REPEATS,
            budget=budget,
            dtype=dtype,
            device=place,
            seed=seed,
            json_file=json_file,
            plot=plot,
        )
        return
    count = num_rows or max(512, 4 * max(sizes, default=1))
    if config_name is not None:
        name, tokens = config_name, sequence_length or 128
        width = classifier_hidden_size or ClassificationTrainingConfig().classifier_hidden_size
        work = usage(
            lambda: shape_workload(
                name,
                rows=count,
                sequence_length=tokens,
                num_labels=labels,
                classifier_hidden_size=width,
                device=place,
                dtype=dtype,
                backend=backend,
                seed=seed,
            )
        )
        exit_distribution = exit_distribution or "even"
    else:
        texts = _benchmark_texts(model or "", data_file, task, data_dir, text_columns)
        work = model_workload(
            model or "",
            texts,
            rows=count,
            device=place,
            dtype=dtype,
            backend=backend,
            criterion=criterion,
            threshold=threshold,
            seed=seed,
        )
    shares = None
    if exit_distribution is not None:
        text, depth = exit_distribution, work.engine.backend.num_layers
        shares = usage(lambda: exit_distribution_shares(text, depth))
    rule = usage(lambda: work.engine.rule(criterion, threshold))
    with announced() as (announce, tick):
        report = measure_speed(
            work.engine,
            work.rows,
            batch_sizes=sizes,
            throughput=throughput or batch_sizes is None,
            shares=shares,
            rule=rule,
            repeats=repeats or REPEATS,
            seed=seed,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    console().print(speed_table(report))
    say_left_out(report.workload)
    figures = report.to_dict()
    if work.choice is not None:
        say(str(work.choice))
        figures["choice"] = work.choice.to_dict()
    if json_file is not None:
        write_json(json_file, figures)
        say(f"Figures written to {json_file}")
    if plot is not None:
        from consistentee.evaluation.plots import plot_speed

        plot_speed(
            report, plot, title=f"{report.workload['model']}, {report.environment['threads']} thread(s)"
        )
        say(f"Picture written to {plot}")


def say_left_out(workload: Mapping[str, Any]) -> None:
    """Name what a benchmark had no time for, and what gives it."""
    if workload["left_out"]:
        names = ", ".join(workload["left_out"])
        say(
            f"Left out, as {workload['seconds']:g} seconds are too few: {names}. Give more, or --batch-sizes."
        )


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


def _check_sources(
    model: str | None,
    config_name: str | None,
    *,
    data_file: Path | None,
    task: str | None,
    data_dir: Path | None,
    text_columns: Columns,
    sequence_length: int | None,
    labels: int,
    classifier_hidden_size: int | None,
    threshold: float | None,
) -> None:
    """What is measured, and what goes with it only.

    Raises:
        UsageError: an option that would have no effect.
    """
    of_models = {
        "data-file": data_file,
        "task": task,
        "data-dir": data_dir,
        "text-columns": text_columns,
        "threshold": threshold,
    }
    of_shapes = {
        "sequence-length": sequence_length,
        "labels": None if labels == 2 else labels,
        "classifier-hidden-size": classifier_hidden_size,
    }
    for name, value in (of_models if model is None else of_shapes).items():
        if value is not None:
            with_, not_with = ("a model", "--config-name") if model is None else ("--config-name", "a model")
            raise UsageError(f"--{name} goes with {with_}, not with {not_with}.")
    if config_name is not None:
        return
    if (data_file is None) == (task is None):
        raise UsageError("A model needs --data-file, or --task with --data-dir: one of them.")
    if task is None and data_dir is not None:
        raise UsageError("--data-dir goes with --task, not with --data-file.")
    if data_file is None and text_columns:
        raise UsageError("--text-columns goes with --data-file; a task knows its own.")


def _generates(model: str | None, config_name: str | None) -> bool:
    """Whether it is a text generator that is to be measured."""
    if config_name is not None:
        from consistentee.evaluation.speed_generation import GENERATION_SHAPES

        return config_name in GENERATION_SHAPES
    from consistentee.models.loaded import LoadedGenerator, model_kind

    return model is not None and model_kind(model) is LoadedGenerator


def _batch_sizes(text: str | None, throughput: bool) -> list[int]:
    """Batch sizes of latency mode as given, or the usual ones."""
    if text is None:
        return [] if throughput else [1, 8, 32, 128]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f'--batch-sizes must be whole numbers from 1 on, such as 1,8,32, got "{text}".')
    return sizes


def _benchmark_texts(
    model: str, data_file: Path | None, task: str | None, data_dir: Path | None, text_columns: Columns
) -> Iterator[tuple[str, ...]]:
    """The texts that a model is measured on."""
    if data_file is not None:
        from consistentee.backbones.loading import read_config
        from consistentee.data.files import read_texts

        pairs = read_config(model, "Model").get("text_pairs")
        check_column_count(text_columns, pairs, model)
        return read_texts(str(data_file), text_columns, pairs=pairs)
    from consistentee.data.classification import load_task

    return iter(load_task(known_task(task or ""), data_dir)[1].texts)
