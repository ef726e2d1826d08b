"""How fast texts are generated: `consistentee benchmark` on a causal language model.

Competitors generate the same texts in the same run, in turn: with exits, at full depth, with exits that nobody takes
(what looking for them costs), lossless, plain `transformers`, and its own self-speculative decoding
(`assistant_early_exit`, one text at a time). What counts is the ratio between them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoConfig

from consistentee.backbones import decoders
from consistentee.data.generation_batches import pad_left
from consistentee.evaluation.speed import exit_layers_of
from consistentee.evaluation.time_budget import Planner, TimeBudget
from consistentee.inference.timing import environment, paired_ratio, synchronised_seconds, time_in_turn
from consistentee.models.causal_lm import EarlyExitForCausalLM

PAD = 0
LEAST_NEW_TOKENS, PROBED_TOKENS = 16, 6
"""New tokens of a text at least, where time decides; and how many it takes to see what one costs."""

GENERATION_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m-shape": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b-shape": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Shapes with random weights, for studying speed without a trained model."""

THRESHOLDS = {"softmax_margin": 0.9, "state_similarity": 0.95, "confidence_classifier": 0.5, "static": 1.0}
"""Of the rivals on random weights, whose exits are forced: only what looking costs is measured."""


@dataclass(frozen=True)
class GenerationSpeedRow:
    """One competitor at one batch size.

    Args:
        name: `engine`, `engine-full-depth`, `engine-nobody-leaves`, `engine-lossless`, `transformers` or
            `transformers-early-exit-<layer>`.
        batch_size: texts at once.
        dtype: precision.
        tokens_per_second: new tokens of all texts, median over the repetitions.
        latency_ms_per_token: milliseconds from one token of a text to the next, prompt included; median.
        mean_exit_layer: layers executed per new token; all of them where drafts are verified.
        layer_speedup: layers of the model / mean exit layer.
        wall_clock_speedup: against `engine-full-depth`, median of the repetitions' ratios.
        wall_clock_speedup_quartiles: first and third quartile of the same.
        efficiency: wall_clock_speedup / layer_speedup, of `engine` only.
        speedup_over_transformers: likewise against `transformers`.
        draft_acceptance: share of the verified drafts that stayed; of `engine-lossless` only.
        peak_memory_mb: of the device, on a GPU; None on CPU.
        new_tokens: of every text.
        repeats: timed repetitions.
    """

    name: str
    batch_size: int
    dtype: str
    tokens_per_second: float
    latency_ms_per_token: float
    mean_exit_layer: float
    layer_speedup: float
    wall_clock_speedup: float
    wall_clock_speedup_quartiles: tuple[float, float]
    efficiency: float | None
    speedup_over_transformers: float
    draft_acceptance: float | None
    peak_memory_mb: float | None
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class GenerationSpeedReport:
    """What `measure_generation_speed` found.

    Args:
        environment: hardware, versions, threads, seed.
        workload: model shape, texts, tokens, how exits came about.
        rows: one for each competitor and batch size.
    """

    environment: dict[str, Any]
    workload: dict[str, Any]
    rows: tuple[GenerationSpeedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"environment": self.environment, "workload": self.workload, "rows": rows}


def shape_generator(
    config_name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> EarlyExitForCausalLM:
    """A model with random weights of a named shape.

    Args:
        config_name: one of `GENERATION_SHAPES`.
        seed: of the weights.
        dtype: their precision.
        device: where it goes.

    Raises:
        ValueError: there is no such shape.
    """
    if config_name not in GENERATION_SHAPES:
        raise ValueError(f'config-name must be one of {", ".join(GENERATION_SHAPES)}, got "{config_name}".')
    values = dict(GENERATION_SHAPES[config_name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = decoders.build_decoder(config).to(dtype)  # pyright: ignore[reportArgumentType]
        model = EarlyExitForCausalLM.from_backbone(backbone, thresholds=THRESHOLDS)
    model = cast(Any, model).to(dtype)
    return (model if device is None else model.to(device)).eval()


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, all of one length."""
    rng = np.random.default_rng(seed)
    return rng.integers(min(1000, vocab_size // 2), vocab_size, (count, length)).tolist()


def measure_generation_speed(
    model: EarlyExitForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    name: str,
    batch_sizes: Sequence[int] = (1, 8, 32),
    new_tokens: int = 128,
    shares: Sequence[float] | None = None,
    criterion: str | None = None,
    threshold: float | None = None,
    lossless: bool = False,
    repeats: int = 5,
    seed: int = 0,
    budget: TimeBudget | None = None,
    announce: Callable[[float], object] = lambda _: None,
    tick: Callable[[str], object] = lambda _: None,
) -> GenerationSpeedReport:
    """Time a model with exits and its competitors.

    Args:
        model: in evaluation mode.
        prompts: token ids; each batch size takes the first ones, over again where there are too few.
        name: of the model, for the report.
        batch_sizes: texts at once.
        new_tokens: tokens of every text; nobody ends earlier.
        shares: of tokens that are forced to leave at each layer; None: the model's own rule decides.
        criterion, threshold: the model's own rule; None takes the saved one.
        lossless: time `lossless` mode and Hugging Face's own self-speculative decoding, too; needs trained exits to say
            anything.
        repeats: timed repetitions.
        seed: of forced exits.
        budget: a time to keep to, and whether fewer new tokens, repetitions or batch sizes may be taken for it; None:
            all of it.
        announce: with a budget, called before measuring with the seconds it will take, about.
        tick: called with a line about what is being measured.

    Raises:
        ValueError: no prompts, or a number that makes no sense.
    """
    if not prompts or not batch_sizes or min(batch_sizes) < 1 or new_tokens < 2 or repeats < 1:
        raise ValueError(
            "There must be prompts, batch sizes from 1 on, at least 2 new_tokens and at least 1 of repeats, got "
            f"{len(prompts)} prompts, batch sizes {list(batch_sizes)}, new_tokens {new_tokens} and repeats {repeats}."
        )
    found: list[GenerationSpeedRow] = []
    rule = {"criterion": criterion, "threshold": threshold}

    def match(size: int, tokens: int) -> _Match:
        chosen = [list(prompts[place % len(prompts)]) for place in range(size)]
        return _Match(model, chosen, tokens, shares, rule, lossless, seed)

    planner, left_out = Planner(budget, len(batch_sizes), repeats), list[str]()
    least = min(new_tokens, LEAST_NEW_TOKENS)
    with _endless(model):
        for place, size in enumerate(batch_sizes):
            title, fixed, cost = f"batch size {size}", 0.0, 0.0
            if budget is not None:
                tick("trying it out" if place == 0 else title)
                if place == 0:
                    match(size, 2).seconds_of_a_pass()  # kernels are built
                short, longer = (match(size, tokens).seconds_of_a_pass() for tokens in (2, 2 + PROBED_TOKENS))
                cost = (
                    max(0.0, longer - short) / PROBED_TOKENS
                )  # seconds of a token, and of reading the prompts
                fixed = max(0.0, short - 2 * cost)
                if place == 0:
                    sizes = len(batch_sizes)
                    announce(planner.expected(new_tokens * sizes, cost, fixed * sizes))
                if found and not planner.fits(cost, least, fixed):
                    left_out.append(title)
                    planner.next_size()
                    continue
            tokens, times = planner.plan(cost, least=least, most=new_tokens, fixed=fixed)
            found += match(size, tokens).play(times, lambda title=title: tick(title))
            planner.next_size()
    config: Any = model.config.backbone_config
    workload = {
        "model": name.replace("\\", "/").rstrip("/").split("/")[-1],
        "model_type": config.model_type,
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": model.num_layers,
        "vocab_size": int(config.vocab_size),
        "exit_head": model.config.exit_head,
        "mean_prompt_tokens": statistics.mean(map(len, prompts)),
        "new_tokens": new_tokens,
        "exits": "model" if shares is None else [round(share, 6) for share in shares],
        "repeats": min((row.repeats for row in found), default=repeats),
        "seconds": None if budget is None or math.isinf(budget.seconds) else budget.seconds,
        "left_out": left_out,
    }
    return GenerationSpeedReport(environment(model.device, seed), workload, tuple(found))


class _Match:
    """The competitors on one batch of prompts."""

    def __init__(
        self,
        model: EarlyExitForCausalLM,
        prompts: list[list[int]],
        new_tokens: int,
        shares: Sequence[float] | None,
        rule: dict[str, Any],
        lossless: bool,
        seed: int,
    ) -> None:
        self.model, self.new_tokens, self.batch_size = model, new_tokens, len(prompts)
        ids, mask = pad_left(prompts, PAD)
        device = model.device
        self.inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        self.runs: dict[str, Callable[[], Any]] = {
            "engine": self._ours("early-exit", self._forced(shares, seed), rule),
            "engine-full-depth": self._ours("full", None, {}),
            "engine-nobody-leaves": self._ours("early-exit", self._last(), rule),
            "transformers": self._theirs(),
        }
        if lossless:
            self.runs["engine-lossless"] = self._ours("lossless", None, {})
            if len(prompts) == 1:
                layer = max(1, model.num_layers // 2)
                early = f"transformers-early-exit-{layer}"
                self.runs[early] = self._theirs(assistant_early_exit=layer)

    def play(self, repeats: int, tick: Callable[[], object]) -> list[GenerationSpeedRow]:
        """Time all, and make their rows of the report."""
        device = self.model.device
        outputs: dict[str, Any] = {}  # of the pass that is not timed
        for name, run in self.runs.items():
            output = run()
            if name.startswith("engine"):
                outputs[name] = output
            tick()
        memory = {name: _peak_memory(run, device) for name, run in self.runs.items()}
        work = {name: [run] for name, run in self.runs.items()}
        seconds = time_in_turn(work, device, repeats, tick, untimed=False)
        return [self._row(name, seconds, outputs.get(name), memory[name]) for name in self.runs]

    def seconds_of_a_pass(self) -> float:
        """What all competitors take together."""
        start = synchronised_seconds(self.model.device)
        for run in self.runs.values():
            run()
        return synchronised_seconds(self.model.device) - start

    def _forced(self, shares: Sequence[float] | None, seed: int) -> list[list[int]] | None:
        """Layers of all tokens, by position and row."""
        if shares is None:
            return None
        layers = exit_layers_of(shares, self.new_tokens * self.batch_size, seed)
        return [layers[start : start + self.batch_size] for start in range(0, len(layers), self.batch_size)]

    def _last(self) -> list[list[int]]:
        return [[self.model.num_layers] * self.batch_size]

    def _ours(self, mode: str, forced: list[list[int]] | None, rule: dict[str, Any]) -> Callable[[], Any]:
        options = {
            **self.inputs,
            **rule,
            "mode": mode,
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "pad_token_id": PAD,
            "return_dict_in_generate": True,
            "forced_exit_layers": forced,
        }
        return lambda: self.model.generate(**options)

    def _theirs(self, **more: Any) -> Callable[[], Any]:
        backbone: Any = self.model.backbone
        options = {
            **self.inputs,
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "pad_token_id": PAD,
            **more,
        }
        return lambda: backbone.generate(**options)

    def _row(
        self, name: str, seconds: dict[str, list[list[float]]], output: Any, memory: float | None
    ) -> GenerationSpeedRow:
        taken = seconds[name]
        depth = self.model.num_layers
        mean = float(depth)
        if output is not None and name != "engine-lossless":
            mean = float(output.exit_layers.float().mean())
        acceptance = None
        if output is not None and output.drafted:
            acceptance = output.accepted / output.drafted
        ratio, first, third = paired_ratio(seconds["engine-full-depth"], taken)
        typical = statistics.median(sum(repetition) for repetition in taken)
        return GenerationSpeedRow(
            name=name,
            batch_size=self.batch_size,
            dtype=str(self.model.backbone.dtype).removeprefix("torch."),
            tokens_per_second=self.new_tokens * self.batch_size / typical,
            latency_ms_per_token=1000 * typical / self.new_tokens,
            mean_exit_layer=mean,
            layer_speedup=depth / mean,
            wall_clock_speedup=ratio,
            wall_clock_speedup_quartiles=(first, third),
            efficiency=ratio / (depth / mean) if name == "engine" else None,
            speedup_over_transformers=paired_ratio(seconds["transformers"], taken)[0],
            draft_acceptance=acceptance,
            peak_memory_mb=memory,
            new_tokens=self.new_tokens,
            repeats=len(taken),
        )


@contextmanager
def _endless(model: EarlyExitForCausalLM) -> Iterator[None]:
    """No end-of-text token, for all competitors alike: every text has the same length."""
    configs: list[Any] = [model.generation_config, model.backbone.generation_config]
    before = [config.eos_token_id for config in configs]
    try:
        for config in configs:
            config.eos_token_id = None
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.eos_token_id = value


def _peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MB that torch held on the GPU at most; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) / 2**20
