"""Exits on a classifier that stays what it is: how they come onto it, and how they are saved without it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files
from typing_extensions import Self

from consistentee.backbones import encoders
from consistentee.backbones.loading import HUB_OPTIONS, backbone_fingerprint, load_pretrained
from consistentee.backbones.precision import cast_parameters
from consistentee.heads.original_head import OURS, OriginalHead, head_modules
from consistentee.models.backbone_model import BackboneModel
from consistentee.models.configuration import EarlyExitConfig, opening_and_fields

_LOG = logging.getLogger(__name__)


class KeepsOriginal(BackboneModel):
    """What a model with exits can do where it kept the head of the classifier that it was made of."""

    config: Any
    classifiers: Any
    _original_place: str | Path | None = None
    """Where the original of exits that were saved alone was found, if not where the configuration says."""

    @classmethod
    def from_classifier(cls, name_or_path: str | Path, **config_values: Any) -> Self:
        """Fresh exits on a fine-tuned classifier, whose backbone and head stay what they are; in evaluation mode.

        At full depth it gives the original's logits, bit for bit.

        Args:
            name_or_path: hub name or local folder of a Hugging Face sequence classifier of a supported type, or of a
                plain model that `consistentee finetune` saved.
            **config_values: further fields of the configuration, such as `num_queries` or `classifier_hidden_size`, and
                options of opening the classifier, such as `revision` or `dtype`.

        Raises:
            ValueError: it has exits already, its type is not supported, it is no classifier of one class an input, or
                a keyword is unknown.
            OSError: if there is no such model.
        """
        opening, config_values = opening_and_fields(cls.config_class, config_values)
        original = _open_original(str(name_or_path), opening)
        config = original.config
        if config.model_type == OURS:
            head_values = {key: getattr(config, key) for key in ("head", "pooling", "num_queries")}
            head_values["width"] = config.pooled_size
            shared = ("max_length", "parse_special_tokens", "text_pairs", "task")
            config_values = {key: getattr(config, key) for key in shared} | config_values
            encoder_config = config.backbone_config
        else:
            encoders.architecture_of(config)
            head_values, encoder_config = {}, config
        new_config = cast(Any, EarlyExitConfig)(
            encoder_config=encoder_config,
            attn_implementation=encoder_config._attn_implementation,
            original_head={"model_type": config.model_type, **head_values},
            id2label=config.id2label,
            label2id=config.label2id,
            **config_values,
        )
        return cast_parameters(cls._on(original, new_config), original.dtype).eval()

    @classmethod
    def _on(cls, original: Any, config: Any) -> Self:
        """A model with fresh exits around the parts of an original."""
        model_type = config.original_head["model_type"]
        backbone = original.backbone if model_type == OURS else original.base_model
        modules = head_modules(original, model_type)
        if hasattr(backbone, "pooler"):
            backbone.pooler = cast(Any, None)  # it is the head's now
        model = cast(Any, cls)(config, backbone=backbone)
        head = cast(OriginalHead, model.classifiers.layers[-1])
        head.parts = nn.ModuleDict(modules).requires_grad_(False).eval()
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; of a model whose configuration says `exits_only`, the exits alone.

        For that the original is opened once more. Where the weights under the exits are no longer its own, or it cannot
        be found, all of them are saved and a warning is logged; from then on the configuration says so, too.
        """
        if self.config.exits_only:
            weights: Mapping[str, torch.Tensor] = kwargs.get("state_dict") or self.state_dict()
            changed = self._changed_from_original(weights)
            if changed is None:
                kwargs["state_dict"] = {name: weights[name] for name in self.exit_names()}
            else:
                _LOG.warning(
                    "%s: all weights are saved to %s, not the exits alone (exits_only).",
                    changed,
                    save_directory,
                )
                self.config.exits_only = False
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _changed_from_original(self, weights: Mapping[str, torch.Tensor]) -> str | None:
        """Why these weights must not be saved without those below the exits; None where they can be."""
        known, exits = cast("dict[str, Any]", self.config.original), set(self.exit_names())
        name = str(self._original_place or known["name"])
        try:
            parts = _open_unchanged(name, known)
            with torch.random.fork_rng(devices=[]):
                own = type(self)._on(parts, copy.deepcopy(self.config)).state_dict()
        except (OSError, ValueError) as error:
            return f'The original "{name}" cannot be compared with ({error})'
        for key in own.keys() - exits:
            here, there = weights.get(key), own[key]
            if here is None or not torch.equal(here.detach().cpu(), there.to(here.dtype)):
                self.config.original = {**known, "tuned": "full"}
                return f'The weights under the exits are no longer those of "{name}", such as "{key}"'
        return None

    def exit_names(self) -> list[str]:
        """Names of the weights that are the exits' and not the original's."""
        head = f"classifiers.layers.{self.num_layers - 1}."
        return [
            name
            for name in self.state_dict()
            if name.startswith(("classifiers.", "policy.", "learnt_to_exit.")) and not name.startswith(head)
        ]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, original: str | Path | None = None, **kwargs: Any
    ) -> Any:
        """As Hugging Face's. A folder with exits alone is put onto the model that they were made for.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            *args, **kwargs: Hugging Face's.
            original: where that model lies now; None takes where it lay.

        Raises:
            ValueError: the original is not what it was.
            OSError: there is no such folder, or no original.
        """
        config = kwargs.get("config")
        if not isinstance(config, EarlyExitConfig):
            config = EarlyExitConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not config.exits_only:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if (
                config.original_head is not None
            ):  # loaded weights ask for gradients, whatever was there before
                model.classifiers.layers[-1].requires_grad_(False)
            return loaded
        model = cls._put_onto_original(str(pretrained_model_name_or_path), config, original, kwargs)
        if kwargs.get("output_loading_info"):
            return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return model

    @classmethod
    def _put_onto_original(
        cls, folder: str, config: EarlyExitConfig, moved_to: str | Path | None, options: dict[str, Any]
    ) -> Self:
        known: dict[str, Any] = config.original or {}
        name = str(moved_to or known.get("name"))
        try:
            parts = _open_unchanged(name, known, options)
        except _NotTheOriginal as error:
            raise ValueError(f'Model "{folder}" holds exits for "{name}", {error}') from error
        except OSError as error:
            raise OSError(
                f'Model "{folder}" holds the exits alone, and the model that they are for, "{name}", cannot be opened. '
                "Put it there, or write its place into original.name of config.json, or give it in Python: "
                f"Engine.from_pretrained(..., original=...). ({error})"
            ) from error
        if config.num_classes != parts.config.num_labels:
            raise ValueError(
                f'num_labels must be {parts.config.num_labels} for exits on "{name}", got {config.num_classes}: the '
                "original's head decides the classes. Leave num_labels out."
            )
        config.name_or_path = folder
        config.encoder_config = parts.backbone.config if hasattr(parts, "backbone") else parts.config
        model = cls._on(parts, config)
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        weights = _saved_weights(folder, options.get("variant"), hub)
        missing = set(model.exit_names()) - weights.keys()
        if missing:
            raise ValueError(
                f'Model "{folder}" lacks {len(missing)} of its exits\' weights, such as "{min(missing)}". Restore it.'
            )
        model.load_state_dict(weights, strict=False)
        model._original_place = moved_to
        return cast_parameters(model, parts.dtype).to(parts.device).eval()


_ORIGINALS = ("dtype", "torch_dtype", "attn_implementation", "device_map")
"""Options of opening a model that concern the original below the exits, too."""
_ANYWHERE = ("token", "cache_dir", "local_files_only")


class _NotTheOriginal(ValueError):
    """Another model lies where the original lay."""


def _saved_weights(folder: str, variant: str | None, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a folder or a name on the hub by name, whether one file holds them or several shards.

    Args:
        folder: or a name on the hub.
        variant: what is in the files' names before the ending, as in `save_pretrained`; None for nothing.
        hub: options of finding it.

    Raises:
        OSError: there are none.
    """
    name, index_name = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if variant is not None:
        name, index_name = (f".{variant}.".join(file.rsplit(".", 1)) for file in (name, index_name))
    paths: Any
    try:
        paths = [cached_file(folder, name, **hub)]
    except OSError as error:
        try:
            index: Any = cached_file(folder, index_name, **hub)
        except OSError:
            raise error from None
        paths, _ = get_checkpoint_shard_files(folder, index, **hub)
    return {name: weight for path in paths for name, weight in load_file(path).items()}


def _open_unchanged(name: str, known: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """The original that a configuration knows, opened where it lies now.

    Raises:
        ValueError: there is another model there.
        OSError: there is none.
    """
    found = backbone_fingerprint(name)
    if found is not None and found != known.get("fingerprint"):
        raise _NotTheOriginal(
            f"which is not what it was (content {str(known.get('fingerprint'))[:8]}, now {found[:8]}): the exits may "
            "be wrong about it. Run `consistentee retrofit` again, or restore it."
        )
    opening = {key: value for key, value in (options or {}).items() if key in (*_ORIGINALS, *_ANYWHERE)}
    if "torch_dtype" in opening:  # its name of old
        opening.setdefault("dtype", opening.pop("torch_dtype"))
    if found is None and known.get("revision") is not None:
        opening["revision"] = known["revision"]
    return _open_original(name, opening)


def _open_original(name: str, opening: Mapping[str, Any]) -> Any:
    """The classifier that exits are for."""
    original: Any = load_pretrained(AutoModelForSequenceClassification, name, "Model", **opening)
    check_single_label(original.config, name)
    if original.config.model_type == EarlyExitConfig.model_type:
        raise ValueError(f'Model "{name}" has exits already. Give the model that it was made of.')
    return original


def check_single_label(config: Any, name: str) -> None:
    """See that a classifier gives one class for an input.

    Raises:
        ValueError: it gives a number, an order, or several labels.
    """
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            f'Model "{name}" is a multi-label classifier, whose exits would have to agree on a set of labels: not '
            "supported. Give a classifier of one class an input."
        )
    if config.problem_type == "regression" or config.num_labels < 2:
        raise ValueError(
            f'Model "{name}" gives a number (num_labels={config.num_labels}: regression, or a reranker such as a '
            "CrossEncoder), whose exits would have to agree within a tolerance or in order: not supported. Give a "
            "classifier of two classes or more."
        )
