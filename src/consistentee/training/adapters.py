"""LoRA adapters inside a causal language model's layers, and their way into its weights at the end."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from consistentee.backbones.decoders import decoder_architecture
from consistentee.errors import require_extra

PROJECTIONS = ("query", "key", "value", "attention_output", "gate", "up", "down")


class Adapters:
    """The adapters of a model, or none.

    Args:
        wrapped: what peft made of the model.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def merge(self) -> None:
        """Add the adapters to the weights and take them out: the model is a plain one again."""
        if self._wrapped is not None:
            self._wrapped.merge_and_unload()
            self._wrapped = None


def adapted_projections(model_type: str) -> list[str]:
    """Paths inside a layer of all projections of attention and MLP, which get adapters.

    Example:
        >>> adapted_projections("gpt2")
        ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    """
    parts = decoder_architecture(model_type).parts
    return [path for path in (getattr(parts, name) for name in PROJECTIONS) if path]


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, dropout: float) -> Adapters:
    """Put LoRA adapters beside all projections of attention and MLP, in place; everything else is frozen.

    Args:
        model: a causal language model of a supported type.
        rank: of the adapters.
        alpha: their scale, which is divided by the rank.
        dropout: before the adapters.

    Raises:
        ImportError: peft is not installed.

    Source: LoRA (arXiv:2106.09685), by way of peft.
    """
    peft: Any = require_extra("lora", "peft")
    architecture = decoder_architecture(model.config)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=adapted_projections(architecture.model_type),
        fan_in_fan_out=architecture.model_type == "gpt2",  # its projections are stored transposed
    )
    return Adapters(peft.LoraModel(model, config, "default"))
