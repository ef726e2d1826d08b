"""The head that a model was fine-tuned with, kept on its last layer as it was: the same modules, the same operations.

A model that gets exits without being changed still has to give its own logits at full depth, bit for bit. The table at
the end says, for every supported type, which modules of the Hugging Face classifier make its head and how they are
called; `build` makes them anew for a saved configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from consistentee.heads.classifiers import InternalClassifiers

HeadFunction = Callable[[Any, Tensor, Tensor, Any], Tensor]
"""(modules by name, hidden states, attention mask, the original's config) -> logits (batch, classes)."""


@dataclass(frozen=True)
class HeadParts:
    """A row of `HEADS`.

    Attributes:
        modules: paths inside the Hugging Face classifier; the last part of a path is the module's name.
        forward: how they make logits of the last layer's states.
    """

    modules: tuple[str, ...]
    forward: HeadFunction


class OriginalHead(nn.Module):
    """A fine-tuned model's own head in the place of the last layer's classifier. It never leaves evaluation mode.

    Args:
        model_type: key of `HEADS`.
        modules: what it is made of, by name.
        config: the original's, or of a model of ours its classifiers' values.
        width: of the pooled states that the other layers' classifiers give.
    """

    def __init__(self, model_type: str, modules: Mapping[str, nn.Module], config: Any, width: int) -> None:
        super().__init__()
        self.model_type, self.width = model_type, width
        self._config = config
        self.parts = nn.ModuleDict(dict(modules))
        self.requires_grad_(False)
        self.eval()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros in place of a pooled state, (batch, width), as nobody decides here, and logits (batch, classes).

        Args:
            hidden_states: (batch, tokens, hidden), the last layer's.
            attention_mask: (batch, tokens), 1 for real tokens.
        """
        logits = HEADS[self.model_type].forward(self.parts, hidden_states, attention_mask, self._config)
        return hidden_states.new_zeros(hidden_states.shape[0], self.width), logits

    def train(self, mode: bool = True) -> OriginalHead:
        """Stay in evaluation mode, whatever the model around does."""
        return super().train(False)


def head_modules(model: Any, model_type: str) -> dict[str, nn.Module]:
    """The modules of a classifier's head, by name.

    Args:
        model: a Hugging Face sequence classifier, or a plain one of ours.
        model_type: key of `HEADS`.
    """
    return {path.rpartition(".")[2]: model.get_submodule(path) for path in HEADS[model_type].modules}


def build_original_head(
    values: Mapping[str, Any], backbone_config: PreTrainedConfig, num_labels: int, width: int
) -> OriginalHead:
    """A head of the same make with weights of no meaning, for those that are to be loaded.

    Args:
        values: `model_type`, and of a plain model of ours what its classifier is.
        backbone_config: the original's configuration.
        num_labels: classes.
        width: of the pooled states of the other layers.

    Raises:
        ValueError: a type that the table does not have.
    """
    model_type = str(values.get("model_type"))
    if model_type not in HEADS:
        raise ValueError(f'original_head must be of a type among {", ".join(HEADS)}, got "{model_type}".')
    if model_type == OURS:
        plain = {name: values[name] for name in ("head", "pooling", "num_queries", "width")}
        hidden = int(getattr(backbone_config, "hidden_size", None) or backbone_config.dim)
        classifiers = InternalClassifiers(
            num_layers=1, hidden_size=hidden, num_labels=num_labels, dropout=0.0, **plain
        )
        return OriginalHead(OURS, {"classifiers": classifiers}, None, width)
    with torch.device("meta"):
        whole = AutoModelForSequenceClassification.from_config(backbone_config)
    modules = head_modules(whole, model_type)
    if torch.empty(0).device.type != "meta":  # else whoever loads the weights gives them room
        for module in modules.values():
            module.to_empty(device=torch.empty(0).device)
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)
    return OriginalHead(model_type, modules, backbone_config, width)


def _pooled_then_classified(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    return parts["classifier"](parts["pooler"](states))


def _classified(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    return parts["classifier"](states)


def _distilbert(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    return parts["classifier"](torch.relu(parts["pre_classifier"](states[:, 0])))


def _albert(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    return parts["classifier"](torch.tanh(parts["pooler"](states[:, 0])))


def _modernbert(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    if config.classifier_pooling == "cls":
        pooled = states[:, 0]
    else:
        pooled = (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return parts["classifier"](parts["head"](pooled))


def _ours(parts: Any, states: Tensor, mask: Tensor, config: Any) -> Tensor:
    return parts["classifiers"](0, states, mask)[1]


OURS = "consistentee_full_depth"
_ROBERTA = HeadParts(("classifier",), _classified)
HEADS: dict[str, HeadParts] = {
    "bert": HeadParts(("bert.pooler", "classifier"), _pooled_then_classified),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": HeadParts(("pre_classifier", "classifier"), _distilbert),
    "albert": HeadParts(("albert.pooler", "classifier"), _albert),
    "electra": _ROBERTA,
    "mpnet": _ROBERTA,
    "deberta-v2": HeadParts(("pooler", "classifier"), _pooled_then_classified),
    "modernbert": HeadParts(("head", "classifier"), _modernbert),
    OURS: HeadParts(("classifiers",), _ours),
}
"""By the original's model type."""
