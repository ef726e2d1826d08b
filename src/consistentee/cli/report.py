"""The command `report`: what exits give, as one HTML page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from consistentee.cli.data import evaluation_data, read_all_texts
from consistentee.cli.evaluate import check_texts_alone
from consistentee.cli.kinds import CLASSIFIERS, kind_of_model
from consistentee.cli.options import DATA, Flag, RowOptions
from consistentee.cli.terminal import at_least_one, check_place, say, usage
from consistentee.config import Criterion
from consistentee.errors import UsageError


def report_command(
    folder: str,
    /,
    *,
    output: Path,
    data: RowOptions | None = None,
    texts: Annotated[str | None, Parameter(allow_leading_hyphen=True, group=DATA)] = None,
    max_samples: Annotated[int | None, Parameter(group=DATA)] = None,
    criterion: Annotated[list[Criterion] | None, Parameter(consume_multiple=True)] = None,
    threshold: float | None = None,
    operating_point: str | None = None,
    reference: str | None = None,
    no_texts: Flag = False,
    batch_size: int | None = None,
    debug: Flag = False,
) -> None:
    """Write one HTML page on what the exits of a classifier give, or on a comparison, to be read without network.

    The trade-off with operating points and intervals, where the classes exit, accuracy by exit layer (agreement with
    full depth where there are no labels), hardness against exit layer, texts that exit early and texts that need depth,
    settings and environment. Without rows the page shows what the folder's training record holds. Of a folder that
    `consistentee compare` filled: how methods rank, all curves and all tables.

    Args:
        folder: Folder of a trained or retrofitted classifier, or its name on the hub; or the output folder of
            `consistentee compare`.
        output: The page. Of files that are there only a report of ours, or an empty one, is replaced.
        texts: Texts without labels, in every form that predict reads; agreement with full depth takes the place of
            accuracy.
        max_samples: Report on at most so many rows, every class with its share.
        criterion: Exit rule; of several, the first is reported and all are drawn. [default: the saved one, and beside
            it some whose thresholds training chose]
        threshold: Of the first criterion. [default: the one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        reference: Folder of a model to compare with, on labelled rows: the plain one from `finetune`, or any as it was
            saved.
        no_texts: Leave the example texts out; they are the only part of the rows that the page holds.
        batch_size: Inputs per step; does not change the result. [default: 64]
        debug: Show tracebacks and the messages of other libraries.
    """
    at_least_one(batch_size=batch_size, max_samples=max_samples)
    data, summary = data or RowOptions(), Path(folder) / "compare.json"
    rows_given = {"texts": texts, **dataclasses.asdict(data)}
    needing_rows = {
        "max_samples": max_samples,
        "criterion": criterion,
        "threshold": threshold,
        "operating_point": operating_point,
        "reference": reference,
        "batch_size": batch_size,
    }
    from consistentee.evaluation.html_page import check_report_file
    from consistentee.evaluation.html_report import model_page, record_page
    from consistentee.functional.criteria import check_fitted

    usage(lambda: check_report_file(output))
    check_place("--output", output)
    if summary.is_file():
        from consistentee.evaluation.comparison.page import comparison_page

        _refuse({**rows_given, **needing_rows}, f"goes with a model, and {folder} holds a comparison.")
        return _write(output, comparison_page(summary))
    if (summary.parent / "cells").is_dir() and not (summary.parent / "config.json").exists():
        raise UsageError(
            f"{folder} holds cells of a comparison and no {summary.name} yet. Write it: consistentee compare --render "
            f"--output-dir {shlex.quote(folder)}"
        )
    if kind_of_model(folder) is not CLASSIFIERS:
        raise UsageError(f'report goes with classifiers, and model "{folder}" is a text generator.')
    saved = CLASSIFIERS.load(folder)
    saved.exit_rule()  # which a plain model has not, and says so
    if texts is not None:
        check_texts_alone(data, reference)
    elif not any(value is not None for value in rows_given.values()):
        _refuse(needing_rows, "needs rows: give --task, --eval-file or --texts.")
        return _write(output, record_page(saved))
    for name in criterion or ():
        usage(lambda name=name: check_fitted(name, saved.model.config))
    usage(lambda: saved.exit_rule(criterion[0] if criterion else None, threshold, operating_point))
    from consistentee.evaluation.exit_report import report_exits

    rows, source = _rows(texts, data, saved, max_samples)
    found = report_exits(
        saved,
        rows,
        criteria=criterion or (),
        threshold=threshold,
        operating_point=operating_point,
        reference=None if reference is None else CLASSIFIERS.load(reference),
        with_texts=not no_texts,
        source=source,
        batch_size=batch_size or CLASSIFIERS.batch_size,
        progress=True,
    )
    return _write(output, model_page(saved, found, with_texts=not no_texts))


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raise UsageError for the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def _rows(texts: str | None, data: RowOptions, saved: Any, max_samples: int | None) -> tuple[Any, str]:
    """Labelled rows, or texts; and where they come from."""
    if texts is not None:
        return read_all_texts(texts, data.text_columns, saved, max_samples)
    rows = evaluation_data(data, CLASSIFIERS, saved.task, label_names=saved.label_names)
    return rows.max_samples(max_samples), rows.source


def _write(output: Path, page: str) -> None:
    from consistentee.atomic_files import write_text

    write_text(output, page)
    say(f"Report written to {output}")
