"""The decoding loop behind `EarlyExitForCausalLM.generate`: tokens out of logits, until every text has ended.

Hugging Face prepares prompts, processors and stopping criteria and then calls `generate_tokens`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from consistentee.backbones.decoders import CACHE, CACHES
from consistentee.backbones.limits import longest_input
from consistentee.config import GenerationMode, SkippedStates
from consistentee.errors import require_choice
from consistentee.inference.decoder.decoding import Decoding
from consistentee.inference.decoder.draws import drawing_from, require_tokens, tokens_from
from consistentee.inference.decoder.exit_rules import FixedExitRule, NeverExit, TokenExitRule
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.inference.decoder.known_processors import RecordedEnds, stateful
from consistentee.inference.decoder.lossless import DraftClock, LosslessDecoding
from consistentee.inference.decoder.recompute import RecomputeDecoding
from consistentee.inference.modes import inference_without_autocast
from consistentee.models.generation_checks import (
    check_adapters,
    check_fixed_exits,
    check_inputs,
    check_search,
)

_log = logging.getLogger(__name__)
MOST_CLOCKS = 64
"""Ways of drafting whose speed is remembered: a server's clients may send any threshold."""

CAPACITY_AHEAD = 512
"""New tokens that the cache has room for from the start, at most; it grows from there."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; the fields are `EarlyExitForCausalLM.generate`'s."""

    mode: str
    criterion: str
    threshold: float | None
    skipped_states: str
    full_depth_first_token: bool
    min_exit_layer: int
    draft_tokens: int
    draft_threshold: float | None
    adaptive_drafts: bool
    fixed_exit_layers: list[list[int]] | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, get_args(GenerationMode))
        require_choice("skipped_states", self.skipped_states, get_args(SkippedStates))
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens must be at least 1, got {self.draft_tokens}.")
        if self.fixed_exit_layers is not None and (self.mode != "early-exit" or not self.fixed_exit_layers):
            raise ValueError(
                'fixed_exit_layers must hold at least one position and go with mode="early-exit", '
                f'got mode "{self.mode}".'
            )


@dataclass
class EarlyExitGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences, scores, logits: as in Hugging Face.
        cache: an empty one (`past_key_values` before transformers 5.24): skipped layers fill another. By it assisted
            decoding knows, where such a model drafts for another one, that masks of its prompts have to grow.
        exit_layers: (batch, new tokens) int64, the layer at which each token exited, 1-based; 0 for padding. In
            `lossless` mode the layer at which a token was drafted, or the last one where it came from a verification.
        drafted, accepted: of `lossless` mode: drafts that were verified, and those that stayed.
        drafted_by_row, accepted_by_row: the same, (batch,) each.
    """

    exit_layers: Tensor | None = None
    drafted: int | None = None
    accepted: int | None = None
    drafted_by_row: list[int] | None = None
    accepted_by_row: list[int] | None = None


def generate_tokens(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    options: GenerationOptions,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | EarlyExitGenerateOutput:
    """Decode, in the place of Hugging Face's own loop.

    Args:
        model: an `EarlyExitForCausalLM`.
        input_ids: (batch, tokens) prompts, padding on the left.
        logits_processor, stopping_criteria, generation_config, streamer: as Hugging Face prepared them.
        options: how.
        **model_kwargs: what else Hugging Face prepared: `attention_mask`, (batch, tokens), and a cache of its own.

    Raises:
        ValueError: a way to search, or an input, that exits cannot serve, or more tokens than the model has positions.
    """
    # Not a parameter of its own: Hugging Face would take it out of what it prepares.
    attention_mask: Tensor | None = model_kwargs.pop("attention_mask", None)
    model_kwargs.pop("tokenizer", None)  # for stop strings, which are among the criteria by now
    values: Any = generation_config
    check_search(values, options.mode)
    check_adapters(model)
    check_fixed_exits(options.fixed_exit_layers, len(input_ids), model.num_layers)
    if not values.use_cache:
        if options.mode != "full":
            raise ValueError(
                'use_cache must be true for exits, got False. Give use_cache=True, or mode="full".'
            )
        plain_loop: Any = cast(Any, GenerationMixin)._sample
        ends = RecordedEnds(stopping_criteria)
        with drawing_from(options.generator):
            found: Any = plain_loop(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=ends,
                generation_config=generation_config,
                streamer=streamer,
                attention_mask=attention_mask,
                **{name: value for name, value in model_kwargs.items() if name not in CACHES},
            )
        if not values.return_dict_in_generate:
            return found
        layers: Any = model.num_layers * torch.stack(ends.running, dim=1)
        return EarlyExitGenerateOutput(**found, exit_layers=layers)
    check_inputs(input_ids, attention_mask, model_kwargs)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    loop = _token_loop
    if options.mode == "lossless":
        others = stateful(logits_processor, stopping_criteria, len(input_ids))
        if others:
            _log.warning(
                'mode "lossless" generates without drafts, through all layers: %s may depend on more than the text so '
                "far.",
                ", ".join(others),
            )
        else:
            loop = _lossless_loop
    with inference_without_autocast():
        output = loop(model, input_ids, mask, logits_processor, stopping_criteria, values, options, streamer)
    if streamer is not None:
        streamer.end()
    setattr(output, CACHE, DynamicCache())
    return output if values.return_dict_in_generate else output.sequences


def _clock(weights: ExitWeights, options: GenerationOptions, rows: int) -> DraftClock:
    """What is known of the speed of drafting in this way."""
    way = (
        options.criterion,
        options.threshold,
        options.min_exit_layer,
        options.draft_threshold,
        options.draft_tokens,
        rows,
    )
    clocks = weights.draft_clocks
    clock = clocks[way] = clocks.pop(way, None) or DraftClock()  # the last one that was asked for is the last
    for oldest in list(clocks)[:-MOST_CLOCKS]:
        clocks.pop(oldest, None)
    return clock


def decoding_rule(model: Any, options: GenerationOptions, *, drafts: bool = False) -> TokenExitRule:
    """When tokens exit: of an `EarlyExitForCausalLM`, and where they are `drafts` of the lossless mode."""
    if options.mode == "full" or (options.mode == "lossless" and not drafts):
        return NeverExit()
    threshold = options.threshold
    if options.mode == "lossless" and options.criterion == "policy" and threshold is None:
        threshold = options.draft_threshold
    rule = model.exit_rule(options.criterion, threshold, options.min_exit_layer)
    return rule if options.fixed_exit_layers is None else FixedExitRule(rule, options.fixed_exit_layers)


def _capacity(input_ids: Tensor, config: Any) -> int:
    length = input_ids.shape[1]
    return length + min(CAPACITY_AHEAD, max(1, (config.max_length or length + CAPACITY_AHEAD) - length))


def _token_loop(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: Any,
    options: GenerationOptions,
    streamer: Any,
) -> EarlyExitGenerateOutput:
    """One token of every running row per step."""
    weights = model.exit_weights()
    recompute = options.skipped_states == "recompute" and options.mode == "early-exit"
    decoding = (RecomputeDecoding if recompute else Decoding)(
        weights,
        decoding_rule(model, options),
        attention_mask,
        _capacity(input_ids, config),
        full_depth_first_token=options.full_depth_first_token or options.mode != "early-exit",
    )
    batch, device = len(input_ids), input_ids.device
    positions = _Positions(model, attention_mask)
    running = list(range(batch))
    pad = _pad_token(config)
    layers: list[Tensor] = []
    scores: list[Tensor] = []
    raw: list[Tensor] = []
    keeps = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    greedy = not (logits_processor or config.do_sample or keeps)  # nobody asks for logits
    normed, exit_layers = decoding.prefill(input_ids)
    while True:
        rows = None if len(running) == batch else torch.tensor(running, device=device)
        if greedy:
            tokens = weights.greedy(normed, exit_layers)
        else:
            logits = weights.logits(normed, exit_layers).float()
            if rows is not None:  # processors know rows by their place in the batch
                logits = logits.new_zeros(batch, logits.shape[-1]).index_copy_(0, rows, logits)
            if config.output_logits and keeps:
                raw.append(_kept(logits))
            logits = logits_processor(input_ids, logits)
            if config.output_scores and keeps:
                scores.append(_kept(logits))
            tokens = tokens_from(logits, do_sample=config.do_sample, generator=options.generator)
            tokens = tokens if rows is None else tokens[rows]
        require_tokens(tokens, exit_layers)
        if rows is not None:
            tokens = torch.full((batch,), pad, device=device).index_copy_(0, rows, tokens)
        exited = torch.zeros(batch, dtype=torch.int64, device=device)
        exited[running] = torch.tensor(exit_layers, device=device)
        layers.append(exited)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        _stream(streamer, tokens, exited)
        ended: list[bool] = stopping_criteria(input_ids, tuple(scores) or None).tolist()
        still = [place for place, row in enumerate(running) if not ended[row]]
        if not still:
            break
        if len(still) < len(running):
            decoding.keep(still)
            running = [running[place] for place in still]
        positions.check(dict.fromkeys(running, len(layers)))
        normed, exit_layers = decoding.step(tokens if len(running) == batch else tokens[running])
    drafts: dict[str, Any] = {}
    if options.mode == "lossless":
        drafts = {"drafted": 0, "accepted": 0, "drafted_by_row": [0] * batch, "accepted_by_row": [0] * batch}
    return EarlyExitGenerateOutput(
        sequences=_kept(input_ids),  # pyright: ignore[reportArgumentType]
        scores=tuple(scores) or None,  # pyright: ignore[reportArgumentType]
        logits=tuple(raw) or None,  # pyright: ignore[reportArgumentType]
        exit_layers=_kept(torch.stack(layers, dim=1)),
        **drafts,
    )


def _lossless_loop(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: Any,
    options: GenerationOptions,
    streamer: Any,
) -> EarlyExitGenerateOutput:
    """Rounds of drafts and verifications, until every row has ended."""
    batch, device = len(input_ids), input_ids.device
    if streamer is not None and batch > 1:
        raise ValueError(
            f'streamer takes one text at a time in mode "lossless", got {batch}: rows end their drafts at different '
            "times. Generate them one by one, or without a streamer."
        )
    weights = model.exit_weights()

    def choose(row: int, before: Sequence[int], logits: Tensor) -> int:
        so_far = torch.cat([input_ids[row], torch.tensor(list(before), dtype=torch.int64, device=device)])
        spread = logits.new_zeros(
            batch, len(logits), dtype=torch.float32
        )  # processors know rows by their place
        spread[row] = logits
        scores = logits_processor(so_far.expand(batch, -1), spread)  # pyright: ignore[reportArgumentType]
        return int(scores[row].argmax())

    def ends(row: int, tokens: Sequence[int]) -> bool:
        so_far = torch.cat([input_ids[row], torch.tensor(list(tokens), dtype=torch.int64, device=device)])
        return bool(stopping_criteria(so_far[None], None)[0])  # pyright: ignore[reportArgumentType]

    positions = _Positions(model, attention_mask)
    exact = RecomputeDecoding(
        weights,
        decoding_rule(model, options, drafts=True),
        attention_mask,
        _capacity(input_ids, config),
        full_depth_first_token=True,
    )
    decoding = LosslessDecoding(
        exact,
        weights,
        choose if logits_processor else None,
        draft_tokens=options.draft_tokens,
        room=positions.room((config.max_length or math.inf) - input_ids.shape[1]),
        clock=_clock(weights, options, batch) if options.adaptive_drafts else None,
    )
    decoding.prefill(input_ids)
    running, checked = list(range(batch)), [0] * batch
    while running:
        still: list[int] = []
        for place, row in enumerate(running):
            drafted = decoding.rows[row]
            stop = False
            while not stop and checked[row] < len(drafted.tokens):
                checked[row] += 1
                stop = ends(row, drafted.tokens[: checked[row]])
                if streamer is not None:
                    layer = drafted.exit_layers[checked[row] - 1]
                    _stream(
                        streamer,
                        torch.tensor([drafted.tokens[checked[row] - 1]]),
                        torch.tensor([layer]),
                    )
            if stop:
                del drafted.tokens[checked[row] :], drafted.exit_layers[checked[row] :]
            else:
                still.append(place)
        if len(still) < len(running):
            decoding.keep(still)
            running = [running[place] for place in still]
        if running:
            positions.check({row: len(decoding.rows[row].tokens) for row in running})
            decoding.round()
    verified, accepted = ([getattr(row, name) for row in decoding.rows] for name in ("verified", "accepted"))
    longest = max(len(row.tokens) for row in decoding.rows)
    tokens = torch.full((batch, longest), _pad_token(config), device=device)
    layers = torch.zeros(batch, longest, dtype=torch.int64, device=device)
    for row, drafted in enumerate(decoding.rows):
        tokens[row, : len(drafted.tokens)] = torch.tensor(drafted.tokens, device=device)
        layers[row, : len(drafted.tokens)] = torch.tensor(drafted.exit_layers, device=device)
    return EarlyExitGenerateOutput(
        sequences=_kept(torch.cat([input_ids, tokens], dim=1)),  # pyright: ignore[reportArgumentType]
        exit_layers=_kept(layers),
        drafted=sum(verified),
        accepted=sum(accepted),
        drafted_by_row=verified,
        accepted_by_row=accepted,
    )


class _Positions:
    """How far the rows of a batch can go where a model has learned its positions.

    Args:
        model: the early-exit model.
        attention_mask: (rows, tokens) of the prompts.

    Raises:
        ValueError: a prompt is longer than that.
    """

    def __init__(self, model: Any, attention_mask: Tensor) -> None:
        self._limit = longest_input(model.config.backbone_config)
        self._prompts: list[int] = [] if self._limit is None else (attention_mask != 0).sum(1).tolist()
        self._rows = len(attention_mask)
        self.check(dict.fromkeys(range(self._rows), 0))

    def check(self, generated: Mapping[int, int]) -> None:
        """Raise ValueError where a row's newest token has no position: (row, tokens generated so far)."""
        if self._limit is None:
            return
        for row, tokens in generated.items():
            if self._prompts[row] + tokens > self._limit:
                raise ValueError(
                    f"input_ids and new tokens must fit into the {self._limit} positions that the model knows, got "
                    f"{self._prompts[row]} tokens of a prompt and {tokens} new ones that did not end the text. "
                    "Give a shorter prompt, or fewer max_new_tokens."
                )

    def room(self, max_new_tokens: float) -> list[float]:
        """(rows,) the most new tokens; the last one needs no position."""
        if self._limit is None:
            return [max_new_tokens] * self._rows
        return [min(max_new_tokens, self._limit - tokens + 1) for tokens in self._prompts]


def _stream(streamer: Any, tokens: Tensor, layers: Tensor) -> None:
    if streamer is None:
        return
    if hasattr(streamer, "put_exit_layers"):
        streamer.put_exit_layers(layers.cpu())
    streamer.put(tokens.cpu())


def _kept(tensor: Tensor) -> Tensor:
    """A copy for the caller, who may change it and train with it; tensors of the inference mode take neither."""
    with torch.inference_mode(False):
        return tensor.clone()


def _pad_token(config: Any) -> int:
    pad = config._pad_token_tensor
    return 0 if pad is None else int(pad)
