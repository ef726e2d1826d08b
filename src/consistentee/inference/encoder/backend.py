"""What the engine asks of a backend: run one layer on some rows, classify there, keep some rows, pool rows.

A *batch* is whatever a backend makes of token rows: hidden states, padded or packed, and what the layers need beside
them. The engine never looks inside; it counts rows, drops those that exited and joins what is left of several batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.policy import PolicyNetwork

TokenRow = Mapping[str, Sequence[int]]
"""One tokenized input, as `batches.encode_texts` gives it: `input_ids` and, where there are any, `token_type_ids`."""

BatchT = TypeVar("BatchT")


class EncoderParts(Protocol):
    """What an engine needs of a model, in evaluation mode.

    Attributes:
        backbone: a Hugging Face encoder.
        classifiers: one a layer, or one alone on the last layer of a model without exits.
        num_layers: layers of the backbone.
    """

    backbone: PreTrainedModel
    classifiers: InternalClassifiers
    num_layers: int


def policy_of(model: EncoderParts) -> PolicyNetwork | None:
    """The policy network; None for a model without exits."""
    return getattr(model, "policy", None)


def classifier_indices(model: EncoderParts) -> tuple[int, ...]:
    """Which classifier sits on each layer, (layers,): 0 where there is one alone, on the last."""
    num_layers = model.num_layers
    return tuple(range(num_layers)) if len(model.classifiers.layers) == num_layers else (0,) * num_layers


@dataclass(frozen=True)
class Answers:
    """What `Engine.run` gives, in the order of the rows.

    Args:
        labels: class indices.
        scores: their probabilities at the exit layer.
        exit_layers: layers executed, from 1.
        real_tokens, computed_tokens: summed over the layers; `1 - real / computed` is the share of padding.
    """

    labels: list[int]
    scores: list[float]
    exit_layers: list[int]
    real_tokens: int
    computed_tokens: int


class Backend(Protocol[BatchT]):
    """Runs a model layer by layer.

    Attributes:
        name: `torch`, `onnxruntime`, ...: what `Engine.backend` reports.
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        device: where what classifiers say comes back.
        num_layers: layers of the model.
    """

    name: str
    dtype: str
    device: torch.device
    num_layers: int

    def start(self, rows: Sequence[TokenRow]) -> BatchT:
        """Embed the rows: the batch before the first layer, rows in the order given (at least one)."""
        ...

    def run_layer(self, layer_index: int, batch: BatchT) -> BatchT:
        """The batch after one more layer, 0-based. The given one may be overwritten."""
        ...

    def run_all_layers(self, batch: BatchT) -> BatchT:
        """The batch after the last layer, for rows that may not exit before: no need to come back in between."""
        ...

    def classify(self, layer_index: int, batch: BatchT, *, with_pooled: bool = False) -> Tensor:
        """What `exit_feature_map` makes of a layer's pooled states: (rows, classes + width), float32.

        `with_pooled` puts these states behind it: (rows, classes + width + pooled). An original head gives its logits
        alone in any case.
        """
        ...

    def pass_layer(
        self, layer_index: int, batch: BatchT, *, with_pooled: bool = False
    ) -> tuple[BatchT, Tensor]:
        """`run_layer` and `classify` in one go."""
        ...

    def select(self, batch: BatchT, rows: Sequence[int]) -> BatchT:
        """Keep some rows (at least one), ascending indices into the batch."""
        ...

    def merge(self, batches: Sequence[BatchT]) -> BatchT:
        """One batch of the rows of several (at least one), in their order; all stand before the same layer."""
        ...

    def can_merge(self, one: BatchT, other: BatchT) -> bool:
        """Whether `merge` takes the two together at no cost in padding."""
        ...

    def lengths(self, batch: BatchT) -> Sequence[int]:
        """Real tokens of every row."""
        ...

    def computed_tokens(self, batch: BatchT) -> int:
        """Token positions that the linear maps of one layer compute, padding included."""
        ...
