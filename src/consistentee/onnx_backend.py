"""The engine's backend on ONNX Runtime: a session for each layer and each classifier, padded rows, CPU, float32."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee import backbones
from consistentee.backend import TokenRow
from consistentee.errors import require_extra
from consistentee.onnx_graphs import (
    HIDDEN,
    IDS,
    LENGTHS,
    POSITION_BIAS,
    POSITIONS,
    TOKENS,
    TYPES,
    Graph,
    add_classifier,
    add_embeddings,
    add_layer,
    first_position,
)
from consistentee.packed_layers import LAYER_PARTS, PositionBias, inner_layers
from consistentee.torch_backend import ExitModel, classifier_index, policy_of

Floats = NDArray[np.float32]

MAX_MERGED_PADDING = 0.15
"""Share of padding that joining two batches may bring."""

MAX_SEGMENT_BYTES = 1_800_000_000
"""A larger model does not fit into one protobuf message; its layers stay separate sessions."""


def has_onnxruntime(model: ExitModel) -> bool:
    """Whether this model can run on ONNX Runtime here."""
    installed = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
    return installed and model.device.type == "cpu" and model.config.encoder.model_type in LAYER_PARTS


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


class OnnxBackend:
    """A model on ONNX Runtime; see `backend.Backend`.

    It takes as many threads as torch has when it is made. Embeddings run there, too: torch's threads would wait busily
    for more work while the first layers run.

    Args:
        model: of a type in `LAYER_PARTS`, on CPU; its weights are copied.
        dtype: `float32`.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ValueError: a type, dtype, device or activation that this backend does not run.
    """

    name = "onnxruntime"

    def __init__(self, model: ExitModel, dtype: str = "float32") -> None:
        model_type = model.config.encoder.model_type
        if dtype != "float32" or model.device.type != "cpu" or model_type not in LAYER_PARTS:
            raise ValueError(
                f'backend "onnxruntime" runs {", ".join(LAYER_PARTS)} in float32 on CPU, got a model of type '
                f'"{model_type}" in {dtype} on {model.device.type}. Take backend "torch".'
            )
        self.model = model
        self.dtype = dtype
        self.device = model.device
        self.num_layers = model.num_layers
        config: Any = model.backbone.config
        types: Any = getattr(model.backbone.get_submodule("embeddings"), "token_type_embeddings", None)
        self._has_types = types is not None and types.num_embeddings > 1
        self._first_position = first_position(model.backbone)
        self._embeddings = self._embedding_session()
        self._num_heads = int(getattr(config, "num_attention_heads", None) or config.n_heads)
        self._parts = LAYER_PARTS[model_type]
        is_biased = model_type == "mpnet"
        self._position_bias = PositionBias(model.backbone, dtype, model.device) if is_biased else None
        groups = [inner_layers(module) for module in backbones.encoder_layers(model.backbone)]
        self._groups = [
            groups[int(index / (self.num_layers / len(groups)))] for index in range(self.num_layers)
        ]
        self._shares_layers = len(groups) < self.num_layers
        if self._shares_layers:  # a classifier in each session would bring the weights in each
            built = {id(group): self._segment([group]) for group in groups}
            self._layers = [built[id(group)] for group in self._groups]
        else:
            self._layers = [self._segment([group], self._index(layer)) for layer, group in enumerate(groups)]
        self._classifiers: dict[int, Any] = {}
        self._whole: Any = None
        self._making = Lock()
        self._layer_only: Any = require_extra("onnx", "onnxruntime").RunOptions()
        self._layer_only.only_execute_path_to_fetches = True

    def start(self, rows: Sequence[TokenRow]) -> OnnxBatch:
        """Embed the rows."""
        lengths = tuple(len(row["input_ids"]) for row in rows)
        width = max(lengths)
        positions = np.arange(self._first_position, self._first_position + width)[None]
        feed = {IDS: _padded([row["input_ids"] for row in rows], width), POSITIONS: positions}
        if self._has_types:
            feed[TYPES] = _padded([row.get("token_type_ids", ()) for row in rows], width)
        return OnnxBatch(self._embeddings.run(None, feed)[0], lengths)

    def run_layer(self, layer_index: int, batch: OnnxBatch) -> OnnxBatch:
        """The batch after one more layer."""
        return self._run(self._layers[layer_index], batch)[0]

    def pass_layer(self, layer_index: int, batch: OnnxBatch) -> tuple[OnnxBatch, Tensor]:
        """`run_layer` and `classify`, in one session where layers do not share their weights."""
        batch, readings = self._run(self._layers[layer_index], batch, self._pooling_feed(batch))
        return batch, self.classify(layer_index, batch) if readings is None else torch.from_numpy(readings)

    def run_all_layers(self, batch: OnnxBatch) -> OnnxBatch:
        """The batch after the last layer: all layers as one segment, made when first needed."""
        if self._whole is None:
            with self._making:
                if self._whole is None:
                    weights = 4 * sum(
                        p.numel() for group in self._groups for m in group for p in m.parameters()
                    )
                    self._whole = self._segment(self._groups) if weights < MAX_SEGMENT_BYTES else False
        if self._whole:
            return self._run(self._whole, batch)[0]
        for layer_index in range(self.num_layers):
            batch = self.run_layer(layer_index, batch)
        return batch

    def classify(self, layer_index: int, batch: OnnxBatch) -> Tensor:
        """Logits and what the policy reads."""
        index = self._index(layer_index)
        if index is None:
            raise ValueError(
                f"layer {layer_index} must have a classifier, got a model that has one at the top only."
            )
        if index not in self._classifiers:
            with self._making:
                if index not in self._classifiers:
                    self._classifiers[index] = self._classifier(index)
        feed = {HIDDEN: batch.hidden_states, **self._pooling_feed(batch)}
        return torch.from_numpy(self._classifiers[index].run(None, feed)[0])

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
        start = 0
        for batch in batches:
            rows, width, _ = batch.hidden_states.shape
            hidden_states[start : start + rows, :width] = batch.hidden_states
            start += rows
        return OnnxBatch(hidden_states, lengths)

    def can_merge(self, one: OnnxBatch, other: OnnxBatch) -> bool:
        """Batches of similar width."""
        widths = one.hidden_states.shape[1], other.hidden_states.shape[1]
        return min(widths) >= (1 - MAX_MERGED_PADDING) * max(widths)

    def lengths(self, batch: OnnxBatch) -> Sequence[int]:
        """Real tokens of every row."""
        return batch.lengths

    def computed_tokens(self, batch: OnnxBatch) -> int:
        """Rows times width."""
        return batch.hidden_states.shape[0] * batch.hidden_states.shape[1]

    def _index(self, layer_index: int) -> int | None:
        """Which classifier sits on a layer; a plain model's only one on the last."""
        has_one = self._has_exits or layer_index == self.num_layers - 1
        return classifier_index(self.model, layer_index) if has_one else None

    @property
    def _has_exits(self) -> bool:
        return len(self.model.classifiers.layers) > 1 or self.num_layers == 1

    @property
    def _pools_by_tokens(self) -> bool:
        classifiers = self.model.classifiers
        return classifiers.head == "attention" or classifiers.pooling == "mean"

    def _pooling_feed(self, batch: OnnxBatch) -> dict[str, Any]:
        """What the classifiers' pooling needs to know of the tokens."""
        if not self._pools_by_tokens:
            return {}
        return {
            TOKENS: batch.pooling_weights if self.model.classifiers.head != "attention" else batch.token_bias
        }

    def _run(
        self, session: Any, batch: OnnxBatch, pooling_feed: dict[str, Any] | None = None
    ) -> tuple[OnnxBatch, Floats | None]:
        """The batch behind a session, and its classifier's readings where it has one and they are asked for."""
        feed: dict[str, Any] = {HIDDEN: batch.hidden_states, LENGTHS: batch.row_lengths}
        if self._position_bias is not None:
            feed[POSITION_BIAS] = self._position_bias(batch.hidden_states.shape[1]).contiguous().numpy()
        outputs = len(session.get_outputs())
        if outputs == 1:
            return batch.moved_to(session.run(None, feed)[0]), None
        if pooling_feed is None:
            feed |= self._pooling_feed(batch)
            return batch.moved_to(session.run(["output"], feed, self._layer_only)[0]), None
        hidden_states, readings = session.run(None, feed | pooling_feed)
        return batch.moved_to(hidden_states), readings

    def _segment(self, groups: Sequence[list[Any]], index: int | None = None) -> Any:
        """A session that runs some consecutive layers, and a classifier behind them."""
        graph = Graph()
        value = HIDDEN
        bias = "" if self._position_bias is None else POSITION_BIAS
        for group in groups:
            for module in group:
                value = add_layer(graph, value, module, self._parts, self._num_heads, bias)
        inputs: dict[str, Sequence[int | str]] = {
            HIDDEN: ("rows", "width", self._hidden_size),
            LENGTHS: ("rows",),
        }
        if bias:
            inputs[POSITION_BIAS] = (1, self._num_heads, "width", "width")
        outputs = {"output": value}
        if index is not None:
            outputs["readings"] = self._add_classifier(graph, value, index, inputs)
        return make_session(graph.serialize(inputs, outputs))

    def _add_classifier(
        self, graph: Graph, hidden_states: str, index: int, inputs: dict[str, Sequence[int | str]]
    ) -> str:
        if self._pools_by_tokens:
            inputs[TOKENS] = ("rows", 1, "width")
        return add_classifier(graph, hidden_states, self.model.classifiers, policy_of(self.model), index)

    def _embedding_session(self) -> Any:
        graph = Graph()
        value = add_embeddings(graph, self.model.backbone, with_types=self._has_types)
        inputs: dict[str, Sequence[int | str]] = {IDS: ("rows", "width"), POSITIONS: (1, "width")}
        if self._has_types:
            inputs[TYPES] = ("rows", "width")
        return make_session(graph.serialize(inputs, {"output": value}))

    def _classifier(self, index: int) -> Any:
        graph = Graph()
        inputs: dict[str, Sequence[int | str]] = {HIDDEN: ("rows", "width", self._hidden_size)}
        readings = self._add_classifier(graph, HIDDEN, index, inputs)
        return make_session(graph.serialize(inputs, {"readings": readings}))

    @property
    def _hidden_size(self) -> int:
        return int(self.model.config.hidden_size)


def make_session(model: bytes) -> Any:
    """A session on CPU, with as many threads as torch has.

    Its threads stop to wait busily when its run ends: the next layer's session needs the processor.

    Args:
        model: the serialized graph.
    """
    runtime: Any = require_extra("onnx", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _padded(values: Sequence[Sequence[int]], width: int) -> NDArray[np.int64]:
    """(rows, width), zeros on the right."""
    if all(len(value) == width for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([[*value, *[0] * (width - len(value))] for value in values], dtype=np.int64)


def full_model_session(model: ExitModel) -> Any:
    """What people compare with: `torch.onnx.export` of the whole model, optimised by ONNX Runtime.

    Args:
        model: on CPU. Inputs of the session: `input_ids` and `attention_mask`, (rows, width) int64, and
            `token_type_ids` where the model tells types apart; output: the last classifier's logits.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    require_extra("onnx", "onnxscript")
    embeddings = model.backbone.get_submodule("embeddings")
    types: Any = getattr(embeddings, "token_type_embeddings", None)
    names = ["input_ids", "attention_mask"]
    if types is not None and types.num_embeddings > 1:
        names.append("token_type_ids")
    ids = torch.arange(32, dtype=torch.int64).reshape(2, 16) + 5
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(names)]
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("width")}
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                _FullDepth(model).eval(),
                example,
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(sizes,) * len(names),
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    return make_session(program.model_proto.SerializeToString())


class _FullDepth(torch.nn.Module):
    """All layers and the last classifier, to be exported."""

    def __init__(self, model: ExitModel) -> None:
        super().__init__()
        self.backbone, self.classifiers = model.backbone, model.classifiers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(rows, classes)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        return self.classifiers(len(self.classifiers.layers) - 1, states, attention_mask)[1]
