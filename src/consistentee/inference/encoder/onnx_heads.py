"""Classifiers as ONNX graphs: what sits on a layer, and the head that a model came with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from consistentee.errors import SettingError
from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.original_head import OURS, OriginalHead
from consistentee.heads.policy import PolicyNetwork, exit_feature_map
from consistentee.inference.encoder.onnx_builder import Graph
from consistentee.inference.encoder.onnx_graphs import TOKENS, add_gelu


def pooling_of(classifiers: InternalClassifiers) -> str | None:
    """What classifiers ask of the tokens: `bias` (0 at tokens, the lowest float at padding), `weights`, or nothing.

    `weights` is each token's share of its row's mean. Both are (rows, 1, width).
    """
    if classifiers.head == "attention":
        return "bias"
    return "weights" if classifiers.pooling == "mean" else None


def add_classifier(
    graph: Graph,
    hidden_states: str,
    classifiers: InternalClassifiers,
    policy: PolicyNetwork | None,
    index: int,
    tokens: str = TOKENS,
    behind: float | None = None,
) -> tuple[str, str]:
    """One internal classifier, and what the policy reads there.

    Args:
        graph: to add to.
        hidden_states: (rows, width, hidden).
        classifiers, policy: the model's.
        index: which of them.
        tokens: (rows, 1, width), what `pooling_of` says.
        behind: a number that every row gets behind its features, in one more column.

    Returns:
        What `exit_feature_map` makes of the pooled states, (rows, classes + width), and these, (rows, pooled).
    """
    pooled = _pooled(graph, hidden_states, classifiers, index, tokens)
    weight, bias = exit_feature_map(classifiers, policy, index)
    if behind is not None:
        weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        bias = torch.cat([bias, bias.new_tensor([behind])])
    return add_linear(graph, pooled, weight, bias), pooled


def _pooled(graph: Graph, states: str, classifiers: InternalClassifiers, index: int, tokens: str) -> str:
    """(rows, pooled)."""
    if classifiers.head == "attention":
        module: Any = classifiers.layers[index]
        norm, queries = module.pooling.norm, module.pooling.queries
        constants = [graph.constant(values) for values in (norm.weight, norm.bias)]
        keys = graph.op("LayerNormalization", states, *constants, epsilon=float(norm.eps))
        if graph.style.portable:
            scores = graph.op("MatMul", keys, graph.constant(queries.T))
            scores = graph.op("Transpose", scores, perm=[0, 2, 1])
        else:
            scores = graph.op("FusedMatMul", graph.constant(queries), keys, fused=True, transB=1)
        scores = graph.op("Add", scores, tokens)  # (rows, queries, width)
        found = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), keys)
        dense = module.dense
    else:
        dense = classifiers.pooler
        if classifiers.pooling == "cls":
            found = graph.op("Gather", states, graph.constant([0]), axis=1)
        else:
            found = graph.op("MatMul", tokens, states)
    found = graph.op("Reshape", found, graph.constant([0, dense.in_features]))
    return graph.op("Tanh", add_linear(graph, found, dense.weight, dense.bias))


def add_linear(graph: Graph, inputs: str, weight: Tensor, bias: Tensor) -> str:
    """(rows, in) to (rows, out); weight (out, in)."""
    return graph.op("Gemm", inputs, graph.constant(weight), graph.constant(bias), transB=1)


def add_original_head(
    graph: Graph, hidden_states: str, head: OriginalHead, tokens: Callable[[str], str]
) -> str:
    """The head that a model came with, of a type that runs packed.

    Args:
        graph: to add to.
        hidden_states: (rows, width, hidden), the last layer's.
        head: the model's.
        tokens: gives what `pooling_of` names, (rows, 1, width).

    Returns:
        Logits, (rows, classes).
    """
    parts: Any = head.parts
    if head.model_type == OURS:
        classifiers = cast(InternalClassifiers, parts["classifiers"])
        pooling = pooling_of(classifiers)
        there = "" if pooling is None else tokens(pooling)
        return add_classifier(graph, hidden_states, classifiers, None, 0, there)[0]
    if head.model_type not in _OF_FIRST_TOKEN:
        raise SettingError(
            f"The head that a model came with has a graph for {', '.join(_OF_FIRST_TOKEN)}, got one of "
            f'"{head.model_type}".'
        )
    first = graph.op("Gather", hidden_states, graph.constant([0]), axis=1)
    first = graph.op("Squeeze", first, graph.constant([1]))
    dense, activate, output = _OF_FIRST_TOKEN[head.model_type](parts)
    hidden = add_linear(graph, first, dense.weight, dense.bias)
    hidden = add_gelu(graph, hidden) if activate == "Gelu" else graph.op(activate, hidden)
    return add_linear(graph, hidden, output.weight, output.bias)


def _roberta(parts: Any) -> tuple[Any, str, Any]:
    return parts["classifier"].dense, "Tanh", parts["classifier"].out_proj


_OF_FIRST_TOKEN: dict[str, Callable[[Any], tuple[Any, str, Any]]] = {
    "bert": lambda parts: (parts["pooler"].dense, "Tanh", parts["classifier"]),
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _roberta,
    "electra": lambda parts: (parts["classifier"].dense, "Gelu", parts["classifier"].out_proj),
    "distilbert": lambda parts: (parts["pre_classifier"], "Relu", parts["classifier"]),
    "albert": lambda parts: (parts["pooler"], "Tanh", parts["classifier"]),
}
"""Heads of the first token, by model type: a linear map, what follows it, and the map to the classes."""
