"""The supported Hugging Face encoders as one table: how to embed, how to call one layer, what follows a row.

An early-exit model runs an encoder layer by layer and lets rows of the batch exit in between. Everything
that flows from layer to layer is one `EncoderState`; each model type is one `Architecture` row that says how
the state is made from token ids and how one layer turns it into the next hidden states. Layer by layer the
states equal the entries 1..L of Hugging Face's own `output_hidden_states`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from consistentee.backbones.limits import BEHIND_PADDING, longest_input
from consistentee.backbones.loading import load_pretrained, unsupported_type


@dataclass
class EncoderState:
    """Everything that flows from one encoder layer to the next.

    Args:
        hidden_states: (batch, tokens, hidden) float, what the embeddings or the last layer that ran gave.
        attention_mask: (batch, tokens) int64, 1 = real token, 0 = padding; what pooling needs.
        per_row: what the layers need of each row, batch first: the masks in the form that the attention
            implementation wants, None where nothing is masked.
        shared: what is the same for all rows: position biases, rotary tables, relative positions.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    per_row: dict[str, Tensor | None] = field(default_factory=dict[str, Tensor | None])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])

    def select(self, rows: Tensor) -> EncoderState:
        """Keep some rows of the batch: hidden states and masks follow, what is shared stays as it is.

        Args:
            rows: (kept,) int64, indices into the batch, in the order in which the rows shall stand.

        Returns:
            A state of `kept` rows; this one is left as it was.

        Raises:
            ValueError: `rows` is not a vector of int64 indices.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows must be a vector of int64 indices, got shape {tuple(rows.shape)} and {rows.dtype}. "
                "Turn a boolean mask into indices with nonzero()."
            )
        return EncoderState(
            hidden_states=self.hidden_states.index_select(0, rows),
            attention_mask=self.attention_mask.index_select(0, rows),
            per_row={
                name: None if t is None else t.index_select(0, rows) for name, t in self.per_row.items()
            },
            shared=self.shared,
        )

    def without_history(self) -> EncoderState:
        """The same state, through which no gradient goes back."""
        return replace(
            self,
            hidden_states=self.hidden_states.detach(),
            per_row={name: None if mask is None else mask.detach() for name, mask in self.per_row.items()},
            shared={
                key: part.detach() if isinstance(part, Tensor) else part for key, part in self.shared.items()
            },
        )


EmbedFunction = Callable[[PreTrainedModel, Tensor, Tensor, Tensor | None], EncoderState]
LayerFunction = Callable[[PreTrainedModel, int, EncoderState], Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row of the table: what is particular to one model type.

    Args:
        model_type: the `model_type` of the Hugging Face config.
        layers: path of the list of layers inside the base model.
        embed: (backbone, input_ids, attention_mask, token_type_ids) to the state before the first layer.
        run_layer: (backbone, layer_index, state) to the hidden states after that layer.
        pooling: `cls` where pretraining taught the first token to stand for the sentence, `mean` elsewhere.
        has_pooler: the base model builds a pooler unless told not to.
        embedding_projection: path of the linear map from embedding size to hidden size, if the type has one.
    """

    model_type: str
    layers: str
    embed: EmbedFunction
    run_layer: LayerFunction
    pooling: Literal["cls", "mean"]
    has_pooler: bool = False
    embedding_projection: str | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """What transformers' Auto classes are told."""
        return {"add_pooling_layer": False} if self.has_pooler else {}


# --- Embedding: token ids to the state before the first layer -------------------------------------


def _embed_tokens(
    backbone: PreTrainedModel, input_ids: Tensor, token_type_ids: Tensor | None, **options: Tensor
) -> Tensor:
    """Run the embedding module; token types go in only where it tells at least two of them apart.

    Token ids may already be vectors, (batch, tokens, embedding size), as prompt tuning makes them.
    """
    embeddings = backbone.get_submodule("embeddings")
    type_table = getattr(embeddings, "token_type_embeddings", None)
    if token_type_ids is not None and type_table is not None and type_table.num_embeddings > 1:
        options["token_type_ids"] = token_type_ids
    if input_ids.is_floating_point():
        return embeddings(input_ids=None, inputs_embeds=input_ids, **options)
    return embeddings(input_ids, **options)


def _row_mask(mask: object) -> Tensor | None:
    """Let through a mask that rows can be selected from."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise ValueError(
        f"attn_implementation must give masks as tensors, got {type(mask).__name__}. "
        'Load the backbone with attn_implementation="sdpa" or "eager".'
    )


def embed_tokens(
    backbone: PreTrainedModel, input_ids: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """Embed and map the embedding size to the hidden size where the two differ: what goes into the first layer.

    Args:
        backbone: a base model of a type whose embeddings need no mask: all but deberta-v2.
        input_ids: (batch, tokens) int64, padded with the model's padding id.
        token_type_ids: (batch, tokens) int64, ignored where the backbone does not tell them apart.

    Returns:
        (batch, tokens, hidden).
    """
    hidden_states = _embed_tokens(backbone, input_ids, token_type_ids)
    projection = embedding_projection(backbone)
    return hidden_states if projection is None else projection(hidden_states)


def _embed_plain(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> EncoderState:
    """Embed; one mask serves every layer."""
    hidden_states = embed_tokens(backbone, input_ids, token_type_ids)
    mask = create_bidirectional_mask(backbone.config, hidden_states, attention_mask)
    return EncoderState(hidden_states, attention_mask, per_row={"layer_mask": _row_mask(mask)})


def _embed_mpnet(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> EncoderState:
    """Embed and compute the relative position bias, (1, heads, tokens, tokens): one copy serves every row."""
    state = _embed_plain(backbone, input_ids, attention_mask, token_type_ids)
    encoder = cast(Any, backbone.get_submodule("encoder"))
    state.shared["position_bias"] = encoder.compute_position_bias(state.hidden_states[:1])
    return state


def _embed_deberta_v2(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> EncoderState:
    """Embed with padding set to zero; relative positions and their embeddings serve every row and layer."""
    encoder = cast(Any, backbone.get_submodule("encoder"))
    hidden_states = _embed_tokens(backbone, input_ids, token_type_ids, mask=attention_mask)
    return EncoderState(
        hidden_states,
        attention_mask,
        per_row={"layer_mask": encoder.get_attention_mask(attention_mask)},  # (batch, 1, tokens, tokens)
        shared={
            "relative_pos": encoder.get_rel_pos(hidden_states),  # (1, tokens, tokens)
            "rel_embeddings": encoder.get_rel_embedding(),  # (distances, hidden)
        },
    )


def _embed_modernbert(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
) -> EncoderState:
    """Embed; one mask per attention type for each row, one rotary table per attention type for all rows."""
    hidden_states = _embed_tokens(backbone, input_ids, token_type_ids)
    config = cast(Any, backbone.config)
    rotary = backbone.get_submodule("rotary_emb")
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)  # (1, tokens)
    create_mask = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }
    state = EncoderState(hidden_states, attention_mask)
    for attention_type in sorted(set(config.layer_types)):
        mask = create_mask[attention_type](config, hidden_states, attention_mask)
        state.per_row[attention_type] = _row_mask(mask)
        # cos and sin, each (1, tokens, head size)
        state.shared[attention_type] = rotary(hidden_states, position_ids, attention_type)
    return state


# --- Layers: one state to the next hidden states --------------------------------------------------


def _run_plain(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> Tensor:
    return encoder_layers(backbone)[layer_index](state.hidden_states, state.per_row["layer_mask"])


def _run_albert(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> Tensor:
    """Run the group of shared weights that stands for this layer."""
    groups = encoder_layers(backbone)
    group_index = int(layer_index / (num_layers(backbone) / len(groups)))
    return groups[group_index](state.hidden_states, state.per_row["layer_mask"])


def _run_mpnet(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> Tensor:
    layer = encoder_layers(backbone)[layer_index]
    return layer(state.hidden_states, state.per_row["layer_mask"], state.shared["position_bias"])[0]


def _run_deberta_v2(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> Tensor:
    """Run a layer; a convolution over the embeddings, where the config has one, joins after the first."""
    layer = encoder_layers(backbone)[layer_index]
    hidden_states = layer(
        state.hidden_states,
        state.per_row["layer_mask"],
        relative_pos=state.shared["relative_pos"],
        rel_embeddings=state.shared["rel_embeddings"],
    )[0]
    convolution = getattr(backbone.get_submodule("encoder"), "conv", None)
    if layer_index == 0 and convolution is not None:
        hidden_states = convolution(state.hidden_states, hidden_states, state.attention_mask)
    return hidden_states


def _run_modernbert(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> Tensor:
    """Run a layer; the final norm belongs to the last one, as in `last_hidden_state`."""
    layer = cast(Any, encoder_layers(backbone)[layer_index])
    hidden_states = layer(
        state.hidden_states,
        attention_mask=state.per_row[layer.attention_type],
        position_embeddings=state.shared[layer.attention_type],
    )
    if layer_index == num_layers(backbone) - 1:
        hidden_states = backbone.get_submodule("final_norm")(hidden_states)
    return hidden_states


# --- The table ------------------------------------------------------------------------------------

_ROWS = (
    Architecture("bert", "encoder.layer", _embed_plain, _run_plain, "cls", has_pooler=True),
    Architecture("roberta", "encoder.layer", _embed_plain, _run_plain, "mean", has_pooler=True),
    Architecture("xlm-roberta", "encoder.layer", _embed_plain, _run_plain, "mean", has_pooler=True),
    Architecture("camembert", "encoder.layer", _embed_plain, _run_plain, "mean", has_pooler=True),
    Architecture("distilbert", "transformer.layer", _embed_plain, _run_plain, "mean"),
    Architecture(
        "albert",
        "encoder.albert_layer_groups",
        _embed_plain,
        _run_albert,
        "cls",
        has_pooler=True,
        embedding_projection="encoder.embedding_hidden_mapping_in",
    ),
    Architecture(
        "electra",
        "encoder.layer",
        _embed_plain,
        _run_plain,
        "mean",
        embedding_projection="embeddings_project",
    ),
    Architecture("mpnet", "encoder.layer", _embed_mpnet, _run_mpnet, "mean", has_pooler=True),
    Architecture(
        "deberta-v2",
        "encoder.layer",
        _embed_deberta_v2,
        _run_deberta_v2,
        "mean",
        embedding_projection="embeddings.embed_proj",
    ),
    Architecture("modernbert", "layers", _embed_modernbert, _run_modernbert, "mean"),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(ARCHITECTURES)


def architecture_of(config_or_model_type: PreTrainedConfig | str) -> Architecture:
    """Find the row of a backbone.

    Args:
        config_or_model_type: the backbone's config, or its model type, such as `"bert"`.

    Returns:
        The row of the table.

    Raises:
        ValueError: the type is not in the table, or the config makes a decoder of it.
    """
    if isinstance(config_or_model_type, str):
        model_type = config_or_model_type
    else:
        model_type = config_or_model_type.model_type
        if getattr(config_or_model_type, "is_decoder", False):
            raise ValueError(
                "A backbone must be an encoder, got a config with is_decoder=True. Set it to False."
            )
    if model_type not in ARCHITECTURES:
        raise unsupported_type("Backbone", model_type, SUPPORTED_MODEL_TYPES)
    return ARCHITECTURES[model_type]


# --- Running a backbone ---------------------------------------------------------------------------


def num_layers(backbone: PreTrainedModel) -> int:
    """Count the layers an input passes through; albert's shared layer counts each time it runs."""
    return backbone.config.num_hidden_layers


def encoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """Give the list of layers; for albert the list of weight-sharing groups, shorter than `num_layers`."""
    return cast(nn.ModuleList, backbone.get_submodule(architecture_of(backbone.config).layers))


def embedding_projection(backbone: PreTrainedModel) -> nn.Module | None:
    """Give the linear map from embedding size to hidden size; None where the backbone has none."""
    path = architecture_of(backbone.config).embedding_projection
    if path is None:
        return None
    parent_path, _, name = path.rpartition(".")
    return getattr(backbone.get_submodule(parent_path), name, None)


def embed(
    backbone: PreTrainedModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> EncoderState:
    """Turn token ids into the state before the first layer.

    Args:
        backbone: a base model of a supported type.
        input_ids: (batch, tokens) int64; None with `inputs_embeds`.
        attention_mask: (batch, tokens), 1 = real token, 0 = padding; None: every token is real.
        token_type_ids: (batch, tokens) int64, 0 or 1 for the first or second text; ignored where the backbone
            does not tell them apart.
        inputs_embeds: (batch, tokens, embedding size) float, what the token embeddings gave, in place of ids.

    Returns:
        The state that `run_layer` with layer index 0 takes.

    Raises:
        ValueError: the type is not supported, the shapes do not fit, or a row is longer than the backbone's positions.
    """
    architecture = architecture_of(backbone.config)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids or inputs_embeds must be given, and not both.")
    name, tokens, axes = "input_ids", input_ids, 2
    if inputs_embeds is not None:
        name, tokens, axes = "inputs_embeds", inputs_embeds, 3
    if tokens is None or tokens.ndim != axes:
        form = "(batch, tokens)" if axes == 2 else "(batch, tokens, embedding size)"
        raise ValueError(
            f"{name} must have the shape {form}, got {None if tokens is None else tuple(tokens.shape)}."
        )
    shape = tokens.shape[:2]
    for part, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{part} must have the shape of {name}, {tuple(shape)}, got {tuple(tensor.shape)}."
            )
    mask = torch.ones(shape, dtype=torch.int64, device=tokens.device)
    mask = mask if attention_mask is None else attention_mask.to(torch.int64)
    _check_positions(backbone, mask)
    return architecture.embed(backbone, tokens, mask, token_type_ids)


def _check_positions(backbone: PreTrainedModel, mask: Tensor) -> None:
    """Refuse rows for which the table of positions is too short; padding takes none where it has its own entry."""
    longest, width = longest_input(backbone.config), mask.shape[1]
    if longest is None or width <= longest:
        return
    tokens = int(mask.sum(1).max()) if backbone.config.model_type in BEHIND_PADDING else width
    if tokens > longest:
        raise ValueError(
            f"input_ids must have at most {longest} tokens a row, the positions of the backbone, got {tokens}. "
            f"Cut the texts: tokenizer(texts, truncation=True, max_length={longest})."
        )


def run_layer(backbone: PreTrainedModel, layer_index: int, state: EncoderState) -> EncoderState:
    """Run one layer.

    Args:
        backbone: a base model of a supported type.
        layer_index: 0-based, 0 to `num_layers(backbone) - 1`.
        state: the state before this layer; left as it was.

    Returns:
        The state after this layer; after the last layer its hidden states are HF's `last_hidden_state`.

    Raises:
        ValueError: there is no such layer.
    """
    if not 0 <= layer_index < num_layers(backbone):
        raise ValueError(f"layer_index must be in [0, {num_layers(backbone) - 1}], got {layer_index}.")
    if state.hidden_states.shape[0] == 0:  # every row has exited; the layers cannot reshape an empty batch
        return replace(state)
    hidden_states = architecture_of(backbone.config).run_layer(backbone, layer_index, state)
    return replace(state, hidden_states=hidden_states)


# --- Making a backbone ----------------------------------------------------------------------------


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a backbone with random weights, without a pooler.

    Args:
        config: the config of a supported encoder.

    Raises:
        ValueError: the type is not supported.
    """
    return cast(PreTrainedModel, AutoModel.from_config(config, **architecture_of(config).load_options))


def load_backbone(name_or_path: str | Path, **hub_kwargs: Any) -> PreTrainedModel:
    """Load a pretrained encoder, without its pooler or task head; arguments and errors as in `load_pretrained`."""
    return load_pretrained(AutoModel, name_or_path, row_of=architecture_of, **hub_kwargs)
