"""The command `retrofit`: exits for the model that serves already."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter
from rich.console import Group
from rich.text import Text

from consistentee.cli.effects import check_retrofit
from consistentee.cli.options import (
    DATA,
    NO_RECIPE,
    NOT_GIVEN,
    Columns,
    Flag,
    Unchecked,
    check_column_count,
    check_one_or_two,
    field_docs,
    shown_default,
)
from consistentee.cli.terminal import (
    at_least_one,
    check_json_file,
    check_one_reader,
    check_plot_file,
    console,
    is_first_process,
    save_figures,
    say,
    say_reading,
    usage,
)
from consistentee.config import RetrofitConfig
from consistentee.errors import UsageError, require_range

OF_RETROFIT = (
    "exits_only tune_backbone lora_rank lora_alpha lora_dropout max_length parse_special_tokens num_queries "
    "classifier_hidden_size ensemble_decay head_dropout passes exit_min_steps batch_size learning_rate "
    "head_learning_rate weight_decay schedule warmup_ratio max_grad_norm mixed_precision policy_texts "
    "calibration_texts report_texts policy_input policy_hidden_size policy_dropout policy_epochs policy_min_steps "
    "policy_batch_size policy_learning_rate policy_weight_decay policy_folds entropy_bonus layer_cost_warmup "
    "initial_exit_bias estimator num_rollouts reward reward_loss hardness layer_costs layer_cost_mode seed "
    "threshold_margin checkpoint_every max_cache_mb max_disk_mb tracker"
)
"""Settings that have an effect here."""


def _retrofit_options() -> type:
    """A dataclass with the settings of `OF_RETROFIT`, `NOT_GIVEN` where the command line does not give them."""
    hints, docs = get_type_hints(RetrofitConfig), field_docs(RetrofitConfig)
    defaults = {field.name: field.default for field in dataclasses.fields(RetrofitConfig)}
    fields: list[tuple[str, Any, Any]] = []
    for name in OF_RETROFIT.split():
        shown = shown_default(defaults[name])
        parameter = Parameter(
            help=docs.get(name, "") + (f" [default: {shown}]" if shown else ""),
            group=NO_RECIPE,
            show_default=False,
            negative=None if hints[name] in (bool, bool | None) else (),
            consume_multiple=isinstance(defaults[name], tuple),
        )
        fields.append((name, Annotated[hints[name], Unchecked(), parameter], NOT_GIVEN))
    options = dataclasses.make_dataclass(
        "RetrofitOptions", fields, frozen=True, namespace={"__module__": __name__}
    )
    return Parameter(name="*")(options)


if TYPE_CHECKING:
    from consistentee.data.classification import NotedLabels

    RetrofitOptions = RetrofitConfig
else:
    RetrofitOptions = _retrofit_options()


def retrofit_command(
    model: str,
    /,
    *,
    texts: Annotated[list[str], Parameter(consume_multiple=True, negative=(), group=DATA)],
    output_dir: Path,
    text_columns: Annotated[Columns, Parameter(group=DATA)] = None,
    label_column: Annotated[str | None, Parameter(group=DATA)] = None,
    max_texts: Annotated[int | None, Parameter(group=DATA)] = None,
    max_disagreement: float = 0.01,
    confidence: float = 0.95,
    resume: Flag = False,
    settings: RetrofitOptions | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    debug: Flag = False,
) -> None:
    """Give a fine-tuned classifier exits that imitate it, from texts without labels; the model stays as it is.

    At full depth the new folder gives the model's own logits, unless --tune-backbone lets it change for the exits'
    sake. Some of the texts are kept to certify how often exits agree with the model, and others to report on.

    Args:
        model: Hugging Face sequence classifier, or plain model of `consistentee finetune`: a folder, or a name on the
            hub.
        texts: Files of texts in every form that `predict` reads; "-" is standard input. Of a data set with several
            splits, "train" is read. Duplicates are dropped.
        output_dir: Where checkpoints and the finished model go.
        text_columns: The column of the text, or the two columns of a pair; files of plain text have none. [default:
            the usual names]
        label_column: The column of the label, where there is one: accuracy is reported as well. Nothing learns from it;
            rows may have none, and plain text has none.
        max_texts: Read at most so many different texts.
        max_disagreement: Share of texts that may get another label than the model's, at the default threshold.
        confidence: Of the certificate.
        resume: Go on from the last checkpoint in the output folder.
        json_file: Write all figures to this file.
        plot: Draw the trade-off and the exit histogram into this PNG, PDF or SVG file.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_one_or_two(text_columns)
    at_least_one(max_texts=max_texts)
    check_json_file(json_file)
    check_plot_file(plot)
    if label_column is not None and text_columns is None:
        raise UsageError("--label-column goes with --text-columns.")
    for name, value in (("--max-disagreement", max_disagreement), ("--confidence", confidence)):
        usage(lambda name=name, value=value: require_range(name, value, 0, 1, open_end=True))
        if value == 0:
            raise UsageError(f"{name} must be above 0, got 0.")
    given = {} if settings is None else vars(settings)
    given = {name: value for name, value in given.items() if value is not NOT_GIVEN}
    config = usage(lambda: RetrofitConfig.from_dict({**given, "max_accuracy_loss": max_disagreement}))
    check_retrofit(given, config)
    from accelerate import PartialState

    from consistentee.evaluation.retrofit import SPEED_SECONDS, keep_threshold, report_retrofit
    from consistentee.models.loaded import LoadedClassifier, load_model
    from consistentee.models.record import record_evaluation
    from consistentee.training.run_folders import check_output_dir
    from consistentee.training.train import retrofit_task, run_retrofit

    start = time.perf_counter()
    usage(lambda: check_output_dir(output_dir, model))
    source = ", ".join(texts)
    noted = None
    if label_column is not None and text_columns is not None:
        from consistentee.data.classification import NotedLabels

        noted = NotedLabels(text_columns, label_column)
    task = retrofit_task(
        model, read_texts_of(model, texts, text_columns, noted), config, source=source, max_texts=max_texts
    )
    dropped = task.data.num_duplicates
    if is_first_process():
        say(f"{len(task.data):,} different texts" + (f", {dropped:,} duplicates dropped" if dropped else ""))
    calibration, reported = task.held_rows()
    labels = None
    if noted is not None:  # before the training, which a wrong label is not to cost
        labels = noted.classes_of(map(reported.text, range(len(reported))), task.original.label_names)
        if not labels and is_first_process():
            say(f'No text to report on has a label in column "{label_column}": accuracy is not reported.')
    folder = run_retrofit(task, output_dir, resume=resume, report=say)
    saved = load_model(folder, LoadedClassifier, device=PartialState().device)
    is_main = is_first_process()
    report = report_retrofit(
        saved,
        calibration=calibration,
        reported=reported,
        num_train_texts=len(task.parts.exits),
        num_policy_texts=len(task.parts.policy),
        max_disagreement=max_disagreement,
        confidence=confidence,
        original=task.original if task.is_tuned else None,
        labels=labels,
        speed_seconds=SPEED_SECONDS if is_main else None,
        progress=is_main,
    )
    if not is_main:
        return
    report = dataclasses.replace(report, seconds=time.perf_counter() - start)
    keep_threshold(folder, report)
    figures = report.to_dict()
    record_evaluation(folder, {name: figures[name] for name in figures if name not in LONG})
    from consistentee.evaluation.plots import plot_evaluation

    console().print(Group(*_tables(report)))
    for line in retrofit_lines(report, folder):
        say(line)
    title = f"{Path(model).name}, retrofitted"
    save_figures(figures, json_file, plot, lambda path: plot_evaluation(report.evaluation, path, title=title))


LONG = ("curve", "other_criteria", "disagreements", "environment", "speed")


def read_texts_of(
    model: str, files: list[str], columns: list[str] | None, labels: NotedLabels | None = None
) -> Iterator[tuple[str, ...]]:
    """Texts of several files, for a model; of those with columns labels are noted on the way.

    Args:
        model: whose texts are single or pairs.
        files: as `predict` reads them; "-" is standard input.
        columns: of the texts; files of plain text have none.
        labels: collects the labels.
    """
    from consistentee.backbones.loading import read_config
    from consistentee.data.files import TO_LEARN, may_have_columns, read_texts

    pairs = read_config(model, "Model").get("text_pairs")
    check_column_count(columns, pairs, model)
    for file in files:
        check_one_reader(file)
        say_reading(file, "texts")
        named, note = (columns, labels and labels.note) if may_have_columns(file) else (None, None)
        yield from read_texts(file, named, pairs=pairs, splits=TO_LEARN, on_row=note)


def _tables(report: Any) -> Iterator[Any]:
    """Operating points, exits by layer, and the texts on which exits and model differ."""
    from consistentee.evaluation.reports import agreement_tables

    yield from agreement_tables(report.evaluation)
    if report.disagreements:
        yield Text("\nWhere exits differ from the model, those it is surest of first:")
        for one in report.disagreements[:5]:
            yield Text(
                f"  {one.label} {one.score:.2f}, at layer {one.exit_layer} {one.exit_label} {one.exit_score:.2f}: "
                f"{' | '.join(one.texts)[:90]}"
            )


def retrofit_lines(report: Any, folder: Path) -> Iterator[str]:
    """What the person wants to know, in sentences."""
    from consistentee.evaluation.calibration import NO_PROMISE, calibration_lines

    found = report.evaluation
    certified = "not certified"
    if report.calibration.certified:
        certified = f"certified: at least {100 * (1 - report.max_disagreement):g} %"
    speeds = [row for row in report.speed if row.name == "engine"]
    timed = "".join(
        f", {row.wall_clock_speedup:.2f}x faster on this machine at batch {row.batch_size}" for row in speeds
    )
    yield (
        f"\nAgrees with your model on {100 * found.agreement:.2f} % of {found.num_examples:,} unseen texts "
        f"({certified}, confidence {100 * report.confidence:g} %), {found.layer_speedup:.2f}x fewer layers{timed}."
    )
    if found.agreement_with is not None:
        yield f"At full depth the tuned model agrees with it on {100 * report.full_depth_agreement:.2f} %."
    if report.accuracy is not None:
        untuned = report.original_accuracy is None
        of_model = report.full_depth_accuracy if untuned else report.original_accuracy
        yield (
            f"Accuracy on {report.num_labelled:,} of them: {100 * report.accuracy:.2f} %, your model's "
            f"{100 * of_model:.2f} %."
        )
    yield calibration_lines(report.calibration)[0]
    if report.calibration.certified:
        yield NO_PROMISE
    else:
        few = report.calibration.num_rows < (report.calibration.rows_needed or 0)
        kept = "A tenth of the texts are kept for that. " if few else ""
        yield f"{kept}The threshold is the one that the policy's own texts suggest."
    if not report.is_worth_it:
        yield (
            f"Exits are hardly worth it here: at {100 * found.agreement:.2f} % agreement they save "
            f"{100 * found.layers_saved:.0f} % of the layers. What the model decides is only there in its last "
            "layers; a higher --max-disagreement, more texts or a fine-tuning with exits (`consistentee train`) may "
            "change that."
        )
    yield f"The model lies in {folder}. What to type next:"
    quoted = shlex.quote(str(folder))
    yield f'  echo "A text." | consistentee predict {quoted}'
    yield f"  consistentee benchmark {quoted} --data-file YOUR_TEXTS"
    yield f"  consistentee serve {quoted}"
