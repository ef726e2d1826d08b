"""How a text is generated: the options, and what of transformers they put in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from consistentee.config import GenerationMode, SkippedStates
from consistentee.errors import require_choice, require_seed

SHAPING = (
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "watermarking_config",
    "min_length",
    "min_new_tokens",
    "max_time",
    "stop_strings",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
)
"""Settings of transformers that change which tokens are taken: off unless an option asks for them, whatever a model's
own `generation_config` says, and so is transformers' default of the 50 likeliest."""

ONE_TEXT: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "token_healing": False,
    "return_dict_in_generate": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Settings of transformers for one text a prompt, with the usual cache and nothing told beside it, whatever a model
has."""

LEAST_TEMPERATURE = 1e-5
"""The lowest temperature; what is drawn at it is as good as always the likeliest token."""


@dataclass(frozen=True)
class DecodingOptions:
    """How to generate: these options alone decide, and nothing of the model's `generation_config` but its end of text.

    Args:
        mode: `early-exit`, `full` or `lossless`; None takes the saved one.
        criterion: exit rule; None takes the saved one.
        threshold: None takes the one saved for the criterion, of drafts in mode `lossless` the `draft_threshold`.
        skipped_states: `copy` or `recompute`; None takes the saved one.
        max_new_tokens: longest text; None takes what suits the model's task.
        max_prompt_length: longest prompt, in tokens; None takes what the model has room for beside the text.
        do_sample: whether to draw tokens; otherwise the likeliest is taken.
        temperature: at least 1e-5, divides the logits before drawing; None is 1.
        top_k: at least 1, tokens are drawn from so many of the likeliest; None is all of them.
        top_p: in (0, 1], share of the probability from which tokens are drawn; None is all of it.
        seed: of the draws of a call, from a generator of its own; None draws from torch's as it is.
        stop: strings that end a text, one or several; the text ends before them. One that is the name of a special
            token, such as "<|im_end|>", stands for that token.
    """

    mode: str | None = None
    criterion: str | None = None
    threshold: float | None = None
    skipped_states: str | None = None
    max_new_tokens: int | None = None
    max_prompt_length: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if "" in self.stop:
            raise ValueError('stop must hold strings with at least one character, got "". Leave it out.')
        if self.mode is not None:
            require_choice("mode", self.mode, get_args(GenerationMode))
        if self.skipped_states is not None:
            require_choice("skipped_states", self.skipped_states, get_args(SkippedStates))
        for name in ("max_new_tokens", "max_prompt_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("temperature", "top_k", "top_p"):
            if getattr(self, name) is not None and not self.do_sample:
                raise ValueError(f"{name} goes with do_sample, got {getattr(self, name)} without it.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")
        if self.temperature is not None and self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {LEAST_TEMPERATURE:g}, got {self.temperature}: logits divided by less "
                "may be no numbers any more. Leave out do_sample for the likeliest token."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.seed is not None:
            require_seed(self.seed)
        if self.do_sample and self.mode == "lossless":
            raise ValueError('do_sample must be False in mode "lossless", got True: it verifies greedy text.')


def merged_options(options: DecodingOptions | None, values: dict[str, Any]) -> DecodingOptions:
    """The options, with `values` in place of those of the same name."""
    if not values:
        return options or DecodingOptions()
    return DecodingOptions(**{**vars(options or DecodingOptions()), **values})


def seeded_draws(options: DecodingOptions, device: torch.device) -> torch.Generator | None:
    """What one call draws from where the options have a seed for it; None is torch's own generator."""
    if not options.do_sample or options.seed is None:
        return None
    return torch.Generator(device).manual_seed(options.seed)


def generate_arguments(options: DecodingOptions, ends: Collection[int], pad_token_id: int) -> dict[str, Any]:
    """What `generate` of transformers is told, with or without exits.

    Args:
        options: how.
        ends: token ids that end a text.
        pad_token_id: of the tokenizer.
    """
    return {
        **dict.fromkeys(SHAPING),
        **ONE_TEXT,
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.do_sample,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "eos_token_id": sorted(ends),
        "pad_token_id": pad_token_id,
    }


def warpers(options: DecodingOptions) -> LogitsProcessorList:
    """What shapes the probabilities from which tokens are drawn, in the order in which `generate` has it."""
    found = LogitsProcessorList()
    if options.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: the model's, and the tokenizer's, after which training ends its responses."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = set(known) if isinstance(known, (list, tuple)) else {known}
    return {int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None}
