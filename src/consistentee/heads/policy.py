"""The policy network, and what exit scores ask of a layer's pooled state."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from consistentee.config import OLD_POLICY_INPUTS
from consistentee.functional.exits import LOG_ODDS_SCALE, NUM_SIGNALS, classifier_signals, log_odds
from consistentee.heads.classifiers import AttentionClassifier, InternalClassifiers


class PolicyNetwork(nn.Module):
    """Exit logits from the pooled state, the log-odds of the predicted class, or the sum of both.

    The state branch is the paper's: per layer Linear(hidden, 32), GELU, Linear(32, 1). The log-odds have one weight for
    all layers. With log-odds, the state branch begins at zero: an untrained policy is the confidence criterion, and
    what it learns are corrections to that.

    Args:
        policy_input: `state`, `log_odds` or `state+log_odds`, or one of `OLD_POLICY_INPUTS`.
        policy_hidden_size: width of the state branch.
        dropout: on the pooled state; the state branch has many more inputs than instances can pin down.
        initial_exit_bias: added to every exit logit at the start. A negative one makes a young policy go deep, so
            that every layer is visited before it learns to exit.
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
        self.reads_state = "state" in policy_input
        self.reads_log_odds = policy_input != "state"
        self.reads_signals = policy_input in OLD_POLICY_INPUTS
        self.initial_exit_bias = float(initial_exit_bias)
        width = policy_hidden_size
        if self.reads_state:
            self.state_dropout = nn.Dropout(dropout)
            self.state_weight = nn.Parameter(torch.empty(num_layers, hidden_size, width))
            self.state_bias = nn.Parameter(torch.empty(num_layers, width))
            self.state_output = nn.Parameter(torch.empty(num_layers, width))
        if self.reads_log_odds:
            self.confidence_weight = nn.Parameter(torch.empty(()))
        self.exit_bias = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()
        if self.reads_signals:
            self.signal_hidden = nn.Linear(NUM_SIGNALS, width)
            self.signal_output = nn.Linear(width, 1)

    def reset_parameters(self) -> None:
        """Begin anew."""
        if self.reads_state:
            _, hidden_size, width = self.state_weight.shape
            nn.init.normal_(self.state_weight, std=hidden_size**-0.5)
            nn.init.zeros_(self.state_bias)
            nn.init.normal_(self.state_output, std=width**-0.5)
            if self.reads_log_odds:
                nn.init.zeros_(self.state_output)
        if self.reads_log_odds:
            nn.init.ones_(self.confidence_weight)
        nn.init.constant_(self.exit_bias, self.initial_exit_bias)

    def features(self, layer_logits: Tensor) -> Tensor | None:
        """What this policy reads beside the state, (batch, layers, features); None if nothing.

        Args:
            layer_logits: (batch, layers, classes); from the first layer on where `reads_signals`.
        """
        if not self.reads_log_odds:
            return None
        return classifier_signals(layer_logits) if self.reads_signals else log_odds(layer_logits)[..., None]

    def feature_logits(self, features: Tensor) -> Tensor:
        """The features' share of the exit logits: (batch, layers, features) -> (batch, layers)."""
        if not self.reads_signals:
            return self.confidence_weight * features[..., 0]
        corrections = self.signal_output(nn.functional.gelu(self.signal_hidden(features))).squeeze(-1)
        return self.confidence_weight * (LOG_ODDS_SCALE * features[..., 0]) + corrections

    def forward(self, pooled: Tensor, features: Tensor | None, first_layer_index: int = 0) -> Tensor:
        """Exit logits of consecutive layers.

        Args:
            pooled: (batch, layers, width), the states of `layers` consecutive layers.
            features: what `features` gives for these layers, or None for a policy on the state alone.
            first_layer_index: 0-based number of the first of these layers.

        Returns:
            (batch, layers), float32.

        Raises:
            ValueError: if this policy reads features and they are missing.
        """
        here = slice(first_layer_index, first_layer_index + pooled.shape[1])
        logits = self.exit_bias[here].expand(pooled.shape[:2])
        if self.reads_state:
            state = pooled.to(self.exit_bias.dtype)
            if (
                self.training and self.state_dropout.p
            ):  # one mask for all layers of an instance: fewer random numbers
                state = state * self.state_dropout(state.new_ones(len(state), 1, state.shape[2]))
            hidden = torch.einsum("blh,lhw->blw", state, self.state_weight[here]) + self.state_bias[here]
            logits = logits + (nn.functional.gelu(hidden) * self.state_output[here]).sum(-1)
        if self.reads_log_odds:
            if features is None:
                raise ValueError(f'policy_input "{self.policy_input}" needs features, got None.')
            logits = logits + self.feature_logits(features.to(self.exit_bias.dtype))
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
    if policy is None or not policy.reads_state:
        return output.weight.float(), output.bias.float()
    weights = [output.weight.float(), policy.state_weight[index].T.float()]
    return torch.cat(weights), torch.cat([output.bias.float(), policy.state_bias[index].float()])
