"""ONNX Runtime runs the same layers and classifiers as the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")

from test_packed_layers import LAYERS, LENGTHS, alone, build, token_rows

from consistentee.errors import SettingError
from consistentee.evaluation.precision import candidates
from consistentee.functional.criteria import CRITERIA
from consistentee.inference.encoder import onnx_backend, onnx_runner, onnx_sessions
from consistentee.inference.encoder.onnx_backend import BoundOnnxBackend, OnnxBackend
from consistentee.inference.encoder.onnx_runner import OnnxExitRunner
from consistentee.inference.encoder.onnx_scores import ONNX_SCORES, OnnxExitScores
from consistentee.inference.encoder.onnx_sessions import full_model_session
from consistentee.inference.encoder.packed_layers import LAYER_PARTS
from consistentee.inference.encoder.scheduler import BATCH_TOKENS, ExitRule, run_rows
from consistentee.inference.encoder.torch_backend import PackedBackend
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from tiny import (
    tiny_backbone,
    tiny_classifier,
    tiny_dataset,
    tiny_full_depth_model,
    tiny_model,
    tiny_tokenizer,
)

CASES = [(model_type, {}, {}) for model_type in LAYER_PARTS]
CASES += [
    ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}, {}),
    ("bert", {"hidden_act": "relu"}, {}),
    ("bert", {"hidden_act": "gelu_new"}, {}),
    ("bert", {}, {"head": "shared_pooler", "pooling": "cls"}),
    ("mpnet", {}, {"head": "shared_pooler", "pooling": "mean"}),
]


BACKENDS = pytest.mark.parametrize("kind", [OnnxBackend, BoundOnnxBackend])


def states_of(batch: Any, row: int, length: int) -> torch.Tensor:
    return torch.as_tensor(batch.hidden_states[row, :length])


@BACKENDS
@pytest.mark.parametrize("model_type,config,values", CASES)
@torch.no_grad()
def test_layers_and_classifiers(
    tmp_path: Path, kind: Any, model_type: str, config: dict[str, Any], values: dict[str, Any]
) -> None:
    model = build(tmp_path, model_type, config, **values)
    rows = token_rows(model)
    wanted = [alone(model, row) for row in rows]
    backend, torchs = kind(model), PackedBackend(model, "float32")
    batch, other = backend.start(rows), torchs.start(rows)
    for layer in range(LAYERS):
        before = batch
        batch, other = backend.run_layer(layer, batch), torchs.run_layer(layer, other)
        for row, states in enumerate(wanted):
            found = states_of(batch, row, LENGTHS[row])
            torch.testing.assert_close(found, states[layer], atol=1e-4, rtol=1e-4)
        right = torchs.classify(layer, other)
        torch.testing.assert_close(backend.classify(layer, batch), right, atol=2e-4, rtol=1e-3)
        passed, readings = backend.pass_layer(layer, before)
        torch.testing.assert_close(readings, right, atol=2e-4, rtol=1e-3)
        for row, length in enumerate(LENGTHS):
            one, same = states_of(passed, row, length), states_of(batch, row, length)
            torch.testing.assert_close(one, same, atol=1e-5, rtol=1e-5)
    whole = backend.run_all_layers(backend.start(rows))
    for row, length in enumerate(LENGTHS):
        one, same = states_of(whole, row, length), states_of(batch, row, length)
        torch.testing.assert_close(one, same, atol=1e-4, rtol=1e-4)


@BACKENDS
@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
@torch.no_grad()
def test_padding_ids_inside_a_text_take_no_position(tmp_path: Path, kind: Any, model_type: str) -> None:
    """A text can spell the padding token, and by its id it may be another one, which every text may hold."""
    model = build(tmp_path, model_type)
    rows = [{"input_ids": ids} for ids in ([5, 1, 7, 1, 1, 9], [1, 8, 9], [4])]
    backend = kind(model)
    batch = backend.run_all_layers(backend.start(rows))
    for row, tokens in enumerate(rows):
        found = states_of(batch, row, len(tokens["input_ids"]))
        torch.testing.assert_close(found, alone(model, tokens)[-1], atol=1e-4, rtol=1e-4)


@BACKENDS
@torch.no_grad()
def test_rows_leave_join_and_shed_padding(tmp_path: Path, kind: Any) -> None:
    model = build(tmp_path, "mpnet")
    rows = token_rows(model)
    backend = kind(model)
    one, other = backend.run_layer(0, backend.start(rows[:4])), backend.run_layer(0, backend.start(rows[4:]))
    kept = backend.select(one, [0, 1, 2])
    assert kept.hidden_states.shape[1] == 9
    assert backend.computed_tokens(kept) == 27
    assert not backend.can_merge(kept, other)
    joined = backend.run_layer(1, backend.merge([kept, other]))
    for position, row in enumerate((0, 1, 2, 4, 5)):
        found = states_of(joined, position, LENGTHS[row])
        torch.testing.assert_close(found, alone(model, rows[row])[1], atol=1e-4, rtol=1e-4)


@BACKENDS
def test_one_segment_only_where_it_fits(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path, "bert")
    rows = token_rows(model)
    with torch.no_grad():
        whole = kind(model)
        wanted = whole.run_all_layers(whole.start(rows)).hidden_states
        assert whole._sessions.whole() is not None
        monkeypatch.setattr(onnx_sessions, "MAX_SEGMENT_BYTES", 1)
        parts = kind(model)
        found = parts.run_all_layers(parts.start(rows)).hidden_states
        assert parts._sessions.whole() is None
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-4, rtol=1e-4)


def test_engine_on_it(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    folder = tiny_model(tmp_path / "model", backbone, initial_exit_bias=0.0)
    texts = [text for (text,) in tiny_dataset(40, seed=5).texts]
    engine = Engine.from_pretrained(folder, device="cpu", backend="onnxruntime")
    assert (engine.backend.name, engine.backend.dtype) == ("onnxruntime", "float32")
    reference = Engine.from_pretrained(folder, device="cpu")
    for criterion, threshold in (("confidence", 1.0), ("patience", 1.5)):
        for batch_size in (None, 1, 7):
            options: Any = {"batch_size": batch_size, "criterion": criterion, "threshold": threshold}
            found, wanted = engine.predict(texts, **options), reference.predict(texts, **options)
            assert [(p.label, p.exit_layer) for p in found] == [(p.label, p.exit_layer) for p in wanted]
            assert [p.score for p in found] == pytest.approx([p.score for p in wanted], abs=1e-4)
    plain = tiny_full_depth_model(tmp_path / "plain", backbone)
    one, other = (
        Engine.from_pretrained(plain, device="cpu", backend=name) for name in ("torch", "onnxruntime")
    )
    assert [p.label for p in one.predict(texts)] == [p.label for p in other.predict(texts)]
    assert ("onnxruntime", "float32") in candidates(engine.saved.model, "auto", "auto")
    assert candidates(engine.saved.model, "float32", "onnxruntime") == (("onnxruntime", "float32"),)
    assert engine.run([], batch_size=1, rule=ExitRule.full_depth()).labels == []


def test_layer_by_layer_where_the_graph_would_open_for_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), initial_exit_bias=0.0)
    engine, older = (Engine.from_pretrained(folder, device="cpu", backend="onnxruntime") for _ in range(2))
    rows, rule = token_rows(engine.saved.model), ExitRule("policy", 0.5)
    monkeypatch.setattr(onnx_runner, "MOST_LAYERS_BEFORE", 2)
    monkeypatch.setattr("onnxruntime.__version__", "1.29.0")
    wanted = engine.run(rows, batch_size=4, rule=rule)
    monkeypatch.setattr("onnxruntime.__version__", "1.28.0")
    found = older.run(rows, batch_size=4, rule=rule)
    assert (found.labels, found.exit_layers) == (wanted.labels, wanted.exit_layers)
    assert engine._runners["policy", False] is not None
    assert older._runners["policy", False] is None
    monkeypatch.setattr(onnx_runner, "MOST_LAYERS_BEFORE", 3)
    assert onnx_runner.has_graph(older.saved.model, rule)


def test_a_criterion_without_a_graph_goes_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(ONNX_SCORES) == set(CRITERIA)
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), initial_exit_bias=0.0)
    engine, other = (Engine.from_pretrained(folder, device="cpu", backend="onnxruntime") for _ in range(2))
    model, rule = engine.saved.model, ExitRule("entropy", 0.02)
    rows = token_rows(model)
    wanted = engine.run(rows, batch_size=4, rule=rule)
    assert onnx_runner.has_graph(model, rule)
    monkeypatch.delitem(ONNX_SCORES, "entropy")
    assert not onnx_runner.has_graph(model, rule)
    found = other.run(rows, batch_size=4, rule=rule)
    assert (found.labels, found.exit_layers) == (wanted.labels, wanted.exit_layers)
    assert other._runners["entropy", False] is None
    message = r'criterion "entropy" has no graph\. Write its row of ONNX_SCORES in inference/encoder/onnx_scores\.py'
    with pytest.raises(SettingError, match=message):
        OnnxExitScores.of(model, "entropy")


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_both_modes_are_one_graph(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", model_type)
    folder = tiny_model(tmp_path / "model", backbone, initial_exit_bias=0.0)
    engine = Engine.from_pretrained(folder, device="cpu", backend="onnxruntime")
    rows = token_rows(engine.saved.model)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    monkeypatch.setitem(
        BATCH_TOKENS, "cpu", 2 * lengths[1]
    )  # some batches of several rows, the longest alone
    shapes = list[int]()
    run = OnnxExitRunner.run
    monkeypatch.setattr(
        OnnxExitRunner, "run", lambda self, part, *how: shapes.append(len(part)) or run(self, part, *how)
    )
    engine.run(rows, batch_size=None, rule=ExitRule("policy", 0.5))
    assert sum(shapes) == len(rows)
    assert 1 in shapes
    assert max(shapes) > 1
    assert (engine.backend._sessions._embeddings, engine.backend._sessions._layers) == (None, None)
    for rule in (ExitRule("policy", 0.5), ExitRule("policy", 0.0), ExitRule.fixed([1, 3, 2, 1, 3, 2])):
        for batch_size in (None, 1, 4, 6):
            found = engine.run(rows, batch_size=batch_size, rule=rule)
            wanted = run_rows(
                engine.backend,
                rows,
                batch_size=batch_size,
                rule=rule,
                exit_scores=engine._scores_under(rule),
                num_classes=2,
            )
            pooled = () if batch_size is None else ("computed_tokens",)  # batches are joined by layers alone
            for name in ("labels", "exit_layers", "real_tokens", *pooled):
                assert getattr(found, name) == getattr(wanted, name), name
            assert found.scores == pytest.approx(wanted.scores, abs=1e-5)
    assert set(engine._runners) == {("policy", False), ("policy", True)}
    with pytest.raises(ValueError, match="exit_layers must be one for each of 6 rows"):
        engine.run(rows, batch_size=2, rule=ExitRule.fixed([1]))


def test_what_it_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'backend "onnxruntime" runs bert, .* in bfloat16 on cpu. Take backend'
    ):
        onnx_backend.onnx_backend(build(tmp_path / "bert", "bert"), "bfloat16")
    with pytest.raises(ValueError, match='got a model of type "modernbert"'):
        onnx_backend.onnx_backend(build(tmp_path / "modernbert", "modernbert"), "float32")
    with pytest.raises(ValueError, match="knows the activations gelu, gelu_new and relu, got SiLU"):
        OnnxBackend(build(tmp_path / "silu", "bert", {"hidden_act": "silu"}))


def test_a_gpu_needs_an_onnxruntime_that_knows_it() -> None:
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(ValueError, match=r"needs the CUDA provider .* Install onnxruntime-gpu"):
        onnx_sessions.make_session(b"", torch.device("cuda", 0))


def test_a_plain_model_has_one_classifier(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    plain: Any = load_model(
        tiny_full_depth_model(tmp_path / "plain", backbone), LoadedClassifier, device="cpu"
    ).model
    rows = token_rows(plain)
    for kind in (OnnxBackend, BoundOnnxBackend):
        backend = kind(plain)
        batch = backend.run_all_layers(backend.start(rows))
        assert backend.classify(plain.num_layers - 1, batch).shape == (len(rows), plain.config.num_classes)
        with pytest.raises(ValueError, match="Layer 0 has no classifier"):
            backend.classify(0, batch)


@torch.no_grad()
def test_engine_on_bound_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), initial_exit_bias=0.0)
    texts = [text for (text,) in tiny_dataset(40, seed=6).texts]
    wanted = Engine.from_pretrained(folder, device="cpu").predict(
        texts, threshold=0.9, criterion="confidence"
    )
    monkeypatch.setattr(onnx_backend, "OnnxBackend", BoundOnnxBackend)
    engine = Engine.from_pretrained(folder, device="cpu", backend="onnxruntime")
    assert isinstance(engine.backend, BoundOnnxBackend)
    for batch_size in (None, 1, 7):
        found = engine.predict(texts, batch_size=batch_size, threshold=0.9, criterion="confidence")
        assert [(p.label, p.exit_layer) for p in found] == [(p.label, p.exit_layer) for p in wanted]


def original(folder: Path, layers: int = 4) -> Any:
    classifier = tiny_classifier(folder / "original", layers=layers)
    return EarlyExitForSequenceClassification.from_classifier(classifier, max_length=64).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BACKENDS
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_the_head_that_a_model_came_with_in_any_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, kind: Any, dtype: torch.dtype
) -> None:
    folder = tiny_classifier(tmp_path / "original", model_type)
    model = EarlyExitForSequenceClassification.from_classifier(folder, max_length=64, dtype=dtype)
    saved = LoadedClassifier(model, tiny_tokenizer(model_type), {}, model_type)
    texts = tiny_dataset(12, seed=6).texts
    wanted = Engine(saved).predict(texts, threshold=1.0, criterion="confidence")
    monkeypatch.setattr(onnx_backend, "OnnxBackend", kind)
    engine = Engine(saved, backend="onnxruntime")
    for batch_size in (None, 5):
        found = engine.predict(texts, batch_size=batch_size, threshold=1.0, criterion="confidence")
        assert [(p.label, p.exit_layer) for p in found] == [(p.label, p.exit_layer) for p in wanted]
        assert [p.score for p in found] == pytest.approx([p.score for p in wanted], abs=1e-3)


@pytest.mark.parametrize("model_type", ["original", "mpnet"])
@torch.no_grad()
def test_the_rival_is_the_same_model(tmp_path: Path, model_type: str) -> None:
    """Of a model with exits, and of one that kept the head that it came with, at any number of rows."""
    if model_type == "mpnet":
        backbone = tiny_backbone(tmp_path, model_type, layers=2)
        model: Any = EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=3).eval()
    else:
        model = original(tmp_path, layers=2)
    session = full_model_session(model)
    names = [given.name for given in session.get_inputs()]
    assert names[:2] == ["input_ids", "attention_mask"]
    for rows, width in ((1, 7), (5, 21)):
        ids = torch.randint(4, 60, (rows, width))
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        wanted = model(**{name: values[name] for name in names}, all_layers=True).layer_logits[:, -1]
        if model_type == "mpnet":
            wanted = model(**{name: values[name] for name in names}, all_layers=True).classifier_logits[:, -1]
        found = session.run(None, {name: values[name].numpy() for name in names})[0]
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-3)
