"""The engine's backends on ONNX Runtime, float32: padded rows in numpy on CPU, in torch's tensors on a GPU.

Each layer runs in one session with its classifier; all layers as one where nobody may exit in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.errors import SettingError, require_extra
from consistentee.inference.encoder.backend import EncoderParts, TokenRow
from consistentee.inference.encoder.incremental_scores import Floats
from consistentee.inference.encoder.onnx_graphs import (
    HIDDEN,
    IDS,
    LENGTHS,
    POSITION_BIAS,
    POSITIONS,
    TOKENS,
    TYPES,
)
from consistentee.inference.encoder.onnx_sessions import EXIT_FEATURES, OUTPUT, POOLED, OnnxSessions
from consistentee.inference.encoder.packed_layers import LAYER_PARTS

MAX_MERGED_PADDING = 0.15
"""Share of padding that joining two batches may bring."""


def has_onnxruntime(model: EncoderParts) -> bool:
    """Whether this model can run on ONNX Runtime here."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return False
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(
        model.backbone.device.type
    )
    available = require_extra("onnx", "onnxruntime").get_available_providers()
    return provider in available and model.backbone.config.model_type in LAYER_PARTS


def onnx_backend(model: EncoderParts, dtype: str) -> OnnxBackend | BoundOnnxBackend:
    """The backend that suits a model's device.

    Args:
        model: of a type in `LAYER_PARTS`, on CPU or a GPU; its weights are copied.
        dtype: `float32`.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ValueError: a type, dtype, device or activation that ONNX Runtime does not run here.
    """
    device = model.backbone.device
    require_onnx(model.backbone.config.model_type, dtype, device.type)
    return OnnxBackend(model) if device.type == "cpu" else BoundOnnxBackend(model)


def require_onnx(model_type: str, dtype: str, device_type: str) -> None:
    """Raise unless ONNX Runtime is there and runs such models so.

    Args:
        model_type: of the backbone.
        dtype: `float32`.
        device_type: `cpu` or `cuda`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SettingError: it does not run them so.
    """
    require_extra("onnx", "onnxruntime")
    if dtype != "float32" or device_type not in ("cpu", "cuda") or model_type not in LAYER_PARTS:
        raise SettingError(
            f'backend "onnxruntime" runs {", ".join(LAYER_PARTS)} in float32 on cpu or cuda, got a model of type '
            f'"{model_type}" in {dtype} on {device_type}. Take backend "torch".'
        )


@dataclass(frozen=True)
class OnnxBatch:
    """Padded rows between two layers.

    Args:
        hidden_states: (rows, width, hidden); width is the longest row's.
        lengths: real tokens of every row.
    """

    hidden_states: Floats
    lengths: tuple[int, ...]

    @cached_property
    def row_lengths(self) -> NDArray[np.int32]:
        """(rows,)."""
        return np.array(self.lengths, dtype=np.int32)

    @cached_property
    def is_token(self) -> NDArray[np.bool_]:
        """(rows, 1, width)."""
        return (np.arange(self.hidden_states.shape[1]) < self.row_lengths[:, None])[:, None]

    @cached_property
    def token_bias(self) -> Floats:
        """(rows, 1, width): 0 at tokens, the lowest float at padding."""
        if min(self.lengths) == self.hidden_states.shape[1]:
            return np.zeros((len(self.lengths), 1, self.hidden_states.shape[1]), dtype=np.float32)
        return np.where(self.is_token, np.float32(0), np.finfo(np.float32).min)

    @cached_property
    def pooling_weights(self) -> Floats:
        """(rows, 1, width): each token's share of its row's mean."""
        return (self.is_token / self.row_lengths[:, None, None]).astype(np.float32)

    def moved_to(self, hidden_states: Floats) -> OnnxBatch:
        """The same rows after a layer; what was worked out about them stays."""
        batch = OnnxBatch(hidden_states, self.lengths)
        for name in ("row_lengths", "is_token", "token_bias", "pooling_weights"):
            if name in self.__dict__:
                batch.__dict__[name] = self.__dict__[name]
        return batch


@dataclass(frozen=True)
class BoundBatch:
    """As `OnnxBatch`, in tensors on the backend's device."""

    hidden_states: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def row_lengths(self) -> Tensor:
        """(rows,) int32."""
        return torch.tensor(self.lengths, dtype=torch.int32).to(self.hidden_states.device)

    @cached_property
    def is_token(self) -> Tensor:
        """(rows, 1, width) bool."""
        positions = torch.arange(self.hidden_states.shape[1], device=self.hidden_states.device)
        return (positions < self.row_lengths[:, None])[:, None]

    @cached_property
    def token_bias(self) -> Tensor:
        """(rows, 1, width): 0 at tokens, the lowest float at padding."""
        lowest = torch.finfo(torch.float32).min
        return torch.zeros_like(self.is_token, dtype=torch.float32).masked_fill_(~self.is_token, lowest)

    @cached_property
    def pooling_weights(self) -> Tensor:
        """(rows, 1, width): each token's share of its row's mean."""
        return self.is_token / self.row_lengths[:, None, None]

    def moved_to(self, hidden_states: Tensor) -> BoundBatch:
        """The same rows after a layer; what was worked out about them stays."""
        batch = BoundBatch(hidden_states, self.lengths)
        batch.__dict__.update(self.__dict__ | {"hidden_states": hidden_states})
        return batch


AnyBatch = OnnxBatch | BoundBatch


def _fill(states: Any, batches: Sequence[AnyBatch]) -> None:
    """Write batches one below the other into (rows, width, hidden) zeros."""
    start = 0
    for batch in batches:
        rows, width, _ = batch.hidden_states.shape
        states[start : start + rows, :width] = batch.hidden_states
        start += rows


class _PaddedRows:
    """What both backends say about padded rows, in numpy or in tensors."""

    name = "onnxruntime"
    dtype = "float32"
    _sessions: OnnxSessions

    def can_merge(self, one: AnyBatch, other: AnyBatch) -> bool:
        """Batches of similar width."""
        widths = one.hidden_states.shape[1], other.hidden_states.shape[1]
        return min(widths) >= (1 - MAX_MERGED_PADDING) * max(widths)

    def lengths(self, batch: AnyBatch) -> Sequence[int]:
        """Real tokens of every row."""
        return batch.lengths

    def computed_tokens(self, batch: AnyBatch) -> int:
        """Rows times width."""
        return batch.hidden_states.shape[0] * batch.hidden_states.shape[1]

    def _pooling_feed(self, batch: AnyBatch) -> dict[str, Any]:
        """What the classifiers' pooling needs to know of the tokens."""
        pooling = self._sessions.pooling
        if pooling is None:
            return {}
        return {TOKENS: batch.token_bias if pooling == "bias" else batch.pooling_weights}


class OnnxBackend(_PaddedRows):
    """A model on ONNX Runtime on CPU; see `backend.Backend`.

    It takes as many threads as torch has when it is made. Embeddings run there, too: torch's threads would wait busily
    for more work while the first layers run.

    Args:
        model: see `onnx_backend`.
    """

    def __init__(self, model: EncoderParts) -> None:
        self.device = torch.device("cpu")
        self.num_layers = model.num_layers
        self._sessions = OnnxSessions(model, self.device)
        self._layer_only: Any = require_extra("onnx", "onnxruntime").RunOptions()
        self._layer_only.only_execute_path_to_fetches = True

    def start(self, rows: Sequence[TokenRow]) -> OnnxBatch:
        """Embed the rows."""
        feed = embedding_feed(rows, self._sessions)
        lengths = tuple(len(row["input_ids"]) for row in rows)
        return OnnxBatch(self._sessions.embeddings.run(None, feed)[0], lengths)

    def run_layer(self, layer_index: int, batch: OnnxBatch) -> OnnxBatch:
        """The batch after one more layer."""
        session = self._sessions.layers[layer_index]
        feed = self._layer_feed(batch)
        if len(session.get_outputs()) > 1:
            feed |= self._pooling_feed(batch)
        return batch.moved_to(session.run([OUTPUT], feed, self._layer_only)[0])

    def run_all_layers(self, batch: OnnxBatch) -> OnnxBatch:
        """The batch after the last layer."""
        whole = self._sessions.whole()
        if whole is not None:
            return batch.moved_to(whole.run(None, self._layer_feed(batch))[0])
        for layer_index in range(self.num_layers):
            batch = self.run_layer(layer_index, batch)
        return batch

    def classify(self, layer_index: int, batch: OnnxBatch, *, with_pooled: bool = False) -> Tensor:
        """Logits, what the policy reads and perhaps pooled states; of an original head logits alone."""
        head = self._sessions.original_head(layer_index)
        if head is not None:
            mask = torch.from_numpy(batch.is_token[:, 0]).long()
            return head(torch.from_numpy(batch.hidden_states), mask)[1]
        feed = {HIDDEN: batch.hidden_states, **self._pooling_feed(batch)}
        wanted = [EXIT_FEATURES, POOLED] if with_pooled else [EXIT_FEATURES]
        return _side_by_side(self._sessions.classifier(layer_index).run(wanted, feed))

    def pass_layer(
        self, layer_index: int, batch: OnnxBatch, *, with_pooled: bool = False
    ) -> tuple[OnnxBatch, Tensor]:
        """`run_layer` and `classify`, in one session where layers do not share their weights."""
        if not self._sessions.fused or self._sessions.original_head(layer_index) is not None:
            batch = self.run_layer(layer_index, batch)
            return batch, self.classify(layer_index, batch, with_pooled=with_pooled)
        feed = self._layer_feed(batch) | self._pooling_feed(batch)
        wanted = [OUTPUT, EXIT_FEATURES, POOLED] if with_pooled else [OUTPUT, EXIT_FEATURES]
        hidden_states, *features = self._sessions.layers[layer_index].run(wanted, feed)
        return batch.moved_to(hidden_states), _side_by_side(features)

    def select(self, batch: OnnxBatch, rows: Sequence[int]) -> OnnxBatch:
        """Keep some rows, and no more padding than they need."""
        lengths = tuple(batch.lengths[row] for row in rows)
        return OnnxBatch(batch.hidden_states[rows, : max(lengths)], lengths)

    def merge(self, batches: Sequence[OnnxBatch]) -> OnnxBatch:
        """Join batches, padded to the widest."""
        if len(batches) == 1:
            return batches[0]
        lengths = tuple(length for batch in batches for length in batch.lengths)
        hidden_states = np.zeros(
            (len(lengths), max(lengths), batches[0].hidden_states.shape[2]), dtype=np.float32
        )
        _fill(hidden_states, batches)
        return OnnxBatch(hidden_states, lengths)

    def _layer_feed(self, batch: OnnxBatch) -> dict[str, Any]:
        feed: dict[str, Any] = {HIDDEN: batch.hidden_states, LENGTHS: batch.row_lengths}
        bias = self._sessions.position_bias
        if bias is not None:
            feed[POSITION_BIAS] = bias(batch.hidden_states.shape[1]).contiguous().numpy()
        return feed


class BoundOnnxBackend(_PaddedRows):
    """A model on ONNX Runtime whose sessions read and write torch's tensors where they lie; see `backend.Backend`.

    For GPUs: nothing goes over the host but what classifiers say. It runs in the order of the stream that is torch's
    current one when it is made.

    Args:
        model: see `onnx_backend`.
    """

    def __init__(self, model: EncoderParts) -> None:
        self.device = model.backbone.device
        self.num_layers = model.num_layers
        self._hidden_size = int(model.backbone.config.hidden_size)
        self._sessions = OnnxSessions(model, self.device)

    def start(self, rows: Sequence[TokenRow]) -> BoundBatch:
        """Embed the rows."""
        feed = embedding_feed(rows, self._sessions)
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in feed.items()}
        shape = (*tensors[IDS].shape, self._hidden_size)
        hidden_states = self._run(self._sessions.embeddings, tensors, {OUTPUT: shape})[0]
        return BoundBatch(hidden_states, tuple(len(row["input_ids"]) for row in rows))

    def run_layer(self, layer_index: int, batch: BoundBatch) -> BoundBatch:
        """The batch after one more layer."""
        if len(self._sessions.layers[layer_index].get_outputs()) > 1:
            return self.pass_layer(layer_index, batch)[0]
        return self._move(self._sessions.layers[layer_index], batch)

    def run_all_layers(self, batch: BoundBatch) -> BoundBatch:
        """The batch after the last layer."""
        whole = self._sessions.whole()
        if whole is not None:
            return self._move(whole, batch)
        for layer_index in range(self.num_layers):
            batch = self.run_layer(layer_index, batch)
        return batch

    def classify(self, layer_index: int, batch: BoundBatch, *, with_pooled: bool = False) -> Tensor:
        """Logits, what the policy reads and perhaps pooled states; of an original head logits alone."""
        head = self._sessions.original_head(layer_index)
        if head is not None:
            return head(batch.hidden_states, batch.is_token[:, 0].long())[1]
        session = self._sessions.classifier(layer_index)
        feed = {HIDDEN: batch.hidden_states, **self._pooling_feed(batch)}
        found = self._run(session, feed, self._feature_shapes(batch, with_pooled))
        return torch.cat(found, dim=1) if with_pooled else found[0]

    def pass_layer(
        self, layer_index: int, batch: BoundBatch, *, with_pooled: bool = False
    ) -> tuple[BoundBatch, Tensor]:
        """`run_layer` and `classify`, in one session where layers do not share their weights."""
        session = self._sessions.layers[layer_index]
        if not self._sessions.fused or self._sessions.original_head(layer_index) is not None:
            batch = self._move(session, batch)
            return batch, self.classify(layer_index, batch, with_pooled=with_pooled)
        shapes = {OUTPUT: tuple(batch.hidden_states.shape), **self._feature_shapes(batch, with_pooled)}
        feed = self._layer_feed(batch) | self._pooling_feed(batch)
        hidden_states, *found = self._run(session, feed, shapes)
        return batch.moved_to(hidden_states), torch.cat(found, dim=1) if with_pooled else found[0]

    def select(self, batch: BoundBatch, rows: Sequence[int]) -> BoundBatch:
        """Keep some rows, and no more padding than they need."""
        lengths = tuple(batch.lengths[row] for row in rows)
        index = torch.tensor(rows, dtype=torch.int64).to(self.device)
        return BoundBatch(batch.hidden_states.index_select(0, index)[:, : max(lengths)].contiguous(), lengths)

    def merge(self, batches: Sequence[BoundBatch]) -> BoundBatch:
        """Join batches, padded to the widest."""
        if len(batches) == 1:
            return batches[0]
        lengths = tuple(length for batch in batches for length in batch.lengths)
        states = batches[0].hidden_states.new_zeros(len(lengths), max(lengths), self._hidden_size)
        _fill(states, batches)
        return BoundBatch(states, lengths)

    def _move(self, session: Any, batch: BoundBatch) -> BoundBatch:
        """Layers without a classifier."""
        shapes = {OUTPUT: tuple(batch.hidden_states.shape)}
        return batch.moved_to(self._run(session, self._layer_feed(batch), shapes)[0])

    def _feature_shapes(self, batch: BoundBatch, with_pooled: bool) -> dict[str, tuple[int, ...]]:
        rows, sessions = len(batch.lengths), self._sessions
        shapes: dict[str, tuple[int, ...]] = {EXIT_FEATURES: (rows, sessions.num_features)}
        return shapes | {POOLED: (rows, sessions.pooled_size)} if with_pooled else shapes

    def _layer_feed(self, batch: BoundBatch) -> dict[str, Tensor]:
        feed = {HIDDEN: batch.hidden_states, LENGTHS: batch.row_lengths}
        bias = self._sessions.position_bias
        if bias is not None:
            feed[POSITION_BIAS] = bias(batch.hidden_states.shape[1]).contiguous()
        return feed

    def _run(self, session: Any, feed: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
        """Run a session on tensors; outputs of these shapes, float32, in their order."""
        outputs = {
            name: torch.empty(shape, dtype=torch.float32, device=self.device)
            for name, shape in shapes.items()
        }
        device = self.device.type, self.device.index or 0
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, feed), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, *device, NUMPY_KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return list(outputs.values())


NUMPY_KINDS = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}


def embedding_feed(rows: Sequence[TokenRow], sessions: OnnxSessions) -> dict[str, NDArray[np.int64]]:
    """What the embeddings' session reads: (rows, width) each, padded with zeros, and positions."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, padding = _padded([row["input_ids"] for row in rows], width), sessions.padding_position
    if padding is None:
        positions = np.arange(width, dtype=np.int64)[None]
    else:
        counts = (ids != padding).astype(np.int64)
        positions = counts.cumsum(1) * counts + padding
    feed = {IDS: ids, POSITIONS: positions}
    if sessions.has_types:
        feed[TYPES] = _padded([row.get("token_type_ids", ()) for row in rows], width)
    return feed


def _side_by_side(features: Sequence[Floats]) -> Tensor:
    """(rows, ...) of one output or of several."""
    return torch.from_numpy(features[0] if len(features) == 1 else np.concatenate(features, axis=1))


def _padded(values: Sequence[Sequence[int]], width: int) -> NDArray[np.int64]:
    """(rows, width), zeros on the right."""
    if all(len(value) == width for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([[*value, *[0] * (width - len(value))] for value in values], dtype=np.int64)
