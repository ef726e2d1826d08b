"""What exit criteria read of a layer beside its prediction and the policy: fitted numbers, and the state itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from consistentee.functional.signals import COST_WEIGHT
from consistentee.heads.classifiers import AttentionClassifier, InternalClassifiers
from consistentee.heads.original_head import OriginalHead


class LearntToExit(nn.Module):
    """One linear map of the pooled state, shared by all layers: will this exit be right?

    Source: BERxiT (EACL 2021, 2021.eacl-main.8), "learning to exit".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin at zero: as likely right as wrong."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits: (batch, layers, width) -> (batch, layers), float32."""
        return (pooled.to(self.weight.dtype) @ self.weight + self.bias).float()


@dataclass(frozen=True)
class NullSpace:
    """What share of a pooled state its layer's classifier does not see, by logits and the state's length alone.

    With the classifier `W f + b` and the shift `o = pinv(W) b` that absorbs its bias, `f + o` has the logits `z` and no
    bias. Its part in the space that the rows of W span has the squared length `z' G z`, where `G = pinv(W W')`, and its
    own is `|f|^2 + 2 z' G b - b' G b`. The share is the root of one minus the ratio of the two.

    Attributes:
        inverse: (layers, classes, classes), G.
        bias: (layers, classes), b.

    Source: NSP (IJCAI 2025, arXiv:2506.17249), which projects in the space of states; the same, but cheaper here.
    """

    inverse: Tensor
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, classifiers: InternalClassifiers) -> NullSpace:
        """That of a model's classifiers. An original head sees everything."""
        inverses: list[Tensor] = []
        biases: list[Tensor] = []
        for module in classifiers.layers:
            if isinstance(module, OriginalHead):
                inverses.append(torch.zeros_like(inverses[-1]))
                biases.append(torch.zeros_like(biases[-1]))
                continue
            output = cast(nn.Linear, module.output if isinstance(module, AttentionClassifier) else module)
            weight = output.weight.double().cpu()
            inverses.append(torch.linalg.pinv(weight @ weight.T, hermitian=True).float())
            biases.append(output.bias.float().cpu())
        device = next(classifiers.parameters()).device
        return cls(torch.stack(inverses).to(device), torch.stack(biases).to(device))

    def shares(self, classifier_logits: Tensor, squared_norms: Tensor, first_layer_index: int = 0) -> Tensor:
        """The share of each state, (batch, layers), in [0, 1].

        Args:
            classifier_logits: (batch, layers, classes), of consecutive layers.
            squared_norms: (batch, layers), of the pooled states.
            first_layer_index: of these layers, 0-based.
        """
        here = slice(first_layer_index, first_layer_index + squared_norms.shape[1])
        logits, bias = classifier_logits.float(), self.bias[here]
        seen = torch.einsum("blc,lcd->bld", logits, self.inverse[here])  # z' G
        shifted = squared_norms + (
            (2 * seen - torch.einsum("lc,lcd->ld", bias, self.inverse[here])) * bias
        ).sum(-1)
        return (1 - (seen * logits).sum(-1) / shifted.clamp_min(1e-12)).clamp(0, 1).sqrt()


SIGNALS = ("classifier_logits", "temperatures", "layer_weights", "right_probs", "null_shares", "has_exit")
"""What there may be, by the names of `criteria.ExitCriterion` and `criteria.exit_scores`."""


class ExitSignals:
    """What a model's exit criteria read beside predictions and the policy.

    Args:
        classifiers: the model's.
        temperatures: (layers,), of the calibrated confidence; None where there are none.
        layer_weights: (layers,), of the experts' sum; None takes `COST_WEIGHT` times the layer.
        learnt_to_exit: the network of that name; None where there is none.
        has_exit: (layers,), which layers have an exit; None: all. The others have no weight among `layer_weights`.
        reads: which of `SIGNALS` are asked for; None: all that there are.
    """

    def __init__(
        self,
        classifiers: InternalClassifiers,
        *,
        temperatures: Sequence[float] | None,
        layer_weights: Sequence[float] | None,
        learnt_to_exit: LearntToExit | None,
        has_exit: Sequence[bool] | None = None,
        reads: Sequence[str] | None = None,
    ) -> None:
        self.reads = SIGNALS if reads is None else tuple(name for name in SIGNALS if name in reads)
        self.temperatures = None if temperatures is None else torch.tensor(temperatures)
        depth = COST_WEIGHT * torch.arange(1, len(classifiers.layers) + 1)
        self.layer_weights = depth if layer_weights is None else torch.tensor(layer_weights)
        self.learnt_to_exit = learnt_to_exit
        self.has_exit = torch.tensor([True] * len(depth) if has_exit is None else list(has_exit))
        self.null_space = NullSpace.of(classifiers) if "null_shares" in self.reads else None

    @property
    def reads_pooled(self) -> bool:
        """Whether anything that is asked for needs the pooled states."""
        return "null_shares" in self.reads or "right_probs" in self.reads

    def on_host(self) -> ExitSignals:
        """A copy in float32 on the CPU, whose weights are its own."""
        found = copy.copy(self)
        if self.learnt_to_exit is not None:
            found.learnt_to_exit = copy.deepcopy(self.learnt_to_exit).float().cpu().requires_grad_(False)
        if self.null_space is not None:
            found.null_space = NullSpace(self.null_space.inverse.cpu(), self.null_space.bias.cpu())
        return found

    def __call__(
        self, pooled: Tensor, classifier_logits: Tensor, first_layer_index: int = 0
    ) -> dict[str, Tensor]:
        """What is asked for and there, for consecutive layers, (batch, layers, ...).

        `layer_weights` are those of all exits from the first; `has_exit` is there where a layer has none.

        Args:
            pooled: (batch, layers, width), the states; not looked at unless `reads_pooled`.
            classifier_logits: (batch, layers, classes), every classifier's own logits.
            first_layer_index: of these layers, 0-based.
        """
        batch, layers = classifier_logits.shape[:2]
        here = slice(first_layer_index, first_layer_index + layers)
        found: dict[str, Tensor] = {}
        if "classifier_logits" in self.reads:
            found["classifier_logits"] = classifier_logits
        if "temperatures" in self.reads and self.temperatures is not None:
            found["temperatures"] = self.temperatures[here].to(classifier_logits.device).expand(batch, -1)
        if "layer_weights" in self.reads:
            weights = self.layer_weights[: here.stop][self.has_exit[: here.stop]]
            found["layer_weights"] = weights.to(classifier_logits.device).expand(batch, -1)
        if "has_exit" in self.reads and not self.has_exit.all():
            found["has_exit"] = self.has_exit[here].to(classifier_logits.device).expand(batch, -1)
        with torch.autocast(classifier_logits.device.type, enabled=False):
            if "right_probs" in self.reads and self.learnt_to_exit is not None:
                found["right_probs"] = self.learnt_to_exit(pooled).sigmoid()
            if self.null_space is not None:
                squared_norms = pooled.float().square().sum(-1)
                found["null_shares"] = self.null_space.shares(
                    classifier_logits, squared_norms, first_layer_index
                )
        return found
