"""What early exits give on labelled rows: accuracy, depth, the trade-off over thresholds, the plain model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor

from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
from consistentee.data.batches import TokenizedDataset, collate
from consistentee.data.labels import is_nameless, match_labels
from consistentee.data.parsing import quoted
from consistentee.data.rows import TextDataset, require_rows
from consistentee.data.tasks import TASKS, ClassificationTask
from consistentee.data.tokenization import tokenize
from consistentee.evaluation.results import BASELINE, Evaluation, OtherCriterion, Reference, depth_metrics
from consistentee.functional.criteria import check_threshold, digits, exit_scores
from consistentee.functional.curves import CurvePoint, trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.metrics import compute_metrics
from consistentee.functional.recall import recall_by_class
from consistentee.functional.standard_errors import standard_error
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification, EarlyExitOutput
from consistentee.progress import track
from consistentee.training.states import LayerStates, run_all_layers
from consistentee.training.steps import default_accelerator


def evaluate_layers(
    layer_logits: Tensor,
    exit_probs: Tensor | None,
    labels: Tensor,
    *,
    criterion: str = "policy",
    threshold: float = 0.5,
    metrics: Sequence[str] = ("accuracy",),
    other_criteria: Mapping[str, float | None] | None = None,
    signals: Mapping[str, Tensor] | None = None,
    reference_predictions: Tensor | None = None,
    label_names: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate an exit criterion on the outputs of all layers.

    Args:
        layer_logits: (rows, layers, classes), every layer's prediction as an exit there would give it.
        exit_probs: (rows, layers), the policy's conditional exit probabilities; read by `policy` and `quantile` only.
        labels: (rows,), int64.
        criterion: one of `criteria.CRITERIA`.
        threshold: an input exits at the first layer whose exit score exceeds it.
        metrics: names from `metrics.METRICS`.
        other_criteria: further criteria to draw, each with its threshold or None.
        signals: `LayerStates.signals`; None where every classifier speaks for itself alone, and there is nothing else.
        reference_predictions: (rows,), int64, another model's classes.
        label_names: classes by index; None calls them "0", "1", ...

    Raises:
        ValueError: there is no row, or a threshold does not fit its criterion.
    """
    if not len(labels):
        raise ValueError("labels must hold at least one row, got none.")
    threshold = check_threshold(threshold, criterion)
    rows, num_layers = layer_logits.shape[:2]
    right = layer_logits.argmax(-1) == labels[:, None]  # (rows, layers)
    signals = {"classifier_logits": layer_logits} if signals is None else signals
    alone = signals["classifier_logits"].argmax(-1) == labels[:, None]
    scores = exit_scores(criterion, layer_logits, exit_probs, **signals)
    exit_layer = choose_exit_layer(scores, threshold)  # (rows,)
    chosen = (exit_layer - 1)[:, None]
    predictions = layer_logits.argmax(-1).gather(1, chosen).squeeze(1)
    right_at_exit = right.gather(1, chosen).squeeze(1)
    exited = torch.bincount(exit_layer - 1, minlength=num_layers)  # (layers,)
    right_of_exited = torch.bincount(exit_layer - 1, weights=right_at_exit.double(), minlength=num_layers)
    return Evaluation(
        num_hidden_layers=num_layers,
        num_examples=rows,
        criterion=criterion,
        threshold=threshold,
        accuracy=float(right_at_exit.double().mean()),
        metrics=compute_metrics(metrics, predictions.numpy(), labels.numpy()),
        **depth_metrics(float(exit_layer.double().mean()), num_layers),
        exit_histogram=exited.tolist(),
        exit_accuracy=[
            float(hits) / int(count) if count else None
            for hits, count in zip(right_of_exited, exited, strict=True)
        ],
        per_layer_accuracy=shares_at_exits(right, signals.get("has_exit")),
        classifier_accuracy=shares_at_exits(alone, signals.get("has_exit")),
        class_recall=recall_by_class(
            predictions.numpy(),
            layer_logits[:, -1].argmax(-1).numpy(),
            labels.numpy(),
            label_names or [str(index) for index in range(layer_logits.shape[-1])],
        ),
        curve=trade_off_curve(scores, right, criterion),
        other_criteria={
            name: _other(name, limit, right, exit_scores(name, layer_logits, exit_probs, **signals))
            for name, limit in (other_criteria or {}).items()
            if name != criterion
        },
        reference=None
        if reference_predictions is None
        else _paired(right_at_exit, reference_predictions, labels, metrics),
    )


def shares_at_exits(right: Tensor, has_exit: Tensor | None) -> list[float | None]:
    """The share of each layer with an exit; None for a layer without, which only repeats what was said before it.

    Args:
        right: (rows, layers), bool.
        has_exit: (rows, layers), bool, the same in every row; None: all.
    """
    shares = right.double().mean(0).tolist()
    exits = [True] * len(shares) if has_exit is None else has_exit[0].tolist()
    return [share if exit_there else None for share, exit_there in zip(shares, exits, strict=True)]


def evaluate_model(
    saved: LoadedClassifier,
    dataset: TextDataset,
    *,
    criteria: Sequence[str] = (),
    threshold: float | None = None,
    operating_point: str | None = None,
    metrics: Sequence[str] | None = None,
    reference: LoadedClassifier | None = None,
    states: tuple[LayerStates, int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a saved model on labelled rows.

    Args:
        saved: the model, from `load_model`.
        dataset: rows whose label names are the model's.
        criteria: exit criteria; the first is reported, the others are drawn beside it. None given: the saved one.
        threshold: of the first criterion; None takes the saved one.
        operating_point: in place of criterion and threshold, one that `consistentee calibrate` saved, by name.
        metrics: names from `metrics.METRICS`; None takes those of the model's task.
        reference: a model to compare with on the same rows, with or without exits, as it was saved.
        states: what `run_layers` gave for these rows; None runs it.
        batch_size: rows per step; does not change the result.
        progress: whether to show how far it is.

    Returns:
        What was found.

    Raises:
        TypeError: other rows than these.
        ValueError: the model has no exits, label names do not agree, or a threshold is missing or does not fit.
    """
    require_rows("dataset", dataset, TextDataset)
    model = saved.early_exit_model
    criterion, threshold = saved.exit_rule(criteria[0] if criteria else None, threshold, operating_point)
    others = {name: saved.known_threshold(name) for name in criteria[1:]}
    columns = class_columns(saved, dataset.label_names)
    outputs, num_truncated = states or run_layers(
        saved, dataset, batch_size=batch_size, description="evaluating" if progress else None
    )
    others_run = None if reference is None else _run(reference, dataset, saved, batch_size, progress)
    evaluation = evaluate_layers(
        outputs.layer_logits[..., columns],
        outputs.exit_probs,
        outputs.labels,
        criterion=criterion,
        threshold=threshold,
        metrics=default_metrics(saved, len(columns)) if metrics is None else metrics,
        other_criteria=others,
        signals=outputs.signals | {"classifier_logits": outputs.classifier_logits[..., columns]},
        reference_predictions=None if others_run is None else others_run[0],
        label_names=dataset.label_names,
    )
    evaluation = replace(
        evaluation,
        num_truncated=num_truncated,
        environment=environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
    )
    if reference is None or others_run is None or evaluation.reference is None:
        return evaluation
    return replace(
        evaluation,
        reference=replace(
            evaluation.reference,
            name=_reference_name(reference),
            num_hidden_layers=getattr(reference.model.config, "num_hidden_layers", None),
            mean_exit_layer=others_run[1],
        ),
    )


def run_layers(
    saved: LoadedClassifier,
    dataset: TextDataset,
    *,
    batch_size: int = 64,
    description: str | None = None,
    keep_pooled: bool = False,
) -> tuple[LayerStates, int]:
    """Every layer's outputs for every row, in full precision whatever a training in this process used.

    Args:
        saved: a model with exits.
        dataset: rows; their labels are not read.
        batch_size: rows per step; does not change the result.
        description: label of the progress bar; none without it.
        keep_pooled: whether to keep the states, in memory.

    Returns:
        The outputs, and how many rows were cut; that is said as well.

    Raises:
        ValueError: the model has no exits, or its inputs are of another number of texts.
    """
    saved.check_texts(len(dataset.texts[0]), f"each row of {dataset.source}")
    rows = _tokenized(saved, dataset)
    states = run_tokenized(
        saved, rows, batch_size=batch_size, description=description, keep_pooled=keep_pooled
    )
    return states, rows.num_truncated


def run_tokenized(
    saved: LoadedClassifier,
    rows: Any,
    *,
    batch_size: int = 64,
    description: str | None = None,
    keep_pooled: bool = False,
) -> LayerStates:
    """As `run_layers`, of rows that are tokenized: a `TokenizedDataset` or `SpooledRows`."""
    model = saved.early_exit_model
    return run_all_layers(
        model,
        rows,
        collate=partial(collate, tokenizer=saved.tokenizer),
        batch_size=batch_size,
        accelerator=default_accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)]),
        keep_pooled=keep_pooled,
        description=description,
    )


def _tokenized(
    saved: LoadedClassifier, dataset: TextDataset, max_length: int | None = None
) -> TokenizedDataset:
    """The rows as a model takes them, at its own length or at a given one; it is said how many were cut."""
    max_length = max_length or saved.max_length
    rows = tokenize(dataset, saved.tokenizer, max_length)
    texts = f'texts were longer than the {max_length} tokens of model "{saved.name}"'
    say_cuts(rows.num_truncated, len(rows), texts, LONGER_TRAINING)
    return rows


def _reference_name(reference: LoadedClassifier) -> str:
    """What tables and pictures call a model that another one is compared with."""
    if not isinstance(reference.model, EarlyExitForSequenceClassification):
        return BASELINE
    criterion, threshold = reference.exit_rule()
    return f"early-exit model, {criterion} > {digits(threshold)}"


def predict_classes(
    saved: LoadedClassifier,
    dataset: TextDataset,
    *,
    beside: LoadedClassifier | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Classes that a model, ours or any Hugging Face classifier, predicts.

    Args:
        saved: the model, from `load_model`.
        dataset: rows; their labels are not read.
        beside: the model that it is compared with, which may read longer rows.
        batch_size: rows per step.
        progress: whether to show how far it is.

    Returns:
        (rows,), int64, indices into `dataset.label_names`.

    Raises:
        ValueError: the label names do not agree.
    """
    return _run(saved, dataset, beside, batch_size, progress)[0]


@torch.no_grad()
def _run(
    saved: LoadedClassifier,
    dataset: TextDataset,
    beside: LoadedClassifier | None,
    batch_size: int,
    progress: bool,
) -> tuple[Tensor, float | None]:
    """What `predict_classes` gives, and the mean exit layer; None where the number of layers is not known."""
    columns = class_columns(saved, dataset.label_names)
    saved.check_texts(len(dataset.texts[0]), f"each row of {dataset.source}")
    rows = _tokenized(saved, dataset, None if beside is None else saved.length_beside(beside))
    order = np.argsort(-rows.lengths, kind="stable")
    predictions = torch.empty(len(rows), dtype=torch.int64)
    layers: list[Tensor] = []
    starts = range(0, len(rows), batch_size)
    for start in track(starts, "reference", shown=progress):
        part = order[start : start + batch_size].tolist()
        batch = collate([rows[row] for row in part], saved.tokenizer)
        inputs = {
            name: batch[name].to(saved.model.device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in batch
        }
        output = saved.model(**inputs)
        predictions[part] = output.logits[:, columns].argmax(-1).cpu()
        if isinstance(output, EarlyExitOutput) and output.exit_layer is not None:
            layers.append(output.exit_layer.cpu())
    depth = getattr(saved.model.config, "num_hidden_layers", None)
    return predictions, float(torch.cat(layers).double().mean()) if layers else depth and float(depth)


def evaluate_plain(
    saved: LoadedClassifier, dataset: TextDataset, *, batch_size: int = 64, progress: bool = False
) -> dict[str, Any]:
    """Accuracy and metrics of a model without exits: `num_examples`, `accuracy`, `metrics`."""
    predictions = predict_classes(saved, dataset, batch_size=batch_size, progress=progress).numpy()
    metrics = compute_metrics(default_metrics(saved, len(dataset.label_names)), predictions, dataset.labels)
    accuracy = compute_metrics(["accuracy"], predictions, dataset.labels)["accuracy"]
    return {"num_examples": len(dataset), "accuracy": accuracy, "metrics": metrics}


def class_columns(saved: LoadedClassifier, label_names: Sequence[str]) -> list[int]:
    """The model's class index for every label of a data set, matched by name.

    Names match exactly; what then is left over matches without regard to case, where that is one to one. A plain model
    whose classes have no names (`LABEL_0`, `LABEL_1`, ...) is taken to have the data set's order.

    Raises:
        ValueError: the names do not agree.
    """
    known = label_names[: len(saved.label_names)] if is_nameless(saved.label_names) else saved.label_names
    found = match_labels(label_names, {name: index for index, name in enumerate(known)})
    columns = [found[name] for name in label_names if name in found]
    if sorted(columns) != list(range(len(saved.label_names))) or len(columns) != len(label_names):
        raise ValueError(
            f'Labels of model "{saved.name}" and of the data must agree, got {quoted(saved.label_names)} '
            f"and {quoted(label_names)}. Evaluate on data of the task that the model was trained for."
        )
    return columns


def default_metrics(saved: LoadedClassifier, num_classes: int) -> tuple[str, ...]:
    """The metrics of the task the model was trained for, all that fit for data of one's own, and the thresholds'."""
    task = TASKS.get(getattr(saved.model.config, "task", None) or "")
    if isinstance(task, ClassificationTask):
        metrics = task.metrics
    else:
        metrics = ("accuracy", "f1", "matthews") if num_classes == 2 else ("accuracy", "matthews")
    chosen = (saved.record.get("config") or {}).get("threshold_metric", "accuracy")
    return tuple(dict.fromkeys((*metrics, chosen)))


def _other(criterion: str, threshold: float | None, right: Tensor, scores: Tensor) -> OtherCriterion:
    point = None
    if threshold is not None:
        exit_layer = choose_exit_layer(scores, check_threshold(threshold, criterion))
        accuracy = float(right.gather(1, (exit_layer - 1)[:, None]).double().mean())
        mean_exit_layer = float(exit_layer.double().mean())
        point = CurvePoint(threshold, accuracy, mean_exit_layer, scores.shape[1] / mean_exit_layer)
    return OtherCriterion(threshold, point, trade_off_curve(scores, right, criterion))


def _paired(
    right: Tensor, reference_predictions: Tensor, labels: Tensor, metrics: Sequence[str]
) -> Reference:
    reference_right = (reference_predictions == labels).double()
    difference = right.double() - reference_right  # (rows,), -1, 0 or 1
    return Reference(
        accuracy=float(reference_right.mean()),
        metrics=compute_metrics(metrics, reference_predictions.numpy(), labels.numpy()),
        accuracy_difference=float(difference.mean()),
        standard_error=standard_error(difference),
    )
