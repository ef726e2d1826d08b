"""Encoder layers and classifiers as ONNX graphs of ONNX Runtime's fused operators, written from a model's weights.

What ONNX Runtime's own optimiser makes of an exported BERT (fused attention, skip connections with their norm, bias
with GELU) is written down directly, one layer at a time, so that rows can exit between layers. The operators are in
the domain `com.microsoft`; see ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from consistentee.backbones.encoders import embedding_projection
from consistentee.backbones.limits import BEHIND_PADDING
from consistentee.errors import require_extra
from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.policy import PolicyNetwork, exit_feature_map
from consistentee.inference.encoder.packed_layers import PackedLayerParts

FUSED = "com.microsoft"
OPSET, FUSED_OPSET = 17, 1

HIDDEN, LENGTHS, POSITION_BIAS, TOKENS = "hidden_states", "lengths", "position_bias", "tokens"
"""Inputs: (rows, width, hidden); (rows,) int32; (1, heads, width, width); what pooling needs to know of the tokens."""

IDS, POSITIONS, TYPES = "input_ids", "positions", "token_type_ids"
"""Inputs of the embeddings, int64: (rows, width); (1, width); (rows, width)."""


class Graph:
    """A graph under construction; values are known by their names."""

    def __init__(self) -> None:
        self._onnx = require_extra("onnx", "onnx")
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def op(self, kind: str, *inputs: str, fused: bool = False, **attributes: Any) -> str:
        """One operator; gives its first output. An empty input name stands for an optional one left out."""
        name = f"v{len(self._nodes)}"
        domain = {"domain": FUSED} if fused else {}
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), [name], **domain, **attributes))
        return name

    def constant(self, values: Tensor | Sequence[int]) -> str:
        """Weights, float32, or a list of whole numbers, int64."""
        is_tensor = isinstance(values, Tensor)
        array = (
            values.detach().float().cpu().contiguous().numpy()
            if is_tensor
            else np.array(values, dtype=np.int64)
        )
        name = f"c{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def serialize(
        self,
        inputs: dict[str, Sequence[int | str]],
        outputs: dict[str, str],
        output_shapes: dict[str, Sequence[int | str]] | None = None,
    ) -> bytes:
        """The finished model.

        Args:
            inputs: shapes by name; `lengths` is int32, ids, positions and types are int64, everything else float32.
            outputs: names of values by the names they get.
            output_shapes: where they are known.
        """
        shapes = output_shapes or {}
        helper, kinds = self._onnx.helper, self._onnx.TensorProto
        whole = {LENGTHS: kinds.INT32, IDS: kinds.INT64, POSITIONS: kinds.INT64, TYPES: kinds.INT64}
        for given, value in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value], [given]))
        graph = helper.make_graph(
            self._nodes,
            "consistentee",
            [
                helper.make_tensor_value_info(name, whole.get(name, kinds.FLOAT), list(shape))
                for name, shape in inputs.items()
            ],
            [helper.make_tensor_value_info(name, kinds.FLOAT, shapes.get(name)) for name in outputs],
            initializer=self._constants,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, FUSED_OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def add_embeddings(graph: Graph, backbone: PreTrainedModel, *, with_types: bool) -> str:
    """Word, position and type embeddings, their norm, and the map to the hidden size where the model has one.

    Args:
        graph: to add to.
        backbone: of a type in `LAYER_PARTS`.
        with_types: whether `TYPES` is an input; else every token is of type 0.

    Returns:
        (rows, width, hidden).
    """
    embeddings: Any = backbone.get_submodule("embeddings")
    words = graph.op("Gather", graph.constant(embeddings.word_embeddings.weight), IDS)
    table = graph.constant(embeddings.position_embeddings.weight)
    summed = graph.op("Add", words, graph.op("Gather", table, POSITIONS))
    types = getattr(embeddings, "token_type_embeddings", None)
    if types is not None and with_types:
        summed = graph.op("Add", summed, graph.op("Gather", graph.constant(types.weight), TYPES))
    elif types is not None:
        summed = graph.op("Add", summed, graph.constant(types.weight[0]))
    norm = embeddings.LayerNorm
    constants = [graph.constant(values) for values in (norm.weight, norm.bias)]
    hidden_states = graph.op("LayerNormalization", summed, *constants, epsilon=float(norm.eps))
    projection: Any = embedding_projection(backbone)
    if projection is None:
        return hidden_states
    mapped = graph.op("MatMul", hidden_states, graph.constant(projection.weight.T))
    return graph.op("Add", mapped, graph.constant(projection.bias))


def first_position(backbone: PreTrainedModel) -> int:
    """Where a model begins to count positions: roberta and its kin behind the padding id."""
    if backbone.config.model_type in BEHIND_PADDING:
        return int(cast(Any, backbone.get_submodule("embeddings")).padding_idx) + 1
    return 0


def add_layer(
    graph: Graph,
    hidden_states: str,
    module: nn.Module,
    parts: PackedLayerParts,
    num_heads: int,
    position_bias: str = "",
) -> str:
    """One post-norm layer.

    Args:
        graph: to add to.
        hidden_states: (rows, width, hidden).
        module: the layer; `parts` says where it keeps what.
        parts: see `packed_layers`.
        num_heads: of its attention.
        position_bias: (1, heads, width, width), or "" where there is none.

    Raises:
        ValueError: an activation that is not there.
    """

    def part(path: str) -> Any:
        return module.get_submodule(path)

    inputs = [part(path) for path in (parts.query, parts.key, parts.value)]
    weight, bias = (torch.cat([getattr(p, name) for p in inputs]) for name in ("weight", "bias"))
    attended = graph.op(
        "Attention",
        *(hidden_states, graph.constant(weight.T), graph.constant(bias), LENGTHS),
        *(("", position_bias) if position_bias else ()),
        fused=True,
        num_heads=num_heads,
    )
    hidden_states = _add_and_norm(
        graph, attended, hidden_states, part(parts.attention_output), part(parts.attention_norm)
    )
    up = part(parts.up)
    raised = graph.op("MatMul", hidden_states, graph.constant(up.weight.T))
    activated = _activate(graph, raised, graph.constant(up.bias), part(parts.activation))
    return _add_and_norm(graph, activated, hidden_states, part(parts.down), part(parts.output_norm))


def _add_and_norm(graph: Graph, inputs: str, skipped: str, linear: Any, norm: Any) -> str:
    mapped = graph.op("MatMul", inputs, graph.constant(linear.weight.T))
    constants = [graph.constant(values) for values in (norm.weight, norm.bias, linear.bias)]
    return graph.op(
        "SkipLayerNormalization", mapped, skipped, *constants, fused=True, epsilon=float(norm.eps)
    )


def _activate(graph: Graph, inputs: str, bias: str, module: Any) -> str:
    kind = type(module).__name__
    if kind == "GELUActivation":
        return graph.op("BiasGelu", inputs, bias, fused=True)
    if kind in ("NewGELUActivation", "FastGELUActivation", "GELUTanh"):
        return graph.op("FastGelu", inputs, bias, fused=True)
    if kind == "ReLU":
        return graph.op("Relu", graph.op("Add", inputs, bias))
    raise ValueError(
        f'backend "onnxruntime" knows the activations gelu, gelu_new and relu, got {kind}. Take torch.'
    )


def add_classifier(
    graph: Graph,
    hidden_states: str,
    classifiers: InternalClassifiers,
    policy: PolicyNetwork | None,
    index: int,
) -> tuple[str, str]:
    """One internal classifier, and what the policy reads there.

    Args:
        graph: to add to. Its input `tokens` is (rows, 1, width): for attention pooling 0 at real tokens and the lowest
            float at padding, for mean pooling the weight of each token; `cls` needs none.
        hidden_states: (rows, width, hidden).
        classifiers, policy: the model's.
        index: which of them.

    Returns:
        What `exit_feature_map` makes of the pooled states, (rows, classes + width), and these, (rows, pooled).
    """
    module: Any = classifiers.layers[index]
    if classifiers.head == "attention":
        norm, queries = module.pooling.norm, module.pooling.queries
        constants = [graph.constant(values) for values in (norm.weight, norm.bias)]
        keys = graph.op("LayerNormalization", hidden_states, *constants, epsilon=float(norm.eps))
        scores = graph.op("MatMul", keys, graph.constant(queries.T))
        scores = graph.op("Add", graph.op("Transpose", scores, perm=[0, 2, 1]), TOKENS)
        pooled = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), keys)
        pooled = graph.op("Reshape", pooled, graph.constant([0, -1]))
        dense = module.dense
    else:
        dense = classifiers.pooler
        if classifiers.pooling == "cls":
            pooled = graph.op("Gather", hidden_states, graph.constant([0]), axis=1)
        else:
            pooled = graph.op("MatMul", TOKENS, hidden_states)
        pooled = graph.op("Reshape", pooled, graph.constant([0, -1]))
    pooled = graph.op("Tanh", _linear(graph, pooled, dense.weight, dense.bias))
    return _linear(graph, pooled, *exit_feature_map(classifiers, policy, index)), pooled


def _linear(graph: Graph, inputs: str, weight: Tensor, bias: Tensor) -> str:
    return graph.op("Gemm", inputs, graph.constant(weight), graph.constant(bias), transB=1)
