"""Internal classifiers on packed rows: what `heads.py` computes, with the pooling's norm folded into its neighbours.

The norm of attention pooling is `gamma * z + beta` with normalised tokens z. Its scores against a query q are
`z . (gamma * q)` plus a constant, which the softmax forgets; the pooled vector is `gamma * sum(w z) + beta` since the
weights sum to one, and the linear map behind it absorbs gamma and beta. So tokens are normalised once, without scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consistentee.heads import InternalClassifiers
from consistentee.linears import make_linear
from consistentee.packed_layers import storage_dtype
from consistentee.packing import Group, PackedBatch


class PackedClassifiers:
    """The classifiers of a model, ready to run on packed rows.

    Args:
        classifiers: the model's own; their weights are copied.
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        device: where they run.
    """

    def __init__(self, classifiers: InternalClassifiers, dtype: str, device: torch.device) -> None:
        kind = _AttentionClassifier if classifiers.head == "attention" else _PooledClassifier
        self.layers = [kind(classifiers, index, dtype, device) for index in range(len(classifiers.layers))]

    def __call__(self, index: int, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Pooled states (rows, hidden) and logits (rows, classes) of one classifier."""
        return self.layers[index](batch)


class _AttentionClassifier:
    def __init__(
        self, classifiers: InternalClassifiers, index: int, dtype: str, device: torch.device
    ) -> None:
        module: Any = classifiers.layers[index]
        norm, queries = module.pooling.norm, module.pooling.queries
        with torch.no_grad():
            weight = module.dense.weight.view(
                -1, len(queries), norm.weight.shape[0]
            )  # (hidden, queries, hidden)
            dense = (weight * norm.weight).flatten(1)
            bias = module.dense.bias + (weight * norm.bias).sum((1, 2))
            self.queries = (queries * norm.weight).to(device, storage_dtype(dtype)).contiguous()
        self.eps, self.shape = norm.eps, list(norm.normalized_shape)
        self.dense = make_linear(
            dense, bias, dtype, device, prepack=False
        )  # few rows: plain weights are as fast
        # Few classes: not worth quantising, and the last thing that should be.
        output = "float32" if dtype == "int8" else dtype
        self.output = make_linear(module.output.weight, module.output.bias, output, device, prepack=False)

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        tokens = batch.hidden_states
        normalised = torch.nn.functional.layer_norm(tokens, self.shape, None, None, self.eps)
        scores = torch.nn.functional.linear(normalised, self.queries)  # (tokens, queries)
        groups = batch.layout.groups
        parts = [self._pool(normalised, scores, group) for group in groups]
        pooled = parts[0] if len(parts) == 1 else torch.cat(parts)
        pooled = self.dense(pooled).tanh_()
        return pooled, self.output(pooled)

    def _pool(self, normalised: Tensor, scores: Tensor, group: Group) -> Tensor:
        """(rows, queries * hidden), the queries' weighted means of each row's tokens."""
        if group.padding is None:
            tokens, scores = normalised[group.start : group.end], scores[group.start : group.end]
        else:
            tokens, scores = (part.index_select(0, group.padding[0]) for part in (normalised, scores))
        shape = (group.rows, group.width, -1)
        scores = scores.view(shape).transpose(1, 2).float()  # (rows, queries, width)
        if group.padding is not None:
            scores = scores.masked_fill(~group.padding[2][:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(tokens.dtype)
        return torch.bmm(weights, tokens.view(shape)).flatten(1)


class _PooledClassifier:
    def __init__(
        self, classifiers: InternalClassifiers, index: int, dtype: str, device: torch.device
    ) -> None:
        module: Any = classifiers.layers[index]
        self.pooling = classifiers.pooling
        pooler = classifiers.pooler
        self.pooler = make_linear(pooler.weight, pooler.bias, dtype, device, prepack=False)
        output = "float32" if dtype == "int8" else dtype
        self.output = make_linear(module.weight, module.bias, output, device, prepack=False)

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        pooled = self.pooler(self._pool(batch)).tanh_()
        return pooled, self.output(pooled)

    def _pool(self, batch: PackedBatch) -> Tensor:
        """(rows, hidden), the first token or the mean of the tokens."""
        layout, tokens = batch.layout, batch.hidden_states
        if self.pooling == "cls":
            return tokens.index_select(0, layout.first_tokens)
        if len(layout) == 1:
            return tokens[: layout.tokens].mean(0, keepdim=True)
        sums = tokens.new_zeros(len(layout), tokens.shape[1], dtype=torch.float32)
        sums.index_add_(0, layout.row_of_token, tokens[: layout.tokens].float())
        lengths = torch.tensor(layout.lengths, device=tokens.device)
        return (sums / lengths[:, None]).to(tokens.dtype)
