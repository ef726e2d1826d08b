"""Whether exits are worth it: accuracy and milliseconds of what one would take instead, in one run with ours.

Beside the model with exits and at full depth, in float32 and int8: the same model in plain `transformers`, in ONNX
Runtime, and in ONNX Runtime's own int8; and other classifiers, such as the backbone's first layers fine-tuned alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from consistentee.data.tokenization import encode_texts
from consistentee.errors import SettingError, require_extra
from consistentee.evaluation.speed import (
    Amount,
    Competitors,
    Seconds,
    SpeedResults,
    Steps,
    latencies,
    measure_in_turn,
    median_seconds,
    shared_metrics,
)
from consistentee.evaluation.speed_classification import ClassificationSpeedRow
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.evaluation.whole_models import (
    WholeModel,
    int8_session,
    onnxruntime_model,
    transformers_model,
)
from consistentee.functional.standard_errors import standard_error
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.onnx_backend import has_onnxruntime
from consistentee.inference.encoder.onnx_builder import GraphStyle
from consistentee.inference.encoder.onnx_runner import OnnxExitRunner, has_graph
from consistentee.inference.encoder.onnx_sessions import full_model_graph, full_model_session, make_session
from consistentee.inference.encoder.packed_layers import LAYER_PARTS
from consistentee.inference.encoder.prepacked_linear import has_int8
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.timing import environment, synchronised_seconds
from consistentee.models.loaded import LoadedClassifier, short_name
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine

JUDGED_BATCH = 32
"""Rows that go together where accuracy is measured."""

MOST_LOSS = 0.01
"""Share of the rows by which a way may be less right than plain `transformers` (without labels: give another class) and
still count as good as it."""

Found = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Classes and exit layers, (rows,) each."""


@dataclass(frozen=True)
class Way:
    """One way to answer.

    Args:
        name: `transformers`, `onnxruntime`, `onnxruntime-int8`; `engine`, `onnx-graph` and what follows them; another
            model's name and what runs it.
        model: short name of the model.
        backend, dtype: what runs the layers, and in which precision.
        num_hidden_layers: of the model.
        has_exits: whether rows can exit early.
        rows: tokenized inputs.
        answer: gives classes, by our model's index, and exit layers of rows that go together.
    """

    name: str
    model: str
    backend: str
    dtype: str
    num_hidden_layers: int
    has_exits: bool
    rows: Sequence[TokenRow]
    answer: Callable[[Sequence[TokenRow]], Found]


@dataclass(frozen=True, kw_only=True)
class AlternativeRow(ClassificationSpeedRow):
    """One way at one batch size.

    Args:
        model: short name of the model.
        has_exits: whether rows can exit early.
        mean_exit_layer, layer_speedup: of all rows, as accuracy is.
        efficiency: wall-clock speed-up over the layer speed-up of the rows that were timed.
        milliseconds: of an input among others of its batch, median of the repetitions.
        accuracy: share of all labelled rows that are right; None without labels.
        accuracy_difference: to plain `transformers`, from the same rows; None without labels.
        accuracy_difference_error: standard error of that difference.
        agreement: share of all rows with the class that plain `transformers` gives.
    """

    model: str
    has_exits: bool
    milliseconds: float
    accuracy: float | None
    accuracy_difference: float | None
    accuracy_difference_error: float | None
    agreement: float

    @property
    def is_as_good(self) -> bool:
        """Whether it is no less right than plain `transformers` but for `MOST_LOSS`, as seen on these rows."""
        kept = self.agreement - 1 if self.accuracy_difference is None else self.accuracy_difference
        return kept >= -MOST_LOSS - 1e-9


def measure_alternatives(
    saved: LoadedClassifier,
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[int] | None,
    *,
    others: Sequence[LoadedClassifier] = (),
    rule: ExitRule | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 5,
    seed: int = 0,
    budget: TimeBudget | None = None,
    announce: Callable[[float], object] = lambda _: None,
    tick: Callable[[str], object] = lambda _: None,
) -> SpeedResults[AlternativeRow]:
    """Answer the same inputs in every way there is, count what is right, and time them in turn.

    Args:
        saved: the model with exits.
        texts: all of them count for accuracy; as many of the first as time allows are timed.
        labels: (texts,) by the model's index; None where there are none.
        others: further classifiers with the same classes.
        rule: when inputs exit; None takes the saved one.
        batch_sizes: inputs that start together.
        repeats: timed repetitions.
        seed: told in the environment; nothing is drawn.
        budget, announce, tick: see `measure_in_turn`.

    Raises:
        SettingError: no texts, a model without exits, or another model with other classes.
        MissingExtraError: ONNX Runtime is not installed: without it others at full depth would be left out.
    """
    if not texts:
        raise SettingError("There must be at least one text to measure with, got none.")
    to_ours = [_classes(saved, other) for other in others]
    with torch.inference_mode():
        ways = [*_our_ways(saved, texts, rule), *_other_ways(saved, others, to_ours, texts)]
        amounts: dict[int | None, Amount] = {}
        for size in batch_sizes:
            least, most = min(len(texts), max(size, 8)), min(len(texts), max(16 * size, 64))
            amounts[size] = Amount(least, most, size, (least,))
        passes = (repeats + 1) * sum(amount.most for amount in amounts.values())
        _announce_all(ways, len(texts), passes, budget, announce)
        found = {way.name: _all_answers(way, tick) for way in ways}
        device = cast(Any, saved.model).device

        def competitors(size: int | None, count: int) -> Competitors[AlternativeRow]:
            work = {way.name: _steps(way, count, size or count) for way in ways}
            timed = {way.name: way for way in ways}

            def row(name: str, _: list[Any], seconds: Seconds, memory: float | None) -> AlternativeRow:
                return _row(timed[name], found, labels, seconds, memory, size or count, count)

            return Competitors(device, work, row)

        rows, planned = measure_in_turn(
            amounts, competitors, repeats=repeats, budget=budget, announce=lambda _: None, tick=tick
        )
    config: Any = saved.model.config
    lengths = [len(row["input_ids"]) for row in ways[0].rows]
    workload = {
        "model": short_name(saved.name),
        "model_type": config.backbone_config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "rows": len(texts),
        "has_labels": labels is not None,
        "mean_tokens": statistics.mean(lengths),
        "max_tokens": max(lengths),
        "exits": "model",
        **planned,
    }
    return SpeedResults(environment(device, seed), workload, rows)


# --- The ways -------------------------------------------------------------------------------------


def _our_ways(
    saved: LoadedClassifier, texts: Sequence[tuple[str, ...]], rule: ExitRule | None
) -> Iterator[Way]:
    """The model by others at full depth, then by the engine and as a graph, with exits."""
    model, name = cast(Any, saved.early_exit_model), short_name(saved.name)
    rows, _ = encode_texts(texts, saved.tokenizer, saved.max_length)
    depth, on_cpu = model.num_layers, model.device.type == "cpu"

    def way(title: str, backend: str, dtype: str, answer: Any, has_exits: bool = False) -> Way:
        return Way(title, name, backend, dtype, depth, has_exits, rows, answer)

    yield way("transformers", "transformers", "float32", _whole(transformers_model(model), depth))
    if _has_whole_graph(model):
        graph = full_model_graph(model)
        for title, dtype, session in (
            ("onnxruntime", "float32", make_session(graph, model.device)),
            ("onnxruntime-int8", "int8", int8_session(graph)),
        ):
            yield way(title, "onnxruntime", dtype, _whole(onnxruntime_model(session, model), depth))
    for dtype in ("float32", *(["int8"] if has_int8(model.device) else [])):
        engine = Engine(saved, dtype=dtype)
        own = rule or engine.rule()
        title = "engine" if dtype == "float32" else f"engine-{dtype}"
        yield way(f"{title}-full-depth", "torch", dtype, _by_engine(engine, ExitRule.full_depth()))
        yield way(title, "torch", dtype, _by_engine(engine, own), True)
        if on_cpu and has_onnxruntime(model) and has_graph(model, own):
            runner = OnnxExitRunner(model, own, GraphStyle(int8=dtype == "int8"))
            title = "onnx-graph" if dtype == "float32" else f"onnx-graph-{dtype}"
            yield way(title, "onnxruntime", dtype, _by_graph(runner, own), True)


def _other_ways(
    saved: LoadedClassifier,
    others: Sequence[LoadedClassifier],
    class_maps: Sequence[NDArray[np.int64]],
    texts: Sequence[tuple[str, ...]],
) -> Iterator[Way]:
    """Other models: at full depth by plain `transformers` and ONNX Runtime; those with exits by their engine."""
    names = [short_name(one.name) for one in (saved, *others)]
    for other, to_ours in zip(others, class_maps, strict=True):
        model, depth, name = cast(Any, other.model), other.num_hidden_layers, short_name(other.name)
        if names.count(name) > 1:
            name = other.name
        rows, _ = encode_texts(texts, other.tokenizer, other.length_beside(saved))
        if isinstance(model, EarlyExitForSequenceClassification):
            engine = Engine(other)
            answer = _by_engine(engine, engine.rule(), to_ours)
            yield Way(f"{name} engine", name, "torch", "float32", depth, True, rows, answer)
            continue
        whole = _whole(transformers_model(model), depth, to_ours)
        yield Way(f"{name} transformers", name, "transformers", "float32", depth, False, rows, whole)
        if hasattr(model, "classifiers") and _has_whole_graph(model):
            whole = _whole(onnxruntime_model(full_model_session(model), model), depth, to_ours)
            yield Way(f"{name} onnxruntime", name, "onnxruntime", "float32", depth, False, rows, whole)


def _has_whole_graph(model: Any) -> bool:
    """Whether ONNX Runtime can run the whole model, of this type and on this device.

    Raises:
        MissingExtraError: it could, and is not installed.
    """
    if model.device.type != "cpu" or model.backbone.config.model_type not in LAYER_PARTS:
        return False
    for module in ("onnx", "onnxruntime", "onnxscript"):
        require_extra("onnx", module)
    return has_onnxruntime(model)


def _classes(saved: LoadedClassifier, other: LoadedClassifier) -> NDArray[np.int64]:
    """Our index of each class of another model."""
    ours = {name: index for index, name in enumerate(saved.label_names)}
    if set(other.label_names) != set(ours):
        raise SettingError(
            f'Models that are compared must have the same classes: "{saved.name}" has '
            f'{", ".join(saved.label_names)}, and "{other.name}" has {", ".join(other.label_names)}.'
        )
    return np.array([ours[name] for name in other.label_names], dtype=np.int64)


def _whole(model: WholeModel, depth: int, to_ours: NDArray[np.int64] | None = None) -> Any:
    def answer(rows: Sequence[TokenRow]) -> Found:
        classes = model(rows).argmax(1)
        layers = np.full(len(rows), depth, dtype=np.int64)
        return (classes if to_ours is None else to_ours[classes]), layers

    return answer


def _by_engine(engine: Engine, rule: ExitRule, to_ours: NDArray[np.int64] | None = None) -> Any:
    def answer(rows: Sequence[TokenRow]) -> Found:
        found = engine.run(rows, batch_size=len(rows), rule=rule)
        classes = np.array(found.labels, dtype=np.int64)
        return (classes if to_ours is None else to_ours[classes]), np.array(found.exit_layers)

    return answer


def _by_graph(runner: OnnxExitRunner, rule: ExitRule) -> Any:
    def answer(rows: Sequence[TokenRow]) -> Found:
        logits, layers = runner.run(rows, rule.threshold)
        return logits.argmax(1), layers

    return answer


# --- What they do ---------------------------------------------------------------------------------


def _all_answers(way: Way, tick: Callable[[str], object]) -> Found:
    """Classes and exit layers of all rows, neighbours by length together."""
    order = np.argsort([len(row["input_ids"]) for row in way.rows], kind="stable")
    classes, layers = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    for start in range(0, len(order), JUDGED_BATCH):
        part = order[start : start + JUDGED_BATCH]
        classes[part], layers[part] = way.answer([way.rows[row] for row in part])
        tick(f"answers of {way.name}")
    return classes, layers


def _announce_all(
    ways: Sequence[Way],
    count: int,
    timed: int,
    budget: TimeBudget | None,
    announce: Callable[[float], object],
) -> None:
    """Say how long all of it will take, from a batch of each way, where `timed` rows are timed if time allows."""
    if budget is None:
        return
    some = min(count, JUDGED_BATCH)
    seconds = 0.0
    for way in ways:
        way.answer(way.rows[:some])
        start = synchronised_seconds(torch.device("cpu"))
        way.answer(way.rows[:some])
        seconds += (synchronised_seconds(torch.device("cpu")) - start) / some
    announce(seconds * count + min(seconds * timed, budget.seconds))


def _steps(way: Way, count: int, size: int) -> Steps:
    def step(rows: Sequence[TokenRow]) -> Callable[[], object]:
        return lambda: way.answer(rows)

    return [step(way.rows[start : min(count, start + size)]) for start in range(0, count, size)]


def _row(
    way: Way,
    found: dict[str, Found],
    labels: Sequence[int] | None,
    seconds: Seconds,
    memory: float | None,
    size: int,
    count: int,
) -> AlternativeRow:
    classes, layers = found[way.name]
    plain = found["transformers"][0]
    lengths = [len(row["input_ids"]) for row in way.rows[:count]]
    widest = [max(lengths[start : start + size]) for start in range(0, count, size)]
    padded = sum(
        width * len(lengths[place * size : (place + 1) * size]) for place, width in enumerate(widest)
    )
    p50, p95 = latencies(seconds[way.name], count, size)
    shared = shared_metrics(way.name, float(layers.mean()), way.num_hidden_layers, seconds, memory)
    if shared["efficiency"] is not None:  # time saved over layers saved is of the same rows
        shared["efficiency"] = (
            shared["wall_clock_speedup"] * float(layers[:count].mean()) / way.num_hidden_layers
        )
    right: dict[str, Any] = dict.fromkeys(
        ("accuracy", "accuracy_difference", "accuracy_difference_error"), None
    )
    if labels is not None:
        truth = np.asarray(labels)
        difference = (classes == truth).astype(np.float64) - (plain == truth)
        right = {
            "accuracy": float((classes == truth).mean()),
            "accuracy_difference": float(difference.mean()),
            "accuracy_difference_error": standard_error(torch.from_numpy(difference)),
        }
    return AlternativeRow(
        **shared,
        mode="latency",
        batch_size=size,
        backend=way.backend,
        dtype=way.dtype,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        instances_per_second=count / median_seconds(seconds[way.name]),
        padding_share=0.0 if way.backend == "torch" else 1 - sum(lengths) / padded,
        rows=count,
        model=way.model,
        has_exits=way.has_exits,
        milliseconds=1000 * median_seconds(seconds[way.name]) / count,
        agreement=float((classes == plain).mean()),
        **right,
    )
