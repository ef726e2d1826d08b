"""The command `generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from consistentee.cli.kinds import GENERATORS
from consistentee.cli.options import Flag
from consistentee.cli.terminal import at_least_one, console, say, say_reading, text_stream, usage
from consistentee.config import GenerationCriterion, GenerationMode, SkippedStates
from consistentee.data.files import may_have_columns
from consistentee.data.hub import FORMATS
from consistentee.errors import UsageError

if TYPE_CHECKING:
    from consistentee.pipelines.decoding_options import DecodingOptions
    from consistentee.pipelines.generator import GeneratedText, TextGenerator


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
        file: Prompts, one a line, CSV, TSV, JSON, Parquet, a `datasets` folder or hf:user/name (of several splits
            "test", else "validation", else "train"); "-", or no file and no --prompt, is standard input.
        prompt: One prompt, in place of a file.
        input: What the prompt is about, if it is about a text.
        prompt_column: The column of the instruction. [default: the usual names]
        input_column: The column of what the instruction is about. [default: the usual names]
        mode: early-exit: tokens exit early; full: all layers; lossless: exits draft and all layers verify, which gives
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
        show_exits: Show where each token exited: in colours or marks, or as "pieces" in the JSON lines.
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
    from consistentee.pipelines.decoding_options import DecodingOptions
    from consistentee.pipelines.generator import TextGenerator
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
    saved = GENERATORS.load(model, device=None if device == "auto" else device, dtype=dtype)
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
        say_reading(file or "-", "prompts")
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
    if file is not None and not may_have_columns(file) and (prompt_column or input_column):
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
