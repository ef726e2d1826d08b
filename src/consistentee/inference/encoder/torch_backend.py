"""The engine's backends in torch: packed rows for BERT and its kin, padded rows for every other encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from consistentee.backbones import encoders as backbones
from consistentee.backbones.precision import cast_parameters
from consistentee.errors import SettingError
from consistentee.heads.original_head import OriginalHead
from consistentee.heads.policy import exit_feature_map
from consistentee.inference.encoder.backend import EncoderParts, TokenRow, classifier_indices, policy_of
from consistentee.inference.encoder.packed_heads import PackedClassifiers, exit_features
from consistentee.inference.encoder.packed_layers import LAYER_PARTS, PackedLayers, storage_dtype
from consistentee.inference.encoder.packing import Layout, PackedBatch, pack, similar_rows
from consistentee.inference.encoder.prepacked_linear import has_fast_bfloat16, has_int8

WIDTH_STEP = 8
"""Padded rows are padded to multiples of this, so that batches of similar rows can be joined."""


def torch_backend(model: EncoderParts, dtype: str) -> PackedBackend | PaddedBackend:
    """The backend that suits a model, on the model's device.

    Args:
        model: in evaluation mode.
        dtype: `float32`, `bfloat16`, `float16` or `int8` (packed types on CPU only).

    Raises:
        ValueError: int8 for a type that runs padded, or on another device.
    """
    model_type = model.backbone.config.model_type
    require_torch(model_type, dtype)
    return PackedBackend(model, dtype) if model_type in LAYER_PARTS else PaddedBackend(model, dtype)


def require_torch(model_type: str, dtype: str) -> None:
    """Raise SettingError unless models of a type run in a dtype, on CPU at least."""
    if dtype == "int8" and model_type not in LAYER_PARTS:
        raise SettingError(
            f'dtype "int8" is there for {", ".join(LAYER_PARTS)}, got a model of type "{model_type}". '
            "Take float32 or bfloat16."
        )


def torch_dtypes(model: EncoderParts) -> tuple[str, ...]:
    """The dtypes that this model runs in on its device: what `auto` chooses from, float32 first."""
    device = model.backbone.device
    if device.type == "cuda":
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return ("float32", half)
    found = ["float32"]
    if device.type == "cpu" and has_fast_bfloat16():
        found.append("bfloat16")
    if has_int8(device) and model.backbone.config.model_type in LAYER_PARTS:
        found.append("int8")
    return tuple(found)


def token_tensors(
    rows: Sequence[TokenRow], width: int, backbone: PreTrainedModel, device: torch.device
) -> list[Tensor]:
    """`input_ids`, `attention_mask` and, where the rows have them, `token_type_ids`, (rows, width) int64.

    Args:
        rows: tokenized inputs of at most `width` tokens.
        width: what they are padded to, on the right.
        backbone: its padding id is the one by which roberta and its kin number positions.
        device: where the tensors go.
    """

    def padded(values: list[Sequence[int]], fill: int) -> Tensor:
        if all(len(value) == width for value in values):
            return torch.tensor(values, dtype=torch.int64).to(device)
        return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values], dtype=torch.int64).to(device)

    ids = [row["input_ids"] for row in rows]
    padding = int(getattr(backbone.config, "pad_token_id", None) or 0)
    tensors = [padded(ids, padding), padded([[1] * len(row) for row in ids], 0)]
    if "token_type_ids" in rows[0]:
        tensors.append(padded([row["token_type_ids"] for row in rows], 0))
    return tensors


class PackedBackend:
    """Rows without padding; see `backend.Backend`."""

    name = "torch"

    def __init__(self, model: EncoderParts, dtype: str) -> None:
        self.model = model
        self.dtype = dtype
        self.device = model.backbone.device
        self.num_layers = model.num_layers
        self._classifier_indices = classifier_indices(model)
        self._layers = PackedLayers(model.backbone, dtype, model.backbone.device)
        self._classifiers = PackedClassifiers(
            model.classifiers, policy_of(model), dtype, model.backbone.device
        )

    def start(self, rows: Sequence[TokenRow]) -> PackedBatch:
        """Embed the rows."""
        lengths = [len(row["input_ids"]) for row in rows]
        parts = [(group, self._embedded([rows[row] for row in group])) for group in similar_rows(lengths)]
        tokens = parts[0][1]
        if len(parts) > 1:
            order = [row for group, _ in parts for row in group]
            layout = Layout([lengths[row] for row in order], self.device)
            index = layout.tokens_of(np.argsort(order).tolist())
            tokens = torch.cat([part for _, part in parts]).index_select(0, index)
        return pack(tokens.to(storage_dtype(self.dtype)), lengths)

    def _embedded(self, rows: Sequence[TokenRow]) -> Tensor:
        """(tokens, hidden), the rows' tokens one after another."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        ids, mask, *types = token_tensors(rows, width, self.model.backbone, self.device)
        tokens = backbones.embed_tokens(self.model.backbone, ids, *types).flatten(0, 1)
        if min(lengths) == width:
            return tokens
        return tokens.index_select(0, mask.flatten().nonzero().squeeze(1))

    def run_layer(self, layer_index: int, batch: PackedBatch) -> PackedBatch:
        """The batch after one more layer."""
        return self._layers.run_layer(layer_index, batch)

    def run_all_layers(self, batch: PackedBatch) -> PackedBatch:
        """The batch after the last layer."""
        for layer_index in range(self.num_layers):
            batch = self.run_layer(layer_index, batch)
        return batch

    def classify(self, layer_index: int, batch: PackedBatch, *, with_pooled: bool = False) -> Tensor:
        """Logits, what the policy reads and perhaps pooled states, float32."""
        return self._classifiers(self._classifier_indices[layer_index], batch, with_pooled=with_pooled)

    def pass_layer(
        self, layer_index: int, batch: PackedBatch, *, with_pooled: bool = False
    ) -> tuple[PackedBatch, Tensor]:
        """`run_layer` and `classify`."""
        batch = self.run_layer(layer_index, batch)
        return batch, self.classify(layer_index, batch, with_pooled=with_pooled)

    def select(self, batch: PackedBatch, rows: Sequence[int]) -> PackedBatch:
        """Keep some rows."""
        return batch.select(rows)

    def merge(self, batches: Sequence[PackedBatch]) -> PackedBatch:
        """Join batches."""
        return PackedBatch.merge(batches)

    def can_merge(self, one: PackedBatch, other: PackedBatch) -> bool:
        """Always: there is no padding."""
        return True

    def lengths(self, batch: PackedBatch) -> Sequence[int]:
        """Tokens of every row."""
        return batch.layout.lengths

    def computed_tokens(self, batch: PackedBatch) -> int:
        """Rows of the token matrix."""
        return len(batch.hidden_states)


@dataclass(frozen=True)
class PaddedBatch:
    """An `EncoderState` and its rows' lengths."""

    state: backbones.EncoderState
    lengths: tuple[int, ...]


class PaddedBackend:
    """Padded rows through Hugging Face's own layers; see `backend.Backend`."""

    name = "torch"

    def __init__(self, model: EncoderParts, dtype: str) -> None:
        kind: torch.dtype = getattr(torch, dtype)
        self.model: Any = model
        if model.backbone.dtype != kind:
            self.model = cast_parameters(copy.deepcopy(cast(Any, model)), kind)
        classifiers = model.classifiers
        self._exit_feature_maps = [
            exit_feature_map(classifiers, policy_of(model), index)
            for index, classifier in enumerate(classifiers.layers)
            if not isinstance(classifier, OriginalHead)
        ]
        self.dtype = dtype
        self.device = model.backbone.device
        self.num_layers = model.num_layers
        self._classifier_indices = classifier_indices(model)

    def start(self, rows: Sequence[TokenRow]) -> PaddedBatch:
        """Embed the rows, padded to a multiple of `WIDTH_STEP` as far as the model's positions reach."""
        lengths = tuple(len(row["input_ids"]) for row in rows)
        backbone = self.model.backbone
        most = int(getattr(backbone.config, "max_position_embeddings", max(lengths)))
        width = max(max(lengths), min(-(-max(lengths) // WIDTH_STEP) * WIDTH_STEP, most))
        tensors = token_tensors(rows, width, backbone, self.device)
        return PaddedBatch(backbones.embed(backbone, *tensors), lengths)

    def run_layer(self, layer_index: int, batch: PaddedBatch) -> PaddedBatch:
        """The batch after one more layer."""
        return PaddedBatch(backbones.run_layer(self.model.backbone, layer_index, batch.state), batch.lengths)

    def run_all_layers(self, batch: PaddedBatch) -> PaddedBatch:
        """The batch after the last layer."""
        for layer_index in range(self.num_layers):
            batch = self.run_layer(layer_index, batch)
        return batch

    def classify(self, layer_index: int, batch: PaddedBatch, *, with_pooled: bool = False) -> Tensor:
        """Logits, what the policy reads and perhaps pooled states, float32; of an original head logits alone."""
        index = self._classifier_indices[layer_index]
        state = batch.state
        pooled, logits = self.model.classifiers(index, state.hidden_states, state.attention_mask)
        if index == len(self._exit_feature_maps):
            return logits.float()
        return exit_features(pooled.float(), *self._exit_feature_maps[index], with_pooled)

    def pass_layer(
        self, layer_index: int, batch: PaddedBatch, *, with_pooled: bool = False
    ) -> tuple[PaddedBatch, Tensor]:
        """`run_layer` and `classify`."""
        batch = self.run_layer(layer_index, batch)
        return batch, self.classify(layer_index, batch, with_pooled=with_pooled)

    def select(self, batch: PaddedBatch, rows: Sequence[int]) -> PaddedBatch:
        """Keep some rows; their padding stays."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return PaddedBatch(batch.state.select(index), tuple(batch.lengths[row] for row in rows))

    def merge(self, batches: Sequence[PaddedBatch]) -> PaddedBatch:
        """Join batches of the same width; what all rows share is the same for all of them."""
        if len(batches) == 1:
            return batches[0]
        states = [batch.state for batch in batches]
        per_row = {name: _joined([state.per_row[name] for state in states]) for name in states[0].per_row}
        state = backbones.EncoderState(
            torch.cat([state.hidden_states for state in states]),
            torch.cat([state.attention_mask for state in states]),
            per_row,
            states[0].shared,
        )
        return PaddedBatch(state, tuple(length for batch in batches for length in batch.lengths))

    def can_merge(self, one: PaddedBatch, other: PaddedBatch) -> bool:
        """Batches of the same width whose masks are both there or both missing."""
        left, right = one.state, other.state
        same_masks = all(
            (left.per_row[name] is None) == (right.per_row[name] is None) for name in left.per_row
        )
        return left.hidden_states.shape[1] == right.hidden_states.shape[1] and same_masks

    def lengths(self, batch: PaddedBatch) -> Sequence[int]:
        """Real tokens of every row."""
        return batch.lengths

    def computed_tokens(self, batch: PaddedBatch) -> int:
        """Rows times width."""
        return batch.state.attention_mask.numel()


def _joined(masks: list[Tensor | None]) -> Tensor | None:
    return None if masks[0] is None else torch.cat([mask for mask in masks if mask is not None])
