"""The supported Hugging Face causal language models as one table: where each keeps its parts, how one layer is called.

Two readers. Training runs the Hugging Face modules themselves, layer by layer (`decoder_state`, `run_decoder_layer`),
with gradients, dropout and adapters. Generation runs the same weights as plain functions (`functional_decoder`), which
needs to know where norms and projections lie: `LayerParts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from consistentee.backbones.limits import longest_input
from consistentee.backbones.loading import load_pretrained, unsupported_type

FULL, SLIDING = "full_attention", "sliding_attention"
CACHES = ("cache", "past_key_values")
"""What transformers calls keys and values that are kept, since 5.24 and before."""
CACHE = next(name for name in CACHES if name in signature(create_causal_mask).parameters)
"""What the installed version calls them."""


@dataclass(frozen=True)
class LayerParts:
    """Where one decoder layer keeps its parts: paths inside the layer's module, "" where it has none.

    Args:
        input_norm: norm before attention.
        query, key, value: projections; a fused one stands in `query` alone.
        fused: how a fused projection lays out its outputs: all queries, then all keys, then all values (`blocks`), or
            query, key and value of one head after the other (`heads`).
        query_norm, key_norm: norms of each head.
        attention_output: projection behind attention.
        attention_output_norm: norm of what attention adds.
        mlp_norm: norm before the MLP.
        gate: gate projection of a gated MLP.
        up, down: the MLP's projections.
        activation: the MLP's activation module.
        mlp_output_norm: norm of what the MLP adds.
        attention: the attention module itself, which knows its scaling.
        attention_cap: its attribute that caps scores; "" where it has none, or has one and leaves it aside (gemma3).
    """

    input_norm: str
    query: str
    attention_output: str
    mlp_norm: str
    up: str
    down: str
    activation: str
    attention: str
    key: str = ""
    value: str = ""
    fused: Literal["", "blocks", "heads"] = ""
    query_norm: str = ""
    key_norm: str = ""
    attention_output_norm: str = ""
    gate: str = ""
    mlp_output_norm: str = ""
    attention_cap: str = ""


@dataclass(frozen=True)
class DecoderArchitecture:
    """One row of the table: what is particular to one model type.

    Args:
        model_type: the `model_type` of the Hugging Face config.
        parts: where a layer keeps its parts.
        base: path of the base model inside the causal language model.
        layers, embeddings, final_norm: paths inside the base model.
        norm: kind of the norms: `rms`, `rms_plus_one` (weights are stored minus one) or `layer`.
        positions: path of a table of learned positions, "" where positions are rotary.
        sliding: which layers attend to a window alone: none, all where the config has a `sliding_window`, or those that
            the config's `layer_types` name (`by_layer`); where Hugging Face's model does not read them, they stand in
            the config without effect.
        rotary_per_layer_type: sliding and full layers rotate by different angles.
        load_options: what transformers' Auto classes are told.
    """

    model_type: str
    parts: LayerParts
    base: str = "model"
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    positions: str = ""
    sliding: Literal["none", "all", "by_layer"] = "none"
    rotary_per_layer_type: bool = False
    load_options: dict[str, Any] = field(default_factory=dict[str, Any])


_LLAMA = LayerParts(
    input_norm="input_layernorm",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
)
_QWEN3 = replace(_LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
_GEMMA2 = replace(
    _LLAMA,
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    attention_cap="attn_logit_softcapping",
)
_GEMMA3 = replace(_GEMMA2, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", attention_cap="")
_GPT2 = LayerParts(
    input_norm="ln_1",
    attention="attn",
    query="attn.c_attn",
    fused="blocks",
    attention_output="attn.c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    activation="mlp.act",
)
_GPT_NEOX = LayerParts(
    input_norm="input_layernorm",
    attention="attention",
    query="attention.query_key_value",
    fused="heads",
    attention_output="attention.dense",
    mlp_norm="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    activation="mlp.act",
)

_ROWS = (
    DecoderArchitecture("llama", _LLAMA),
    DecoderArchitecture("mistral", _LLAMA, sliding="all"),
    DecoderArchitecture("qwen2", _LLAMA, sliding="by_layer"),
    DecoderArchitecture("qwen3", _QWEN3, sliding="by_layer"),
    DecoderArchitecture(
        "gpt2",
        _GPT2,
        base="transformer",
        layers="h",
        embeddings="wte",
        final_norm="ln_f",
        norm="layer",
        positions="wpe",
    ),
    DecoderArchitecture(
        "gpt_neox",
        _GPT_NEOX,
        base="gpt_neox",
        embeddings="embed_in",
        final_norm="final_layer_norm",
        norm="layer",
    ),
    DecoderArchitecture("gemma2", _GEMMA2, norm="rms_plus_one", sliding="by_layer"),
    DecoderArchitecture(
        "gemma3_text", _GEMMA3, norm="rms_plus_one", sliding="by_layer", rotary_per_layer_type=True
    ),
)
DECODERS: dict[str, DecoderArchitecture] = {row.model_type: row for row in _ROWS}
SUPPORTED_DECODER_TYPES: tuple[str, ...] = tuple(DECODERS)


def decoder_architecture(config_or_model_type: PreTrainedConfig | str) -> DecoderArchitecture:
    """Find the row of a causal language model.

    Args:
        config_or_model_type: its config, or its model type, such as `"llama"`.

    Raises:
        ValueError: the type is not in the table, or the config asks for what no row has.
    """
    by_name = isinstance(config_or_model_type, str)
    model_type = config_or_model_type if by_name else config_or_model_type.model_type
    if model_type not in DECODERS:
        raise unsupported_type("Causal language model", model_type, SUPPORTED_DECODER_TYPES)
    if not by_name:
        for name in ("add_cross_attention", "use_bidirectional_attention"):
            if getattr(config_or_model_type, name, False):
                raise ValueError(f"{name} must be false for a causal language model, got true.")
    return DECODERS[model_type]


def decoder_base(model: PreTrainedModel) -> Any:
    """The base model: embeddings, layers and final norm."""
    return model.get_submodule(decoder_architecture(model.config).base)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers."""
    return cast(nn.ModuleList, decoder_base(model).get_submodule(decoder_architecture(model.config).layers))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm behind the last layer."""
    return decoder_base(model).get_submodule(decoder_architecture(model.config).final_norm)


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The map from normed states to logits."""
    return cast(nn.Linear, model.get_output_embeddings())


def soften_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What stands between the head's logits and the model's: gemma's soft cap, nothing elsewhere."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def keep_soft_cap(model: PreTrainedModel) -> None:
    """Compute attention in the one way that knows gemma2's soft cap of its scores.

    SDPA leaves it out, and transformers before 5.21 takes SDPA for gemma2 all the same.
    """
    config: Any = model.config
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of every layer, `full_attention` or `sliding_attention`, as Hugging Face's model has it."""
    values: Any = config
    depth = int(values.num_hidden_layers)
    sliding = DECODERS[values.model_type].sliding
    if sliding == "by_layer":
        return [str(kind) for kind in values.layer_types[:depth]]
    slides = sliding == "all" and values.sliding_window is not None
    return [SLIDING if slides else FULL] * depth


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a sliding layer sees, itself among them; None where no layer slides."""
    if SLIDING not in layer_types(config):
        return None
    return int(cast(Any, config).sliding_window)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position of every token among the real ones of its row, (batch, tokens) int64; padding counts as position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def decoder_inputs(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What goes into the first layer: (batch, tokens) ids and positions -> (batch, tokens, hidden)."""
    row, base = decoder_architecture(model.config), decoder_base(model)
    hidden_states = base.get_submodule(row.embeddings)(input_ids)
    if row.positions:
        hidden_states = hidden_states + base.get_submodule(row.positions)(position_ids)
    return hidden_states


def rotary_tables(
    model: PreTrainedModel, like: Tensor, position_ids: Tensor, rotary: Any = None
) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Cosines and sines of positions for each attention type in use, each (batch, tokens, rotated size).

    `rotary` stands in for the model's own module of angles.
    """
    row, base = decoder_architecture(model.config), decoder_base(model)
    kinds = dict.fromkeys(layer_types(model.config))
    if row.positions:
        return dict.fromkeys(kinds)
    rotary = rotary or base.rotary_emb
    if row.rotary_per_layer_type:
        return {kind: rotary(like, position_ids, kind) for kind in kinds}
    tables = rotary(like, position_ids)
    return dict.fromkeys(kinds, tables)


def rotary_depends_on_length(model: PreTrainedModel) -> bool:
    """Whether angles change with the length of the text so far: `dynamic` and `longrope` scaling."""
    kinds = getattr(getattr(decoder_base(model), "rotary_emb", None), "rope_type", "default")
    return any("dynamic" in kind or kind == "longrope" for kind in _values(kinds))


def _values(kinds: Any) -> list[str]:
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])]


@dataclass
class DecoderState:
    """Everything that flows from one Hugging Face layer to the next in training.

    Args:
        hidden_states: (batch, tokens, hidden).
        position_ids: (batch, tokens) int64.
        masks: by attention type, as the attention implementation wants them.
        rotary: by attention type, cosines and sines; None for learned positions.
    """

    hidden_states: Tensor
    position_ids: Tensor
    masks: dict[str, Any] = field(default_factory=dict[str, Any])
    rotary: dict[str, Any] = field(default_factory=dict[str, Any])


def decoder_state(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> DecoderState:
    """Token ids to the state before the first layer.

    Args:
        model: a causal language model of a type in `DECODERS`.
        input_ids: (batch, tokens) int64.
        attention_mask: (batch, tokens), 1 for real tokens, padding on either side; all ones if missing.

    Raises:
        ValueError: a row is longer than the model's table of positions.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    position_ids = positions_of(attention_mask)
    longest = longest_input(model.config)
    if longest is not None and input_ids.shape[1] > longest and int(position_ids.max()) >= longest:
        raise ValueError(
            f"input_ids must have at most {longest} tokens a row, the positions of the model, "
            f"got {int(position_ids.max()) + 1}."
        )
    hidden_states = decoder_inputs(model, input_ids, position_ids)
    dropout = getattr(decoder_base(model), "drop", None) or getattr(decoder_base(model), "emb_dropout", None)
    if dropout is not None:
        hidden_states = dropout(hidden_states)
    make_mask = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
    masks = {
        kind: make_mask[kind](
            model.config,
            hidden_states,
            attention_mask,
            None,  # no cache
            None,  # nor positions, which tell of packed sequences
        )
        for kind in dict.fromkeys(layer_types(model.config))
    }
    rotary = rotary_tables(model, hidden_states, position_ids)
    return DecoderState(hidden_states, position_ids, masks, rotary)


def run_decoder_layer(
    model: PreTrainedModel, layer_index: int, state: DecoderState, *, checkpointed: bool = False
) -> Tensor:
    """Hidden states after one more layer, 0-based; the final norm is not applied.

    Args:
        model: as in `decoder_state`.
        layer_index: of the layer.
        state: before it.
        checkpointed: compute the layer again in the backward pass instead of keeping what is inside it.
    """
    layer = decoder_layers(model)[layer_index]
    kind = layer_types(model.config)[layer_index]
    options = {"attention_mask": state.masks[kind], "position_ids": state.position_ids, "use_cache": False}
    if state.rotary[kind] is not None:
        options["position_embeddings"] = state.rotary[kind]
    if checkpointed and torch.is_grad_enabled():
        return cast(
            Tensor,
            checkpoint(lambda hidden: layer(hidden, **options), state.hidden_states, use_reentrant=False),
        )
    return layer(state.hidden_states, **options)


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a causal language model with random weights.

    Raises:
        ValueError: the type is not supported.
    """
    decoder_architecture(config)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def load_decoder(name_or_path: str | Path, **hub_kwargs: Any) -> PreTrainedModel:
    """Load a pretrained causal language model; arguments and errors as in `load_pretrained`."""
    return load_pretrained(AutoModelForCausalLM, name_or_path, row_of=decoder_architecture, **hub_kwargs)
