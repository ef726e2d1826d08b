"""Which models an engine takes, and what lays their weights out for fast computing."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from consistentee.errors import SettingError
from consistentee.inference.encoder.backend import Backend, EncoderParts
from consistentee.inference.encoder.onnx_backend import onnx_backend, require_onnx
from consistentee.inference.encoder.torch_backend import require_torch, torch_backend
from consistentee.inference.other_weights import apply_masks, masks_in, weights_elsewhere
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)

BACKENDS = ("torch", "onnxruntime")
ENGINE_DTYPES = ("float32", "bfloat16", "float16", "int8")


def require_own_classifier(saved: LoadedClassifier) -> None:
    """Raise ValueError unless a model is of this library, and its weights are all in its own layers."""
    if not isinstance(saved.model, (EarlyExitForSequenceClassification, FullDepthForSequenceClassification)):
        raise ValueError(
            f'Model "{saved.name}" was not saved by this library (it is a {type(saved.model).__name__}). '
            "Give it exits with `consistentee retrofit`, or give a folder that `consistentee train` or `consistentee "
            "finetune` saved."
        )
    if any(hasattr(module, "base_layer") for module in saved.model.modules()):  # peft's mark of a layer
        raise ValueError(
            f'Model "{saved.name}" has adapters beside its weights, which an engine copies. Merge them first: '
            "merge_and_unload()."
        )
    _require_plain_weights(saved)
    require_evaluation_mode(saved)


def _require_plain_weights(saved: LoadedClassifier) -> None:
    """Raise ValueError for weights that are quantised, or not in memory."""
    elsewhere = weights_elsewhere(saved.model)
    if elsewhere:
        raise ValueError(
            f'Model "{saved.name}" must have all its weights in memory, got {len(elsewhere)} elsewhere, such as '
            f'"{elsewhere[0]}". Open it without offloading (device_map).'
        )
    for name, module in saved.model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
            raise ValueError(
                f'Model "{saved.name}" must have floating point weights, got "{name}", a {type(module).__module__}.'
                f'{type(module).__name__}. Open it as it was saved; Engine(..., dtype="int8") quantises by itself.'
            )


def require_evaluation_mode(saved: LoadedClassifier) -> None:
    """Raise SettingError if a model is in training mode, where dropout makes every answer another one."""
    if saved.model.training:
        raise SettingError(
            f'Model "{saved.name}" must be in evaluation mode, got training mode. Call model.eval().'
        )


class SeenWeights:
    """A model's weights as they are now, to tell later whether they have changed or were replaced.

    What a training or another part brings is seen by `unseen_changes`, as torch does not count a fused optimiser's
    writes. What is written in place through `.data` is not seen. Fields of the configuration that an engine lays out
    count like weights.

    Args:
        model: a model of this library.
    """

    def __init__(self, model: Any) -> None:
        apply_masks(model)
        self._model = model
        self._tree: list[nn.Module] = list(model.modules())
        self._parts, weights = self._parts_now(), self._weights_now()
        self._held = [weight.detach() for weight in weights]  # or others could come to lie where they lay
        self._state = self._state_of(weights)

    def have_changed(self) -> bool:
        """Whether they are other weights, or others than they were."""
        return self._parts_now() != self._parts or self._state_of(self._weights_now()) != self._state

    def _parts_now(self) -> list[nn.Module | None]:
        """What is in each module: as long as that stays, the modules are all there are."""
        return [part for module in self._tree for part in module._modules.values()]

    def _weights_now(self) -> list[Tensor]:
        """All parameters, in a fraction of the time of `parameters()`: they are looked at before every call."""
        own = [
            weight for module in self._tree for weight in module._parameters.values() if weight is not None
        ]
        return own + [mask for module in self._tree for mask in masks_in(module)]

    def _state_of(self, weights: list[Tensor]) -> tuple[Any, ...]:
        is_counted = not any(map(Tensor.is_inference, weights[:1]))
        writes = sum(map(_WRITES, weights)) if is_counted else 0
        fields = [str(getattr(self._model.config, name, None)) for name in _LAID_OUT]
        return self._model.unseen_changes, writes, hash(tuple(map(Tensor.data_ptr, weights))), *fields


_WRITES = attrgetter("_version")
_LAID_OUT = ("exit_layers", "ensemble_decay", "temperatures", "layer_weights")
"""Fields of the configuration that scores and graphs are made of."""


def make_backend(model: EncoderParts, dtype: str, backend: str) -> Backend[Any]:
    """A backend by name.

    Raises:
        MissingExtraError: onnxruntime is asked for and not installed.
        ValueError: there is no such backend or dtype, or the model does not run so.
    """
    device = model.backbone.device
    require_backend(model.backbone.config.model_type, dtype, backend, device.type)
    return torch_backend(model, dtype) if backend == "torch" else onnx_backend(model, dtype)


def require_backend(model_type: str, dtype: str, backend: str, device_type: str = "cpu") -> None:
    """Raise unless there is such a backend, and it runs such models.

    Args:
        model_type: of the backbone.
        dtype: of `ENGINE_DTYPES`.
        backend: of `BACKENDS`.
        device_type: as torch names it.

    Raises:
        MissingExtraError: onnxruntime is asked for and not installed.
        SettingError: there is none, or it does not.
    """
    if "auto" in (dtype, backend):
        raise SettingError(
            'dtype and backend must be named, got "auto". `consistentee benchmark MODEL --dtype auto --backend auto '
            "--data-file TEXTS` says which are the fastest that keep the labels of float32."
        )
    if dtype not in ENGINE_DTYPES:
        raise SettingError(f'dtype must be one of {", ".join(ENGINE_DTYPES)}, got "{dtype}".')
    if backend == "torch":
        require_torch(model_type, dtype)
    elif backend == "onnxruntime":
        require_onnx(model_type, dtype, device_type)
    else:
        raise SettingError(f'backend must be one of {", ".join(BACKENDS)}, got "{backend}".')
