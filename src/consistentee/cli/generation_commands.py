"""The commands that make text: `generate`, and what `train`, `finetune` and `evaluate` do for text generators."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from consistentee.cli.generation_options import (
    generation_evaluation_data,
    generation_training_data,
    save_held_out_texts,
)
from consistentee.cli.options import (
    DataOptions,
    Flag,
    TrainingDataOptions,
    UsageError,
)
from consistentee.cli.terminal import announced, at_least_one, console, say, text_stream, usage
from consistentee.config import GenerationCriterion, GenerationMode, GenerationTrainingConfig, SkippedStates
from consistentee.data.hub import FORMATS
from consistentee.data.recipes import Recipe
from consistentee.evaluation.time_budget import TimeBudget

if TYPE_CHECKING:
    from consistentee.pipelines.generator import DecodingOptions, GeneratedText, TextGenerator

MAX_TRAINING_TEXTS = 100
"""Texts that are generated to report on after a training, at most: they take long."""


def generate(
    model: str,
    file: str | None = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    input: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    prompt_column: str | None = None,
    input_column: str | None = None,
    mode: GenerationMode | None = None,
    criterion: GenerationCriterion | None = None,
    threshold: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    do_sample: Flag = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True, negative=())] = None,
    skipped_states: SkippedStates | None = None,
    template: str | None = None,
    parse_special_tokens: Flag = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    json_lines: Annotated[bool, Parameter(name="--json", negative=())] = False,
    show_exits: Flag = False,
    output: Path | None = None,
    debug: Flag = False,
) -> None:
    """Generate text: of one --prompt as it is written, of many prompts as JSON lines in the order of the prompts.

    A JSON line has prompt, input (if there is one), text, finish_reason (end: the model ended it; stop: a --stop did;
    length: --max-new-tokens), exit_layers (one for each token, the end of the text included), mean_exit_layer, and
    truncated: whether the prompt was longer than there is room for, and was cut; in mode lossless also draft_layers,
    drafted and accepted.

    Args:
        model: Folder of a trained model, or its name on the hub.
        file: Prompts: JSONL, CSV, TSV, Parquet, or one a line; "-" is standard input.
        prompt: One prompt, in place of a file.
        input: What the prompt is about, if it is about a text.
        prompt_column: The column of the instruction. [default: the usual names]
        input_column: The column of what the instruction is about. [default: the usual names]
        mode: early-exit: tokens leave early; full: all layers; lossless: exits draft and all layers verify, which gives
            the text of all layers. [default: the saved one]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it; for static, the layers to run. [default: the
            one chosen in training]
        max_new_tokens: Longest text. [default: what suits the model's task]
        batch_size: Prompts that go through the model together. [default: 8]
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Of the draws: below 1 is safer, above 1 wilder. [default: 1]
        top_k: Draw from so many of the likeliest tokens. [default: all]
        top_p: Draw from the likeliest tokens that have this share together. [default: 1, all]
        seed: Of the draws. [default: 0]
        stop: End the text before this string; may be given several times. Not part of the text.
        skipped_states: Keys and values of skipped layers: copy them from the exit's state, or recompute them. [default:
            the saved way]
        template: How prompts are written: auto, chat, alpaca, plain, or a file. [default: the saved one]
        parse_special_tokens: Take special tokens that a prompt spells for special tokens. [default: as in training]
        dtype: Precision.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        json_lines: A JSON line for --prompt, too.
        show_exits: Show where each token left: in colours or marks, or as "pieces" in the JSON lines.
        output: Write JSON lines here; the file appears when it is complete.
        debug: Show tracebacks and the messages of other libraries.
    """
    at_least_one(batch_size=batch_size, max_new_tokens=max_new_tokens, top_k=top_k)
    _check_prompt_options(file, prompt, input, prompt_column, input_column)
    if prompt is not None and batch_size is not None:
        raise UsageError("--batch-size goes with a file, not with --prompt.")
    if seed is not None and not do_sample:
        raise UsageError("--seed goes with --do-sample: nothing is drawn without it.")
    from consistentee.data.generation import read_prompts
    from consistentee.models.loaded import LoadedGenerator, load_model
    from consistentee.pipelines.generator import DecodingOptions, TextGenerator
    from consistentee.progress import rows_about, show_progress

    options = usage(
        lambda: DecodingOptions(
            mode=mode,
            criterion=criterion,
            threshold=threshold,
            skipped_states=skipped_states,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed or 0,
            stop=stop or (),
        )
    )
    saved = load_model(model, LoadedGenerator, device=None if device == "auto" else device, dtype=dtype)
    written = saved.prompt_template(template)
    if parse_special_tokens:
        written = replace(written, parse_special_tokens=True)
    generator = TextGenerator(saved, template=written)
    options = usage(lambda: generator.check(options))
    if prompt is not None and not json_lines and output is None:
        text = _write_as_it_comes(generator, prompt, input or "", options, show_exits)
        _say_prompts_cut(int(text.truncated), 1, options)
        return
    if prompt is not None:
        prompts: Iterator[tuple[str, str]] = iter([(prompt, input or "")])
    else:
        if (file is None or file == "-") and sys.stdin.isatty():
            print("Reading prompts from standard input, one a line; end with Ctrl-D.", file=sys.stderr)  # noqa: T201
        rows = read_prompts(file or "-", prompt_column=prompt_column, input_column=input_column)
        prompts = ((row["prompt"], row["input"]) for row in rows)
    count = num_truncated = 0
    is_file = output is not None
    total = rows_about(file) if is_file and file is not None else None
    with (
        text_stream(output) as stream,
        show_progress("texts generated", total, unit="text", shown=is_file) as shower,
    ):
        for text in generator.generate_texts(prompts, batch_size=batch_size or 8, options=options):
            stream.write(json.dumps(_line(text, show_exits), ensure_ascii=False) + "\n")
            stream.flush()
            shower.update(figures={"exit_layer": text.mean_exit_layer})
            count, num_truncated = count + 1, num_truncated + text.truncated
    _say_prompts_cut(num_truncated, count, options)


def train_generator(
    kind: Literal["train", "finetune"],
    *,
    backbone: str,
    output_dir: Path,
    config: GenerationTrainingConfig,
    data: TrainingDataOptions,
    recipe: Recipe,
    resume: bool,
) -> None:
    """Train or fine-tune, then evaluate on rows that training has not seen and put the figures into the folder."""
    rows = generation_training_data(data, recipe, config.seed)
    from accelerate import PartialState

    from consistentee.evaluation.generation import evaluate_generation, evaluate_plain_generation
    from consistentee.evaluation.reports import evaluation_tables
    from consistentee.models.loaded import LoadedGenerator, load_model
    from consistentee.models.record import record_evaluation
    from consistentee.training import generation as training

    folder = (training.train_generation if kind == "train" else training.finetune_generation)(
        backbone=backbone,
        train_data=rows.train,
        output_dir=output_dir,
        config=config,
        task=rows.task,
        resume=resume,
        report=say,
    )
    if not PartialState().is_main_process:
        return
    if rows.held_out:
        path = save_held_out_texts(folder, rows.evaluation, data)
        say(f"The rows to report on were cut from the training file; they are in {path}")
    evaluation_rows = rows.evaluation.max_samples(MAX_TRAINING_TEXTS, config.seed)
    drawn = f" of {len(rows.evaluation):,}" if len(evaluation_rows) < len(rows.evaluation) else ""
    say(f"On {len(evaluation_rows):,}{drawn} rows that training has not seen ({rows.evaluation.source}):")
    saved = load_model(folder, LoadedGenerator, device=PartialState().device)
    if kind == "train":
        evaluation = evaluate_generation(saved, evaluation_rows, progress=True, seed=config.seed)
        figures = evaluation.summary()
        console().print(evaluation_tables(evaluation))
    else:
        figures = evaluate_plain_generation(saved, evaluation_rows, progress=True)
        say(", ".join(f"{name} {value:.4f}" for name, value in figures["metrics"].items()))
    record_evaluation(folder, figures)


def evaluate_generator(
    model: str,
    *,
    data: DataOptions,
    criteria: Sequence[str],
    threshold: float | None,
    reference: str | None,
    batch_size: int,
    max_samples: int | None,
    mode: Any,
    max_new_tokens: Any,
    text_speedups: Any,
    bertscore_model: Any,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """What `evaluate` does for a text generator; arguments are its options."""
    from consistentee.atomic_files import write_json
    from consistentee.evaluation.generation import evaluate_generation
    from consistentee.evaluation.reports import evaluation_tables
    from consistentee.functional.criteria import GENERATION_CRITERIA
    from consistentee.models.loaded import LoadedGenerator, load_model
    from consistentee.pipelines.generator import DecodingOptions, TextGenerator

    for name in criteria:
        if name not in GENERATION_CRITERIA:
            raise UsageError(
                f'criterion must be one of {", ".join(GENERATION_CRITERIA)} for a text generator, got "{name}".'
            )
    saved = load_model(model, LoadedGenerator)
    rule, limit = usage(lambda: saved.exit_rule(criteria[0] if criteria else None, threshold))
    mode = mode or saved.early_exit_model.config.mode
    if text_speedups and mode != "early-exit":
        raise UsageError(
            f"--text-speedups goes with --mode early-exit, and it is {mode}, where every token runs all layers."
        )
    generator = TextGenerator(saved)
    usage(lambda: generator.check(DecodingOptions(max_new_tokens=max_new_tokens)))
    for value in text_speedups or ():
        if not 1 < value <= saved.num_hidden_layers:
            raise UsageError(
                f"--text-speedups must be above 1 and at most {saved.num_hidden_layers} (layers), got {value}."
            )
    rows = generation_evaluation_data(data, saved.task).max_samples(max_samples)
    evaluation = evaluate_generation(
        saved,
        rows,
        criteria=[rule, *criteria[1:]],
        threshold=limit,
        mode=mode,
        reference=None if reference is None else load_model(reference, LoadedGenerator),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        text_speedups=text_speedups or (),
        bertscore_model=bertscore_model,
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


def benchmark_generator(
    model: str | None,
    config_name: str | None,
    *,
    data_file: Path | None,
    task: str | None,
    data_dir: Path | None,
    sequence_length: int,
    new_tokens: int,
    batch_sizes: Sequence[int],
    exit_distribution: str | None,
    criterion: str | None,
    threshold: float | None,
    lossless: bool,
    num_rows: int,
    repeats: int,
    budget: TimeBudget,
    dtype: str,
    device: str | None,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """What `benchmark` does for a text generator; arguments as there.

    Raises:
        UsageError: options contradict each other, or a value makes no sense.
    """
    from consistentee.atomic_files import write_json
    from consistentee.backbones.limits import say_cuts
    from consistentee.cli.benchmark import say_left_out
    from consistentee.data.tokenization import encode_prompts
    from consistentee.evaluation.reports import speed_table
    from consistentee.evaluation.speed import exit_distribution_shares, random_token_ids
    from consistentee.evaluation.speed_generation import measure_generation_speed, shape_generator
    from consistentee.models.loaded import DTYPES, LoadedGenerator, load_model, usable_device

    if dtype not in DTYPES:
        raise UsageError(f'--dtype must be one of {", ".join(DTYPES)} for text generators, got "{dtype}".')
    if config_name is not None:
        if lossless:
            raise UsageError("--lossless goes with a trained model: random exits draft nothing that stays.")
        place = None if device is None else usable_device(device)
        name = config_name
        network = shape_generator(config_name, seed=seed, dtype=DTYPES[dtype], device=place)
        prompts = random_token_ids(num_rows, sequence_length, network.config.vocab_size, seed)
        exit_distribution = exit_distribution or "even"
    else:
        name = model or ""
        saved = load_model(name, LoadedGenerator, device=device, dtype=dtype)
        network = usage(lambda: saved.early_exit_model)
        pairs = _benchmark_prompts(data_file, task, data_dir)[:num_rows]
        room = max(1, saved.context_length - new_tokens)
        prompts, cut = encode_prompts(pairs, saved.tokenizer, saved.prompt_template(), max_prompt_length=room)
        texts = f"prompts were longer than the {room} tokens that {new_tokens} new ones leave room for"
        say_cuts(sum(cut), len(cut), texts, "Lower --new-tokens to keep more of them.")
    shares = None
    if exit_distribution is not None:
        text = exit_distribution
        shares = usage(lambda: exit_distribution_shares(text, network.num_layers))
    usage(lambda: network.exit_rule(criterion, threshold))
    with announced() as (announce, tick):
        report = measure_generation_speed(
            network,
            prompts,
            name=name,
            batch_sizes=batch_sizes,
            new_tokens=new_tokens,
            shares=shares,
            criterion=criterion,
            threshold=threshold,
            lossless=lossless,
            repeats=repeats,
            seed=seed,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    console().print(speed_table(report))
    say_left_out(report.workload)
    if json_file is not None:
        write_json(json_file, report.to_dict())
        say(f"Figures written to {json_file}")
    if plot is not None:
        from consistentee.evaluation.plots import plot_speed

        title = f"{report.workload['model']}, {dtype}, {report.environment['threads']} thread(s)"
        plot_speed(report, plot, title=title)
        say(f"Picture written to {plot}")


def _benchmark_prompts(
    data_file: Path | None, task: str | None, data_dir: Path | None
) -> list[tuple[str, str]]:
    """Instructions and inputs that a generator is measured on."""
    if data_file is not None:
        from consistentee.data.generation import read_prompts

        return [(row["prompt"], row["input"]) for row in read_prompts(str(data_file))]
    from consistentee.data.generation import load_generation_task

    rows = load_generation_task(task or "", data_dir)[1]
    return list(zip(rows.instructions, rows.inputs, strict=True))


def _check_prompt_options(
    file: str | None,
    prompt: str | None,
    input: str | None,
    prompt_column: str | None,
    input_column: str | None,
) -> None:
    if prompt is not None and file is not None:
        raise UsageError("A file and --prompt exclude each other: give one of them.")
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt must hold text, got none.")
    if prompt is None and input is not None:
        raise UsageError("--input goes with --prompt; a file has a column for it, see --input-column.")
    if prompt is not None and (prompt_column or input_column):
        raise UsageError("--prompt-column and --input-column go with a file, not with --prompt.")
    columns = file is None or file == "-" or Path(file).suffix.lower() in FORMATS
    if not columns and (prompt_column or input_column):
        raise UsageError(
            f"--prompt-column and --input-column go with a file of columns ({', '.join(FORMATS)}), and {file} has a "
            "prompt on each line."
        )


def _line(text: GeneratedText, show_exits: bool) -> dict[str, Any]:
    """What a JSON line says."""
    lossless = {name: getattr(text, name) for name in ("draft_layers", "drafted", "accepted")}
    return {
        "prompt": text.prompt,
        **({"input": text.input} if text.input else {}),
        "text": text.text,
        "finish_reason": text.finish_reason,
        "exit_layers": text.exit_layers,
        "mean_exit_layer": round(text.mean_exit_layer, 4),
        "truncated": text.truncated,
        **({} if text.draft_layers is None else lossless),
        **({"pieces": text.pieces} if show_exits else {}),
    }


def _say_prompts_cut(cut: int, total: int, options: DecodingOptions) -> None:
    from consistentee.backbones.limits import say_cuts

    room = f"the {options.max_prompt_length} tokens that {options.max_new_tokens} new ones leave room for"
    say_cuts(cut, total, f"prompts were longer than {room}", "A lower --max-new-tokens leaves more.")


def _write_as_it_comes(
    generator: TextGenerator, prompt: str, input: str, options: DecodingOptions, show_exits: bool
) -> GeneratedText:
    """The text on standard output, token by token; white space before its first letter is left out."""
    from consistentee.cli.exit_colours import ExitPrinter

    lossless = options.mode == "lossless"
    printer = None
    if show_exits:
        printer = ExitPrinter(console(), generator.saved.num_hidden_layers, lossless=lossless)
    begun = False

    def show(piece: str, exit_layer: int) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if printer is not None:
            printer.put(piece, exit_layer)
        else:
            sys.stdout.write(piece)
        sys.stdout.flush()

    text = generator.stream(prompt, input, on_token=show, options=options)
    if printer is not None:
        printer.end(drafted=text.drafted, accepted=text.accepted)
    else:
        say("")
    return text
