"""A whole model with its exits as one session of ONNX Runtime: who exits is decided in the graph, not on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consistentee.errors import require_extra
from consistentee.inference.encoder.backend import Answers, EncoderParts, TokenRow
from consistentee.inference.encoder.incremental_scores import Floats, labels_and_scores
from consistentee.inference.encoder.onnx_builder import GraphStyle
from consistentee.inference.encoder.onnx_exits import EXIT_LAYERS, MASK, MOST_LAYERS, THRESHOLD, ExitGraph
from consistentee.inference.encoder.onnx_graphs import IDS, TYPES
from consistentee.inference.encoder.onnx_scores import ONNX_SCORES, OnnxExitScores
from consistentee.inference.encoder.onnx_sessions import MAX_SEGMENT_BYTES, make_session
from consistentee.inference.encoder.scheduler import BATCH_TOKENS, ExitRule

OPENS_NESTED, MOST_LAYERS_BEFORE = (1, 29), 12
"""onnxruntime that opens graphs with exits, one `If` inside another, at once; and how many layers earlier ones open in
seconds: their time about doubles with each layer."""


def opens_nested(num_layers: int) -> bool:
    """Whether the installed onnxruntime opens a graph of so many layers with exits within seconds.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    version = str(require_extra("onnx", "onnxruntime").__version__)
    return num_layers <= MOST_LAYERS_BEFORE or tuple(map(int, version.split(".")[:2])) >= OPENS_NESTED


def has_graph(model: EncoderParts, rule: ExitRule) -> bool:
    """Whether a model's exits under a rule can be one graph that is held in memory and that onnxruntime opens."""
    policy: Any = getattr(model, "policy", None)
    if policy is None or rule.criterion not in ONNX_SCORES or model.num_layers > MOST_LAYERS:
        return False
    if rule.criterion in ("policy", "quantile") and policy.reads_signals:
        return False
    if not opens_nested(model.num_layers):
        return False
    parameters = (p for part in (model.backbone, model.classifiers) for p in part.parameters())
    return 4 * sum(p.numel() for p in parameters) < MAX_SEGMENT_BYTES


class OnnxExitRunner:
    """The session of a model under one criterion, on CPU, with as many threads as torch has when it is made.

    Args:
        model: with exits, see `has_graph`; its weights are copied.
        rule: whose criterion counts, and whether its exit layers are fixed.
        style: how the graph is written; None for ONNX Runtime, in float32.
    """

    def __init__(self, model: Any, rule: ExitRule, style: GraphStyle | None = None) -> None:
        scores = OnnxExitScores.of(model, str(rule.criterion))
        fixed = rule.exit_layers is not None
        graph = ExitGraph(model, scores, num_classes=model.config.num_classes, style=style, fixed_exits=fixed)
        self._session = make_session(graph.build().SerializeToString(), torch.device("cpu"))
        self._names = {given.name for given in self._session.get_inputs()}

    def run(
        self, rows: Sequence[TokenRow], threshold: float, exit_layers: Sequence[int] | None = None
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Logits (rows, classes) and exit layers (rows,) of rows that go together.

        Args:
            rows: at least one.
            threshold: a row exits at the first layer whose score exceeds it.
            exit_layers: of the rows, where these are fixed.
        """
        feed: dict[str, Any] = graph_feed(rows, self._names)
        if EXIT_LAYERS in self._names:
            feed[EXIT_LAYERS] = np.array(exit_layers, dtype=np.int64)
        else:
            feed[THRESHOLD] = np.array(threshold, dtype=np.float32)
        logits, layers = self._session.run(None, feed)
        return logits, layers


def graph_feed(rows: Sequence[TokenRow], names: set[str]) -> dict[str, NDArray[np.int64]]:
    """What a session of a graph reads of rows: (rows, width) each, padded with zeros.

    Args:
        rows: at least one.
        names: of the session's inputs.
    """
    width = max(len(row["input_ids"]) for row in rows)
    feed = {
        name: np.zeros((len(rows), width), dtype=np.int64) for name in (IDS, MASK, TYPES) if name in names
    }
    for place, row in enumerate(rows):
        count = len(row["input_ids"])
        feed[IDS][place, :count], feed[MASK][place, :count] = row["input_ids"], 1
        types = row.get("token_type_ids")
        if types is not None and TYPES in feed:
            feed[TYPES][place, :count] = types
    return feed


def run_graph(
    runner: OnnxExitRunner,
    rows: Sequence[TokenRow],
    batch_size: int | None,
    rule: ExitRule,
    num_layers: int,
) -> Answers:
    """Answers for tokenized rows, batch by batch of neighbours by length, as `scheduler.run_rows` gives them.

    Args:
        runner: of the rule's criterion.
        rows: what `encode_texts` gives.
        batch_size: rows that go together; None: throughput mode, as many as hold `scheduler.BATCH_TOKENS`.
        rule: when they exit.
        num_layers: of the model.

    Raises:
        ValueError: fixed exit layers that do not fit.
    """
    rule.check(len(rows), num_layers)
    count = len(rows)
    labels, scores, exits = np.zeros(count, np.int64), np.zeros(count, np.float32), np.zeros(count, np.int64)
    lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    computed = 0
    order = np.argsort(lengths, kind="stable")
    for part in _batches(order, lengths, batch_size):
        fixed = None if rule.exit_layers is None else [rule.exit_layers[row] for row in part]
        logits, layers = runner.run([rows[row] for row in part], rule.threshold, fixed)
        labels[part], scores[part] = labels_and_scores(logits, layers)
        exits[part] = layers
        for layer in range(1, int(layers.max()) + 1):
            still = lengths[part][layers >= layer]
            computed += len(still) * int(still.max())
    real = int((lengths * exits).sum())
    return Answers(labels.tolist(), scores.tolist(), exits.tolist(), real, computed)


def _batches(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int | None
) -> Iterator[NDArray[np.int64]]:
    """Rows in their order, so many at a time, or as many as hold so many tokens; lengths grow along the order."""
    start = 0
    while start < len(order):
        size = batch_size
        if size is None:
            rest = lengths[order[start : start + BATCH_TOKENS["cpu"]]]
            size = max(1, int((rest * np.arange(1, len(rest) + 1) <= BATCH_TOKENS["cpu"]).sum()))
        yield order[start : start + size]
        start += size
