"""The command `export`."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from consistentee.atomic_files import user_path
from consistentee.cli.kinds import CLASSIFIERS, kind_of_model
from consistentee.cli.options import Columns, Flag, check_one_or_two
from consistentee.cli.terminal import at_least_one, say, usage
from consistentee.config import Criterion
from consistentee.errors import UsageError


def export_command(
    model: str,
    *,
    output: Path,
    file_format: Annotated[Literal["onnx", "web"], Parameter(name="--format")] = "onnx",
    criterion: Criterion | None = None,
    threshold: float | None = None,
    operating_point: str | None = None,
    opset: int = 17,
    precision: Literal["float32", "int8"] = "float32",
    portable: Flag = False,
    calibration_file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    text_columns: Columns = None,
    max_samples: int | None = None,
    npm: Path | None = None,
    debug: Flag = False,
) -> None:
    """Write a classifier as one ONNX file that decides by itself who exits, to run without this library.

    The folder holds model.onnx, tokenizer.json, config.json with the names of the classes, and README.md with examples
    for Python, JavaScript and others. The threshold stays an input of the graph, the exit rule is part of it. With
    --format web it also holds the playground, which runs the file in a browser: any file server shows it.

    Args:
        model: Folder of a trained model, or its name on the hub.
        output: Folder to write; new, empty, or an earlier export.
        file_format: What to write: onnx, or web: with a page and all that it needs.
        criterion: Exit rule. [default: the saved one]
        threshold: Exit at the first layer whose exit score exceeds it, unless the caller says otherwise. [default: the
            one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        opset: Version of the standard operators, 17 to 21.
        precision: float32, or int8: weights of the layers in 8 bits.
        portable: Standard operators only, for other runtimes; slower on ONNX Runtime.
        calibration_file: Texts, in every form that predict reads, on which the file is compared with the model: how
            many labels and exit layers differ.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        max_samples: Compare on at most so many texts, drawn at random.
        npm: Of web: folder in which `npm install` put the page's packages. [default: npm fetches them]
        debug: Show tracebacks and the messages of other libraries.
    """
    check_one_or_two(text_columns)
    at_least_one(max_samples=max_samples)
    if calibration_file is None and (text_columns or max_samples is not None):
        given = "--text-columns" if text_columns else "--max-samples"
        raise UsageError(f"{given} goes with --calibration-file.")
    if npm is not None and file_format != "web":
        raise UsageError("--npm goes with --format web.")
    from consistentee.functional.criteria import digits
    from consistentee.pipelines.export import export_onnx, require_replaceable
    from consistentee.serving.web_folder import export_web

    require_replaceable(user_path(output))
    if kind_of_model(model) is not CLASSIFIERS:
        raise UsageError(
            f'export goes with classifiers, and model "{model}" is a text generator, whose tokens exit one by one.'
        )
    from consistentee.cli.data import read_all_texts

    saved = CLASSIFIERS.load(model, device="cpu")
    if saved.has_exits:
        usage(lambda: saved.exit_rule(criterion, threshold, operating_point))
    texts: list[tuple[str, ...]] = []
    if calibration_file is not None:
        texts, _ = read_all_texts(calibration_file, text_columns, saved, max_samples)
    write = export_onnx if file_format == "onnx" else partial(export_web, npm=npm)
    found = write(
        saved,
        output,
        criterion=criterion,
        threshold=threshold,
        operating_point=operating_point,
        opset=opset,
        precision=precision,
        portable=portable,
        compare_texts=texts,
    )
    rule = "no exits" if found.threshold is None else f"{found.criterion} > {digits(found.threshold)}"
    say(f"Written to {output}: model.onnx ({found.megabytes:.0f} MB, {precision}, opset {opset}, {rule}).")
    if found.compared:
        say(
            f"Against the model in float32 on {found.compared} texts: {found.labels_differ} labels and "
            f"{found.exit_layers_differ} exit layers differ."
        )
    elif precision != "float32":
        say("How many labels the 8 bits change is not known: give --calibration-file.")
    if file_format == "web":
        say(f"To see it: python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(output))}")
