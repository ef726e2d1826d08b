"""What sits on each layer: pooling, the internal classifier and the policy network.

Two kinds of internal classifier. `attention`: every layer reads its tokens with a few learned queries of its own and
has its own two-layer classifier; good shallow classifiers need to see more than one token. `shared_pooler`: the
paper's, one tanh pooler shared by all layers on the [CLS] state or on the mean of the tokens, and one linear
classifier per layer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from consistentee.functional.exits import LOG_ODDS_SCALE, NUM_SIGNALS, SIGNAL_NAMES

LOG_ODDS = SIGNAL_NAMES.index("log_odds")


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
        nn.init.normal_(self.queries, std=hidden_size**-0.5)

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


class PolicyNetwork(nn.Module):
    """Exit logits from the pooled state, the classifier's signals, or the sum of both branches.

    The state branch is the paper's: per layer Linear(hidden, 32), GELU, Linear(32, 1). The signal branch is one small
    network shared by all layers (the layer number is among the signals), beside a weight on the log-odds of the
    predicted class. With signals, both networks begin at zero: an untrained policy is the confidence criterion, and
    what it learns are corrections to that.

    Args:
        policy_input: `state`, `signals` or `state+signals`.
        policy_hidden_size: width of both branches.
        dropout: on the pooled state; the state branch has many more inputs than instances can pin down.
        initial_exit_bias: added to every exit logit at the start. A negative one makes a young policy go deep, so
            that every layer is visited before it learns to leave.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        policy_input: str,
        policy_hidden_size: int,
        dropout: float,
        initial_exit_bias: float,
    ) -> None:
        super().__init__()
        self.policy_input = policy_input
        width = policy_hidden_size
        if "state" in policy_input:
            self.state_dropout = nn.Dropout(dropout)
            self.state_weight = nn.Parameter(torch.empty(num_layers, hidden_size, width))
            self.state_bias = nn.Parameter(torch.zeros(num_layers, width))
            self.state_output = nn.Parameter(torch.empty(num_layers, width))
            nn.init.normal_(self.state_weight, std=hidden_size**-0.5)
            nn.init.normal_(self.state_output, std=width**-0.5)
        if "signals" in policy_input:
            self.confidence_weight = nn.Parameter(torch.tensor(1.0))
            self.signal_hidden = nn.Linear(NUM_SIGNALS, width)
            self.signal_output = nn.Linear(width, 1)
            nn.init.zeros_(self.signal_output.weight)
            nn.init.zeros_(self.signal_output.bias)
            if "state" in policy_input:
                nn.init.zeros_(self.state_output)
        self.exit_bias = nn.Parameter(torch.full((num_layers,), float(initial_exit_bias)))

    @property
    def needs_signals(self) -> bool:
        """Whether `forward` reads the signals."""
        return "signals" in self.policy_input

    def forward(self, pooled: Tensor, signals: Tensor | None, first_layer_index: int = 0) -> Tensor:
        """Exit logits of consecutive layers.

        Args:
            pooled: (batch, layers, width), the states of `layers` consecutive layers.
            signals: (batch, layers, NUM_SIGNALS), or None for a policy on the state alone.
            first_layer_index: 0-based number of the first of these layers.

        Returns:
            (batch, layers), float32.

        Raises:
            ValueError: if this policy reads signals and they are missing.
        """
        here = slice(first_layer_index, first_layer_index + pooled.shape[1])
        logits = self.exit_bias[here].expand(pooled.shape[:2])
        if "state" in self.policy_input:
            state = pooled.to(self.exit_bias.dtype)
            if (
                self.training and self.state_dropout.p
            ):  # one mask for all layers of an instance: fewer random numbers
                state = state * self.state_dropout(state.new_ones(len(state), 1, state.shape[2]))
            hidden = torch.einsum("blh,lhw->blw", state, self.state_weight[here]) + self.state_bias[here]
            logits = logits + (nn.functional.gelu(hidden) * self.state_output[here]).sum(-1)
        if self.needs_signals:
            if signals is None:
                raise ValueError(f'policy_input "{self.policy_input}" needs signals, got None.')
            signals = signals.to(self.exit_bias.dtype)
            hidden = nn.functional.gelu(self.signal_hidden(signals))
            log_odds = LOG_ODDS_SCALE * signals[..., LOG_ODDS]
            logits = logits + self.confidence_weight * log_odds + self.signal_output(hidden).squeeze(-1)
        return logits.float()


@torch.no_grad()
def exit_readings(
    classifiers: InternalClassifiers, policy: PolicyNetwork | None, index: int
) -> tuple[Tensor, Tensor]:
    """One linear map of a layer's pooled state to all that exit decisions ask of it.

    Args:
        classifiers, policy: the model's; None for a model without exits.
        index: of the layer, 0-based.

    Returns:
        Weight (classes + width, pooled) and bias (classes + width,), float32: the classifier's logits and, for a policy
        that reads the state, the inputs of its hidden units there.
    """
    module = classifiers.layers[index]
    output = cast(nn.Linear, module.output if isinstance(module, AttentionClassifier) else module)
    if policy is None or "state" not in policy.policy_input:
        return output.weight.float(), output.bias.float()
    weights = [output.weight.float(), policy.state_weight[index].T.float()]
    return torch.cat(weights), torch.cat([output.bias.float(), policy.state_bias[index].float()])
