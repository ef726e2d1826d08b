"""LoRA adapters inside a backbone's layers, and their way into its weights at the end."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from consistentee.errors import require_extra


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


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, dropout: float) -> Adapters:
    """Put LoRA adapters beside all linear maps but an LM head, in place; everything else is frozen.

    Args:
        model: a causal language model, or an encoder.
        rank: of the adapters.
        alpha: their scale, which is divided by the rank.
        dropout: before the adapters.

    Raises:
        ImportError: peft is not installed.

    Source: LoRA (arXiv:2106.09685), by way of peft.
    """
    peft: Any = require_extra("lora", "peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # its projections are stored transposed
    )
    return Adapters(peft.LoraModel(model, config, "default"))
