"""What a cell keeps of a trained model: one pass of all layers over the evaluation rows, every criterion on its exits.

Besides figures it keeps, packed, which layers are right on each row and where each row exits at each threshold of each
criterion. That is all that paired statistics need; texts are not kept.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.data.rows import TextDataset
from consistentee.evaluation.classification import class_columns, default_metrics, predict_classes, run_layers
from consistentee.functional.criteria import CRITERIA, is_fitted
from consistentee.functional.curves import curve_of_thresholds, trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.hardness import memorized_layer
from consistentee.functional.metrics import compute_metrics
from consistentee.models.loaded import LoadedClassifier

CURVE_POINTS = 120
"""Thresholds of a curve at most, besides the ends of their range and those that validation chose."""


def measure(saved: LoadedClassifier, rows: TextDataset) -> dict[str, Any]:
    """Everything a cell says about a model.

    Args:
        saved: with exits or without.
        rows: to report on.

    Returns:
        Plain values: `num_hidden_layers`, `criterion` (the model's own; None without exits), `correct` (packed), and of
        a model with exits `per_layer_accuracy`, `classifier_accuracy`, `memorized_layer_histogram` and `criteria`, else
        `accuracy` and `metrics`.
    """
    metrics = default_metrics(saved, len(rows.label_names))
    if not saved.has_exits:
        predictions = predict_classes(saved, rows).numpy()
        correct = predictions == np.asarray(rows.labels)
        return {
            "num_hidden_layers": saved.num_hidden_layers,
            "criterion": None,
            "accuracy": float(correct.mean()),
            "metrics": compute_metrics(metrics, predictions, rows.labels),
            "correct": pack_bits(correct[:, None]),
        }
    states, _ = run_layers(saved, rows)
    columns = class_columns(saved, rows.label_names)
    predictions = states.layer_logits[..., columns].argmax(-1)  # (rows, layers)
    alone = states.classifier_logits[..., columns].argmax(-1) == states.labels[:, None]
    right = predictions == states.labels[:, None]
    return {
        "num_hidden_layers": right.shape[1],
        "criterion": saved.early_exit_model.config.criterion,
        "per_layer_accuracy": right.double().mean(0).tolist(),
        "classifier_accuracy": alone.double().mean(0).tolist(),
        "memorized_layer_histogram": torch.bincount(
            memorized_layer(alone) - 1, minlength=right.shape[1]
        ).tolist(),
        "correct": pack_bits(right.numpy()),
        "criteria": {
            name: _criterion_figures(
                name, states.exit_scores(name), predictions, states.labels, saved, metrics
            )
            for name in CRITERIA
            if is_fitted(name, saved.early_exit_model.config)
        },
    }


def _criterion_figures(
    name: str,
    scores: Tensor,
    predictions: Tensor,
    labels: Tensor,
    saved: LoadedClassifier,
    metrics: tuple[str, ...],
) -> dict[str, Any]:
    """A criterion's curve, where each row exits along it, and what the threshold that validation chose gives."""
    right = predictions == labels[:, None]
    chosen = saved.known_threshold(name)
    within = {
        f"{at['max_loss']:g}": float(at["threshold"])
        for at in (saved.record.get("validation") or {}).get("tolerances", {}).get(name, ())
    }
    found = {point.threshold for point in trade_off_curve(scores, right, name, limit=CURVE_POINTS)}
    thresholds = sorted({*found, *within.values()} if chosen is None else {*found, *within.values(), chosen})
    exits = torch.stack([choose_exit_layer(scores, threshold) for threshold in thresholds], dim=1)
    figures: dict[str, Any] = {
        "curve": [
            [point.threshold, point.accuracy, point.mean_exit_layer]
            for point in curve_of_thresholds(scores, right, thresholds)
        ],
        "exits": pack_exits(exits.numpy(), scores.shape[1]),
        "at_validation_threshold": None,
        "at_tolerances": {loss: thresholds.index(threshold) for loss, threshold in within.items()},
    }
    if chosen is not None:
        at = exits[:, thresholds.index(chosen)]
        at_exit = predictions.gather(1, at[:, None] - 1).squeeze(1)
        figures["at_validation_threshold"] = {
            "point": thresholds.index(chosen),
            "threshold": chosen,
            "metrics": compute_metrics(metrics, at_exit.numpy(), labels.numpy()),
            "exit_histogram": torch.bincount(at - 1, minlength=scores.shape[1]).tolist(),
        }
    return figures


# --- Packing --------------------------------------------------------------------------------------


def pack_bits(correct: NDArray[np.bool_]) -> str:
    """(rows, layers) booleans as text, layer by layer."""
    return _pack(np.packbits(correct.T))


def unpack_bits(text: str, rows: int, layers: int) -> NDArray[np.bool_]:
    """What `pack_bits` packed.

    Raises:
        ValueError: it is not of so many rows and layers.
    """
    bits = np.unpackbits(_unpack(text, (rows * layers + 7) // 8))[: rows * layers]
    return bits.reshape(layers, rows).T.astype(bool)


def pack_exits(exits: NDArray[np.integer[Any]], num_layers: int) -> str:
    """Exit layers at rising thresholds, which make them deeper, as text.

    Args:
        exits: (rows, thresholds), from 1, not falling along a row; at most 255 thresholds.
        num_layers: of the model.

    Returns:
        At how many of the thresholds a row has exited by each layer below the last, packed.
    """
    layers = np.arange(1, num_layers)
    by_layer = (exits[:, :, None] <= layers).sum(1).astype(np.uint8)  # (rows, layers - 1)
    return _pack(np.ascontiguousarray(by_layer.T).ravel())


def unpack_exits(text: str, rows: int, num_layers: int, num_thresholds: int) -> NDArray[np.uint8]:
    """What `pack_exits` packed, (rows, thresholds).

    Raises:
        ValueError: it is not of so many rows and layers.
    """
    by_layer = _unpack(text, rows * (num_layers - 1)).reshape(num_layers - 1, rows)
    passed = by_layer[:, :, None] <= np.arange(num_thresholds)  # (layers - 1, rows, thresholds)
    return (1 + passed.sum(0)).astype(np.uint8)


def _pack(values: NDArray[np.uint8]) -> str:
    return base64.b85encode(zlib.compress(values.tobytes(), 9)).decode("ascii")


def _unpack(text: str, size: int) -> NDArray[np.uint8]:
    try:
        values = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"packed rows must be whole, got {text[:20]!r}...: {error}.") from error
    if len(values) != size:
        raise ValueError(f"packed rows must be {size} bytes, got {len(values)}.")
    return values


_AS_THEY_ARE = ("config", "own_settings", "threshold")
"""Keys of what is asked for or compared, not measured."""


def rounded(value: Any) -> Any:
    """The same with every fraction cut to six digits that count: cells are kept under version control.

    Settings and thresholds stay as they are, those of a `curve`'s lists too, which begin with them: close to 1 many
    differ only in later digits.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {
            key: inner if key in _AS_THEY_ARE else _rounded_at(key, inner) for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return value


def _rounded_at(key: str, value: Any) -> Any:
    if key == "curve" and all(isinstance(point, list) for point in value):
        return [[point[0], *rounded(point[1:])] for point in value]
    return rounded(value)
