"""A whole model as one graph: the labels and exit layers of the engine, at any batch size, in every style."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx
import onnx.reference
from onnxruntime import InferenceSession, SessionOptions
from test_packed_layers import build

from consistentee.errors import SettingError
from consistentee.functional.criteria import CRITERIA
from consistentee.functional.signals import similar_patience_scores
from consistentee.inference.encoder import onnx_exits
from consistentee.inference.encoder.onnx_builder import Graph, GraphStyle, WeightFile
from consistentee.inference.encoder.onnx_exits import ExitGraph
from consistentee.inference.encoder.onnx_runner import opens_nested
from consistentee.inference.encoder.onnx_scores import History, OnnxExitScores
from consistentee.inference.encoder.packed_layers import LAYER_PARTS
from tiny import fit_at_random

CLASSES = 3
MODELS = {
    model_type: ({}, {"head": "attention", "classifier_hidden_size": 8}) for model_type in LAYER_PARTS
} | {
    "albert groups": ({"num_hidden_groups": 2, "inner_group_num": 2}, {}),
    "bert relu cls": ({"hidden_act": "relu"}, {"head": "shared_pooler", "pooling": "cls"}),
    "bert gelu_new mean": ({"hidden_act": "gelu_new"}, {"head": "shared_pooler", "pooling": "mean"}),
}
PORTABLE = GraphStyle(opset=20, portable=True)


def feed_of(model: Any, rows: int, seed: int = 0, width: int = 24) -> dict[str, np.ndarray]:
    """Rows of 2 to 20 tokens, padded to more than the longest needs."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 60, (rows, width))
    mask = (np.arange(width) < rng.integers(2, 21, rows)[:, None]).astype(np.int64)
    feed = {"input_ids": ids * mask, "attention_mask": mask}
    if getattr(model.config.backbone_config, "type_vocab_size", 0) > 1:
        feed["token_type_ids"] = (np.arange(width) > 4).astype(np.int64) * mask
    return feed


@torch.no_grad()
def oracle(model: Any, feed: dict[str, np.ndarray], criterion: str, threshold: float) -> Any:
    """All layers, then the choice."""
    tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
    return model(**tensors, criterion=criterion, threshold=threshold, all_layers=True)


def median_score(model: Any, feed: dict[str, np.ndarray], criterion: str) -> float:
    """A threshold between scores, so that some rows exit early and some do not."""
    found = all_scores(model, oracle(model, feed, "static", 99.0), criterion).unique()
    return float(found[len(found) // 2 - 1 : len(found) // 2 + 1].mean())


@torch.no_grad()
def all_scores(model: Any, layers: Any, criterion: str) -> torch.Tensor:
    """Exit scores of all layers, (rows, layers)."""
    from consistentee.functional.criteria import EXIT_CRITERIA, exit_scores

    signals = model.exit_signals(EXIT_CRITERIA[criterion].reads)(layers.pooled, layers.classifier_logits)
    return exit_scores(criterion, layers.layer_logits, layers.exit_probs, **signals)


def session_of(proto: Any) -> InferenceSession:
    options = SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return InferenceSession(proto.SerializeToString(), options)


def graph_of(model: Any, criterion: str, threshold: float | None = 0.5, **how: Any) -> Any:
    scores = OnnxExitScores.of(model, criterion)
    return ExitGraph(model, scores, num_classes=CLASSES, **how).build(threshold)


def assert_same(found: Any, wanted: Any, tolerance: float = 2e-4) -> None:
    logits, exit_layers = found
    assert exit_layers.tolist() == wanted.exit_layer.tolist()
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("style", [GraphStyle(), PORTABLE], ids=["fused", "portable"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_model(tmp_path: Path, name: str, style: GraphStyle) -> None:
    config, values = MODELS[name]
    model = build(tmp_path, name.split()[0], config, **values)
    feed = feed_of(model, 64)
    threshold = median_score(model, feed, "policy")
    proto = graph_of(model, "policy", threshold, style=style)
    onnx.checker.check_model(proto, full_check=style.portable)
    session = session_of(proto)
    for rows in (1, 7, 64):
        part = {key: values[:rows] for key, values in feed.items()}
        assert_same(session.run(None, part), oracle(model, part, "policy", threshold))
    exits = session.run(None, feed)[1]
    assert len(set(exits.tolist())) > 1
    for limit in (0.0, 1.0):  # all exit at once, and nobody before the last layer
        found = session.run(None, {**feed, "threshold": np.array(limit, np.float32)})
        assert_same(found, oracle(model, feed, "policy", limit))


@pytest.mark.parametrize("style", [GraphStyle(), PORTABLE], ids=["fused", "portable"])
@pytest.mark.parametrize("name", ["bert", "bert relu cls", "bert gelu_new mean"])
def test_rows_without_tokens_leave_the_others_alone(tmp_path: Path, name: str, style: GraphStyle) -> None:
    config, values = MODELS[name]
    model = build(tmp_path, "bert", config, **values)
    feed = feed_of(model, 12)
    threshold = median_score(model, feed, "policy")
    wanted = oracle(model, feed, "policy", threshold)
    empty = [0, 5, 11]  # a batch that is filled up to a fixed size
    for key in feed:
        feed[key][empty] = 0
    found: Any = session_of(graph_of(model, "policy", threshold, style=style)).run(None, feed)
    logits, exit_layers = found
    assert np.isfinite(logits).all()
    assert set(exit_layers[empty].tolist()) <= set(range(1, model.num_layers + 1))
    whole = [row for row in range(12) if row not in empty]
    assert len(set(exit_layers[whole].tolist())) > 1
    assert exit_layers[whole].tolist() == wanted.exit_layer[whole].tolist()
    np.testing.assert_allclose(logits[whole], wanted.logits.numpy()[whole], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_every_criterion(tmp_path: Path, criterion: str, decay: float) -> None:
    model = build(tmp_path, "bert", ensemble_decay=decay)
    fit_at_random(model)
    feed = feed_of(model, 40)
    threshold = 2.5 if criterion in ("patience", "static") else median_score(model, feed, criterion)
    for style in (GraphStyle(), PORTABLE):
        found = session_of(graph_of(model, criterion, threshold, style=style)).run(None, feed)
        assert_same(found, oracle(model, feed, criterion, threshold))


def test_likeness_stays_within_its_range_where_layers_hardly_differ(tmp_path: Path) -> None:
    model = build(tmp_path, "bert", policy_input="log_odds", ensemble_decay=0.0)
    scores = OnnxExitScores.of(model, "similar_patience")
    rng, graph, history = np.random.default_rng(0), Graph(PORTABLE), History()
    logits = 3 * rng.normal(size=(2000, CLASSES)) + 1e-3 * rng.normal(size=(2, 2000, CLASSES))
    feed = {f"layer {index}": np.pad(layer, ((0, 0), (0, 1))) for index, layer in enumerate(logits)}
    _, second = [scores.step(graph, index, name, "", history).score for index, name in enumerate(feed)]
    inputs = {name: ("float", ["rows", CLASSES + 1]) for name in feed}
    session = session_of(graph.model(inputs, {"score": (second, "float", None)}))
    given = {name: values.astype(np.float32) for name, values in feed.items()}
    found: Any = session.run(None, given)[0]
    assert found.min() >= 0
    assert found.max() == 1
    wanted = similar_patience_scores(torch.from_numpy(logits).float().transpose(0, 1))[:, 1]
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("criterion", ["policy", "confidence", "patience"])
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_what_the_layers_say(tmp_path: Path, model_type: str, criterion: str) -> None:
    model = build(tmp_path, model_type)
    feed = feed_of(model, 16)
    threshold = 1.5 if criterion == "patience" else median_score(model, feed, criterion)
    style = GraphStyle(weights_outside=criterion != "policy")
    proto = graph_of(model, criterion, None, shows_layers=True, style=style)
    outside = sum(len(each.raw_data) for each in proto.graph.initializer)
    assert (outside > 0.7 * proto.ByteSize()) == style.weights_outside
    session = session_of(proto)
    assert [given.name for given in session.get_inputs()][-1] == "threshold"
    assert not session.get_overridable_initializers()  # JavaScript could not give one
    names = ["logits", "exit_layer", "layer_logits", "exit_scores", "exit_probs"]
    for limit in (
        threshold,
        9.0 if criterion == "patience" else 1.0,
    ):  # the second: nobody exits before the last layer
        wanted = oracle(model, feed, criterion, limit)
        logits, exits, layer_logits, scores, probs = session.run(
            names, {**feed, "threshold": np.array(limit, np.float32)}
        )
        assert_same((logits, exits), wanted)
        reached = np.arange(4) < np.asarray(exits)[:, None]
        own = all_scores(model, wanted, criterion).numpy()
        for found, right in ((layer_logits, wanted.layer_logits), (scores, own), (probs, wanted.exit_probs)):
            right = np.asarray(right)
            there = reached if right.ndim == 2 else reached[..., None]
            np.testing.assert_allclose(np.asarray(found), np.where(there, right, 0), atol=2e-4, rtol=1e-3)


def test_what_the_layers_below_an_original_head_say(tmp_path: Path) -> None:
    from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
    from tiny import tiny_classifier

    original = tiny_classifier(tmp_path, "bert")
    model: Any = EarlyExitForSequenceClassification.from_classifier(original, max_length=64).eval()
    feed = feed_of(model, 8)
    scores = OnnxExitScores.of(model, "confidence")
    classes, layers = model.config.num_classes, model.num_layers
    proto = ExitGraph(model, scores, num_classes=classes, shows_layers=True).build(2.0)
    _, _, logits, exit_scores, exit_probs = session_of(proto).run(None, feed)
    wanted = oracle(model, feed, "confidence", 1.0)
    np.testing.assert_allclose(np.asarray(logits), wanted.layer_logits.numpy(), atol=2e-4, rtol=1e-3)
    assert np.asarray(exit_scores).shape == (8, layers)
    assert not np.asarray(exit_scores)[:, -1].any()
    assert not np.asarray(exit_probs)[:, -1].any()
    assert np.asarray(exit_probs)[:, :-1].all()


@pytest.mark.parametrize("policy_input", ["state", "log_odds", "state+log_odds"])
@pytest.mark.parametrize("labels", [2, 3])
def test_every_policy(tmp_path: Path, policy_input: str, labels: int) -> None:
    from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
    from tiny import tiny_backbone, unsettle

    path = tiny_backbone(tmp_path, layers=4)
    model: Any = EarlyExitForSequenceClassification.from_backbone(
        path, num_labels=labels, policy_input=policy_input
    ).eval()
    unsettle(model)
    feed = feed_of(model, 40)
    threshold = median_score(model, feed, "policy")
    scores = OnnxExitScores.of(model, "policy")
    proto = ExitGraph(model, scores, num_classes=labels).build(threshold)
    assert_same(session_of(proto).run(None, feed), oracle(model, feed, "policy", threshold))


def test_policies_of_old_models_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path, "bert", policy_input="signals")
    with pytest.raises(SettingError, match=r'reads "signals", as those of 0.1.0 did, has no graph'):
        OnnxExitScores.of(model, "policy")
    OnnxExitScores.of(model, "confidence")


@pytest.mark.parametrize("name", ["bert", "mpnet", "albert"])
def test_the_reference_evaluator_agrees(tmp_path: Path, name: str) -> None:
    model = build(tmp_path, name)
    feed = feed_of(model, 5, width=8)
    threshold = median_score(model, feed, "policy")
    proto = graph_of(model, "policy", threshold, style=PORTABLE)
    assert {opset.domain for opset in proto.opset_import} == {""}
    found = onnx.reference.ReferenceEvaluator(proto).run(
        None, {**feed, "threshold": np.array(threshold, np.float32)}
    )
    assert_same(found, oracle(model, feed, "policy", threshold))


@pytest.mark.parametrize("style", [GraphStyle(), PORTABLE], ids=["fused", "portable"])
@pytest.mark.parametrize("name", ["roberta", "mpnet"])
def test_padding_ids_inside_a_text_take_no_position(tmp_path: Path, name: str, style: GraphStyle) -> None:
    model = build(tmp_path, name)
    feed = feed_of(model, 20)
    feed["input_ids"][:, 1] = 1
    threshold = median_score(model, feed, "policy")
    proto = graph_of(model, "policy", threshold, style=style)
    assert_same(session_of(proto).run(None, feed), oracle(model, feed, "policy", threshold))


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_versions_of_the_operators(tmp_path: Path, opset: int) -> None:
    model = build(tmp_path, "mpnet")
    feed = feed_of(model, 9)
    threshold = median_score(model, feed, "confidence")
    for portable in (False, True):
        proto = graph_of(model, "confidence", threshold, style=GraphStyle(opset=opset, portable=portable))
        assert proto.opset_import[0].version == opset
        assert_same(session_of(proto).run(None, feed), oracle(model, feed, "confidence", threshold))


@pytest.mark.parametrize("name", ["bert", "mpnet"])
@pytest.mark.parametrize("portable", [False, True])
def test_8_bits_are_near(tmp_path: Path, name: str, portable: bool) -> None:
    model = build(tmp_path, name)
    feed = feed_of(model, 32)
    wanted = oracle(model, feed, "static", 3.0)
    proto = graph_of(model, "static", 3.0, style=GraphStyle(int8=True, portable=portable))
    assert proto.ByteSize() < 0.8 * graph_of(model, "static").ByteSize()
    logits, exit_layers = session_of(proto).run(None, feed)
    assert exit_layers.tolist() == [3] * 32
    assert np.abs(logits - wanted.logits.numpy()).mean() < 0.05
    assert np.abs(logits - wanted.logits.numpy()).max() > 1e-4


def test_fixed_exits(tmp_path: Path) -> None:
    model = build(tmp_path, "bert")
    feed = feed_of(model, 16)
    exits = np.resize([4, 1, 3, 2], 16)
    session = session_of(graph_of(model, "patience", fixed_exits=True))
    logits, exit_layers = session.run(None, {**feed, "exit_layers": exits})
    assert exit_layers.tolist() == exits.tolist()
    layers = oracle(model, feed, "policy", 1.0).layer_logits
    wanted = layers[torch.arange(16), torch.from_numpy(exits) - 1]
    np.testing.assert_allclose(np.asarray(logits), wanted.numpy(), atol=2e-4)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "bert")
    feed = feed_of(model, 9)
    path = tmp_path / "model.onnx"
    with (tmp_path / "weights.data").open("wb") as stream:
        proto = graph_of(model, "policy", 0.5, weights=WeightFile(stream, "weights.data"))
    path.write_bytes(proto.SerializeToString())
    assert path.stat().st_size < 0.5 * (tmp_path / "weights.data").stat().st_size
    options = SessionOptions()
    options.log_severity_level = 3
    found = InferenceSession(str(path), options).run(None, feed)
    assert_same(found, oracle(model, feed, "policy", 0.5))


def nodes_of(graph: Any) -> Iterator[Any]:
    """Of a graph and of what stands inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def test_operators_have_names_of_their_own(tmp_path: Path) -> None:
    model = build(tmp_path, "bert")
    names = [node.name for node in nodes_of(graph_of(model, "policy").graph)]
    assert len(names) > 100
    assert all(names)
    assert len(names) == len(set(names))


def test_what_has_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build(tmp_path / "modernbert", "modernbert")
    with pytest.raises(SettingError, match=r'can be made of bert, .* got a model of type "modernbert"'):
        graph_of(other, "policy")
    model = build(tmp_path / "bert", "bert")
    monkeypatch.setattr(onnx_exits, "MOST_LAYERS", 3)
    with pytest.raises(SettingError, match="can have 3 layers, one inside another, got 4"):
        graph_of(model, "policy")


@pytest.mark.skipif(
    not opens_nested(onnx_exits.MOST_LAYERS), reason="older versions of onnxruntime open it for hours"
)
def test_thirty_layers_can_be_read(tmp_path: Path) -> None:
    from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
    from tiny import tiny_backbone

    path = tiny_backbone(tmp_path, layers=onnx_exits.MOST_LAYERS)
    model: Any = EarlyExitForSequenceClassification.from_backbone(path, num_labels=CLASSES).eval()
    feed = feed_of(model, 4)
    found = session_of(graph_of(model, "static", 29.0)).run(None, feed)
    assert_same(found, oracle(model, feed, "static", 29.0))
