"""How fast the engine is: `consistentee benchmark`.

Competitors do the same rows in the same run, in turn: the engine with exits, the same engine at full depth, plain
`transformers` at full depth on padded batches in the order of arrival, and the engine forced to the last layer with all
its exits computed (what exits cost where nobody takes them); in float32 on CPU and with the extra `onnx` also ONNX
Runtime's optimised whole model. What counts is the ratio between them.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoConfig

from consistentee.evaluation.time_budget import Planner, TimeBudget
from consistentee.inference.encoder.backend import Answers, TokenRow
from consistentee.inference.encoder.incremental_scores import log_softmax
from consistentee.inference.encoder.onnx_backend import has_onnxruntime
from consistentee.inference.encoder.onnx_sessions import full_model_session
from consistentee.inference.encoder.packed_layers import storage_dtype
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.encoder.torch_backend import token_tensors
from consistentee.inference.timing import environment, paired_ratio, synchronised_seconds, time_in_turn
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine

ARRIVAL_BATCH = 32
"""Rows of a padded batch that throughput mode is compared with."""

PROBED_ROWS = 32
"""Rows of throughput mode at least."""

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert", "vocab_size": 30522, **_BASE},
    "mpnet-base": {"model_type": "mpnet", "vocab_size": 30527, **_BASE},
    "minilm-12l-shape": {"model_type": "bert", "vocab_size": 30522, **_MINILM},
    "minilm-6l-shape": {"model_type": "bert", "vocab_size": 30522, **_MINILM, "num_hidden_layers": 6},
}
"""Shapes with random weights, for studying speed without a trained model."""


@dataclass(frozen=True)
class SpeedRow:
    """One competitor in one mode.

    Args:
        name: `engine`, `engine-full-depth`, `engine-nobody-leaves`, `transformers` or `onnxruntime`.
        mode: `latency` or `throughput`.
        batch_size: rows that start together; None in throughput mode.
        latency_ms_p50, latency_ms_p95: of one batch; None in throughput mode.
        instances_per_second: median over the repetitions.
        padding_share: of the token positions that linear maps compute, in [0, 1).
        mean_exit_layer: layers executed per row.
        layer_speedup: layers of the model / mean exit layer.
        wall_clock_speedup: against `engine-full-depth`, median of the repetitions' ratios.
        wall_clock_speedup_quartiles: first and third quartile of the same.
        efficiency: wall_clock_speedup / layer_speedup; None where nothing leaves.
        speedup_over_transformers: likewise against `transformers`.
        peak_memory_mb: of the device, on a GPU; None on CPU, where one process holds all competitors.
        rows: that were measured.
        repeats: timed repetitions.
    """

    name: str
    mode: str
    batch_size: int | None
    backend: str
    dtype: str
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    instances_per_second: float
    padding_share: float
    mean_exit_layer: float
    layer_speedup: float
    wall_clock_speedup: float
    wall_clock_speedup_quartiles: tuple[float, float]
    efficiency: float | None
    speedup_over_transformers: float
    peak_memory_mb: float | None
    rows: int
    repeats: int


@dataclass(frozen=True)
class SpeedReport:
    """What `measure_speed` found.

    Args:
        environment: hardware, versions, threads, seed.
        workload: model shape, rows, tokens, how exits came about.
        rows: one for each competitor, mode and batch size.
    """

    environment: dict[str, Any]
    workload: dict[str, Any]
    rows: tuple[SpeedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "environment": self.environment,
            "workload": self.workload,
            "rows": [asdict(row) for row in self.rows],
        }


def shape_model(
    config_name: str,
    *,
    num_labels: int = 2,
    classifier_hidden_size: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> LoadedClassifier:
    """A model with random weights of a named shape, without a tokenizer.

    Args:
        config_name: one of `SHAPES`.
        num_labels: classes.
        classifier_hidden_size: see `EarlyExitConfig`.
        seed: of the weights.
        device: where it goes.

    Raises:
        ValueError: there is no such shape.
    """
    if config_name not in SHAPES:
        raise ValueError(f'config-name must be one of {", ".join(SHAPES)}, got "{config_name}".')
    values = dict(SHAPES[config_name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    options: dict[str, Any] = {"encoder_config": config, "num_labels": num_labels, "max_length": 512}
    options["classifier_hidden_size"] = classifier_hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EarlyExitForSequenceClassification(EarlyExitConfig(**options))
    if device is not None:
        cast(torch.nn.Module, model).to(device)
    return LoadedClassifier(model.eval(), None, {}, config_name)


def random_rows(count: int, sequence_length: int, vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of random token ids, all of one length; small ids, which are special in real vocabularies, are left out."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(min(1000, vocab_size // 2), vocab_size, (count, sequence_length))
    return [{"input_ids": row} for row in ids.tolist()]


def exit_distribution_shares(text: str, num_layers: int) -> list[float]:
    """The share of rows that leave at each layer, from `even`, `last` or `p1,p2,...`.

    Raises:
        ValueError: it is none of these, has another number of entries than there are layers, or does not sum to one.
    """
    if text == "even":
        return [1 / num_layers] * num_layers
    if text == "last":
        return [0.0] * (num_layers - 1) + [1.0]
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f'exit-distribution must be "even", "last" or shares such as 0.5,0.5, got "{text}".'
        ) from None
    if len(shares) != num_layers:
        raise ValueError(
            f"exit-distribution must have one share for each of {num_layers} layers, got {len(shares)}."
        )
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-3:
        raise ValueError(
            f"exit-distribution must be shares >= 0 that sum to 1, got a sum of {sum(shares):g}."
        )
    return shares


def exit_layers_of(shares: Sequence[float], count: int, seed: int) -> list[int]:
    """Exit layers, 1-based, for so many rows: the shares as exactly as whole rows allow, shuffled.

    Args:
        shares: (layers,), summing to one.
        count: rows.
        seed: of the shuffle.
    """
    ends = np.round(np.cumsum(shares) / sum(shares) * count).astype(int)
    layers = np.repeat(np.arange(1, len(shares) + 1), np.diff(ends, prepend=0)).tolist()
    random.Random(seed).shuffle(layers)
    return layers


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
    announce: Callable[[float], object] = lambda _: None,
    tick: Callable[[str], object] = lambda _: None,
) -> SpeedReport:
    """Time the engine and its competitors.

    Args:
        engine: to be measured.
        rows: tokenized inputs in the order of arrival; each batch size takes as many of them as it needs for a fair
            share of its time: all in throughput mode, at most `16 * batch_size`, and at least 32.
        batch_sizes: of latency mode.
        throughput: measure throughput mode too.
        shares: of rows that are forced to leave at each layer; None: the model's own rule decides.
        rule: the model's own rule; None takes the saved one.
        repeats: timed repetitions.
        seed: of the forced exits.
        budget: a time to keep to, and whether fewer rows, repetitions or modes may be taken for it; None: all of it.
        announce: with a budget, called before measuring with the seconds it will take, about.
        tick: called with what is being measured after each pass.

    Raises:
        ValueError: no rows, no mode, or repeats below 1.
    """
    if not rows or repeats < 1 or not (batch_sizes or throughput) or any(size < 1 for size in batch_sizes):
        raise ValueError(
            "There must be at least one row, one repetition and one batch size (each at least 1) or throughput mode, "
            f"got {len(rows)} rows, {repeats} repetitions and batch sizes {list(batch_sizes)}."
        )
    modes: list[int | None] = [*batch_sizes, *([None] if throughput else [])]
    found: list[SpeedRow] = []
    full_session = _full_session(engine)

    def match(size: int | None, count: int) -> _Match:
        chosen = list(rows[:count])
        forced = None if shares is None else exit_layers_of(shares, len(chosen), seed)
        return _Match(engine, chosen, size, forced, rule, full_session)

    most = {size: min(len(rows), len(rows) if size is None else max(16 * size, 32)) for size in modes}
    least = {size: min(most[size], PROBED_ROWS if size is None else max(size, 8)) for size in modes}
    planner = Planner(budget, len(modes), repeats)
    cost, left_out = 0.0, list[str]()  # seconds of a row for all competitors together
    if budget is not None:
        tick("trying it out")
        first = modes[0]
        few = min(len(rows), 8)
        small = match(first and min(first, few), few)
        small.seconds_of_a_pass()  # kernels are built
        cost = small.seconds_of_a_pass() / few
        announce(planner.expected(sum(most.values()), cost))
    for size in modes:
        title = "throughput mode" if size is None else f"batch size {size}"
        if found and not planner.fits(cost, least[size]):
            left_out.append(title)
            planner.next_size()
            continue
        if budget is not None:
            tick(title)
            cost = match(size, least[size]).seconds_of_a_pass() / least[size]
        count, times = planner.plan(cost, least=least[size], most=most[size], step=size or 1)
        found += match(size, count).play(times, lambda title=title: tick(title))
        planner.next_size()
    config: Any = engine.saved.model.config
    lengths = [len(row["input_ids"]) for row in rows]
    workload = {
        "model": engine.saved.name.replace("\\", "/").rstrip("/").split("/")[-1],
        "model_type": config.backbone_config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "classifier_hidden_size": config.pooled_size,
        "rows": len(rows),
        "mean_tokens": statistics.mean(lengths),
        "max_tokens": max(lengths),
        "exits": "model" if shares is None else [round(share, 6) for share in shares],
        "repeats": min((row.repeats for row in found), default=repeats),
        "seconds": None if budget is None or math.isinf(budget.seconds) else budget.seconds,
        "left_out": left_out,
    }
    return SpeedReport(environment(engine.backend.device, seed), workload, tuple(found))


class _Match:
    """The competitors on one set of rows, in one mode."""

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[TokenRow],
        batch_size: int | None,
        forced: Sequence[int] | None,
        rule: ExitRule | None,
        full_session: Any,
    ) -> None:
        self.full_session = full_session
        self.engine, self.rows, self.batch_size = engine, rows, batch_size
        own = rule or engine.rule()
        self.depth = engine.backend.num_layers
        has_exits = isinstance(engine.saved.model, EarlyExitForSequenceClassification)
        self.rules: dict[str, tuple[ExitRule, list[int] | None]] = {
            "engine-full-depth": (ExitRule.full_depth(), None)
        }
        if has_exits:
            exits = None if forced is None else list(forced)
            self.rules = {"engine": (own, exits), **self.rules}
            self.rules["engine-nobody-leaves"] = (own, [self.depth] * len(rows))

    def play(self, repeats: int, tick: Callable[[], object]) -> list[SpeedRow]:
        """Time all, and make their rows of the report."""
        device, work = self.engine.backend.device, self._work()
        with torch.inference_mode():
            first: dict[str, list[Any]] = {}  # also the pass that is not timed
            for name, steps in work.items():
                first[name] = [step() for step in steps]
                tick()
            memory = {name: _peak_memory(steps, device) for name, steps in work.items()}
            seconds = time_in_turn(work, device, repeats, tick, untimed=False)
        return [
            self._row(name, seconds, first[name] if name in self.rules else None, memory[name])
            for name in work
        ]

    def seconds_of_a_pass(self) -> float:
        """What all competitors take together."""
        device = self.engine.backend.device
        start = synchronised_seconds(device)
        with torch.inference_mode():
            for steps in self._work().values():
                for step in steps:
                    step()
        return synchronised_seconds(device) - start

    def _work(self) -> dict[str, Sequence[Callable[[], object]]]:
        """The competitors' batches."""
        work: dict[str, Sequence[Callable[[], object]]] = {
            name: self._steps(*rule) for name, rule in self.rules.items()
        }
        work["transformers"] = self._transformers()
        if self.full_session is not None:
            work["onnxruntime"] = self._onnxruntime(self.full_session)
        return work

    def _parts(self, size: int | None) -> list[range]:
        """The rows batch by batch, in the order of arrival; all at once for None."""
        step = size or len(self.rows)
        return [range(start, min(start + step, len(self.rows))) for start in range(0, len(self.rows), step)]

    def _steps(self, rule: ExitRule, exits: list[int] | None) -> list[Callable[[], Answers]]:
        def step(part: range) -> Callable[[], Answers]:
            rows = [self.rows[row] for row in part]
            here = rule
            if exits is not None:
                here = ExitRule(rule.criterion, rule.threshold, tuple(exits[row] for row in part))
            return lambda: self.engine.run(rows, batch_size=self.batch_size, rule=here)

        return [step(part) for part in self._parts(self.batch_size)]

    def _transformers(self) -> list[Callable[[], object]]:
        """The backbone as Hugging Face runs it, padded, and the last classifier; labels and scores as lists."""
        model: Any = self.engine.saved.model
        classifiers, device = model.classifiers, self.engine.backend.device
        last = len(classifiers.layers) - 1
        kind = storage_dtype(self.engine.backend.dtype)
        if model.dtype != kind:
            model = copy.deepcopy(model).to(kind)
            classifiers = model.classifiers

        def step(part: range) -> Callable[[], object]:
            rows = [self.rows[row] for row in part]

            def run() -> object:
                width = max(len(row["input_ids"]) for row in rows)
                ids, mask, *types = token_tensors(rows, width, model.backbone, device)
                inputs = {"token_type_ids": types[0]} if types and _has_token_types(model.backbone) else {}
                states = model.backbone(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
                top = classifiers(last, states, mask)[1].float().softmax(-1).max(-1)
                return top.values.tolist(), top.indices.tolist()

            return run

        return [step(part) for part in self._parts(self.batch_size or ARRIVAL_BATCH)]

    def _onnxruntime(self, session: Any) -> list[Callable[[], object]]:
        """The whole model as ONNX Runtime optimises it, padded; labels and scores as lists."""
        names = [given.name for given in session.get_inputs()]
        model: Any = self.engine.saved.model
        cpu = torch.device("cpu")

        def step(part: range) -> Callable[[], object]:
            rows = [self.rows[row] for row in part]

            def run() -> object:
                width = max(len(row["input_ids"]) for row in rows)
                values = [tensor.numpy() for tensor in token_tensors(rows, width, model.backbone, cpu)]
                if len(values) < len(names):
                    values.append(np.zeros_like(values[0]))
                logits = session.run(None, dict(zip(names, values, strict=False)))[0]
                scores = np.exp(log_softmax(logits))
                return scores.max(1).tolist(), scores.argmax(1).tolist()

            return run

        return [step(part) for part in self._parts(self.batch_size or ARRIVAL_BATCH)]

    def _row(
        self,
        name: str,
        seconds: dict[str, list[list[float]]],
        answers: list[Answers] | None,
        memory: float | None,
    ) -> SpeedRow:
        taken = seconds[name]
        batches = [1000 * value for repetition in taken for value in repetition]
        if answers is None:
            mean_exit_layer, padding = float(self.depth), self._arrival_padding()
        else:
            mean_exit_layer = statistics.mean(layer for answer in answers for layer in answer.exit_layers)
            padding = 1 - sum(a.real_tokens for a in answers) / sum(a.computed_tokens for a in answers)
        layer_speedup = self.depth / mean_exit_layer
        ratio, first, third = paired_ratio(seconds["engine-full-depth"], taken)
        is_latency = self.batch_size is not None
        is_ours = answers is not None
        return SpeedRow(
            name=name,
            mode="latency" if is_latency else "throughput",
            batch_size=self.batch_size,
            backend=self.engine.backend.name if is_ours else name,
            dtype=self.engine.backend.dtype
            if is_ours
            else _name_of(storage_dtype(self.engine.backend.dtype)),
            latency_ms_p50=float(np.percentile(batches, 50)) if is_latency else None,
            latency_ms_p95=float(np.percentile(batches, 95)) if is_latency else None,
            instances_per_second=len(self.rows) / statistics.median(sum(repetition) for repetition in taken),
            padding_share=padding,
            mean_exit_layer=mean_exit_layer,
            layer_speedup=layer_speedup,
            wall_clock_speedup=ratio,
            wall_clock_speedup_quartiles=(first, third),
            efficiency=ratio / layer_speedup if name == "engine" else None,
            speedup_over_transformers=paired_ratio(seconds["transformers"], taken)[0],
            peak_memory_mb=memory,
            rows=len(self.rows),
            repeats=len(taken),
        )

    def _arrival_padding(self) -> float:
        real = computed = 0
        for part in self._parts(self.batch_size or ARRIVAL_BATCH):
            lengths = [len(self.rows[row]["input_ids"]) for row in part]
            real += sum(lengths)
            computed += max(lengths) * len(lengths)
        return 1 - real / computed


def _full_session(engine: Engine) -> Any:
    """ONNX Runtime's whole model beside a float32 engine on CPU; None where it is not there or not comparable."""
    model: Any = engine.saved.model
    if engine.backend.dtype != "float32" or not has_onnxruntime(model) or find_spec("onnxscript") is None:
        return None
    return full_model_session(model)


def _peak_memory(steps: Sequence[Callable[[], object]], device: torch.device) -> float | None:
    """MB that torch held on the GPU at most during one pass; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        for step in steps:
            step()
    return torch.cuda.max_memory_allocated(device) / 2**20


def _has_token_types(backbone: Any) -> bool:
    table = getattr(backbone.get_submodule("embeddings"), "token_type_embeddings", None)
    return table is not None and table.num_embeddings > 1


def _name_of(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
