"""The command `probe`: whether exits would be worth it, before anything is trained for good."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from consistentee.cli.options import Columns, Flag, check_one_or_two
from consistentee.cli.retrofit import read_texts_of
from consistentee.cli.terminal import check_json_file, save_figures, say
from consistentee.errors import UsageError


def probe_command(
    model: str,
    /,
    *,
    texts: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    text_columns: Columns = None,
    seconds: float = 120.0,
    seed: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    debug: Flag = False,
) -> None:
    """See in two minutes what exits would save on a fine-tuned classifier; nothing is changed or kept.

    A few hundred texts teach exits and a policy: what these save at 99 and 98 % agreement with the model is what
    `retrofit` on more texts will save at least.

    Args:
        model: Hugging Face sequence classifier, or plain model of `consistentee finetune`: a folder, or a name on the
            hub.
        texts: Files of texts in every form that `predict` reads; "-" is standard input. Of a data set with several
            splits, "train" is read.
        text_columns: The column of the text, or the two columns of a pair; files of plain text have none. [default:
            the usual names]
        seconds: Time to keep to, about; texts are read as it allows.
        seed: Of everything drawn.
        json_file: Write all figures to this file.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_one_or_two(text_columns)
    check_json_file(json_file)
    if not 0 < seconds < math.inf:
        raise UsageError(f"--seconds must be above 0, got {seconds:g}.")
    from consistentee.evaluation.probe import probe

    report = probe(model, read_texts_of(model, texts, text_columns), seconds=seconds, seed=seed)
    for line in probe_lines(report):
        say(line)
    save_figures(report.to_dict(), json_file)


def probe_lines(report: Any) -> list[str]:
    """What was found, in sentences."""
    lines = [
        f"Exits learnt from {report.num_train_texts:,} texts, the policy from {report.num_examples:,} others that it "
        f"is judged by, cross-fitted; {report.num_hidden_layers} layers."
    ]
    for point in report.points:
        low, high = point.interval
        timed = "".join(
            f", {row.wall_clock_speedup:.2f}x faster at batch {row.batch_size}"
            for row in point.speed
            if row.name == "engine"
        )
        lines.append(
            f"At {100 * point.agreement:g} % agreement with your model: {point.layer_speedup:.2f}x fewer layers (95 % "
            f"interval {low:.2f} to {high:.2f}){timed} on this machine."
        )
    lines.append(
        f"It took {report.seconds:.0f} seconds. More texts make better exits: consistentee retrofit MODEL --texts "
        "FILE... --output-dir DIR"
    )
    if report.points[0].interval[1] < 1.15:
        lines.append(
            "Exits are hardly worth it here: what the model decides is only there in its last layers, as far as these "
            "texts can tell."
        )
    return lines
