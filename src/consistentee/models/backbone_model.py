"""What our Hugging Face classes share: a backbone inside, and what models with exits know of their exit rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from consistentee.atomic_files import give_usual_permissions
from consistentee.functional.criteria import check_fitted, check_threshold
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.configuration import BackboneConfig


class BackboneModel(PreTrainedModel):
    """A backbone that runs layer by layer, with something of ours on it."""

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    config: BackboneConfig
    backbone: PreTrainedModel
    unseen_changes: int = 0
    """How often weights may have changed in ways that torch does not count: a fused optimiser's, a part put in."""

    def __init__(self, config: BackboneConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        self._has_no_weights = torch.empty(0).device.type == "meta"  # `from_pretrained` brings them

    @property
    def supports_gradient_checkpointing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the backbone's layers can be computed again in the backward pass instead of being kept."""
        return self.backbone.supports_gradient_checkpointing

    @property
    def num_layers(self) -> int:
        """Number of layers, hence of possible exits."""
        return self.config.num_hidden_layers

    def train(self, mode: bool = True) -> Self:
        """As torch's."""
        if mode or any(module.training for module in self.modules()):
            self.unseen_changes += 1
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's."""
        self.unseen_changes += 1
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; others may read weights like any new file, where safetensors lets their owner alone."""
        saved: Any = super().save_pretrained(save_directory, *args, **kwargs)
        for path in Path(save_directory).glob("*.safetensors"):
            give_usual_permissions(path)
        return saved

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give the backbone as many token embeddings as a tokenizer has tokens; as in Hugging Face."""
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.backbone_config.vocab_size = len(embeddings.weight)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # New modules initialise themselves when built, and those of the backbone go by its rules. Where weights were to
        # be loaded and some were not there, or had another shape, the same rules apply, to these alone: transformers
        # keeps torch's initialisers off whatever was loaded.
        if not self._has_no_weights:
            return
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        else:
            self.backbone._init_weights(module)


class WithExits:
    """A model whose layers have exits, and the policy that decides about them."""

    task: ClassVar[str]
    """Whose criteria it knows: `CLASSIFICATION` or `GENERATION`."""
    config: Any
    num_layers: Any

    def new_policy(self, policy_input: str | None = None) -> PolicyNetwork:
        """An untrained policy network as the configuration has it, or with another input."""
        return PolicyNetwork(
            num_layers=self.num_layers,
            hidden_size=self.config.pooled_size,
            policy_input=policy_input or self.config.policy_input,
            policy_hidden_size=self.config.policy_hidden_size,
            dropout=self.config.policy_dropout,
            initial_exit_bias=self.config.initial_exit_bias,
        )

    def known_threshold(self, criterion: str) -> float | None:
        """The saved threshold of a criterion, or None."""
        if criterion == self.config.criterion:
            return self.config.threshold
        value = (getattr(self.config, "thresholds", None) or {}).get(criterion)
        return None if value is None else float(value)

    def criterion_and_threshold(self, criterion: str | None, threshold: float | None) -> tuple[str, float]:
        """What a call uses, checked: the given ones, or the saved ones.

        Raises:
            ValueError: an unknown criterion, a threshold that does not fit, or none to be found.
        """
        rule: str = self.config.criterion if criterion is None else criterion
        check_fitted(rule, self.config)
        limit = self.known_threshold(rule) if threshold is None else threshold
        if limit is None:
            check_threshold(1, rule, self.task)
            raise ValueError(f'criterion "{rule}" has no saved threshold. Give one with threshold=.')
        return rule, check_threshold(limit, rule, self.task)
