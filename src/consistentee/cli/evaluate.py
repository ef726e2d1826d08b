"""The command `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from consistentee.cli.data import evaluation_data, read_all_texts
from consistentee.cli.kinds import CLASSIFIERS, GENERATORS, AnyCriterion, Kind, kind_of_model
from consistentee.cli.options import DataOptions, Flag, RowOptions, check_one_or_two
from consistentee.cli.terminal import (
    at_least_one,
    check_json_file,
    check_plot_file,
    console,
    save_figures,
    say,
    tuned_note,
    usage,
)
from consistentee.config import GenerationMode
from consistentee.errors import UsageError

TO_GENERATE = Group("Text generators", sort_key=2)


def evaluate(
    model: str,
    *,
    data: DataOptions | None = None,
    criterion: Annotated[list[AnyCriterion] | None, Parameter(consume_multiple=True)] = None,
    threshold: float | None = None,
    operating_point: str | None = None,
    texts: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    reference: str | None = None,
    clock: int | None = None,
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
            entropy, calibrated_confidence, patience, confident_patience, similar_patience, expert_sum, energy, cap,
            learnt_to_exit, quantile, static; of text generators: policy, softmax_margin, state_similarity,
            confidence_classifier, static. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        texts: Texts without labels, in every form that predict reads; agreement with full depth, or with the reference,
            takes the place of accuracy. Classifiers only.
        reference: Folder of a model to compare with: the plain one from `finetune`, or any of its kind as it was
            saved; of a tuned model (`retrofit --tune-backbone`) the original.
        clock: Tell curves and picture in time of this machine, for so many inputs that start together, such as 1: a
            layer and an exit are timed. Classifiers only.
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
    at_least_one(batch_size=batch_size, max_samples=max_samples, max_new_tokens=max_new_tokens, clock=clock)
    check_json_file(json_file)
    check_plot_file(plot)
    from consistentee.functional.criteria import check_fitted

    kind = kind_of_model(model)
    saved = kind.load(model)  # first of all, so that a broken folder is called one
    of_generators = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "text_speedups": text_speedups,
        "bertscore_model": bertscore_model,
    }
    for name, value in of_generators.items():
        if value is not None and kind is not GENERATORS:
            raise UsageError(
                f'--{name.replace("_", "-")} goes with a text generator, and model "{model}" is none.'
            )
    for name, value in {"operating_point": operating_point, "texts": texts, "clock": clock}.items():
        if value is not None and kind is GENERATORS:
            raise UsageError(
                f'--{name.replace("_", "-")} goes with a classifier, and model "{model}" is none.'
            )
    kind.check_criteria(criterion)
    network = saved.early_exit_model  # which a plain model has not
    for name in criterion or ():
        usage(lambda name=name: check_fitted(name, network.config))
    first = criterion[0] if criterion else None
    if kind is GENERATORS:
        of_generators["mode"] = mode = mode or network.config.mode
        rule, limit = usage(lambda: saved.exit_rule_of_mode(mode, first, threshold))
    else:
        rule, limit = usage(lambda: saved.exit_rule(first, threshold, operating_point))
    if texts is not None:
        check_texts_alone(data or DataOptions())
    evaluation, source = kind.commands["evaluate"](
        saved,
        kind,
        data or DataOptions(),
        max_samples,
        **(of_generators if kind is GENERATORS else {"texts": texts, "clock": clock}),
        criteria=[rule, *(criterion or [])[1:]],
        threshold=limit,
        reference=reference,
        batch_size=batch_size or kind.batch_size,
    )
    from consistentee.evaluation.plots import plot_evaluation
    from consistentee.evaluation.reports import evaluation_tables

    console().print(evaluation_tables(evaluation))
    title = f"{Path(model).name}, {Path(source).name}"
    save_figures(
        evaluation.to_dict(), json_file, plot, lambda path: plot_evaluation(evaluation, path, title=title)
    )


def evaluate_classifier(
    saved: Any,
    kind: Kind,
    data: DataOptions,
    max_samples: int | None,
    *,
    reference: str | None,
    texts: str | None = None,
    clock: int | None = None,
    **how: Any,
) -> tuple[Any, str]:
    """Measure a classifier, on texts without labels where these are given; the last arguments are those of either.

    Returns:
        The evaluation, and where its rows come from.
    """
    from consistentee.evaluation.agreement import evaluate_agreement, unlabelled_rows
    from consistentee.evaluation.classification import evaluate_model, run_layers

    compared = None if reference is None else kind.load(reference)
    if texts is not None:
        if compared is None and saved.model.config.is_tuned:
            say(tuned_note(saved.model.config))
        found, source = read_all_texts(texts, data.text_columns, saved, max_samples)
        rows = unlabelled_rows(found, saved.label_names, source)
        states = run_layers(saved, rows, batch_size=how["batch_size"], description="evaluating")
        evaluation: Any = evaluate_agreement(
            saved, found, reference=compared, source=source, states=states, progress=True, **how
        )
    else:
        rows = evaluation_data(data, kind, saved.task, label_names=saved.label_names).max_samples(max_samples)
        states = run_layers(saved, rows, batch_size=how["batch_size"], description="evaluating")
        evaluation = evaluate_model(saved, rows, reference=compared, states=states, progress=True, **how)
    if clock is not None:
        from consistentee.evaluation.layer_times import clock_of, times_on

        times = times_on(saved, rows.texts, batch_size=clock, criterion=evaluation.criterion, progress=True)
        has_exit = saved.model.config.has_exit
        timed = clock_of(evaluation, times, states[0].exit_scores, has_exit)
        evaluation = replace(evaluation, clock=timed)
    return evaluation, rows.source


def check_texts_alone(data: RowOptions, reference: str | None = None) -> None:
    """Raise UsageError for labelled rows beside --texts, or what needs them: a reference, where it is given here."""
    check_one_or_two(data.text_columns)
    given = {
        "--task": data.task,
        "--data-dir": data.data_dir,
        "--eval-file": data.eval_file,
        "--label-column": data.label_column,
        "--reference": reference,
    }
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--texts has no labels, so {name} goes without it.")
    data.check_kind(CLASSIFIERS)


def evaluate_generator(
    saved: Any,
    kind: Kind,
    data: DataOptions,
    max_samples: int | None,
    *,
    mode: GenerationMode,
    max_new_tokens: int | None,
    text_speedups: Sequence[float] | None,
    reference: str | None,
    **how: Any,
) -> tuple[Any, str]:
    """Measure a text generator; the last arguments are those of `evaluate_generation`, and so on as for classifiers."""
    from consistentee.evaluation.generation import evaluate_generation
    from consistentee.pipelines.decoding_options import DecodingOptions
    from consistentee.pipelines.generator import TextGenerator

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
    rows = evaluation_data(data, kind, saved.task).max_samples(max_samples)
    evaluation = evaluate_generation(
        saved,
        rows,
        mode=mode,
        reference=None if reference is None else kind.load(reference),
        max_new_tokens=max_new_tokens,
        text_speedups=text_speedups or (),
        progress=True,
        **how,
    )
    return evaluation, rows.source
