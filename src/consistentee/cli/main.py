"""The command line: one thin function per command. Heavy libraries are imported inside, so that `--help` is quick.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted, 143 ended by SIGTERM (129 by SIGHUP). A failure is one
line on standard error that says what to do; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from consistentee import __version__
from consistentee.cli.benchmark import benchmark
from consistentee.cli.generation_commands import evaluate_generator, generate, train_generator
from consistentee.cli.options import (
    HELD_OUT_FILE,
    Columns,
    DataOptions,
    Flag,
    SettingOptions,
    TrainingDataOptions,
    UsageError,
    check_column_count,
    config_class_of_kind,
    evaluation_data,
    read_recipe,
    save_held_out,
    training_config,
    training_data,
)
from consistentee.cli.terminal import (
    Stopped,
    at_least_one,
    console,
    forget,
    hold_standard_streams,
    outlasting_readers,
    say,
    stoppable,
    text_stream,
    usage,
)
from consistentee.config import Criterion, GenerationCriterion, GenerationMode, GenerationTrainingConfig
from consistentee.errors import SettingError

AnyCriterion = Literal[Criterion, GenerationCriterion]
TO_GENERATE = Group("Text generators", sort_key=2)

_CONTINUE = {
    "train": "Continue with the same command and --resume.",
    "finetune": "Continue with the same command and --resume.",
}

app = App(
    name="consistentee",
    help=(
        "Early exits for transformers: hard inputs use all the layers, easy ones leave early. Classifiers: train, "
        "evaluate, predict. Text generators, whose tokens leave one by one: train, evaluate, generate."
    ),
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
    """Train a classifier or a text generator with early exits, evaluate it and save it.

    A task decides which of them, or a training file: with --text-columns and --label-column it is a classifier, with
    --prompt-column, --input-column or --response-column, or of a .txt file, a text generator.

    Args:
        output_dir: Where checkpoints and the finished model go.
        backbone: Encoder, or causal language model, to start from: a name on the model hub or a local folder.
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
        backbone: Encoder, or causal language model, to start from: a name on the model hub or a local folder.
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
    criterion: Annotated[list[AnyCriterion] | None, Parameter(consume_multiple=True)] = None,
    threshold: float | None = None,
    reference: str | None = None,
    batch_size: int | None = None,
    max_samples: int | None = None,
    mode: Annotated[GenerationMode | None, Parameter(group=TO_GENERATE)] = None,
    max_new_tokens: Annotated[int | None, Parameter(group=TO_GENERATE)] = None,
    text_speedups: Annotated[list[float] | None, Parameter(group=TO_GENERATE, consume_multiple=True)] = None,
    bertscore_model: Annotated[str | None, Parameter(group=TO_GENERATE)] = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    debug: Flag = False,
) -> None:
    """Measure quality, layers saved and the trade-off between them.

    Args:
        model: Folder of a trained model, or its name on the hub.
        criterion: Exit rule; of several, the first is reported and all are drawn. Of classifiers: policy, confidence,
            entropy, patience; of text generators: policy, softmax_margin, state_similarity, confidence_classifier,
            static. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        reference: Folder of a model to compare with: the plain one from `finetune`, or any of its kind as it was
            saved.
        batch_size: Inputs per step; does not change the result. [default: 64; to generate text: 8]
        max_samples: Evaluate on at most so many rows, every class with its share.
        mode: How tokens are generated. [default: the saved one]
        max_new_tokens: Longest text. [default: what suits the task]
        text_speedups: Layer speed-ups at which text of every criterion is generated too. [default: none]
        bertscore_model: Encoder for BERTScore: a folder or a name on the hub. [default: no BERTScore]
        json_file: Write all figures to this file.
        plot: Draw trade-off curves and exit histogram into this PNG, PDF or SVG file.
        debug: Show tracebacks and the messages of other libraries.
    """
    at_least_one(batch_size=batch_size, max_samples=max_samples, max_new_tokens=max_new_tokens)
    if plot is not None:  # before the work, not after it
        from consistentee.evaluation.plots import check_plot

        usage(lambda: check_plot(plot))
    from consistentee.models.loaded import LoadedGenerator, model_kind

    of_generators = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "text_speedups": text_speedups,
        "bertscore_model": bertscore_model,
    }
    if model_kind(model) is LoadedGenerator:
        evaluate_generator(
            model,
            data=data or DataOptions(),
            criteria=criterion or [],
            threshold=threshold,
            reference=reference,
            batch_size=batch_size or 8,
            max_samples=max_samples,
            json_file=json_file,
            plot=plot,
            **of_generators,
        )
        return
    from consistentee.atomic_files import write_json
    from consistentee.evaluation.classification import evaluate_model
    from consistentee.evaluation.reports import evaluation_tables
    from consistentee.functional.criteria import CRITERIA
    from consistentee.models.loaded import LoadedClassifier, load_model

    saved = load_model(model, LoadedClassifier)  # first of all, so that a broken folder is called one
    for name, value in of_generators.items():
        if value is not None:
            raise UsageError(
                f'--{name.replace("_", "-")} goes with a text generator, and model "{model}" is none.'
            )
    for name in criterion or []:
        if name not in CRITERIA:
            raise UsageError(
                f'criterion must be one of {", ".join(CRITERIA)} for a classifier, got "{name}".'
            )
    task = saved.early_exit_model.config.task
    rule, limit = usage(lambda: saved.exit_rule(criterion[0] if criterion else None, threshold))
    rows = evaluation_data(data or DataOptions(), saved.label_names, task).max_samples(max_samples)
    evaluation = evaluate_model(
        saved,
        rows,
        criteria=[rule, *(criterion or [])[1:]],
        threshold=limit,
        reference=None if reference is None else load_model(reference, LoadedClassifier),
        batch_size=batch_size or 64,
        progress=True,
    )
    console().print(evaluation_tables(evaluation))
    if json_file is not None:
        write_json(json_file, evaluation.to_dict())
        say(f"Figures written to {json_file}")
    if plot is not None:
        from consistentee.evaluation.plots import plot_evaluation

        plot_evaluation(evaluation, plot, title=f"{Path(model).name}, {Path(rows.source).name}")
        say(f"Picture written to {plot}")


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

    "truncated" in a line says whether the input was longer than the model takes, and was cut.

    Args:
        model: Folder of a trained model, or its name on the hub.
        file: Texts, one a line (for a model of pairs, two separated by a tab), CSV, TSV, JSONL or Parquet; "-" is
            standard input.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        batch_size: Inputs that go through the model together. [default: as many as are fastest, from a growing window]
        dtype: Precision: float32, bfloat16, float16 or int8; `consistentee benchmark --dtype auto` recommends one.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        backend: What runs the layers: torch or onnxruntime.
        output: Write here instead of to standard output; the file appears when it is complete.
        debug: Show tracebacks and the messages of other libraries.
    """
    if text_columns is not None and len(text_columns) > 2:
        raise UsageError(f"--text-columns takes one column or two, got {len(text_columns)}.")
    at_least_one(batch_size=batch_size)
    from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
    from consistentee.data.files import read_texts
    from consistentee.pipelines.classifier import Engine
    from consistentee.progress import rows_about, show_progress

    engine = Engine.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    if file == "-" and sys.stdin.isatty():
        print("Reading texts from standard input, one a line; end with Ctrl-D.", file=sys.stderr)  # noqa: T201
    pairs = engine.saved.text_pairs
    check_column_count(text_columns, pairs, model)
    texts_in = read_texts(file, text_columns, pairs=pairs)
    windows = usage(
        lambda: engine.windows(texts_in, batch_size=batch_size, threshold=threshold, criterion=criterion)
    )
    count, num_truncated = 0, 0
    is_file = output is not None
    with (
        text_stream(output) as stream,
        show_progress(
            "predictions", rows_about(file) if is_file else None, unit="text", shown=is_file
        ) as shower,
    ):
        for texts, predictions in windows:
            for text, prediction in zip(texts, predictions, strict=True):
                line = {
                    "text": text[0] if len(text) == 1 else list(text),
                    "label": prediction.label,
                    "score": round(prediction.score, 6),
                    "exit_layer": prediction.exit_layer,
                    "truncated": prediction.truncated,
                }
                count += 1
                num_truncated += prediction.truncated
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            shower.update(len(texts))
    texts_cut = f"texts were longer than the model's {engine.saved.max_length} tokens"
    say_cuts(num_truncated, count, texts_cut, LONGER_TRAINING)


app.command(generate)
app.command(benchmark)
COMMANDS = (train, finetune, evaluate, predict, generate, benchmark)
OUTLASTING = (train, finetune, evaluate, benchmark)
"""Commands whose work is more than what they print: it goes on when nobody reads that any more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    go_on = _CONTINUE.get(given[0] if given else "", "")
    with suppress(AttributeError):  # a stream that a test put in place, or none
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        with stoppable():
            _run(given, debug)
    except Stopped as stopped:
        return _fail(f"Ended by {signal.Signals(stopped.number).name}. {go_on}".strip(), 128 + stopped.number)
    except KeyboardInterrupt:
        return _fail(f"Interrupted. {go_on}".strip(), 130)
    except BrokenPipeError as error:
        if given[0] in [command.__name__ for command in OUTLASTING]:  # it was not about what they print
            return _fail(_advice(error), 1)
        forget(sys.stdout)
        return 0  # the reader has had enough: not a failure
    except (CycloptsError, SettingError) as error:
        return _fail(_one_line(error), 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        return _fail(_advice(error), 1)
    return 0


def _run(arguments: list[str], debug: bool) -> None:
    """Find the command, and run it."""
    hold_standard_streams()
    command, bound, _ = app.parse_args(_hyphen_last(arguments), exit_on_error=False, print_error=False)
    if sys.stdout is None and command in (predict, generate) and bound.arguments.get("output") is None:
        raise OSError("Standard output is closed, so the answers have nowhere to go. Give --output.")
    with warnings.catch_warnings(), outlasting_readers() if command in OUTLASTING else nullcontext():
        if not debug and command in COMMANDS:
            _quieten_libraries()
        if command in COMMANDS:
            from consistentee.threads import limit_threads

            limit_threads()
        command(*bound.args, **bound.kwargs)
    if sys.stdout is not None:
        sys.stdout.flush()


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
    data = data or TrainingDataOptions()
    recipe = read_recipe(recipe_file, data)
    backbone = backbone or recipe.backbone
    if backbone is None:
        raise UsageError("Give --backbone: the name of a model on the hub to start from, or a local folder.")
    model_kind = data.kind(recipe.task)
    config = training_config(settings, recipe, config_class_of_kind(model_kind), kind)
    from consistentee.training.run_folders import check_output_dir

    usage(lambda: check_output_dir(output_dir, backbone))  # before the data is read
    if isinstance(config, GenerationTrainingConfig):
        train_generator(
            kind,
            backbone=backbone,
            output_dir=output_dir,
            config=config,
            data=data,
            recipe=recipe,
            resume=resume,
        )
        return
    rows = training_data(data, recipe, config.seed)
    from accelerate import PartialState

    from consistentee.evaluation.classification import evaluate_model, evaluate_plain
    from consistentee.evaluation.reports import evaluation_tables
    from consistentee.functional.metrics import check_threshold_metric
    from consistentee.models.loaded import LoadedClassifier, load_model
    from consistentee.models.record import record_evaluation
    from consistentee.training import classification as training

    if kind == "train":
        usage(lambda: check_threshold_metric(config.threshold_metric, len(rows.train.label_names)))
    folder = (training.train if kind == "train" else training.finetune)(
        backbone=backbone,
        train_data=rows.train,
        output_dir=output_dir,
        config=config,
        task=rows.task,
        resume=resume,
        report=say,
    )
    is_main = PartialState().is_main_process
    saved = load_model(folder, LoadedClassifier, device=PartialState().device)
    if kind == "train":
        evaluation = evaluate_model(saved, rows.evaluation, progress=is_main)
        figures = evaluation.summary()
        if is_main:
            say(f"On {len(rows.evaluation):,} rows that training has not seen ({rows.evaluation.source}):")
            console().print(evaluation_tables(evaluation))
    else:
        figures = evaluate_plain(saved, rows.evaluation, progress=is_main)
        if is_main:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in figures["metrics"].items())
            say(
                f"On {len(rows.evaluation):,} rows that training has not seen ({rows.evaluation.source}): {listed}"
            )
    if not is_main:
        return
    record_evaluation(folder, figures)
    if rows.held_out:
        save_held_out(folder / HELD_OUT_FILE, rows.evaluation, data)
        say(f"These rows were cut from the training file; they are in {folder / HELD_OUT_FILE}")


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


def _hyphen_last(arguments: list[str]) -> list[str]:
    """Put the file "-" behind "--": an argument parser takes it for an option elsewhere."""
    before = [None, *arguments]
    kept = [
        argument
        for argument, previous in zip(arguments, before, strict=False)
        if argument != "-" or previous in ("--prompt", "--input")
    ]
    return arguments if "--" in arguments or len(kept) == len(arguments) else [*kept, "--", "-"]


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
