"""The command line: one thin function per command. Heavy libraries are imported inside, so that `--help` is quick.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. A failure is one line on standard error that says what
to do; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from consistentee import __version__
from consistentee.atomic import atomic_path
from consistentee.config import Criterion
from consistentee.options import (
    HELD_OUT_FILE,
    Columns,
    DataOptions,
    Flag,
    SettingOptions,
    TrainingDataOptions,
    UsageError,
    evaluation_data,
    known_task,
    read_recipe,
    save_held_out,
    training_config,
    training_data,
)

T = TypeVar("T")

_CONTINUE = {
    "train": "Continue with the same command and --resume.",
    "finetune": "Continue with the same command and --resume.",
    "demo": "Continue with the same command.",
}

app = App(
    name="consistentee",
    help="Early-exit text classifiers: hard inputs use all the layers, easy ones leave early.",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
)


@app.command
def train(
    *,
    output_dir: Path,
    backbone: str | None = None,
    config: Path | None = None,
    resume: Flag = False,
    data: TrainingDataOptions | None = None,
    settings: SettingOptions | None = None,
    debug: Flag = False,
) -> None:
    """Train a ConsistentEE classifier, evaluate it and save it.

    Args:
        output_dir: Where checkpoints and the finished model go.
        backbone: Encoder to start from: a name on the model hub or a local folder.
        config: Recipe (YAML) with settings; options given here override it.
        resume: Go on from the last checkpoint in the output folder.
        debug: Show tracebacks and the messages of other libraries.
    """
    _train("train", output_dir, backbone, config, resume, data, settings)


@app.command
def finetune(
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
        backbone: Encoder to start from: a name on the model hub or a local folder.
        config: Recipe (YAML) with settings; options given here override it.
        resume: Go on from the last checkpoint in the output folder.
        debug: Show tracebacks and the messages of other libraries.
    """
    _train("finetune", output_dir, backbone, config, resume, data, settings)


@app.command
def evaluate(
    model: str,
    *,
    data: DataOptions | None = None,
    criterion: Annotated[list[Criterion] | None, Parameter(consume_multiple=True)] = None,
    threshold: float | None = None,
    reference: str | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    debug: Flag = False,
) -> None:
    """Measure accuracy, layers saved and the trade-off between them.

    Args:
        model: Folder of a trained model, or its name on the hub.
        criterion: Exit rule; of several, the first is reported and all are drawn. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        reference: Folder of the plain model to compare with, from `finetune` or any text classifier.
        batch_size: Inputs per step; does not change the result.
        max_samples: Evaluate on at most so many rows, every class with its share.
        json_file: Write all figures to this file.
        plot: Draw trade-off curves and exit histogram into this PNG, PDF or SVG file.
        debug: Show tracebacks and the messages of other libraries.
    """
    for name, value in (("--batch-size", batch_size), ("--max-samples", max_samples)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    if plot is not None:  # before the work, not after it
        from consistentee.plots import check_plot

        _usage(lambda: check_plot(plot))
    from consistentee.atomic import write_json
    from consistentee.evaluation import evaluate_model
    from consistentee.reports import evaluation_report
    from consistentee.saved import open_model

    saved = open_model(model)
    task = saved.early_exit_model.config.task
    rule, limit = _usage(lambda: saved.exit_rule(criterion[0] if criterion else None, threshold))
    rows = evaluation_data(data or DataOptions(), saved.label_names, task).max_samples(max_samples)
    evaluation = evaluate_model(
        saved,
        rows,
        criteria=[rule, *(criterion or [])[1:]],
        threshold=limit,
        reference=None if reference is None else open_model(reference),
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    _console().print(evaluation_report(evaluation))
    if json_file is not None:
        write_json(json_file, evaluation.to_dict())
        _say(f"Figures written to {json_file}")
    if plot is not None:
        from consistentee.plots import plot_evaluation

        plot_evaluation(evaluation, plot, title=f"{Path(model).name}, {Path(rows.source).name}")
        _say(f"Picture written to {plot}")


@app.command
def predict(
    model: str,
    file: str = "-",
    /,
    *,
    text_columns: Columns = None,
    criterion: Criterion | None = None,
    threshold: float | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    backend: str = "torch",
    output: Path | None = None,
    debug: Flag = False,
) -> None:
    """Predict labels: one JSON line for each input, with label, score and exit layer, in the order of the input.

    Args:
        model: Folder of a trained model, or its name on the hub.
        file: Texts, one a line (a tab separates the two of a pair), CSV, TSV, JSONL or Parquet; "-" is standard input.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        batch_size: Inputs that go through the model together. [default: as many as are fastest, from a growing window]
        dtype: Precision: float32, bfloat16, float16, int8, or auto: the fastest that keeps the labels of float32 on
            the first inputs; what it is, is said on standard error.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        backend: What runs the layers: torch, onnxruntime, or auto (with a model).
        output: Write here instead of to standard output; the file appears when it is complete.
        debug: Show tracebacks and the messages of other libraries.
    """
    if text_columns is not None and len(text_columns) > 2:
        raise UsageError(f"--text-columns takes one column or two, got {len(text_columns)}.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}.")
    from consistentee.engine import Engine
    from consistentee.files import read_texts

    engine = Engine.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    if file == "-" and sys.stdin.isatty():
        print("Reading texts from standard input, one a line; end with Ctrl-D.", file=sys.stderr)  # noqa: T201
    texts_in = read_texts(file, text_columns)
    windows = _usage(
        lambda: engine.windows(texts_in, batch_size=batch_size, threshold=threshold, criterion=criterion)
    )
    said = False
    with _text_stream(output) as stream:
        for texts, predictions in windows:
            if engine.choice is not None and not said:
                print(engine.choice, file=sys.stderr)  # noqa: T201
                said = True
            for text, prediction in zip(texts, predictions, strict=True):
                line = {
                    "text": text[0] if len(text) == 1 else list(text),
                    "label": prediction.label,
                    "score": round(prediction.score, 6),
                    "exit_layer": prediction.exit_layer,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()


@app.command
def benchmark(
    model: str | None = None,
    *,
    data_file: Path | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    text_columns: Columns = None,
    config_name: str | None = None,
    sequence_length: int = 128,
    labels: int = 2,
    classifier_hidden_size: int | None = None,
    exit_distribution: str | None = None,
    criterion: Criterion | None = None,
    threshold: float | None = None,
    batch_sizes: str | None = None,
    throughput: Flag = False,
    num_rows: int | None = None,
    repeats: int = 5,
    backend: str = "torch",
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    debug: Flag = False,
) -> None:
    """Measure speed: the engine with exits, the same at full depth, and plain transformers, in turn in one run.

    Args:
        model: Folder of a trained model, or its name on the hub; it needs --data-file or --task.
        data_file: Texts: one a line (a tab separates the two of a pair), CSV, TSV, JSONL or Parquet.
        task: Evaluation rows of a task by name.
        data_dir: The task's local folder; without it the task comes from the model hub.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        config_name: In place of a model: random weights of a shape, such as bert-base or minilm-12l-shape.
        sequence_length: Tokens of the random rows that go with --config-name.
        labels: Classes of the model that goes with --config-name.
        classifier_hidden_size: Width of its exits. [default: what training gives]
        exit_distribution: Force exits: even, last, or the share of each layer (0.1,0.2,...). [default: the model's
            own rule; even with --config-name]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        batch_sizes: Batch sizes of latency mode, separated by commas. [default: 1,8,32,128]
        throughput: Throughput mode alone, or beside the --batch-sizes given. [default: both]
        num_rows: Rows to take. [default: 512, or enough for four batches]
        repeats: Timed repetitions, after one that is not.
        backend: What runs the layers: torch, onnxruntime, or auto (with a model).
        dtype: Precision: float32, bfloat16, float16, int8, or auto (with a model).
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        threads: Threads of the CPU. [default: what torch takes]
        seed: Of random weights, rows and forced exits.
        json_file: Write all figures to this file.
        plot: Draw throughput and speed-ups into this PNG, PDF or SVG file.
        debug: Show tracebacks and the messages of other libraries.
    """
    if (model is None) == (config_name is None):
        raise UsageError("Give a model (with --data-file or --task), or --config-name: one of them.")
    sizes = _batch_sizes(batch_sizes, throughput)
    for name, value in (
        ("repeats", repeats),
        ("threads", threads),
        ("num-rows", num_rows),
        ("labels", labels - 1),
        ("classifier-hidden-size", classifier_hidden_size),
    ):
        if value is not None and value < 1:
            raise UsageError(
                f"--{name} must be at least {1 + (name == 'labels')}, got {value + (name == 'labels')}."
            )
    if plot is not None:  # before the work, not after it
        from consistentee.plots import check_plot

        _usage(lambda: check_plot(plot))
    import torch

    from consistentee.atomic import write_json
    from consistentee.config import TrainingConfig
    from consistentee.reports import speed_report
    from consistentee.speed import measure_speed
    from consistentee.workloads import model_workload, shape_workload

    if threads is not None:
        torch.set_num_threads(threads)
    count = num_rows or max(512, 4 * max(sizes, default=1))
    place = None if device == "auto" else device
    if config_name is not None:
        for name, value in (("data-file", data_file), ("task", task), ("threshold", threshold)):
            if value is not None:
                raise UsageError(f"--{name} goes with a model, not with --config-name.")
        name, tokens = config_name, sequence_length
        width = classifier_hidden_size or TrainingConfig().classifier_hidden_size
        work = _usage(
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
        texts = _benchmark_texts(data_file, task, data_dir, text_columns)
        work = model_workload(
            model or "", texts, rows=count, device=place, dtype=dtype, backend=backend, seed=seed
        )
    report = measure_speed(
        work.engine,
        work.rows,
        batch_sizes=sizes,
        throughput=throughput or batch_sizes is None,
        shares=_usage(lambda: work.shares(exit_distribution)),
        rule=_usage(lambda: work.engine.rule(criterion, threshold)),
        repeats=repeats,
        seed=seed,
        tick=_progress if sys.stderr.isatty() else lambda _: None,
    )
    _console().print(speed_report(report))
    if json_file is not None:
        write_json(json_file, report.to_dict())
        _say(f"Figures written to {json_file}")
    if plot is not None:
        from consistentee.plots import plot_speed

        plot_speed(
            report, plot, title=f"{report.workload['model']}, {report.environment['threads']} thread(s)"
        )
        _say(f"Picture written to {plot}")


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
    data_file: Path | None, task: str | None, data_dir: Path | None, text_columns: Columns
) -> Iterator[tuple[str, ...]]:
    """The texts that a model is measured on."""
    if (data_file is None) == (task is None):
        raise UsageError("A model needs --data-file, or --task with --data-dir: one of them.")
    if data_file is not None:
        if data_dir is not None:
            raise UsageError("--data-dir goes with --task, not with --data-file.")
        from consistentee.files import read_texts

        return read_texts(str(data_file), text_columns)
    from consistentee.data import load_task

    return iter(load_task(known_task(task or ""), data_dir)[1].texts)


def _progress(title: str) -> None:
    sys.stderr.write(f"\r{title} ...\x1b[K")
    sys.stderr.flush()


@app.command
def demo(*, output_dir: Path = Path("consistentee-demo"), seed: int = 0, debug: Flag = False) -> None:
    """Train, evaluate and try a small real model in a few minutes on a CPU, without the model hub.

    Args:
        output_dir: Where downloads, models, figures and the picture go.
        seed: Of the split and the training.
        debug: Show tracebacks and the messages of other libraries.
    """
    from consistentee.demo import run_demo

    run_demo(output_dir, seed=seed, console=_console())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    with suppress(AttributeError):  # a stream that a test put in place
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        command, bound, _ = app.parse_args(given, exit_on_error=False, print_error=False)
        with warnings.catch_warnings():
            if not debug and command in (train, finetune, evaluate, predict, benchmark, demo):
                _quieten_libraries()
            command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(f"Interrupted. {_CONTINUE.get(given[0] if given else '', '')}".strip(), 130)
    except BrokenPipeError:  # the reader has had enough: not a failure
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CycloptsError, UsageError) as error:
        return _fail(_one_line(error), 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        return _fail(_advice(error), 1)
    return 0


def _train(
    kind: Literal["train", "finetune"],
    output_dir: Path,
    backbone: str | None,
    recipe_file: Path | None,
    resume: bool,
    data: TrainingDataOptions | None,
    settings: Any,
) -> None:
    """Train or fine-tune, then evaluate on rows that training has not seen and put the figures into the folder."""
    recipe = read_recipe(recipe_file)
    backbone = backbone or recipe.backbone
    if backbone is None:
        raise UsageError("Give --backbone: the name of an encoder on the model hub, or a local folder.")
    config = training_config(settings, recipe)
    data = data or TrainingDataOptions()
    rows = training_data(data, recipe, config.seed)
    from accelerate import PartialState

    from consistentee import training
    from consistentee.evaluation import evaluate_model, evaluate_plain
    from consistentee.reports import evaluation_report
    from consistentee.saved import open_model, record_evaluation

    folder = (training.train if kind == "train" else training.finetune)(
        backbone=backbone,
        train_data=rows.train,
        output_dir=output_dir,
        config=config,
        task=rows.task,
        resume=resume,
        report=_say,
    )
    is_main = PartialState().is_main_process
    saved = open_model(folder, device=PartialState().device)
    if kind == "train":
        evaluation = evaluate_model(saved, rows.evaluation, progress=sys.stderr.isatty())
        figures = evaluation.summary()
        if is_main:
            _say(f"On {len(rows.evaluation):,} rows that training has not seen ({rows.evaluation.source}):")
            _console().print(evaluation_report(evaluation))
    else:
        figures = evaluate_plain(saved, rows.evaluation, progress=is_main and sys.stderr.isatty())
        if is_main:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in figures["metrics"].items())
            _say(
                f"On {len(rows.evaluation):,} rows that training has not seen ({rows.evaluation.source}): {listed}"
            )
    if not is_main:
        return
    record_evaluation(folder, figures)
    if rows.held_out:
        save_held_out(folder / HELD_OUT_FILE, rows.evaluation, data)
        _say(f"These rows were cut from the training file; they are in {folder / HELD_OUT_FILE}")


@contextmanager
def _text_stream(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when the block ends without an error."""
    if path is None:
        yield sys.stdout
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream


def _usage(check: Callable[[], T]) -> T:
    """What the function returns; a value that it refuses was given on the command line.

    Raises:
        UsageError: in place of ValueError.
    """
    try:
        return check()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _quieten_libraries() -> None:
    """Keep back warnings and progress bars of other libraries; what matters to the user we say ourselves."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
    )  # read when `datasets` is imported, if it ever is
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _console() -> Console:
    """Standard output; wide enough for our tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _say(message: str) -> None:
    """One line on standard output, as it is."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _advice(error: Exception) -> str:
    """What went wrong and what to do about it, on one line."""
    message = _one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "There is not enough memory. Lower --batch-size or --max-length."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return message
    return f"{type(error).__name__}: {message} (run again with --debug for the traceback)"


def _fail(message: str, code: int) -> int:
    """One line on standard error, and the exit code."""
    with suppress(OSError):
        sys.stderr.write(f"consistentee: {message}\n")
        sys.stderr.flush()
    return code
