"""How fast texts are generated: `consistentee benchmark` on a causal language model.

Beside the competitors of `speed`, of which plain `transformers` generates the same number of tokens: lossless decoding,
and transformers' own self-speculative decoding (`assistant_early_exit`, one text at a time).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from consistentee.backbones import decoders
from consistentee.backbones.precision import cast_parameters
from consistentee.data.batches import pad_left
from consistentee.evaluation.speed import (
    Amount,
    Competitors,
    Seconds,
    SpeedResults,
    SpeedRow,
    Steps,
    fixed_exit_layers,
    measure_in_turn,
    median_seconds,
    rounded_shares,
    shape_config,
    shared_metrics,
)
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.inference.timing import environment
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.loaded import short_name
from consistentee.pipelines.decoding_options import ONE_TEXT, SHAPING

PAD = 0
LEAST_NEW_TOKENS, PROBES = 16, (2, 8)
"""New tokens of a text at least, where time decides; and how many it takes to see what one costs."""

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True}
GENERATION_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m-shape": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "llama-1b-shape": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}
"""Shapes with random weights, for studying speed without a trained model."""

THRESHOLDS = {"softmax_margin": 0.9, "state_similarity": 0.95, "confidence_classifier": 0.5, "static": 1.0}
"""Of other criteria on random weights, whose exit layers are fixed: only what looking costs is measured."""


@dataclass(frozen=True, kw_only=True)
class GenerationSpeedRow(SpeedRow):
    """One competitor at one batch size.

    Args:
        name: one of those of `speed`, `engine-lossless` or `transformers-early-exit-<layer>`.
        tokens_per_second: new tokens of all texts, median over the repetitions.
        latency_ms_per_token: milliseconds from one token of a text to the next, prompt included; median.
        draft_acceptance: share of the verified drafts that stayed; of `engine-lossless` only.
        new_tokens: of every text.
    """

    tokens_per_second: float
    latency_ms_per_token: float
    draft_acceptance: float | None
    new_tokens: int


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
    config = shape_config(GENERATION_SHAPES, config_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = cast_parameters(decoders.build_decoder(config), dtype)
        model = EarlyExitForCausalLM.from_backbone(backbone, thresholds=THRESHOLDS)
    model = cast_parameters(cast(Any, model), dtype)
    return (model if device is None else model.to(device)).eval()


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
) -> SpeedResults[GenerationSpeedRow]:
    """Time a model with exits and its competitors.

    Args:
        model: in evaluation mode.
        prompts: token ids; each batch size takes the first ones, over again where there are too few.
        name: of the model, for the record.
        batch_sizes: texts at once.
        new_tokens: tokens of every text; nobody ends earlier.
        shares: of tokens whose exit layers are fixed, by layer; None: the model's own rule decides.
        criterion, threshold: the model's own rule, also of lossless drafts; None takes the saved one.
        lossless: time `lossless` mode and Hugging Face's own self-speculative decoding, too; needs trained exits to say
            anything.
        repeats: timed repetitions.
        seed: of the fixed exit layers.
        budget, announce, tick: see `measure_in_turn`; its amounts are new tokens.

    Raises:
        ValueError: no prompts, or a number that makes no sense.
    """
    if not prompts or not batch_sizes or min(batch_sizes) < 1 or new_tokens < 2 or repeats < 1:
        raise ValueError(
            "There must be prompts, batch sizes from 1 on, at least 2 new_tokens and at least 1 of repeats, got "
            f"{len(prompts)} prompts, batch sizes {list(batch_sizes)}, new_tokens {new_tokens} and repeats {repeats}."
        )
    rule = {"criterion": criterion, "threshold": threshold}
    amount = Amount(min(new_tokens, LEAST_NEW_TOKENS), new_tokens, probes=PROBES)

    def competitors(size: int | None, tokens: int) -> Competitors[GenerationSpeedRow]:
        chosen = [list(prompts[place % len(prompts)]) for place in range(size or 1)]
        return _Texts(model, chosen, tokens).competitors(rule, shares, lossless, seed)

    with _plain_settings(model):
        found, planned = measure_in_turn(
            dict.fromkeys(batch_sizes, amount),
            competitors,
            repeats=repeats,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    config: Any = model.config.backbone_config
    workload = {
        "model": short_name(name),
        "model_type": config.model_type,
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": model.num_layers,
        "vocab_size": int(config.vocab_size),
        "exit_head": model.config.exit_head,
        "mean_prompt_tokens": statistics.mean(map(len, prompts)),
        "new_tokens": new_tokens,
        "exits": rounded_shares(shares),
        **planned,
    }
    return SpeedResults(environment(model.device, seed), workload, found)


class _Texts:
    """The competitors' ways to generate from one batch of prompts."""

    def __init__(self, model: EarlyExitForCausalLM, prompts: list[list[int]], new_tokens: int) -> None:
        self.model, self.new_tokens, self.batch_size = model, new_tokens, len(prompts)
        ids, mask = pad_left(prompts, PAD)
        self.options: dict[str, Any] = {
            "input_ids": ids.to(model.device),
            "attention_mask": mask.to(model.device),
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": PAD,
        }

    def competitors(
        self, rule: dict[str, Any], shares: Sequence[float] | None, lossless: bool, seed: int
    ) -> Competitors[GenerationSpeedRow]:
        """All of them, the lossless ones where they are asked for; exits by a rule, or fixed."""
        fixed = None
        if shares is not None:  # of all tokens, by position and row
            layers = fixed_exit_layers(shares, self.new_tokens * self.batch_size, seed)
            starts = range(0, len(layers), self.batch_size)
            fixed = [layers[start : start + self.batch_size] for start in starts]
        last = [[self.model.num_layers] * self.batch_size]
        work: dict[str, Steps] = {
            "engine": self._ours("early-exit", fixed_exit_layers=fixed, **rule),
            "engine-full-depth": self._ours("full"),
            "engine-nobody-leaves": self._ours("early-exit", fixed_exit_layers=last, **rule),
            "transformers": self._transformers(),
        }
        if lossless:
            work["engine-lossless"] = self._ours("lossless", **rule)
            if self.batch_size == 1:
                layer = max(1, self.model.num_layers // 2)
                work[f"transformers-early-exit-{layer}"] = self._transformers(assistant_early_exit=layer)
        return Competitors(self.model.device, work, self._row)

    def _ours(self, mode: str, **more: Any) -> Steps:
        options = {**self.options, **more, "mode": mode, "return_dict_in_generate": True}
        return [lambda: self.model.generate(**options)]

    def _transformers(self, **more: Any) -> Steps:
        backbone: Any = self.model.backbone
        return [lambda: backbone.generate(**self.options, **more)]

    def _row(
        self, name: str, outputs: list[Any], seconds: Seconds, memory: float | None
    ) -> GenerationSpeedRow:
        mean_exit_layer, acceptance = float(self.model.num_layers), None
        if name == "engine-lossless":
            acceptance = outputs[0].accepted / outputs[0].drafted if outputs[0].drafted else None
        elif name.startswith("engine"):
            mean_exit_layer = float(outputs[0].exit_layers.float().mean())
        typical = median_seconds(seconds[name])
        return GenerationSpeedRow(
            **shared_metrics(name, mean_exit_layer, self.model.num_layers, seconds, memory),
            batch_size=self.batch_size,
            dtype=str(self.model.backbone.dtype).removeprefix("torch."),
            tokens_per_second=self.new_tokens * self.batch_size / typical,
            latency_ms_per_token=1000 * typical / self.new_tokens,
            draft_acceptance=acceptance,
            new_tokens=self.new_tokens,
        )


@contextmanager
def _plain_settings(model: EarlyExitForCausalLM) -> Iterator[None]:
    """Nothing of the model's own `generation_config`, for all competitors alike, as texts are generated elsewhere.

    There is no end-of-text token either: every text has the same length.
    """
    plain = {**dict.fromkeys(SHAPING), **ONE_TEXT, "eos_token_id": None}
    configs: list[Any] = [model.generation_config, model.backbone.generation_config]
    before = [{name: getattr(config, name) for name in plain if hasattr(config, name)} for config in configs]
    try:
        for config, known in zip(configs, before, strict=True):
            for name in known:
                setattr(config, name, plain[name])
        yield
    finally:
        for config, known in zip(configs, before, strict=True):
            for name, value in known.items():
                setattr(config, name, value)
