"""The policy network, and what exit scores ask of a layer's pooled state."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from consistentee.functional.exits import LOG_ODDS_SCALE, NUM_SIGNALS, SIGNAL_NAMES
from consistentee.heads.classifiers import AttentionClassifier, InternalClassifiers

LOG_ODDS = SIGNAL_NAMES.index("log_odds")


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
def exit_feature_map(
    classifiers: InternalClassifiers, policy: PolicyNetwork | None, index: int
) -> tuple[Tensor, Tensor]:
    """One linear map of a layer's pooled state to all that exit scores ask of it.

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
