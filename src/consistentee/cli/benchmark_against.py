"""`benchmark --against`: accuracy and milliseconds of what one would take instead, beside a classifier with exits."""

from __future__ import annotations

import random
from typing import Any

from consistentee.cli.data import known_task
from consistentee.cli.kinds import CLASSIFIERS
from consistentee.cli.options import check_column_count
from consistentee.cli.terminal import announced, console, save_figures, usage
from consistentee.errors import UsageError

USUAL = "usual"
"""The word that stands for the ways there always are, where no other model is named."""

AGAINST_SIZES = (1, 32)
HAS_NO_EFFECT = (
    "config_name",
    "sequence_length",
    "labels",
    "classifier_hidden_size",
    "exit_distribution",
    "throughput",
    "serve",
    "backend",
    "dtype",
)


def benchmark_against(
    model: str | None, options: Any, sizes: list[int], repeats: int, budget: Any, texts: list[tuple[str, ...]]
) -> None:
    """Measure, and print what was found.

    Args:
        model: folder of a classifier with exits.
        options: of the command.
        sizes: batch sizes; empty for the usual ones.
        repeats: timed repetitions.
        budget: time that the timing keeps to.
        texts: of the file, where no labels are read; else empty.

    Raises:
        UsageError: options that have no effect here.
        ValueError: models that cannot be compared.
    """
    given = options.given()
    for name in HAS_NO_EFFECT:
        if given[name] is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --against: leave it out.")
    if model is None:
        raise UsageError("--against goes with a model, not with --config-name.")
    from consistentee.evaluation.alternatives import measure_alternatives
    from consistentee.evaluation.alternatives_view import alternatives_table, plot_alternatives
    from consistentee.inference.encoder.scheduler import ExitRule

    saved = CLASSIFIERS.load(model, device=options.place)
    rule = ExitRule(
        *usage(lambda: saved.exit_rule(options.criterion, options.threshold, options.operating_point))
    )
    others = [CLASSIFIERS.load(name, device=options.place) for name in options.against if name != USUAL]
    rows, labels = _labelled(options, saved, texts)
    count = options.num_rows or len(rows)
    order = random.Random(options.seed).sample(range(len(rows)), min(count, len(rows)))
    with announced() as (announce, tick):
        report = measure_alternatives(
            saved,
            [rows[row] for row in order],
            None if labels is None else [labels[row] for row in order],
            others=others,
            rule=rule,
            batch_sizes=sizes or AGAINST_SIZES,
            repeats=repeats,
            seed=options.seed,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    console().print(alternatives_table(report))
    title = f"{report.workload['model']}, {report.environment['threads']} thread(s)"
    save_figures(
        report.to_dict(),
        options.json_file,
        options.plot,
        lambda path: plot_alternatives(report, path, title=title),
    )


def _labelled(
    options: Any, saved: Any, texts: list[tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], list[int] | None]:
    """The inputs, and their labels by the model's index, where there are any."""
    if options.label_column is not None:
        columns = {"text_columns": options.text_columns, "label_column": options.label_column}
        check_column_count(options.text_columns, saved.text_pairs, saved.name)
        rows = CLASSIFIERS.load_files(None, options.data_file, **columns, label_names=saved.label_names)[1]
    elif options.task is not None:
        task = known_task(options.task, CLASSIFIERS)
        rows = CLASSIFIERS.load_task(task, options.data_dir, label_names=saved.label_names)[1]
    else:
        return texts, None
    return list(rows.texts), [int(label) for label in rows.labels]
