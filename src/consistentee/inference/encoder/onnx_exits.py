"""A whole model as one ONNX graph that decides by itself who exits: an `If` after every layer, one inside another.

After a layer and its classifier the graph asks twice. Does anybody go on? Only then comes the next layer, inside the
`If`. Does anybody exit? Only then are answers written, at the places of their rows, and what the other rows bring along
closes up, without the padding that nobody needs any more. So a batch of one row that goes on costs the two questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from consistentee.backbones import encoders as backbones
from consistentee.errors import SettingError
from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.original_head import OriginalHead
from consistentee.inference.encoder.backend import EncoderParts, classifier_indices, policy_of
from consistentee.inference.encoder.onnx_builder import Graph, GraphStyle, WeightFile
from consistentee.inference.encoder.onnx_graphs import (
    IDS,
    TYPES,
    AttentionInputs,
    add_embeddings,
    add_layer,
    add_positions,
    composed_attention,
    knows_token_types,
    padding_position,
)
from consistentee.inference.encoder.onnx_heads import add_classifier, add_original_head, pooling_of
from consistentee.inference.encoder.onnx_scores import History, OnnxExitScores
from consistentee.inference.encoder.packed_layers import LAYER_PARTS, PositionBias, inner_layers

MASK, THRESHOLD, EXIT_LAYERS = "attention_mask", "threshold", "exit_layers"
LOGITS, EXIT_LAYER = "logits", "exit_layer"
"""Inputs: (rows, width) int64; a scalar; (rows,) int64, of a graph whose exits are fixed. Outputs: (rows, classes) and
(rows,) int64."""

LAYER_LOGITS, EXIT_SCORES, EXIT_PROBS = "layer_logits", "exit_scores", "exit_probs"
"""Further outputs of a graph that shows its layers: (rows, layers, classes); (rows, layers), of the criterion and of
the policy, both 0 at the last layer of an original head. All are 0 at layers that a row did not reach."""

ORDER, FOUND, FIXED, SEEN = "order", "found", "fixed", "seen"
"""What rows bring along: their places in the input, (rows, 1) int64; what was found so far for all rows of the input,
(rows, classes + 1); where they are to exit, (rows, 1); and what was seen at each layer, (rows, layers, classes + 2)."""

FLOAT, INT32, INT64 = 1, 6, 7
"""Kinds of values by their numbers in ONNX."""

MOST_LAYERS = 30
"""Readers of protobuf files follow a hundred messages one inside another, and each layer takes three."""

APART = 1000.0
"""No exit score is so far from another: rows whose exits are fixed differ by so much from layer to layer."""


@dataclass
class _Carried:
    """A value that rows bring along: its kind, whether axis 0 is the rows, and which axes are their width."""

    value: str
    kind: str = "float"
    has_rows: bool = True
    width_axes: tuple[int, ...] = ()


class ExitGraph:
    """Writes the graph of a model.

    Args:
        model: of a type in `LAYER_PARTS`.
        scores: of the exit criterion; None: all layers for all rows.
        num_classes: of the model.
        style: how it is written.
        weights: where the weights go; None keeps them in the graph.
        fixed_exits: whether rows exit where `EXIT_LAYERS` says, to study speed; the scores are computed all the same.
        shows_layers: whether what each layer says is given as well; needs scores.
        token_types: whether rows bring them, to a model that tells them apart; else all tokens are of type 0.

    Raises:
        SettingError: a model of another type, or of too many layers.
    """

    def __init__(
        self,
        model: EncoderParts,
        scores: OnnxExitScores | None,
        *,
        num_classes: int,
        style: GraphStyle | None = None,
        weights: WeightFile | None = None,
        fixed_exits: bool = False,
        shows_layers: bool = False,
        token_types: bool = True,
    ) -> None:
        config: Any = model.backbone.config
        if config.model_type not in LAYER_PARTS:
            raise SettingError(
                f'An ONNX graph can be made of {", ".join(LAYER_PARTS)}, got a model of type "{config.model_type}".'
            )
        if scores is not None and model.num_layers > MOST_LAYERS:
            raise SettingError(
                f"An ONNX graph with exits can have {MOST_LAYERS} layers, one inside another, got {model.num_layers}."
            )
        self._model, self._scores, self._fixed = model, scores, fixed_exits
        self._shows_layers = shows_layers and scores is not None
        self._num_classes = num_classes
        self._graph = Graph(style, weights)
        self._num_heads = int(getattr(config, "num_attention_heads", None) or config.n_heads)
        groups = [inner_layers(module) for module in backbones.encoder_layers(model.backbone)]
        depth = model.num_layers
        self._groups = [groups[int(index / (depth / len(groups)))] for index in range(depth)]
        self._classifier_of = classifier_indices(model)
        self._has_bias = config.model_type == "mpnet"
        last = model.classifiers.layers[-1]
        self._original = last if isinstance(last, OriginalHead) else None
        self._has_types = token_types and knows_token_types(model.backbone)

    def build(self, threshold: float | None = 0.0) -> Any:
        """The graph, a protobuf message.

        Args:
            threshold: what `THRESHOLD` is where the caller gives none; None: the caller must, and in JavaScript only
                then can.
        """
        graph, shape = self._graph, ("rows", "width")
        inputs: dict[str, tuple[str, Sequence[int | str]]] = {IDS: ("int64", shape), MASK: ("int64", shape)}
        if self._has_types:
            inputs[TYPES] = ("int64", shape)
        if self._fixed:
            inputs[EXIT_LAYERS] = ("int64", ("rows",))
        elif self._scores is not None:
            inputs[THRESHOLD] = ("float", ())
            if threshold is not None:
                graph.constant(np.array(threshold, np.float32), name=THRESHOLD)
        rows = graph.op("Slice", graph.op("Shape", IDS), graph.constant([0]), graph.constant([1]))
        carried = self._begin(rows)
        seen: dict[str, tuple[str, str, Sequence[int | str]]] = {}
        if self._scores is None:
            logits, layer = self._all_layers(rows, carried)
        else:
            carried[FOUND] = self._zeros(rows, self._num_classes + 1)
            if self._shows_layers:
                carried[SEEN] = self._zeros(rows, self._model.num_layers, self._num_classes + 2)
            found = self._layers(self._scores, carried)
            sizes = graph.constant([self._num_classes, 1])
            logits, layer = graph.ops("Split", found[FOUND], sizes, outputs=2, axis=1)
            layer = graph.op("Reshape", graph.op("Cast", layer, to=INT64), graph.constant([-1]))
            if self._shows_layers:
                seen = self._seen(self._scores, found[SEEN])
        return graph.model(
            inputs,
            {
                LOGITS: (logits, "float", ("rows", self._num_classes)),
                EXIT_LAYER: (layer, "int64", ("rows",)),
                **seen,
            },
        )

    def _zeros(self, rows: str, *shape: int) -> _Carried:
        """(rows, ...), of all rows of the input, to be written to."""
        graph = self._graph
        whole = graph.op("Concat", rows, graph.constant(list(shape)), axis=0)
        zero = graph.tensor(np.zeros(1, np.float32))
        return _Carried(graph.op("ConstantOfShape", whole, value=zero), has_rows=False)

    def _seen(self, scores: OnnxExitScores, seen: str) -> dict[str, tuple[str, str, Sequence[int | str]]]:
        """The outputs that show the layers."""
        graph, layers, classes = self._graph, self._model.num_layers, self._num_classes
        logits, *of_exit = graph.ops("Split", seen, graph.constant([classes, 1, 1]), outputs=3, axis=2)
        found: dict[str, tuple[str, str, Sequence[int | str]]] = {
            LAYER_LOGITS: (logits, "float", ("rows", layers, classes))
        }
        names = (EXIT_SCORES, EXIT_PROBS) if scores.has_exit_probs else (EXIT_SCORES,)
        for name, value in zip(names, of_exit, strict=False):
            value = graph.op("Squeeze", value, graph.constant([2]))
            found[name] = (value, "float", ("rows", layers))
        return found

    def _begin(self, rows: str) -> dict[str, _Carried]:
        """Embed the rows, without padding that none of them needs; what they bring along to the first layer."""
        graph = self._graph
        lengths = graph.reduce("ReduceSum", MASK, 1, keepdims=False)  # (rows,)
        widest = graph.reduce("ReduceMax", lengths, None, keepdims=False)
        width = graph.op("Reshape", widest, graph.constant([1]))
        ids, mask, *types = (
            _first(graph, name, width, [1]) for name in (IDS, MASK, *([TYPES] if self._has_types else []))
        )
        zero, one = (graph.constant(np.array(number, np.int64)) for number in (0, 1))
        padding = padding_position(self._model.backbone)
        positions = (
            graph.op("Range", zero, widest, one) if padding is None else add_positions(graph, ids, padding)
        )
        states = add_embeddings(
            graph, self._model.backbone, ids=ids, positions=positions, types=types[0] if types else ""
        )
        carried = {
            "hidden": _Carried(states, width_axes=(1,)),
            "lengths": _Carried(graph.op("Cast", lengths, to=INT32), "int32"),
        }
        is_token = graph.op("Unsqueeze", graph.op("Cast", mask, to=FLOAT), graph.constant([1]))
        pooling = {pooling_of(self._model.classifiers)} if self._own_classifiers else set()
        for name in sorted({*pooling, *self._original_pooling()} - {None}):  # (rows, 1, width)
            values = self._token_values(str(name), is_token, lengths)
            carried[str(name)] = _Carried(values, width_axes=(2,))
        if composed_attention(graph, self._has_bias):
            values = self._token_values("bias", is_token, lengths)
            values = graph.op("Unsqueeze", values, graph.constant([1]))
            carried["mask"] = _Carried(values, width_axes=(3,))
        if self._has_bias:
            carried["position_bias"] = _Carried(
                self._position_bias(widest), has_rows=False, width_axes=(2, 3)
            )
        if self._scores is not None:
            count = graph.op("Squeeze", rows, graph.constant([0]))
            order = graph.op("Unsqueeze", graph.op("Range", zero, count, one), graph.constant([1]))
            carried[ORDER] = _Carried(order, "int64")
        if self._fixed:
            at = graph.op("Cast", graph.op("Unsqueeze", EXIT_LAYERS, graph.constant([1])), to=FLOAT)
            carried[FIXED] = _Carried(graph.op("Mul", at, graph.number(APART)))
        return carried

    @property
    def _own_classifiers(self) -> bool:
        return len(self._model.classifiers.layers) > 1 or self._original is None

    def _original_pooling(self) -> set[str | None]:
        head = self._original
        if head is None or "classifiers" not in head.parts:
            return set()
        return {pooling_of(cast(InternalClassifiers, head.parts["classifiers"]))}

    def _token_values(self, name: str, is_token: str, lengths: str) -> str:
        """What pooling asks of the tokens, (rows, 1, width)."""
        graph = self._graph
        if name == "weights":
            total = graph.op("Max", graph.op("Cast", lengths, to=FLOAT), graph.number(1.0))
            total = graph.op("Unsqueeze", total, graph.constant([1, 2]))
            return graph.op("Div", is_token, total)
        lowest = graph.number(float(np.finfo(np.float32).max))
        return graph.op("Mul", graph.op("Sub", is_token, graph.number(1.0)), lowest)

    def _position_bias(self, width: str) -> str:
        """MPNet's, (1, heads, width, width): by the distance of two tokens; `width` a scalar."""
        graph, backbone = self._graph, self._model.backbone
        longest = int(backbone.config.max_position_embeddings)
        bias = PositionBias(backbone, "float32", torch.device("cpu"))(longest)[0]  # (heads, longest, longest)
        table = torch.cat([bias[:, 1:, 0].flip(1), bias[:, 0]], dim=1)  # (heads, 2 * longest - 1)
        zero, one = (graph.constant(np.array(number, np.int64)) for number in (0, 1))
        places = graph.op("Range", zero, width, one)
        column = graph.op("Unsqueeze", places, graph.constant([1]))
        distance = graph.op("Sub", graph.op("Unsqueeze", places, graph.constant([0])), column)
        distance = graph.op("Add", distance, graph.constant(np.array(longest - 1, np.int64)))
        found = graph.op("Gather", graph.constant(table), distance, axis=1)
        return graph.op("Unsqueeze", found, graph.constant([0]))

    def _layer(self, graph: Graph, index: int, carried: Mapping[str, _Carried]) -> str:
        """States after one more layer."""
        values = {name: each.value for name, each in carried.items()}
        tokens = AttentionInputs(values["lengths"], values.get("position_bias", ""), values.get("mask", ""))
        parts = LAYER_PARTS[self._model.backbone.config.model_type]
        states = values["hidden"]
        for module in self._groups[index]:
            states = add_layer(graph, states, module, parts, self._num_heads, tokens)
        return states

    def _classify(
        self, graph: Graph, index: int, states: str, carried: Mapping[str, _Carried]
    ) -> tuple[str, str]:
        """Exit features and pooled states of a layer; of an original head its logits alone."""
        model = self._model
        if self._original is not None and index == model.num_layers - 1:
            logits = add_original_head(graph, states, self._original, lambda name: carried[name].value)
            return logits, ""
        pooling = pooling_of(model.classifiers)
        tokens = "" if pooling is None else carried[pooling].value
        place = self._classifier_of[index]
        number = None if self._scores is None else index + 1.0
        return add_classifier(graph, states, model.classifiers, policy_of(model), place, tokens, number)

    def _all_layers(self, rows: str, carried: dict[str, _Carried]) -> tuple[str, str]:
        """Logits of the last layer, and its number for every row."""
        graph, last = self._graph, self._model.num_layers - 1
        for index in range(last + 1):
            carried["hidden"].value = self._layer(graph, index, carried)
        features, _ = self._classify(graph, last, carried["hidden"].value, carried)
        if policy_of(self._model) is not None and self._original is None:
            features = _first(graph, features, graph.constant([self._num_classes]), [1])
        layer = graph.op("ConstantOfShape", rows, value=graph.tensor(np.array([last + 1], np.int64)))
        return features, layer

    def _layers(self, scores: OnnxExitScores, carried: dict[str, _Carried]) -> dict[str, str]:
        """All layers with their exits; what was found, (rows, classes + 1): logits and exit layer; and `SEEN`."""
        graph, history = self._graph, History()
        last = self._model.num_layers - 1
        ended: list[tuple[Graph, dict[str, str]]] = []
        for index in range(last + 1):
            states = self._layer(graph, index, carried)
            carried["hidden"] = replace(carried["hidden"], value=states)
            if not scores.has_exit(index):
                continue
            features, pooled = self._classify(graph, index, states, carried)
            if index == last and self._original is not None:
                at = scores.alone(graph, index, features, carried[ORDER].value)
            else:
                at = scores.step(graph, index, features, pooled, history)
            answers = {FOUND: at.answers}
            if self._shows_layers:
                answers[SEEN] = scores.shown(graph, at)
            if index == last:
                ended.append((graph, _write(graph, index, answers, carried)))
                break
            score, limit = at.score, THRESHOLD
            if self._fixed:
                score = graph.op("Sub", score, carried[FIXED].value)
                limit = graph.number(-APART * (index + 1.5))
            for name, value in history.values.items():
                carried[name] = _Carried(value, history.kinds[name])
            least = graph.reduce("ReduceMin", score, None, keepdims=False)
            goes_on = graph.op("LessOrEqual", least, limit)
            results, inner, outer = graph.choose(goes_on, len(answers))
            _give(outer, _write(outer, index, answers, carried))
            ended.append((graph, dict(zip(answers, results, strict=True))))
            written = _write(inner, index, answers, carried)
            carried = self._close_up(inner, score, limit, written, carried)
            for name in history.values:
                history.values[name] = carried[name].value
            graph = inner
        for graph, values in ended[1:]:
            _give(graph, values)
        return ended[0][1]

    def _close_up(
        self,
        graph: Graph,
        score: str,
        limit: str,
        written: Mapping[str, str],
        carried: Mapping[str, _Carried],
    ) -> dict[str, _Carried]:
        """With what is written down so far, keep the rows that go on and the width that these need."""
        stays = graph.op("Reshape", graph.op("LessOrEqual", score, limit), graph.constant([-1]))
        lengths = graph.op("Compress", carried["lengths"].value, stays, axis=0)
        width = graph.op("Cast", graph.reduce("ReduceMax", lengths, 0), to=INT64)
        kept: dict[str, _Carried] = {}
        for name, each in carried.items():
            value = lengths if name == "lengths" else each.value
            if name in written:
                value = written[name]
            elif each.has_rows and name != "lengths":
                value = graph.op("Compress", value, stays, axis=0)
            value = _first(graph, value, width, each.width_axes) if each.width_axes else value
            kept[name] = replace(each, value=value)
        return kept


def _first(graph: Graph, value: str, count: str, axes: Sequence[int]) -> str:
    """The first entries of a value along some axes; `count` is (1,) int64."""
    ends = count if len(axes) == 1 else graph.op("Concat", *[count] * len(axes), axis=0)
    return graph.op("Slice", value, graph.constant([0] * len(axes)), ends, graph.constant(list(axes)))


def _write(
    graph: Graph, index: int, answers: Mapping[str, str], carried: Mapping[str, _Carried]
) -> dict[str, str]:
    """What was found, with the answers of the rows that are here at their places; `SEEN` at this layer, from 0."""
    places = {FOUND: carried[ORDER].value}
    if SEEN in answers:
        layer = graph.op("Mul", carried[ORDER].value, graph.constant(np.array(0, np.int64)))
        layer = graph.op("Add", layer, graph.constant(np.array(index, np.int64)))
        places[SEEN] = graph.op("Concat", carried[ORDER].value, layer, axis=1)
    return {
        name: graph.op("ScatterND", carried[name].value, places[name], value)
        for name, value in answers.items()
    }


def _give(graph: Graph, values: Mapping[str, str]) -> None:
    """End a branch with what was found."""
    graph.give(list(values.values()), ["float"] * len(values))
