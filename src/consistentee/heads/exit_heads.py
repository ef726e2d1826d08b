"""What makes a token of a state at a layer that is not the last: a norm of its own and a head.

Three heads. `shared`: the layer's own norm, then the model's LM head; one vector of weights per layer. `low_rank`: a
small adapter per layer in between. `separate`: the paper's, one head per layer, which in a small model weigh more than
the model itself.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from consistentee.backbones import decoders


class ExitHeads(nn.Module):
    """Norms and heads of all layers but the last, whose norm and head are the model's.

    Args:
        model: the causal language model they sit on; norms begin as its final norm, separate heads as its head.
        kind: `shared`, `low_rank` or `separate`.
        rank: of `low_rank` adapters; a layer's two matrices are (rank, hidden) and (hidden, rank), the second begins at
            zero.

    Source: separate heads are ConsistentEE's (arXiv:2312.11882), a shared one is CALM's (arXiv:2207.07061).
    """

    def __init__(self, model: PreTrainedModel, kind: str, rank: int) -> None:
        super().__init__()
        self.kind = kind
        depth = len(decoders.decoder_layers(model))
        norm, head = decoders.final_norm(model), decoders.lm_head(model)
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(depth - 1))
        if kind == "low_rank":
            hidden, like = head.in_features, head.weight
            self.down = nn.Parameter(
                torch.empty(depth - 1, rank, hidden, dtype=like.dtype, device=like.device)
            )
            self.up = nn.Parameter(torch.empty(depth - 1, hidden, rank, dtype=like.dtype, device=like.device))
        elif kind == "separate":
            self.heads = nn.ModuleList(_own_head(head) for _ in range(depth - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh adapters, which begin without effect; norms and separate heads begin as the model's."""
        if self.kind == "low_rank":
            nn.init.normal_(self.down, std=self.down.shape[2] ** -0.5)
            nn.init.zeros_(self.up)

    def normed(self, model: PreTrainedModel, layer_index: int, hidden_states: Tensor) -> Tensor:
        """States behind the norm of a layer's exit, (..., hidden): what policy and head read."""
        is_last = layer_index == len(self.norms)
        return (
            decoders.final_norm(model)(hidden_states) if is_last else self.norms[layer_index](hidden_states)
        )

    def adapted(self, layer_index: int, normed: Tensor) -> Tensor:
        """What goes into the head of a layer, (..., hidden)."""
        if self.kind != "low_rank" or layer_index == len(self.norms):
            return normed
        inner = nn.functional.linear(normed, self.down[layer_index])
        return normed + nn.functional.linear(inner, self.up[layer_index])

    def logits(self, model: PreTrainedModel, layer_index: int, normed: Tensor) -> Tensor:
        """Logits of an exit after a layer, (..., vocabulary), from `normed` states."""
        own = self.kind == "separate" and layer_index < len(self.norms)
        head = self.heads[layer_index] if own else decoders.lm_head(model)
        return decoders.soften_logits(model, head(self.adapted(layer_index, normed)))

    @property
    def head_is_shared(self) -> bool:
        """Whether tokens that exited at different layers go through the head together."""
        return self.kind != "separate"


def _own_head(head: nn.Linear) -> nn.Linear:
    """A copy whose weights are its own, also where the model's head is tied to its embeddings."""
    own = nn.Linear(
        head.in_features,
        head.out_features,
        bias=head.bias is not None,
        dtype=head.weight.dtype,
        device=head.weight.device,
    )
    own.load_state_dict(head.state_dict())
    return own


class ConfidenceClassifier(nn.Module):
    """One linear classifier per layer: will this exit give the last layer's token?

    Source: CALM (arXiv:2207.07061), "early exit classifier", trained on agreement with the last layer.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin at zero: as likely as not."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, normed: Tensor) -> Tensor:
        """Logits: (tokens, layers, hidden) -> (tokens, layers), float32."""
        return ((normed.to(self.weight.dtype) * self.weight).sum(-1) + self.bias).float()
