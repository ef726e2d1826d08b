"""One text at every layer of a model: what is predicted there, how ready the text is to exit, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.incremental_scores import log_softmax
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.modes import inference_only
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine


@dataclass(frozen=True)
class LayerView:
    """A text after a layer.

    Args:
        layer: from 1.
        probs: (labels,) float32, the prediction of a text that exits here.
        exit_score: of the criterion; the text exits at the first layer whose score exceeds the threshold, and at the
            last one in any case. None at the last layer of an original head, and where the model has no exits.
        exit_prob: the policy's, likewise.
        elapsed_ms: wall-clock time from the token ids to here, milliseconds.
    """

    layer: int
    probs: NDArray[np.float32]
    exit_score: float | None
    exit_prob: float | None
    elapsed_ms: float


@inference_only
def view_layers(engine: Engine, row: TokenRow, criterion: str) -> list[LayerView]:
    """A text at every layer that has an exit, and at the last one.

    Predictions and scores are those of `Engine.predict` with a batch of one, which stops at the exit; here the text
    goes on to the end, and the criterion's scores and the policy's are both computed at each layer.

    Args:
        engine: of the model.
        row: the text's token ids, of `Engine.tokenize`.
        criterion: by which it would exit; without meaning for a model that has no exits.
    """
    backend, model = engine.backend, engine.saved.model
    classes, last = model.config.num_classes, backend.num_layers - 1
    start = time.perf_counter()
    batch = backend.start([row])
    if not isinstance(model, EarlyExitForSequenceClassification):
        batch = backend.run_all_layers(batch)
        logits = backend.classify(last, batch)[:, :classes].cpu().numpy()
        return [LayerView(last + 1, _probs(logits), None, None, _since(start))]
    # At a threshold below the least one everybody exits, so that there are scores.
    rules = [ExitRule(name, EXIT_CRITERIA[name].thresholds.low - 1) for name in (criterion, "policy")]
    readers = [engine.exit_scores(rule) for rule in rules]
    known = [(reader, reader.begin(1)) for reader in readers if reader is not None]
    is_silent_at = last if model.config.original_head is not None else None
    views: list[LayerView] = []
    for layer_index, has_exit in enumerate(model.config.has_exit):
        if not has_exit:
            batch = backend.run_layer(layer_index, batch)
            for reader, history in known:
                reader.skip(history)
            continue
        with_pooled = any(reader.reads_pooled for reader, _ in known)
        batch, features = backend.pass_layer(layer_index, batch, with_pooled=with_pooled)
        seen = features.cpu().numpy()
        score, exit_prob = (float(reader.step(history, seen)[0]) for reader, history in known)
        if layer_index == is_silent_at:
            score = exit_prob = None
        probs = _probs(known[0][1].prediction_logits)
        views.append(LayerView(layer_index + 1, probs, score, exit_prob, _since(start)))
    return views


def _probs(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.exp(log_softmax(logits))[0]


def _since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)
