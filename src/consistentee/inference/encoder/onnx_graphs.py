"""Encoder layers as ONNX graphs, written from a model's weights.

What ONNX Runtime's own optimiser makes of an exported BERT (fused attention, skip connections with their norm, bias
with GELU) is written down directly, one layer at a time, so that rows can exit between layers. The same layers can be
written in standard operators, and with weights of 8 bits; see `onnx_builder.GraphStyle`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from consistentee.backbones.encoders import embedding_projection
from consistentee.backbones.limits import BEHIND_PADDING
from consistentee.errors import SettingError
from consistentee.inference.encoder.onnx_builder import Graph
from consistentee.inference.encoder.packed_layers import PackedLayerParts

HIDDEN, LENGTHS, POSITION_BIAS, TOKENS = "hidden_states", "lengths", "position_bias", "tokens"
"""Values: (rows, width, hidden); (rows,) int32; (1, heads, width, width); what pooling needs to know of the tokens."""

IDS, POSITIONS, TYPES = "input_ids", "positions", "token_type_ids"
"""Inputs of the embeddings, int64: (rows, width); (1, width), or (rows, width) where ids decide; (rows, width)."""


@dataclass(frozen=True)
class AttentionInputs:
    """What attention knows of the tokens beside their states.

    Args:
        lengths: (rows,) int32, real tokens of every row.
        position_bias: (1, heads, width, width), mpnet's; "" for none.
        mask: (rows, 1, 1, width), 0 at tokens, the lowest float at padding; for `composed_attention`, else "".
    """

    lengths: str
    position_bias: str = ""
    mask: str = ""


def composed_attention(graph: Graph, position_bias: bool) -> bool:
    """Whether attention is written in parts: standard operators, or 8 bits beside a bias that QAttention lacks."""
    return graph.style.portable or (graph.style.int8 and position_bias)


def add_embeddings(
    graph: Graph, backbone: PreTrainedModel, *, ids: str = IDS, positions: str = POSITIONS, types: str = ""
) -> str:
    """Word, position and type embeddings, their norm, and the map to the hidden size where the model has one.

    Args:
        graph: to add to.
        backbone: of a type in `LAYER_PARTS`.
        ids: (rows, width) int64.
        positions: (rows, width), (1, width) or (width,) int64.
        types: (rows, width) int64; "": every token is of type 0.

    Returns:
        (rows, width, hidden).
    """
    embeddings: Any = backbone.get_submodule("embeddings")
    words = graph.op("Gather", graph.constant(embeddings.word_embeddings.weight), ids)
    table = graph.constant(embeddings.position_embeddings.weight)
    summed = graph.op("Add", words, graph.op("Gather", table, positions))
    of_types = getattr(embeddings, "token_type_embeddings", None)
    if of_types is not None and types:
        summed = graph.op("Add", summed, graph.op("Gather", graph.constant(of_types.weight), types))
    elif of_types is not None:
        summed = graph.op("Add", summed, graph.constant(of_types.weight[0]))
    hidden_states = _norm(graph, summed, embeddings.LayerNorm)
    projection: Any = embedding_projection(backbone)
    if projection is None:
        return hidden_states
    mapped = graph.op("MatMul", hidden_states, graph.constant(projection.weight.T))
    return graph.op("Add", mapped, graph.constant(projection.bias))


def knows_token_types(backbone: PreTrainedModel) -> bool:
    """Whether a model tells token types apart."""
    types: Any = getattr(backbone.get_submodule("embeddings"), "token_type_embeddings", None)
    return types is not None and types.num_embeddings > 1


def padding_position(backbone: PreTrainedModel) -> int | None:
    """The padding id of roberta and its kin, which is its position as well; the other tokens count on from there.

    None for a model whose positions do not depend on the ids.
    """
    if backbone.config.model_type in BEHIND_PADDING:
        return int(cast(Any, backbone.get_submodule("embeddings")).padding_idx)
    return None


def add_positions(graph: Graph, ids: str, padding: int) -> str:
    """Positions as roberta and its kin count them, (rows, width): a padding id takes none, also inside a text.

    Args:
        graph: to add to.
        ids: (rows, width) int64.
        padding: of `padding_position`.
    """
    number = graph.constant(np.array(padding, np.int64))
    counts = graph.op("Cast", graph.op("Not", graph.op("Equal", ids, number)), to=7)
    passed = graph.op("CumSum", counts, graph.constant(np.array(1, np.int64)))
    return graph.op("Add", graph.op("Mul", passed, counts), number)


def add_layer(
    graph: Graph,
    hidden_states: str,
    module: nn.Module,
    parts: PackedLayerParts,
    num_heads: int,
    tokens: AttentionInputs,
) -> str:
    """One post-norm layer.

    Args:
        graph: to add to.
        hidden_states: (rows, width, hidden).
        module: the layer; `parts` says where it keeps what.
        parts: see `packed_layers`.
        num_heads: of its attention.
        tokens: what attention knows of them.

    Raises:
        SettingError: an activation that is not there.
    """

    def part(path: str) -> Any:
        return module.get_submodule(path)

    inputs = [part(path) for path in (parts.query, parts.key, parts.value)]
    weight, bias = (torch.cat([getattr(p, name) for p in inputs]) for name in ("weight", "bias"))
    attended = _attention(graph, hidden_states, weight, bias, num_heads, tokens)
    hidden_states = _add_and_norm(
        graph, attended, hidden_states, part(parts.attention_output), part(parts.attention_norm)
    )
    up = part(parts.up)
    raised = _map(graph, hidden_states, up.weight)
    activated = _activate(graph, raised, graph.constant(up.bias), part(parts.activation))
    return _add_and_norm(graph, activated, hidden_states, part(parts.down), part(parts.output_norm))


def _attention(
    graph: Graph, hidden_states: str, weight: Tensor, bias: Tensor, num_heads: int, tokens: AttentionInputs
) -> str:
    """Self-attention without its output map, (rows, width, hidden)."""
    if composed_attention(graph, bool(tokens.position_bias)):
        return _attention_in_parts(graph, hidden_states, weight, bias, num_heads, tokens)
    if graph.style.int8:
        states, scale, zero = graph.ops("DynamicQuantizeLinear", hidden_states, outputs=3)
        values, scales, zeros = _quantised(graph, weight)
        inputs = (states, values, graph.constant(bias), scale, scales, tokens.lengths, zero, zeros)
        return graph.op("QAttention", *inputs, fused=True, num_heads=num_heads)
    inputs = (hidden_states, graph.constant(weight.T), graph.constant(bias), tokens.lengths)
    behind = ("", tokens.position_bias) if tokens.position_bias else ()
    return graph.op("Attention", *inputs, *behind, fused=True, num_heads=num_heads)


def _attention_in_parts(
    graph: Graph, hidden_states: str, weight: Tensor, bias: Tensor, num_heads: int, tokens: AttentionInputs
) -> str:
    size = weight.shape[1] // num_heads
    projected = graph.op("Add", _map(graph, hidden_states, weight), graph.constant(bias))
    shape = graph.constant([0, 0, 3, num_heads, size])
    heads = graph.op("Transpose", graph.op("Reshape", projected, shape), perm=[2, 0, 3, 1, 4])
    query, key, value = (
        graph.op("Gather", heads, graph.constant(np.array(index, np.int64)), axis=0) for index in range(3)
    )  # (rows, heads, width, size)
    query = graph.op("Mul", query, graph.number(size**-0.5))
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    for addend in (tokens.position_bias, tokens.mask):
        scores = graph.op("Add", scores, addend) if addend else scores
    found = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    found = graph.op("Transpose", found, perm=[0, 2, 1, 3])
    return graph.op("Reshape", found, graph.constant([0, 0, num_heads * size]))


def _map(graph: Graph, inputs: str, weight: Tensor) -> str:
    """A linear map without its bias: (..., in) to (..., out); weight (out, in)."""
    if not graph.style.int8:
        return graph.op("MatMul", inputs, graph.constant(weight.T))
    values, scales, zeros = _quantised(graph, weight)
    if not graph.style.portable:
        return graph.op("DynamicQuantizeMatMul", inputs, values, scales, zeros, fused=True)
    states, scale, zero = graph.ops("DynamicQuantizeLinear", inputs, outputs=3)
    product = graph.op("MatMulInteger", states, values, zero, zeros)
    product = graph.op("Cast", product, to=1)
    return graph.op("Mul", product, graph.op("Mul", scale, scales))


def _quantised(graph: Graph, weight: Tensor) -> tuple[str, str, str]:
    """Weights (in, out) in 8 bits, with the scale and the zero of each output.

    They are unsigned: products of unsigned and signed bytes overflow on processors without VNNI.
    """
    array = weight.detach().float().cpu().numpy().T
    scales = (np.maximum(np.abs(array).max(0), 1e-12) / 127).astype(np.float32)
    values = (np.rint(array / scales).clip(-127, 127) + 128).astype(np.uint8)
    zeros = np.full(array.shape[1], 128, np.uint8)
    return graph.constant(values), graph.constant(scales), graph.constant(zeros)


def _norm(graph: Graph, values: str, norm: Any) -> str:
    constants = [graph.constant(each) for each in (norm.weight, norm.bias)]
    return graph.op("LayerNormalization", values, *constants, epsilon=float(norm.eps))


def _add_and_norm(graph: Graph, inputs: str, skipped: str, linear: Any, norm: Any) -> str:
    mapped = _map(graph, inputs, linear.weight)
    if graph.style.portable:
        mapped = graph.op("Add", mapped, graph.constant(linear.bias))
        return _norm(graph, graph.op("Add", mapped, skipped), norm)
    constants = [graph.constant(values) for values in (norm.weight, norm.bias, linear.bias)]
    return graph.op(
        "SkipLayerNormalization", mapped, skipped, *constants, fused=True, epsilon=float(norm.eps)
    )


def _activate(graph: Graph, inputs: str, bias: str, module: Any) -> str:
    kind = _activation_kind(module)
    if kind == "ReLU":
        return graph.op("Relu", graph.op("Add", inputs, bias))
    if kind == "GELUActivation":
        if not graph.style.portable:
            return graph.op("BiasGelu", inputs, bias, fused=True)
        return add_gelu(graph, graph.op("Add", inputs, bias))
    if not graph.style.portable:
        return graph.op("FastGelu", inputs, bias, fused=True)
    return _tanh_gelu(graph, graph.op("Add", inputs, bias))


def check_layer(module: nn.Module, parts: PackedLayerParts) -> None:
    """Raise SettingError for a layer that has no graph, by its activation."""
    _activation_kind(module.get_submodule(parts.activation))


def _activation_kind(module: Any) -> str:
    kind = type(module).__name__
    if kind in ("ReLU", "GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh"):
        return kind
    raise SettingError(
        f'backend "onnxruntime" knows the activations gelu, gelu_new and relu, got {kind}. Take torch.'
    )


def add_gelu(graph: Graph, values: str) -> str:
    """GELU by the error function, of values of any shape."""
    if not graph.style.portable:
        return graph.op("Gelu", values, fused=True)
    share = graph.op("Erf", graph.op("Mul", values, graph.number(math.sqrt(0.5))))
    share = graph.op("Add", share, graph.number(1.0))
    return graph.op("Mul", graph.op("Mul", values, graph.number(0.5)), share)


def _tanh_gelu(graph: Graph, values: str) -> str:
    cube = graph.op("Mul", graph.op("Mul", values, values), values)
    inner = graph.op("Add", values, graph.op("Mul", cube, graph.number(0.044715)))
    share = graph.op("Tanh", graph.op("Mul", inner, graph.number(math.sqrt(2 / math.pi))))
    share = graph.op("Add", share, graph.number(1.0))
    return graph.op("Mul", graph.op("Mul", values, graph.number(0.5)), share)
