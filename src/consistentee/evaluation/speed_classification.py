"""How fast a classifier's engine is: `consistentee benchmark`.

Beside the competitors of `speed`, of which plain `transformers` runs padded batches in the order of arrival: in float32
on CPU and with the extra `onnx` also ONNX Runtime's optimised whole model.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch

from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.precision import Choice, recommend
from consistentee.evaluation.speed import (
    Amount,
    Competitors,
    Seconds,
    SpeedResults,
    SpeedRow,
    Steps,
    fixed_exit_layers,
    latencies,
    measure_in_turn,
    median_seconds,
    random_token_ids,
    rounded_shares,
    shape_config,
    shared_metrics,
)
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.evaluation.whole_models import WholeModel, onnxruntime_model, transformers_model
from consistentee.inference.encoder.backend import Answers, TokenRow
from consistentee.inference.encoder.incremental_scores import log_softmax
from consistentee.inference.encoder.onnx_backend import has_onnxruntime
from consistentee.inference.encoder.onnx_runner import OnnxExitRunner, has_graph
from consistentee.inference.encoder.onnx_sessions import full_model_session
from consistentee.inference.encoder.packed_layers import storage_dtype
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.timing import environment
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import LoadedClassifier, short_name, usable_device
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine

ARRIVAL_BATCH = 32
"""Rows of a padded batch that throughput mode is compared with."""

PROBED_ROWS = 32
"""Rows of throughput mode at least."""

READ_AT_MOST = 100_000
"""Texts of a file among which the sample is drawn."""

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert", "vocab_size": 30522, **_BASE},
    "mpnet-base": {"model_type": "mpnet", "vocab_size": 30527, **_BASE},
    "minilm-12l-shape": {"model_type": "bert", "vocab_size": 30522, **_MINILM},
    "minilm-6l-shape": {"model_type": "bert", "vocab_size": 30522, **_MINILM, "num_hidden_layers": 6},
}
"""Shapes with random weights, for studying speed without a trained model."""


@dataclass(frozen=True, kw_only=True)
class ClassificationSpeedRow(SpeedRow):
    """One competitor in one mode.

    Args:
        name: one of those of `speed`, or `onnxruntime` (its own whole model) or `onnx-graph` (ours, with its exits,
            as `consistentee export` writes it).
        mode: `latency` or `throughput`.
        backend: what ran the layers.
        latency_ms_p50, latency_ms_p95: of one whole batch; None in throughput mode.
        instances_per_second: median over the repetitions.
        padding_share: of the token positions that linear maps compute, in [0, 1).
        rows: that were measured.
    """

    mode: str
    backend: str
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    instances_per_second: float
    padding_share: float
    rows: int


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        engine: with its model.
        rows: tokenized inputs in the order of arrival.
        choice: how dtype and backend were chosen, where that was asked for.
    """

    engine: Engine
    rows: Sequence[TokenRow]
    choice: Choice | None = None


def shape_workload(
    config_name: str,
    *,
    rows: int,
    sequence_length: int,
    num_labels: int = 2,
    classifier_hidden_size: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "torch",
    seed: int = 0,
) -> Workload:
    """Random weights of a named shape, without a tokenizer, and random rows of one length.

    Args:
        config_name: one of `SHAPES`.
        rows, sequence_length: of the inputs.
        num_labels: classes.
        classifier_hidden_size: see `EarlyExitConfig`.
        device, dtype, backend: of the engine.
        seed: of weights and rows.

    Raises:
        ValueError: an unknown shape, a length that the model's positions do not hold, or a precision that is chosen on
            labels, which random weights do not have.
    """
    if "auto" in (dtype, backend):
        raise ValueError(
            '"auto" needs a trained model, whose labels it keeps. Give a dtype and a backend with config-name.'
        )
    encoder: Any = shape_config(SHAPES, config_name)
    options: dict[str, Any] = {"encoder_config": encoder, "num_labels": num_labels, "max_length": 512}
    options["classifier_hidden_size"] = classifier_hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EarlyExitForSequenceClassification(EarlyExitConfig(**options))
    if device is not None:
        cast(torch.nn.Module, model).to(usable_device(device))
    most = encoder.max_position_embeddings - 2  # mpnet counts from 2
    if not 1 <= sequence_length <= most:
        raise ValueError(f"sequence-length must be in [1, {most}] for {config_name}, got {sequence_length}.")
    engine = Engine(LoadedClassifier(model.eval(), None, {}, config_name), dtype=dtype, backend=backend)
    ids = random_token_ids(rows, sequence_length, encoder.vocab_size, seed)
    return Workload(engine, [{"input_ids": row} for row in ids])


def model_workload(
    name_or_path: str,
    texts: Iterable[tuple[str, ...]],
    *,
    rows: int,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "torch",
    criterion: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> Workload:
    """A saved model and a random sample of texts, in the order in which they arrive.

    `auto` in dtype or backend compares what there is on the sample, under the exit rule, and takes what is recommended.

    Raises:
        ValueError: there are no texts, too few for `auto`, or the rule does not fit.
    """
    named = [None if value == "auto" else value for value in (dtype, backend)]
    engine = Engine.from_pretrained(
        name_or_path, device=device, dtype=named[0] or "float32", backend=named[1] or "torch"
    )
    read = list(itertools.islice(texts, READ_AT_MOST))
    if not read:
        raise ValueError("There must be at least one text to measure with, got none.")
    kept = sorted(random.Random(seed).sample(range(len(read)), min(rows, len(read))))
    sample = [read[position] for position in kept]
    engine.saved.check_texts(len(sample[0]), "each text")
    encoded, cut = encode_texts(sample, engine.saved.tokenizer, engine.saved.max_length)
    longer = f"texts were longer than the model's {engine.saved.max_length} tokens"
    say_cuts(sum(cut), len(cut), longer, LONGER_TRAINING)
    if None not in named:
        return Workload(engine, encoded)
    rule = engine.rule(criterion, threshold)
    choice = recommend(engine.saved, encoded, dtype=dtype, backend=backend, rule=rule)
    return Workload(Engine(engine.saved, dtype=choice.dtype, backend=choice.backend), encoded, choice)


def measure_speed(
    engine: Engine,
    rows: Sequence[TokenRow],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    throughput: bool = True,
    shares: Sequence[float] | None = None,
    rule: ExitRule | None = None,
    repeats: int = 5,
    seed: int = 0,
    budget: TimeBudget | None = None,
    with_onnxruntime: bool = True,
    announce: Callable[[float], object] = lambda _: None,
    tick: Callable[[str], object] = lambda _: None,
) -> SpeedResults[ClassificationSpeedRow]:
    """Time the engine and its competitors.

    Args:
        engine: to be measured.
        rows: tokenized inputs in the order of arrival; each batch size takes as many of them as it needs for a fair
            share of its time: all in throughput mode, at most `16 * batch_size`, and at least 32.
        batch_sizes: of latency mode.
        throughput: measure throughput mode too.
        shares: of rows whose exit layers are fixed, by layer; None: the model's own rule decides.
        rule: the model's own rule; None takes the saved one.
        repeats: timed repetitions.
        seed: of the fixed exit layers.
        with_onnxruntime: whether ONNX Runtime's whole model competes where it can.
        budget, announce, tick: see `measure_in_turn`; its amounts are rows.

    Raises:
        ValueError: no rows, no mode, or repeats below 1.
    """
    if not rows or repeats < 1 or not (batch_sizes or throughput) or any(size < 1 for size in batch_sizes):
        raise ValueError(
            "There must be at least one row, one repetition and one batch size (each at least 1) or throughput mode, "
            f"got {len(rows)} rows, {repeats} repetitions and batch sizes {list(batch_sizes)}."
        )
    session = _full_session(engine) if with_onnxruntime else None
    own = rule or engine.rule()
    graphs = _graph_runner(engine, own, shares is not None) if with_onnxruntime else None
    amounts: dict[int | None, Amount] = {}
    for size in [*batch_sizes, *([None] if throughput else [])]:
        most = min(len(rows), len(rows) if size is None else max(16 * size, 32))
        least = min(most, PROBED_ROWS if size is None else max(size, 8))
        amounts[size] = Amount(least, most, size or 1, (least,))

    def competitors(size: int | None, count: int) -> Competitors[ClassificationSpeedRow]:
        exits = None if shares is None else fixed_exit_layers(shares, count, seed)
        return _Batches(engine, rows[:count], size).competitors(own, exits, session, graphs)

    with torch.inference_mode():
        found, planned = measure_in_turn(
            amounts, competitors, repeats=repeats, budget=budget, announce=announce, tick=tick
        )
    config: Any = engine.saved.model.config
    lengths = [len(row["input_ids"]) for row in rows]
    workload = {
        "model": short_name(engine.saved.name),
        "model_type": config.backbone_config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "classifier_hidden_size": config.pooled_size,
        "rows": len(rows),
        "mean_tokens": statistics.mean(lengths),
        "max_tokens": max(lengths),
        "exits": rounded_shares(shares),
        **planned,
    }
    return SpeedResults(environment(engine.backend.device, seed), workload, found)


class _Batches:
    """The competitors' batches of one set of rows; `batch_size` None: all rows at once, in throughput mode."""

    def __init__(self, engine: Engine, rows: Sequence[TokenRow], batch_size: int | None) -> None:
        self.engine, self.rows, self.batch_size = engine, rows, batch_size
        self.backend, self.model = engine.backend, cast(Any, engine.saved.model)

    def competitors(
        self, rule: ExitRule, exits: Sequence[int] | None, session: Any, runner: OnnxExitRunner | None
    ) -> Competitors[ClassificationSpeedRow]:
        """All of them: exits by a rule, or fixed; ONNX Runtime's whole model and our graph, if there are such."""
        work: dict[str, Steps] = {"engine-full-depth": self._engine(ExitRule.full_depth(), None)}
        if isinstance(self.model, EarlyExitForSequenceClassification):
            last = [self.backend.num_layers] * len(self.rows)
            work = {"engine": self._engine(rule, exits), **work}
            work["engine-nobody-leaves"] = self._engine(rule, last)
        work["transformers"] = self._padded(transformers_model(self.model, storage_dtype(self.backend.dtype)))
        if session is not None:
            work["onnxruntime"] = self._padded(onnxruntime_model(session, self.model))
        if runner is not None and self.batch_size is not None:
            work["onnx-graph"] = self._onnx_graph(runner, rule, exits)
        return Competitors(self.backend.device, work, self._row)

    def _parts(self, size: int | None) -> list[Sequence[TokenRow]]:
        """The rows batch by batch, in the order of arrival; all at once for None."""
        step = size or len(self.rows)
        return [self.rows[start : start + step] for start in range(0, len(self.rows), step)]

    def _engine(self, rule: ExitRule, exits: Sequence[int] | None) -> Steps:
        def step(start: int, rows: Sequence[TokenRow]) -> Callable[[], Answers]:
            here = rule
            if exits is not None:
                here = ExitRule(rule.criterion, rule.threshold, tuple(exits[start : start + len(rows)]))
            return lambda: self.engine.run(rows, batch_size=self.batch_size, rule=here)

        size = self.batch_size or len(self.rows)
        return [step(place * size, part) for place, part in enumerate(self._parts(size))]

    def _padded(self, whole: WholeModel) -> Steps:
        """Batches in the order of arrival, padded to their longest row; scores and labels as lists."""

        def step(rows: Sequence[TokenRow]) -> Callable[[], object]:
            def predict() -> tuple[list[float], list[int]]:
                scores = np.exp(log_softmax(whole(rows)))
                return scores.max(1).tolist(), scores.argmax(1).tolist()

            return predict

        return [step(part) for part in self._parts(self.batch_size or ARRIVAL_BATCH)]

    def _onnx_graph(self, runner: OnnxExitRunner, rule: ExitRule, exits: Sequence[int] | None) -> Steps:
        """The whole model with its exits as one graph, alone; scores, labels and exit layers."""

        def step(start: int, rows: Sequence[TokenRow]) -> Callable[[], object]:
            here = None if exits is None else exits[start : start + len(rows)]

            def predict() -> tuple[list[Any], ...]:
                logits, layers = runner.run(rows, rule.threshold, here)
                scores = np.exp(log_softmax(logits))
                return scores.max(1).tolist(), scores.argmax(1).tolist(), layers.tolist()

            return predict

        size = self.batch_size or len(self.rows)
        return [step(place * size, part) for place, part in enumerate(self._parts(size))]

    def _row(
        self, name: str, outputs: list[Any], seconds: Seconds, memory: float | None
    ) -> ClassificationSpeedRow:
        is_ours = name.startswith("engine")
        backend, dtype = name, str(storage_dtype(self.backend.dtype)).removeprefix("torch.")
        mean_exit_layer, padding = float(self.backend.num_layers), self._arrival_padding()
        if is_ours:
            backend, dtype = self.backend.name, self.backend.dtype
            mean_exit_layer = statistics.mean(layer for answer in outputs for layer in answer.exit_layers)
            padding = 1 - sum(a.real_tokens for a in outputs) / sum(a.computed_tokens for a in outputs)
        if name == "onnx-graph":
            backend, dtype = "onnxruntime", "float32"
            mean_exit_layer = statistics.mean(layer for *_, layers in outputs for layer in layers)
        p50, p95 = None, None
        if self.batch_size is not None:
            p50, p95 = latencies(seconds[name], len(self.rows), self.batch_size)
        shared = shared_metrics(name, mean_exit_layer, self.backend.num_layers, seconds, memory)
        if name == "onnx-graph" and self.backend.name == backend:
            shared["efficiency"] = shared["wall_clock_speedup"] / shared["layer_speedup"]
        return ClassificationSpeedRow(
            **shared,
            mode="throughput" if self.batch_size is None else "latency",
            batch_size=self.batch_size,
            backend=backend,
            dtype=dtype,
            latency_ms_p50=p50,
            latency_ms_p95=p95,
            instances_per_second=len(self.rows) / median_seconds(seconds[name]),
            padding_share=padding,
            rows=len(self.rows),
        )

    def _arrival_padding(self) -> float:
        real = computed = 0
        for part in self._parts(self.batch_size or ARRIVAL_BATCH):
            lengths = [len(row["input_ids"]) for row in part]
            real += sum(lengths)
            computed += max(lengths) * len(lengths)
        return 1 - real / computed


def _full_session(engine: Engine) -> Any:
    """ONNX Runtime's whole model beside a float32 engine on CPU; None where it is not there or not comparable."""
    model: Any = engine.saved.model
    if engine.backend.dtype != "float32" or not has_onnxruntime(model) or find_spec("onnxscript") is None:
        return None
    return full_model_session(model)


def _graph_runner(engine: Engine, rule: ExitRule, fixed: bool) -> OnnxExitRunner | None:
    """Our graph beside a float32 engine on CPU; None where there is none."""
    model: Any = engine.saved.model
    if engine.backend.dtype != "float32" or engine.backend.device.type != "cpu" or not has_onnxruntime(model):
        return None
    rule = ExitRule(rule.criterion, rule.threshold, (model.num_layers,) if fixed else None)
    return OnnxExitRunner(model, rule) if has_graph(model, rule) else None
