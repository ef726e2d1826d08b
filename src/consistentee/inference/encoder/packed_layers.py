"""Encoder layers on packed rows: BERT and its kin, with fused projections and without padding.

One table says where each model type keeps the parts of a layer; the layer itself is written once. Types that are not
in the table (relative attention of deberta-v2, sliding windows of modernbert) run padded, see `torch_backend.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from consistentee.backbones.encoders import encoder_layers, num_layers
from consistentee.inference.encoder.packing import Group, Layout, PackedBatch
from consistentee.inference.encoder.prepacked_linear import Linear, make_linear

softmax_attention = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class PackedLayerParts:
    """Paths of the parts of one post-norm layer inside its module."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    activation: str
    down: str
    output_norm: str


_BERT = PackedLayerParts(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    output_norm="output.LayerNorm",
)
_MPNET = PackedLayerParts(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    output_norm="output.LayerNorm",
)
_DISTILBERT = PackedLayerParts(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)
_ALBERT = PackedLayerParts(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_output="attention.dense",
    attention_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    output_norm="full_layer_layer_norm",
)
LAYER_PARTS: dict[str, PackedLayerParts] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
    "mpnet": _MPNET,
}
"""Model types that run packed."""


class PackedLayers:
    """The layers of a backbone, ready to run on packed rows.

    Args:
        backbone: of a type in `LAYER_PARTS`; its weights are copied into the layout that the device likes.
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        device: where they run.
    """

    def __init__(self, backbone: PreTrainedModel, dtype: str, device: torch.device) -> None:
        config: Any = backbone.config
        self.num_heads = int(getattr(config, "num_attention_heads", None) or config.n_heads)
        parts = LAYER_PARTS[config.model_type]
        modules = [list(inner_layers(module)) for module in encoder_layers(backbone)]
        built = [[_Layer(module, parts, dtype, device) for module in group] for group in modules]
        depth = num_layers(backbone)  # albert: fewer groups of weights than layers
        self.layers = [built[int(index / (depth / len(built)))] for index in range(depth)]
        self._position_bias = PositionBias(backbone, dtype, device) if config.model_type == "mpnet" else None

    def run_layer(self, layer_index: int, batch: PackedBatch) -> PackedBatch:
        """The batch after one more layer, 0-based."""
        hidden_states = batch.hidden_states
        for layer in self.layers[layer_index]:
            hidden_states = layer(hidden_states, lambda qkv: self._attend(qkv, batch.layout))
        return PackedBatch(hidden_states, batch.layout)

    def _attend(self, projected: Tensor, layout: Layout) -> Tensor:
        """Queries, keys and values (tokens, 3 * hidden) to attention's output (tokens, hidden), group by group."""
        groups = layout.groups
        if len(groups) == 1 and groups[0].padding is None and layout.tokens == len(projected):
            return self._attend_group(projected, groups[0])
        hidden_size = projected.shape[1] // 3
        output = projected.new_empty(len(projected), hidden_size)
        output[layout.tokens :] = 0
        for group in groups:
            if group.padding is None:
                found = self._attend_group(projected[group.start : group.end], group)
            else:
                gather, scatter, _ = group.padding
                found = self._attend_group(projected.index_select(0, gather), group).index_select(0, scatter)
            output[group.start : group.end] = found
        return output

    def _attend_group(self, projected: Tensor, group: Group) -> Tensor:
        """(rows * width, 3 * hidden) to (rows * width, hidden)."""
        shape = (group.rows, group.width, 3, self.num_heads, -1)
        query, key, value = (
            projected.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (rows, heads, width, size)
        output = softmax_attention(query, key, value, attn_mask=self._mask(group, projected.dtype))
        return output.transpose(1, 2).reshape(len(projected), -1)

    def _mask(self, group: Group, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention scores, (rows or 1, heads or 1, width or 1, width)."""
        bias = None if self._position_bias is None else self._position_bias(group.width)
        if group.padding is None:
            return bias
        is_token = group.padding[2][:, None, None, :]
        if bias is None:
            return is_token
        return torch.where(is_token, bias, torch.finfo(dtype).min)


class _Layer:
    """Attention and feed-forward of one layer, post-norm."""

    def __init__(self, module: nn.Module, parts: PackedLayerParts, dtype: str, device: torch.device) -> None:
        def part(path: str) -> Any:
            return module.get_submodule(path)

        def linear(path: str) -> Linear:
            return make_linear(part(path).weight, part(path).bias, dtype, device)

        inputs = [part(path) for path in (parts.query, parts.key, parts.value)]
        weight, bias = (torch.cat([getattr(p, name) for p in inputs]) for name in ("weight", "bias"))
        self.project = make_linear(weight, bias, dtype, device)
        self.attention_output = linear(parts.attention_output)
        self.attention_norm = _norm(part(parts.attention_norm), dtype, device)
        self.up = linear(parts.up)
        self.activate = _activation(part(parts.activation))
        self.down = linear(parts.down)
        self.output_norm = _norm(part(parts.output_norm), dtype, device)

    def __call__(self, hidden_states: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        attended = self.attention_output(attend(self.project(hidden_states)))
        hidden_states = self.attention_norm(attended.add_(hidden_states))
        return self.output_norm(self.down(self.activate(self.up(hidden_states))).add_(hidden_states))


class PositionBias:
    """MPNet's relative position bias, (1, heads, width, width), computed once for the widest rows seen."""

    def __init__(self, backbone: PreTrainedModel, dtype: str, device: torch.device) -> None:
        encoder: Any = backbone.get_submodule("encoder")
        self._compute: Callable[[Tensor], Tensor] = encoder.compute_position_bias
        self._home = encoder.relative_attention_bias.weight.device
        self._kind, self._device = storage_dtype(dtype), device
        self._widest = torch.empty(1, 1, 0, 0)

    @torch.no_grad()
    def __call__(self, width: int) -> Tensor:
        """(1, heads, width, width)."""
        widest = self._widest
        if widest.shape[-1] < width:
            size = -(-width // 64) * 64
            widest = self._compute(torch.empty(1, size, 1, device=self._home)).to(self._device, self._kind)
            self._widest = widest  # one assignment: another thread sees the old one or the new one
        return widest[:, :, :width, :width]


def storage_dtype(dtype: str) -> torch.dtype:
    """What hidden states are kept in: int8 maps take and give float32."""
    return torch.float32 if dtype == "int8" else getattr(torch, dtype)


def inner_layers(module: nn.Module) -> list[nn.Module]:
    """The layers inside an entry of the list: albert's are groups."""
    inner = getattr(module, "albert_layers", None)
    return [module] if inner is None else list(cast(nn.ModuleList, inner))


def _norm(norm: nn.LayerNorm, dtype: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    kind = storage_dtype(dtype)
    weight, bias = (parameter.detach().to(device, kind) for parameter in (norm.weight, norm.bias))
    shape, eps = list(norm.normalized_shape), norm.eps
    return lambda rows: torch.nn.functional.layer_norm(rows, shape, weight, bias, eps)


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """In place where that is known to be the same."""
    if type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu:
        return torch.ops.aten.gelu_
    return module
