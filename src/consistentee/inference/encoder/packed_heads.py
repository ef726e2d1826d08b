"""Internal classifiers on packed rows: what `heads/` computes, with the pooling's norm folded into its neighbours.

The norm of attention pooling is `gamma * z + beta` with normalised tokens z. Its scores against a query q are
`z . (gamma * q)` plus a constant, which the softmax forgets; the pooled vector is `gamma * sum(w z) + beta` since the
weights sum to one, and the linear map behind it absorbs gamma and beta. So tokens are normalised once, without scale.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.original_head import OriginalHead
from consistentee.heads.policy import PolicyNetwork, exit_feature_map
from consistentee.inference.encoder.packed_layers import storage_dtype
from consistentee.inference.encoder.packing import Group, PackedBatch, similar_rows
from consistentee.inference.encoder.prepacked_linear import make_linear


class PackedClassifiers:
    """The classifiers of a model, ready to run on packed rows.

    Args:
        classifiers: the model's own; their weights are copied.
        policy: what else reads the pooled states; None where nothing does.
        dtype: `float32`, `bfloat16`, `float16` or `int8`. What comes last is float32 always.
        device: where they run.
    """

    def __init__(
        self,
        classifiers: InternalClassifiers,
        policy: PolicyNetwork | None,
        dtype: str,
        device: torch.device,
    ) -> None:
        kind = _AttentionPooled if classifiers.head == "attention" else _Pooled
        last = classifiers.layers[-1]
        self._original = _Original(last, dtype, device) if isinstance(last, OriginalHead) else None
        indices = range(len(classifiers.layers) - (self._original is not None))
        self._pooled = [kind(classifiers, index, dtype, device) for index in indices]
        maps = [exit_feature_map(classifiers, policy, index) for index in indices]
        self._exit_features = [(weight.to(device).clone(), bias.to(device).clone()) for weight, bias in maps]

    def __call__(self, index: int, batch: PackedBatch, *, with_pooled: bool = False) -> Tensor:
        """What `exit_feature_map` makes of one layer's rows, (rows, classes + width), float32.

        `with_pooled` puts the pooled states behind it. Of an original head its logits, (rows, classes).
        """
        if self._original is not None and index == len(self._pooled):
            return self._original(batch)
        return exit_features(self._pooled[index](batch).float(), *self._exit_features[index], with_pooled)


def exit_features(pooled: Tensor, weight: Tensor, bias: Tensor, with_pooled: bool) -> Tensor:
    """A map of `exit_feature_map` on pooled states, (rows, width), all float32, and perhaps these states behind it."""
    features = torch.nn.functional.linear(pooled, weight, bias)
    return torch.cat([features, pooled], dim=1) if with_pooled else features


class _Original:
    """The head that the model came with, on padded rows: it is asked once an input, and needs no speed."""

    def __init__(self, head: OriginalHead, dtype: str, device: torch.device) -> None:
        self._head = copy.deepcopy(head).to(device, storage_dtype(dtype))

    def __call__(self, batch: PackedBatch) -> Tensor:
        layout = batch.layout
        rows = batch.hidden_states[: layout.tokens].split(layout.lengths)
        groups = similar_rows(layout.lengths)
        logits = torch.cat([self._logits([rows[row] for row in group]) for group in groups])
        if len(groups) > 1:
            order = torch.tensor([row for group in groups for row in group], device=logits.device)
            logits = torch.empty_like(logits).index_copy_(0, order, logits)
        return logits

    def _logits(self, rows: list[Tensor]) -> Tensor:
        """(rows, classes) of the states of each row."""
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        return self._head(pad_sequence(rows, batch_first=True), mask)[1].float()


class _AttentionPooled:
    """Pooled states of one layer by its own queries."""

    def __init__(
        self, classifiers: InternalClassifiers, index: int, dtype: str, device: torch.device
    ) -> None:
        module: Any = classifiers.layers[index]
        norm, queries = module.pooling.norm, module.pooling.queries
        with torch.no_grad():
            # (width, queries, hidden)
            weight = module.dense.weight.view(-1, len(queries), norm.weight.shape[0])
            dense = (weight * norm.weight).flatten(1)
            bias = module.dense.bias + (weight * norm.bias).sum((1, 2))
            self.queries = (queries * norm.weight).to(device, storage_dtype(dtype))[None, None].contiguous()
        self.eps, self.shape = norm.eps, list(norm.normalized_shape)
        # Few rows: plain weights are as fast.
        self.dense = make_linear(dense, bias, dtype, device, prepack=False)

    def __call__(self, batch: PackedBatch) -> Tensor:
        tokens = batch.hidden_states
        normalised = torch.nn.functional.layer_norm(tokens, self.shape, None, None, self.eps)
        parts = [self._pool(normalised, group) for group in batch.layout.groups]
        return self.dense(parts[0] if len(parts) == 1 else torch.cat(parts)).tanh_()

    def _pool(self, normalised: Tensor, group: Group) -> Tensor:
        """(rows, queries * hidden), the queries' weighted means of each row's tokens."""
        mask = None
        if group.padding is None:
            tokens = normalised[group.start : group.end]
        else:
            tokens = normalised.index_select(0, group.padding[0])
            mask = group.padding[2][:, None, None]  # (rows, 1, 1, width)
        tokens = tokens.view(group.rows, 1, group.width, -1)  # one head as wide as the states
        pooled = torch.nn.functional.scaled_dot_product_attention(
            self.queries.expand(group.rows, -1, -1, -1), tokens, tokens, attn_mask=mask, scale=1.0
        )
        return pooled.flatten(1)


class _Pooled:
    """Pooled states by the pooler that all layers share."""

    def __init__(
        self, classifiers: InternalClassifiers, index: int, dtype: str, device: torch.device
    ) -> None:
        self.pooling = classifiers.pooling
        pooler = classifiers.pooler
        self.pooler = make_linear(pooler.weight, pooler.bias, dtype, device, prepack=False)

    def __call__(self, batch: PackedBatch) -> Tensor:
        return self.pooler(self._pool(batch)).tanh_()

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
