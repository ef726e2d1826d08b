"""`benchmark --serve`: a classifier behind its server, under load."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from typing import Any

from consistentee.cli.terminal import announced, console, save_figures, say, usage
from consistentee.errors import UsageError

SERVED_SECONDS = 120.0
SERVED_ROWS = 1024
GOES_WITH_SERVE = (
    "data_file",
    "task",
    "data_dir",
    "text_columns",
    "operating_point",
    "num_rows",
    "seconds",
    "threads",
    "seed",
    "json_file",
    "plot",
    "serve",
)


def benchmark_serving(model: str | None, options: Any, texts: Iterable[tuple[str, ...]]) -> None:
    """Measure, and print what was found.

    Args:
        model: folder of a classifier.
        options: of the command.
        texts: to ask about.

    Raises:
        UsageError: options that have no effect here, or a model without exits.
    """
    for name, value in options.given().items():
        if value is not None and name not in GOES_WITH_SERVE:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --serve: leave it out.")
    if model is None:
        raise UsageError("--serve goes with a model, not with --config-name.")
    from consistentee.evaluation.load_plot import load_lines, load_table, plot_load
    from consistentee.evaluation.serving_load import measure_serving
    from consistentee.models.loaded import LoadedClassifier, load_model

    saved = load_model(model, LoadedClassifier, device="cpu")
    usage(lambda: saved.exit_rule(operating_point=options.operating_point))
    read = list(texts)
    count = options.num_rows or SERVED_ROWS
    if len(read) > count:
        read = random.Random(options.seed).sample(read, count)
    if not read:
        raise ValueError("There must be at least one text to ask about, got none.")
    seconds = options.seconds or SERVED_SECONDS
    with announced() as (announce, tick):
        announce(seconds + 30)
        report = measure_serving(
            model,
            read,
            operating_point=options.operating_point,
            seconds=seconds,
            threads=options.threads or 1,
            seed=options.seed,
            tick=tick,
        )
    console().print(load_table(report))
    for line in load_lines(report):
        say(line)
    figures = dataclasses.asdict(report)
    save_figures(figures, options.json_file, options.plot, lambda path: plot_load(report, path))
