"""What `generate` refuses: ways to search, adapters, inputs and caches that exits cannot serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from consistentee.backbones.decoders import CACHES, positions_of

OTHER_SEARCHES = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
)
"""Settings of transformers that ask for a way to search of their own."""

IDLE_OPTIONS = {
    "full": (
        "criterion",
        "threshold",
        "skipped_states",
        "full_depth_first_token",
        "min_exit_layer",
        "draft_tokens",
        "draft_threshold",
        "adaptive_drafts",
    ),
    "early-exit": ("draft_tokens", "draft_threshold", "adaptive_drafts"),
    "lossless": ("skipped_states", "full_depth_first_token"),
}
"""Options that change nothing, by mode."""


def check_idle_options(mode: str, criterion: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option, given in place of the saved one, that has no effect beside the others.

    Args:
        mode, criterion: in use, given or saved.
        given: options of the call by name; None where the saved ones count.
    """
    told = {name: value for name, value in given.items() if value is not None}
    for name in IDLE_OPTIONS[mode]:
        if name in told:
            raise ValueError(
                f'{name} has no effect in mode "{mode}", got {told[name]}. Leave it out, or take another mode.'
            )
    if "min_exit_layer" in told and criterion == "static":
        raise ValueError(
            f'min_exit_layer has no effect with criterion "static", got {told["min_exit_layer"]}: its threshold is the '
            "layer. Leave it out, or take another criterion."
        )
    if "min_exit_layer" in told and "fixed_exit_layers" in told:
        raise ValueError(
            f"min_exit_layer has no effect beside fixed_exit_layers, got {told['min_exit_layer']}. Leave out one of "
            "them."
        )
    if "draft_threshold" in told and criterion != "policy":
        raise ValueError(
            f'draft_threshold has no effect with criterion "{criterion}", got {told["draft_threshold"]}: it is the '
            "policy's. Give threshold instead."
        )
    if "draft_threshold" in told and "threshold" in told:
        raise ValueError(
            f"draft_threshold has no effect beside threshold, got {told['draft_threshold']} and {told['threshold']}. "
            "Leave out one of them."
        )


def check_first_exit_layer(min_exit_layer: int, num_layers: int) -> None:
    """Raise ValueError for a `min_exit_layer` that the model does not have."""
    if not 1 <= min_exit_layer <= num_layers:
        raise ValueError(f"min_exit_layer must be from 1 to {num_layers}, got {min_exit_layer}.")


def check_fixed_exits(fixed: Sequence[Sequence[int]] | None, rows: int, num_layers: int) -> None:
    """Raise ValueError for exits given in advance that are not one layer, 1 to num_layers, for every row."""
    for position, layers in enumerate(fixed or ()):
        if len(layers) != rows or not all(1 <= layer <= num_layers for layer in layers):
            raise ValueError(
                f"fixed_exit_layers must hold for every new token {rows} layers, one a row, of 1 to {num_layers}, got "
                f"{list(layers)} at position {position}."
            )


def check_cache(given: Mapping[str, Any], *configs: Any) -> None:
    """Raise ValueError for a cache that is asked for to save memory (or, `paged`, another loop), which is not used.

    Args:
        given: keywords of the call. What they say counts, None too.
        *configs: generation configs of the call and of the model: the first that says something counts, else.
    """
    name = "cache_implementation"
    if name in given:
        implementation = given[name]
    else:
        implementation = next((found for config in configs if (found := getattr(config, name, None))), None)
    if implementation == "quantized" or (implementation or "").startswith(("paged", "offloaded")):
        raise ValueError(
            f"{name} must be dynamic or static with exits, got {implementation}: skipped layers fill a cache of their "
            f"own. Leave it out; give {name}=None where the model's generation_config has it."
        )


def check_search(config: Any, mode: str) -> None:
    """Raise ValueError for ways to search other than greedy and drawn tokens, and outputs that there are none of."""
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams must be 1 with exits, got {config.num_beams}: beams of one text would exit at different "
            "layers and could not share their keys and values. Take num_beams=1, or the backbone's own generate."
        )
    for name in OTHER_SEARCHES:
        if getattr(config, name, None):
            raise ValueError(f"{name} does not go with exits, got {getattr(config, name)}. Leave it out.")
    if config.do_sample and mode == "lossless":
        raise ValueError('do_sample must be False in mode "lossless", got True: it verifies greedy text.')
    if mode == "lossless" and (config.output_scores or config.output_logits):
        raise ValueError(
            'output_scores and output_logits must be False in mode "lossless", which keeps no logits.'
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} must be False with exits, got True: skipped layers have none.")


def check_adapters(model: Any) -> None:
    """Raise ValueError for soft prompts."""
    caller = getattr(model.prepare_inputs_for_generation, "__self__", None)  # peft's, while it generates
    adapter: Any = getattr(caller, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"adapters must not be soft prompts with exits, got {adapter.peft_type.value}. Generate inside "
            "disable_adapter(), or train LoRA adapters."
        )


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for prompts that are no token ids padded on the left, at positions that begin with 0.

    Args:
        input_ids, attention_mask: (batch, tokens).
        model_kwargs: what else transformers prepared.
    """
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds does not go with exits. Give input_ids.")
    for name in CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{name} must be empty with exits: skipped layers fill a cache of their own. Give whole prompts."
            )
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids must hold at least one token per row, got none.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask must have its padding on the left, got zeros behind ones. "
            'Set tokenizer.padding_side = "left".'
        )
    shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = model_kwargs.get("position_ids")  # given, or counted by transformers
    # Of another shape are those of an assistant's earlier text.
    counts = (
        positions is None or positions.shape != shown.shape or positions_of(shown).eq(positions)[shown != 0]
    )
    if not bool(torch.as_tensor(counts).all()):
        raise ValueError(
            "position_ids must count the tokens of each row from 0 with exits, got others. Leave them out."
        )
