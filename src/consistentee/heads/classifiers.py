"""What sits on each layer of a classifier: pooling and the internal classifier.

Two kinds of internal classifier. `attention`: every layer reads its tokens with a few learned queries of its own and
has its own two-layer classifier; good shallow classifiers need to see more than one token. `shared_pooler`: the
paper's, one tanh pooler shared by all layers on the [CLS] state or on the mean of the tokens, and one linear
classifier per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pool_tokens(hidden_states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector per sequence: its first token (`cls`) or the mean of its real tokens (`mean`).

    Args:
        hidden_states: (batch, tokens, hidden).
        attention_mask: (batch, tokens), 1 for real tokens.
        pooling: `cls` or `mean`.

    Returns:
        (batch, hidden).

    Raises:
        ValueError: if pooling is neither.
    """
    if pooling == "cls":
        return hidden_states[:, 0]
    if pooling == "mean":
        mask = attention_mask[:, :, None].to(hidden_states.dtype)
        return (hidden_states * mask).sum(1) / mask.sum(1).clamp_min(1)
    raise ValueError(f'pooling must be "cls" or "mean", got "{pooling}".')


class AttentionPooling(nn.Module):
    """A few learned queries attend to the tokens of one layer: (batch, tokens, hidden) -> (batch, queries * hidden)."""

    def __init__(self, hidden_size: int, num_queries: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh queries."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The tokens' weighted means; padding weighs nothing."""
        keys = self.norm(hidden_states)
        scores = torch.einsum("qh,bth->bqt", self.queries.to(keys.dtype), keys).float()
        scores = scores.masked_fill(attention_mask[:, None] == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(keys.dtype)  # (batch, queries, tokens)
        return torch.einsum("bqt,bth->bqh", weights, keys).flatten(1)


class AttentionClassifier(nn.Module):
    """One layer's own pooling, `Linear(queries * hidden, width)`, tanh, and `Linear(width, classes)`."""

    def __init__(
        self, hidden_size: int, num_labels: int, num_queries: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.pooling = AttentionPooling(hidden_size, num_queries)
        self.dense = nn.Linear(num_queries * hidden_size, width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled state (batch, width) and logits (batch, classes)."""
        pooled = torch.tanh(self.dense(self.pooling(hidden_states, attention_mask)))
        return pooled, self.output(self.dropout(pooled))


class InternalClassifiers(nn.Module):
    """The classifiers of all layers: `classifiers(layer_index, hidden_states, attention_mask) -> (pooled, logits)`.

    Args:
        head: `attention` or `shared_pooler`.
        pooling: `cls` or `mean`, read by `shared_pooler` only.
        num_queries: learned queries per layer, read by `attention` only.
        width: of the pooled states.

    Shapes: hidden_states (batch, tokens, hidden), attention_mask (batch, tokens), pooled (batch, width), logits
    (batch, classes).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_labels: int,
        head: str,
        pooling: str,
        num_queries: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.head = head
        self.pooling = pooling
        if head == "attention":
            self.layers = nn.ModuleList(
                AttentionClassifier(hidden_size, num_labels, num_queries, width, dropout)
                for _ in range(num_layers)
            )
        else:
            self.pooler = nn.Linear(hidden_size, width)
            self.dropout = nn.Dropout(dropout)
            self.layers = nn.ModuleList(nn.Linear(width, num_labels) for _ in range(num_layers))

    def forward(
        self, layer_index: int, hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled state (batch, width) and logits (batch, classes) of one layer, 0-based."""
        if self.head == "attention":
            return self.layers[layer_index](hidden_states, attention_mask)
        pooled = torch.tanh(self.pooler(pool_tokens(hidden_states, attention_mask, self.pooling)))
        return pooled, self.layers[layer_index](self.dropout(pooled))
