"""ONNX Runtime sessions made from a model: embeddings, layers with their classifiers, the whole of all layers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from consistentee.backbones import encoders as backbones
from consistentee.errors import require_extra
from consistentee.heads.original_head import OriginalHead
from consistentee.heads.policy import exit_feature_map
from consistentee.inference.encoder.backend import EncoderParts, classifier_indices, policy_of
from consistentee.inference.encoder.onnx_builder import Graph, Shape
from consistentee.inference.encoder.onnx_graphs import (
    HIDDEN,
    IDS,
    LENGTHS,
    POSITION_BIAS,
    POSITIONS,
    TOKENS,
    TYPES,
    AttentionInputs,
    add_embeddings,
    add_layer,
    check_layer,
    knows_token_types,
    padding_position,
)
from consistentee.inference.encoder.onnx_heads import add_classifier, pooling_of
from consistentee.inference.encoder.packed_layers import LAYER_PARTS, PositionBias, inner_layers
from consistentee.inference.threads import usable_threads

Inputs = dict[str, tuple[str, Shape]]
"""Kind and shape by name."""

OUTPUT, EXIT_FEATURES, POOLED = "output", "exit_features", "pooled"
"""Outputs: (rows, width, hidden); (rows, classes + width of the policy); (rows, pooled), for those who ask for it."""

MAX_SEGMENT_BYTES = 1_800_000_000
"""A larger model does not fit into one protobuf message; its layers stay separate sessions."""


class OnnxSessions:
    """The sessions of a model.

    Args:
        model: of a type in `LAYER_PARTS`; its weights are copied.
        device: where they run, cpu or cuda. On CPU they take as many threads as torch has now, if there are
            processors for them.

    Attributes:
        embeddings: `IDS`, `POSITIONS` and, with `has_types`, `TYPES` to `OUTPUT`.
        layers: `HIDDEN`, `LENGTHS`, with a position bias `POSITION_BIAS`, and, where `fused` and the layer has a
            classifier, what `pooling` says, to `OUTPUT`, `EXIT_FEATURES` and `POOLED`.
        fused: whether layers bring their classifiers; albert's share their weights and do not.
        pooling: what the classifiers' `TOKENS` are: `bias` (0 at tokens, the lowest float at padding), `weights` (each
            token's share of the mean), or None, for classifiers that need none.
        num_features, pooled_size: numbers of a row of `EXIT_FEATURES` and of `POOLED`.
        position_bias: mpnet's, or None.
        padding_position: see `onnx_graphs`; positions are (rows, width) then, else (1, width).
    """

    def __init__(self, model: EncoderParts, device: torch.device) -> None:
        self._model, self._device = model, device
        self.num_layers = model.num_layers
        config: Any = model.backbone.config
        model_type = config.model_type
        classifiers = model.classifiers
        self.pooling = pooling_of(classifiers)
        last = classifiers.layers[-1]
        is_original = isinstance(last, OriginalHead)
        self._original = copy.deepcopy(last).to(device, torch.float32) if is_original else None
        self.has_types = knows_token_types(model.backbone)
        self.padding_position = padding_position(model.backbone)
        self.position_bias = (
            PositionBias(model.backbone, "float32", device) if model_type == "mpnet" else None
        )
        self._hidden_size = int(model.backbone.config.hidden_size)
        self._num_heads = int(getattr(config, "num_attention_heads", None) or config.n_heads)
        self._parts = LAYER_PARTS[model_type]
        groups = [inner_layers(module) for module in backbones.encoder_layers(model.backbone)]
        self._groups = [
            groups[int(index / (self.num_layers / len(groups)))] for index in range(self.num_layers)
        ]
        for module in (module for group in groups for module in group):
            check_layer(module, self._parts)
        weight = exit_feature_map(classifiers, policy_of(model), 0)[0]
        self.num_features, self.pooled_size = weight.shape
        self._shapes: dict[str, Shape] = {
            EXIT_FEATURES: ("rows", self.num_features),
            POOLED: ("rows", self.pooled_size),
        }
        self._embeddings: Any = None
        self.fused = len(groups) == self.num_layers
        require_extra("onnx", "onnx")
        self._layers: list[Any] | None = None
        self._classifiers: dict[int, Any] = {}
        self._whole: Any = None
        self._making = Lock()
        if device.type != "cpu":  # say at once what is missing
            _ = self.embeddings

    @property
    def embeddings(self) -> Any:
        """The session of the embeddings, made when first asked for."""
        if self._embeddings is None:
            with self._making:
                if self._embeddings is None:
                    self._embeddings = self._embedding_session()
        return self._embeddings

    @property
    def layers(self) -> list[Any]:
        """One session a layer, made when first asked for."""
        if self._layers is None:
            with self._making:
                if self._layers is None:
                    self._layers = self._layer_sessions()
        return self._layers

    def _layer_sessions(self) -> list[Any]:
        if self.fused:
            return [self._segment([group], self._index(layer)) for layer, group in enumerate(self._groups)]
        built = {id(group): group for group in self._groups}
        sessions = {key: self._segment([group]) for key, group in built.items()}
        return [sessions[id(group)] for group in self._groups]

    def whole(self) -> Any:
        """All layers as one session, made when first asked for; None for a model that is too large."""
        if self._whole is None:
            with self._making:
                if self._whole is None:
                    parameters = (
                        p for group in self._groups for module in group for p in module.parameters()
                    )
                    fits = 4 * sum(p.numel() for p in parameters) < MAX_SEGMENT_BYTES
                    self._whole = self._segment(self._groups) if fits else False
        return self._whole or None

    def classifier(self, layer_index: int) -> Any:
        """A layer's classifier alone, made when asked for: `HIDDEN`, with `pooling` `TOKENS`, to what a layer's gives.

        Raises:
            ValueError: the layer has none.
        """
        index = self._index(layer_index)
        if index is None:
            raise ValueError(
                f"Layer {layer_index} has no classifier: a plain model has one, on its last layer."
            )
        if index not in self._classifiers:
            with self._making:
                if index not in self._classifiers:
                    self._classifiers[index] = self._classifier_session(index)
        return self._classifiers[index]

    def original_head(self, layer_index: int) -> OriginalHead | None:
        """The head that the model came with, where it sits on this layer: it runs in torch."""
        return self._original if layer_index == self.num_layers - 1 else None

    def _index(self, layer_index: int) -> int | None:
        """Which classifier sits on a layer; a plain model's only one on the last. An original head is none."""
        if self.original_head(layer_index) is not None:
            return None
        has_exits = len(self._model.classifiers.layers) == self.num_layers
        if has_exits or layer_index == self.num_layers - 1:
            return classifier_indices(self._model)[layer_index]
        return None

    def _segment(self, groups: Sequence[list[Any]], index: int | None = None) -> Any:
        """A session that runs some consecutive layers, and a classifier behind them."""
        graph = Graph()
        value = HIDDEN
        bias = "" if self.position_bias is None else POSITION_BIAS
        tokens = AttentionInputs(LENGTHS, bias)
        for group in groups:
            for module in group:
                value = add_layer(graph, value, module, self._parts, self._num_heads, tokens)
        inputs = self._hidden_input()
        inputs[LENGTHS] = ("int32", ("rows",))
        if bias:
            inputs[POSITION_BIAS] = ("float", (1, self._num_heads, "width", "width"))
        outputs = {OUTPUT: value}
        if index is not None:
            outputs |= self._add_classifier(graph, value, index, inputs)
        return self._session(graph, inputs, outputs)

    def _embedding_session(self) -> Any:
        graph = Graph()
        value = add_embeddings(graph, self._model.backbone, types=TYPES if self.has_types else "")
        counted = 1 if self.padding_position is None else "rows"
        inputs: Inputs = {IDS: ("int64", ("rows", "width")), POSITIONS: ("int64", (counted, "width"))}
        if self.has_types:
            inputs[TYPES] = ("int64", ("rows", "width"))
        return self._session(graph, inputs, {OUTPUT: value})

    def _classifier_session(self, index: int) -> Any:
        graph = Graph()
        inputs = self._hidden_input()
        outputs = self._add_classifier(graph, HIDDEN, index, inputs)
        return self._session(graph, inputs, outputs)

    def _hidden_input(self) -> Inputs:
        return {HIDDEN: ("float", ("rows", "width", self._hidden_size))}

    def _session(self, graph: Graph, inputs: Inputs, outputs: dict[str, str]) -> Any:
        found = {name: (value, "float", self._shapes.get(name)) for name, value in outputs.items()}
        return make_session(graph.model(inputs, found).SerializeToString(), self._device)

    def _add_classifier(self, graph: Graph, hidden_states: str, index: int, inputs: Inputs) -> dict[str, str]:
        if self.pooling is not None:
            inputs[TOKENS] = ("float", ("rows", 1, "width"))
        model = self._model
        exit_features, pooled = add_classifier(
            graph, hidden_states, model.classifiers, policy_of(model), index
        )
        return {EXIT_FEATURES: exit_features, POOLED: pooled}


def make_session(model: bytes | str, device: torch.device) -> Any:
    """A session on CPU, with `usable_threads`, or on a GPU, in the order of torch's current stream.

    On CPU its threads stop to wait busily when its run ends: the next layer's session needs the processor.

    Args:
        model: the serialized graph, or the name of its file.
        device: cpu or cuda.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ValueError: a GPU that the installed onnxruntime does not know.
    """
    runtime: Any = require_extra("onnx", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if device.type == "cpu":
        options.intra_op_num_threads = usable_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise ValueError(
            f'backend "onnxruntime" needs the CUDA provider for device "{device}", got an onnxruntime with '
            f"{', '.join(runtime.get_available_providers())}. Install onnxruntime-gpu, or take backend torch."
        )
    stream = torch.cuda.current_stream(device).cuda_stream
    cuda = {"device_id": str(device.index or 0), "user_compute_stream": str(stream)}
    return runtime.InferenceSession(model, options, providers=[("CUDAExecutionProvider", cuda)])


def full_model_session(model: EncoderParts) -> Any:
    """What people compare with: `full_model_graph`, optimised by ONNX Runtime."""
    return make_session(full_model_graph(model), torch.device("cpu"))


def full_model_graph(model: EncoderParts) -> bytes:
    """`torch.onnx.export` of the whole model, serialized.

    Args:
        model: on CPU. Inputs of the graph: `input_ids` and `attention_mask`, (rows, width) int64, and
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
    return program.model_proto.SerializeToString()


class _FullDepth(torch.nn.Module):
    """All layers and the last classifier, to be exported."""

    def __init__(self, model: EncoderParts) -> None:
        super().__init__()
        self.backbone, self.classifiers = model.backbone, model.classifiers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(rows, classes)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        return self.classifiers(len(self.classifiers.layers) - 1, states, attention_mask)[1]
