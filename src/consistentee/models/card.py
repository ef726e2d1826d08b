"""The README.md of a saved folder: what the model is, what it gains, how it is used. Its text is `card_template.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from consistentee.atomic_files import locked_folder, user_path, write_text
from consistentee.functional.bounds import at_most
from consistentee.functional.criteria import EXIT_CRITERIA, digits
from consistentee.models.operating_points import (
    Points,
    read_operating_points,
    read_saved_config,
    require_operating_points,
)

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")

LAST_LAYERS_TOKEN = "token agreement with the last layer"

POINTS_BEGIN, POINTS_END = "<!-- operating points -->", "<!-- end of operating points -->"
POINTS_TEXT = """Operating points, for `operating_point=` and `--operating-point`:

{}

A certificate holds on average, for rows drawn as those that it comes from: not for a single input or class, nor for
inputs that have changed since."""


def write_model_card(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write the model card of a saved folder.

    Args:
        folder: the saved folder.
        record: the training record; `evaluation` (of one of the evaluations, as a dict) and every other key may be
            missing.

    Returns:
        The file.
    """
    path = Path(folder) / CARD_FILE
    write_text(path, model_card(record, read_saved_config(folder)))
    return path


def enter_operating_points(folder: str | Path) -> None:
    """Put the operating points that a folder has now into its card; the rest of the card stays, whoever wrote it.

    Where there is no card none is made.
    """
    with locked_folder(Path(folder)):
        _enter_operating_points(Path(folder))


def _enter_operating_points(folder: Path) -> None:
    path = folder / CARD_FILE
    if not path.is_file():
        return
    card, section = path.read_text(encoding="utf-8"), _section(read_operating_points(folder))
    start, end = card.find(POINTS_BEGIN), card.find(POINTS_END)
    if 0 <= start < end:
        card = card[:start] + section + card[end + len(POINTS_END) :]
    elif "\n## Training\n" in card:
        card = card.replace("\n## Training\n", f"\n\n{section}\n\n## Training\n", 1)
    else:
        card = f"{card.rstrip()}\n\n{section}\n"
    write_text(path, card)


def model_card(record: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """The text of the card, Markdown with YAML front matter.

    Args:
        record: the training record.
        config: what the folder's `config.json` holds, whose exits, exit rule and operating points count.
    """
    config = config or {}
    points: Points = config.get("operating_points") or {}
    require_operating_points(points)
    exit_layers: Sequence[int] | None = config.get("exit_layers")
    kind, task = str(record.get("kind")), record.get("task")
    generates, exits = kind.endswith("_generation"), not kind.startswith("full_depth")
    evaluation, validation = record.get("evaluation") or {}, record.get("validation") or {}
    thresholds: Mapping[str, float] = {} if exit_layers else record.get("thresholds") or {}
    criterion, threshold = _exit_rule(record, config)
    by_loss = (validation.get("tolerances") or {}).get(criterion, ())
    metric = (record.get("config") or {}).get("threshold_metric", "accuracy")
    backbone = str(record.get("backbone") or ("a language model" if generates else "an encoder"))
    base_model = backbone if _is_hub_name(backbone) else None
    backbone = _short_name(backbone)
    original: Mapping[str, Any] = record.get("original") or {}
    quality = _quality(record, generates)
    pipeline_tag = "text-generation" if generates else "text-classification"
    metrics = {name: evaluation[name] for name in ("accuracy",) if evaluation.get(name) is not None}
    metrics |= evaluation.get("metrics") or {}
    has_accuracy = "accuracy" in metrics or ("accuracy" in validation and quality == "accuracy")
    speed = {name: evaluation[name] for name in ("layer_speedup",) if name in evaluation}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=task or "custom",
            dataset_name=task or "own rows",
            metric_type=name,
            metric_value=value,
        )
        for name, value in {**metrics, **speed}.items()
    ]
    name = f"{backbone}, {task}" if task else backbone
    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers" if generates and not exits else "consistentee",
        pipeline_tag=pipeline_tag,
        license=original.get("license"),
        tags=["consistentee", "early-exit", pipeline_tag] if exits else [pipeline_tag],
        metrics=["accuracy"] if has_accuracy and not generates else None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    words = ("Early-exit" if exits else "Plain", "language model" if generates else "classifier")
    rule = {**evaluation, "threshold": digits(evaluation["threshold"])} if "threshold" in evaluation else None
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=" ".join(words),
        task=task,
        backbone=backbone,
        generates=generates,
        exits=exits,
        after=_places(exit_layers),
        criterion=criterion,
        decider="a policy" if criterion == "policy" else f"the exit rule `{criterion}`",
        method=record.get("method") or "consistent",  # the only one before records said it
        original=original,
        exits_only=bool((record.get("config") or {}).get("exits_only")),
        needs_package=exits or not generates,
        evaluation_rows=_count(evaluation, "rows") + _seen(evaluation),
        exit_rule=" Exit rule: {criterion} above {threshold}.".format(**rule) if rule else "",
        evaluated=_table(("figure", "value"), _evaluated(evaluation, metrics, generates)),
        by_layer=_table(
            ("layer", "rows that exit here", "their accuracy", "accuracy if all exited here"),
            _by_layer(evaluation),
        ),
        validation_rows=_count(
            validation,
            "response tokens of the validation texts, each predicted from the reference text before it"
            if generates
            else "validation rows",
        ),
        validated=_table(("figure", "value"), _validated(validation, quality)),
        by_rule=_table(("exit rule", "threshold", quality, "mean exit layer"), _by_rule(validation)),
        operating_points=_section(points) if points else "",
        pairs=(record.get("data") or {}).get("text_pairs"),
        threshold=digits(other_threshold(criterion, threshold, [at["threshold"] for at in by_loss])),
        by_loss=_table(
            ("loss allowed, points", "threshold", "loss there", "layer speed-up")
            if metric == "accuracy"
            else (f"loss of {metric} allowed, points", "threshold", "accuracy lost there", "layer speed-up"),
            _by_loss(by_loss, validation),
        ),
        thresholds=", ".join(f"{name} {digits(value)}" for name, value in thresholds.items()),
        training="\n".join(_training(record)),
    )
    return f"{card}\n"


def _quality(record: Mapping[str, Any], generates: bool) -> str:
    """What the share of right exits on validation is called."""
    if not generates:
        return "agreement with the original" if record.get("original") else "accuracy"
    exits = not str(record.get("kind")).startswith("full_depth")
    if exits and (record.get("config") or {}).get("reward_target") == "last_layer":
        return LAST_LAYERS_TOKEN
    return "token accuracy"


def other_threshold(criterion: str, threshold: float, measured: Sequence[float] = ()) -> float:
    """Another threshold of an exit criterion than the given one, to show what turning the dial does.

    Args:
        criterion: of either task.
        threshold: the given one.
        measured: thresholds that validation knows, by the loss allowed; the last that differs is taken.
    """
    scale = EXIT_CRITERIA[criterion].thresholds
    if scale.layers:
        (least,) = scale.whole(1)
        return threshold - 1 if threshold - 1 >= least else threshold + 1
    for other in reversed(measured):
        if digits(other) != digits(threshold):
            return other
    span = scale.high - scale.low
    return scale.low + (0.5 if threshold > scale.low + 0.6 * span else 0.9) * span


def _exit_rule(record: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, float]:
    """Criterion and threshold that the model has exits by: the folder's, else those of the training."""
    loss = (record.get("validation") or {}).get("loss")
    trained = loss.get("criterion") if isinstance(loss, Mapping) else None  # fine-tuning's is a number
    criterion = str(config.get("criterion") or trained or "policy")
    threshold = config.get("threshold")
    if threshold is None:
        threshold = (record.get("thresholds") or {}).get(criterion, 0.5)
    return criterion, float(threshold)


def _places(exit_layers: Sequence[int] | None) -> str:
    """Where the exits are, in words."""
    if not exit_layers:
        return "after every layer"
    *first, last = map(str, exit_layers)
    return f"after layers {', '.join(first)} and {last}" if first else f"after layer {last}"


TableRows = list[tuple[str, ...]]


def _evaluated(evaluation: Mapping[str, Any], metrics: Mapping[str, float], generates: bool) -> TableRows:
    """What an evaluation found on unseen rows."""
    rows: TableRows = []
    for name, value in metrics.items():
        coefficient = f"{value:.3f}" if name == "matthews" else _percent(value)
        rows.append((name, f"{value:.4g}" if generates else coefficient))
    if "mean_exit_layer" in evaluation:
        if "per_layer_accuracy" in evaluation:
            rows.append(("accuracy of the last layer", _percent(evaluation["per_layer_accuracy"][-1])))
        mean, depth = evaluation["mean_exit_layer"], evaluation["num_hidden_layers"]
        rows.append(("mean exit layer", f"{mean:.2f} of {depth}"))
        rows.append(("layer speed-up", f"{evaluation['layer_speedup']:.2f}x"))
        rows.append(("layers saved", _percent(1 - mean / depth)))
    if evaluation.get("agreement_with") is not None:
        rows.append(("agreement of full depth", _percent(evaluation["per_layer_agreement"][-1])))
    reference = evaluation.get("reference") or {}
    if "accuracy_difference" in reference:
        difference, error = 100 * reference["accuracy_difference"], 100 * reference["standard_error"]
        name = reference.get("name", "plain model")
        rows.append((f"accuracy of the {name}", _percent(reference["accuracy"])))
        rows.append(("difference, paired", f"{difference:+.1f} points (standard error {error:.1f})"))
    return rows


def _by_layer(evaluation: Mapping[str, Any]) -> TableRows:
    if "exit_accuracy" not in evaluation:
        return []
    columns = (evaluation[name] for name in ("exit_histogram", "exit_accuracy", "per_layer_accuracy"))
    return [
        (str(layer), f"{count:,}", *("" if share is None else _percent(share) for share in (right, if_all)))
        for layer, (count, right, if_all) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _validated(validation: Mapping[str, Any], quality: str) -> TableRows:
    """What selection saw: a little too good to be a measurement."""
    shown = {
        "accuracy": (quality, _percent),
        "full_depth_accuracy": (f"{quality} of the last layer", _percent),
        "mean_exit_layer": ("mean exit layer", "{:.2f}".format),
        "layer_speedup": ("layer speed-up", "{:.2f}x".format),
    }
    if quality == LAST_LAYERS_TOKEN:  # of which the last layer's own is all
        del shown["full_depth_accuracy"]
    return [(name, show(validation[key])) for key, (name, show) in shown.items() if key in validation]


def _by_rule(validation: Mapping[str, Any]) -> TableRows:
    return [
        (name, digits(point["threshold"]), _percent(point["accuracy"]), f"{point['mean_exit_layer']:.2f}")
        for name, point in (validation.get("criteria") or {}).items()
    ]


def _by_loss(points: Sequence[Mapping[str, Any]], validation: Mapping[str, Any]) -> TableRows:
    """What the fastest threshold within each loss gave on validation rows, by the model's own exit rule."""
    return [
        (
            f"{100 * at['max_loss']:g}",
            digits(at["threshold"]),
            f"{100 * (validation['full_depth_accuracy'] - at['accuracy']):.2f}",
            f"{at['layer_speedup']:.2f}x",
        )
        for at in points
    ]


def _section(points: Points) -> str:
    """The operating points as a part of the card that can be found again."""
    table = _table(
        ("operating point", "exit rule", "certified", "layer speed-up"),
        [_operating_point(name, point) for name, point in points.items()],
    )
    return f"{POINTS_BEGIN}\n{POINTS_TEXT.format(table)}\n{POINTS_END}"


def _operating_point(name: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    proof: Mapping[str, Any] = point.get("certificate") or {}
    target = f"`{_short_name(str(proof['reference']))}`" if "reference" in proof else "full depth"
    of = {
        "max_accuracy_loss": f"of accuracy lost against {target}",
        "max_disagreement": f"of disagreement with {target}",
        "min_speedup": f"of disagreement with {target}",
    }
    certified = ""
    if proof.get("goal") in of:
        share = (
            at_most(proof["bound"]) if proof["goal"] == "min_speedup" else f"{100 * proof['target']:.4g} %"
        )
        certified = (
            f"at most {share} {of[proof['goal']]} ({proof['num_rows']:,} rows, "
            f"confidence {100 * proof['confidence']:g} %, {proof.get('date', 'no date')})"
        )
    speed = f"{proof['layer_speedup']:.2f}x" if "layer_speedup" in proof else ""
    return name, f"{point['criterion']} > {digits(point['threshold'])}", certified, speed


def _training(record: Mapping[str, Any]) -> list[str]:
    data: Mapping[str, Any] = record.get("data") or {}
    environment: Mapping[str, Any] = record.get("environment") or {}
    lines: list[str] = []
    if "train_rows" in data:
        lines.append(
            f"{data['train_rows']:,} training rows, {data.get('validation_rows', 0):,} for selection."
        )
    unlabelled: Mapping[str, Any] = record.get("unlabelled") or {}
    if unlabelled:
        lines.append(
            f"{unlabelled['num_texts']:,} texts without labels "
            + (
                f"beside them: {unlabelled['num_exit_texts']:,} for the exits and {unlabelled['num_policy_texts']:,} "
                "for the policy, by agreement with the last layer."
                if unlabelled["kept"]
                else "were tried beside them and not used: validation rows found exits and policy worse with them."
            )
        )
    names = ("consistentee", "torch", "transformers")
    versions = [f"{name} {environment[name]}" for name in names if name in environment]
    if versions:
        hardware = environment.get("hardware", environment.get("device", "an unknown device"))
        lines.append(f"Made with {', '.join(versions)} on {hardware}.")
    return [*lines, "All settings and the course of the training are in `training_record.json`."]


def _table(header: Sequence[str], rows: TableRows) -> str:
    """Markdown; nothing where there are no rows."""
    divider = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, divider, *rows)) if rows else ""


def _count(figures: Mapping[str, Any], of: str) -> str:
    return f"{figures['num_examples']:,} {of}" if "num_examples" in figures else of


def _seen(figures: Mapping[str, Any]) -> str:
    seen = figures.get("num_seen")
    return f", {seen:,} of which are also in the training rows" if seen else " that training has not seen"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short_name(name: str) -> str:
    """A name on the hub as it is, of a folder the last part."""
    return name if _is_hub_name(name) else Path(name).name or name


def _is_hub_name(backbone: str) -> bool:
    """Whether it reads like "user/name" and not like a place on somebody's disk."""
    return (
        backbone.count("/") == 1 and not backbone.startswith((".", "/", "~")) and not Path(backbone).exists()
    )


def license_of(name_or_path: str | Path) -> str | None:
    """The licence that a folder's model card names; None where there is none, and for names on the hub."""
    path = user_path(name_or_path) / CARD_FILE
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path).data.to_dict().get("license")
    except (ValueError, OSError, YAMLError):
        return None
    return None if found is None else str(found)
