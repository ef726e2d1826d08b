"""A smaller encoder of a larger one: its first layers, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from consistentee.backbones.encoders import encoder_layers, num_layers
from consistentee.backbones.loading import read_config
from consistentee.errors import SettingError


def keep_first_layers(backbone: PreTrainedModel, count: int) -> None:
    """Cut a backbone down to its first layers, in place; its configuration follows.

    Args:
        backbone: a base model of a supported type. Of modernbert the final norm stays, and follows the last layer kept.
        count: layers to keep, from 1 to all.

    Raises:
        SettingError: there are fewer layers, or groups of albert layers that share their weights would be cut in two.
    """
    depth, layers = num_layers(backbone), encoder_layers(backbone)
    if not 1 <= count <= depth:
        raise SettingError(f"num_layers must be in [1, {depth}], the layers of the backbone, got {count}.")
    kept = count * len(layers) // depth  # fewer than `count` where layers share their weights
    if kept * depth != count * len(layers) and len(layers) > 1:
        step = depth // len(layers)
        raise SettingError(
            f"num_layers must be a multiple of {step} for this backbone, whose layers share weights in groups, "
            f"got {count}."
        )
    del layers[max(kept, 1) :]
    if len(layers) != depth and hasattr(backbone.config, "num_hidden_groups"):
        backbone.config.num_hidden_groups = len(layers)
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = list(backbone.config.layer_types[:count])
    backbone.config.num_hidden_layers = count


def layers_of(name_or_path: str | Path) -> int:
    """How many layers a saved backbone has, by its configuration; arguments and errors as in `load_backbone`."""
    values = read_config(name_or_path)
    return int(AutoConfig.for_model(values.pop("model_type"), **values).num_hidden_layers)
