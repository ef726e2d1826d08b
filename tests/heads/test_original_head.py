"""Models that keep their own head: at full depth they give what they gave, bit for bit, whatever their type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES
from consistentee.data.tokenization import encode_texts
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, exit_scores
from consistentee.inference.encoder.packing import similar_rows
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import finetune
from quick import quick_config
from tiny import fit_at_random, tiny_backbone, tiny_classifier, tiny_dataset

WIDTH = 8
TEXTS = [row[0] for row in tiny_dataset(24, seed=3).texts]


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def with_exits(folder: Path, **values: Any) -> EarlyExitForSequenceClassification:
    """Exits with weights that tell layers apart."""
    torch.manual_seed(0)
    model = EarlyExitForSequenceClassification.from_classifier(
        folder, **{"num_queries": 2, "classifier_hidden_size": WIDTH, "ensemble_decay": 0.5, **values}
    )
    with torch.no_grad():
        for parameter in (*model.classifiers.layers[:-1].parameters(), *model.policy.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    fit_at_random(model)
    return model.eval()


@pytest.fixture(params=[*SUPPORTED_MODEL_TYPES, "modernbert-mean"], scope="module")
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    values = {"classifier_pooling": "mean"} if request.param == "modernbert-mean" else {}
    return tiny_classifier(folder, request.param.removesuffix("-mean"), **values)


@torch.no_grad()
def test_full_depth_gives_the_originals_logits_bit_for_bit(original: Path, tmp_path: Path) -> None:
    batch = batch_of(original)
    expected = AutoModelForSequenceClassification.from_pretrained(original).eval()(**batch).logits
    model = with_exits(original)
    assert torch.equal(model(**batch, criterion="confidence", threshold=1.0).logits, expected)
    model.train().backbone.eval()
    everything = model(**batch)
    assert torch.equal(everything.layer_logits[:, -1], expected)  # its head stays in evaluation mode
    model.eval().save_pretrained(tmp_path)
    again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**batch, criterion="confidence", threshold=1.0).logits, expected)
    with_ids = {name: value for name, value in again.state_dict().items() if "classifiers" in name}
    for name, value in with_ids.items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("deeper"), "bert", layers=5)


@pytest.mark.parametrize("criterion", ["policy", "confidence", "patience"])
def test_engines_exit_as_choosing_afterwards_does(original: Path, criterion: str) -> None:
    check_engines(original, criterion)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "static"])
def test_engines_do_so_under_every_criterion(deeper: Path, criterion: str) -> None:
    check_engines(deeper, criterion)


@torch.no_grad()
def test_a_long_text_among_short_ones_changes_none_of_them(original: Path) -> None:
    """Rows of similar length are embedded, and go through the head, together."""
    saved = LoadedClassifier(with_exits(original), AutoTokenizer.from_pretrained(original), {}, "retrofitted")
    texts = ["good", "good " * 40, "bad film", "a bad plot", "plot " * 38, "it"]
    rows, _ = encode_texts([(text,) for text in texts], saved.tokenizer, 64)
    assert len(similar_rows([len(row["input_ids"]) for row in rows])) > 1
    engine, rule = Engine(saved), ExitRule("confidence", 1.0)
    together, alone = (engine.run(rows, batch_size=size, rule=rule) for size in (len(rows), 1))
    assert (together.labels, together.exit_layers) == (alone.labels, alone.exit_layers)
    torch.testing.assert_close(
        torch.tensor(together.scores), torch.tensor(alone.scores), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def check_engines(original: Path, criterion: str) -> None:
    model = with_exits(original)
    saved = LoadedClassifier(model, AutoTokenizer.from_pretrained(original), {}, "retrofitted")
    batch = batch_of(original)
    every: Any = model(**batch, all_layers=True)
    signals = model.exit_signals()(every.pooled, every.classifier_logits)
    every_score = exit_scores(criterion, every.layer_logits, every.exit_probs, **signals)
    layer = int((every_score.std(0) > 0).int().argmax())  # the first at which they differ
    scores = every_score[:, layer].sort().values
    middle = int((scores[1:] - scores[:-1])[6:17].argmax()) + 6  # the widest gap: rounding decides nothing
    in_layers = EXIT_CRITERIA[criterion].thresholds.layers
    threshold = 1.5 if in_layers else float(scores[middle : middle + 2].mean())
    slow: Any = model(**batch, all_layers=True, criterion=criterion, threshold=threshold)
    fast: Any = model(**batch, all_layers=False, criterion=criterion, threshold=threshold)
    assert fast.exit_layer.tolist() == slow.exit_layer.tolist()
    assert in_layers or len(set(slow.exit_layer.tolist())) > 1
    torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-5, atol=1e-5)
    rows, _ = encode_texts([(text,) for text in TEXTS], saved.tokenizer, 64)
    for backend in ("torch", "onnxruntime"):
        if backend == "onnxruntime" and model.backbone.config.model_type in ("deberta-v2", "modernbert"):
            continue
        engine = Engine(saved, backend=backend)
        for size in (1, 3, None):
            answers = engine.run(rows, batch_size=size, rule=ExitRule(criterion, threshold))
            assert answers.exit_layers == slow.exit_layer.tolist()
            assert answers.labels == slow.logits.argmax(-1).tolist()
            torch.testing.assert_close(
                torch.tensor(answers.scores), slow.logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5
            )
            deep = engine.run(rows, batch_size=size, rule=ExitRule("confidence", 1.0))
            assert deep.labels == slow.layer_logits[:, -1].argmax(-1).tolist()


def test_a_plain_model_of_ours_keeps_its_head(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    for head in ("attention", "shared_pooler"):
        folder = finetune(
            backbone=backbone,
            train_data=tiny_dataset(40),
            output_dir=tmp_path / head,
            config=quick_config(head=head, warmup_epochs=0.5, rounds=0),
        )
        batch = batch_of(folder)
        with torch.no_grad():
            expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
        model = with_exits(folder)
        assert torch.equal(model(**batch, criterion="confidence", threshold=1.0).logits, expected)
        model.save_pretrained(tmp_path / f"{head} exits")
        again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{head} exits")
        assert torch.equal(again(**batch, criterion="confidence", threshold=1.0).logits, expected)
        with pytest.raises(ValueError, match="has exits already"):
            EarlyExitForSequenceClassification.from_classifier(tmp_path / f"{head} exits")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"problem_type": "multi_label_classification"}, "is a multi-label classifier"),
        ({"num_labels": 1}, r"gives a number \(num_labels=1: regression, or a reranker"),
        ({"problem_type": "regression"}, "gives a number"),
    ],
)
def test_what_gives_no_one_class_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = tiny_classifier(tmp_path, "bert", **values)
    with pytest.raises(ValueError, match=message):
        EarlyExitForSequenceClassification.from_classifier(folder)


def test_types_without_a_row_are_named(tmp_path: Path) -> None:
    new_config: Any = EarlyExitConfig
    config = AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r'original_head must be of a type among bert, .*, got "gpt9"'):
        EarlyExitForSequenceClassification(
            new_config(encoder_config=config, original_head={"model_type": "gpt9"})
        )
    with pytest.raises(
        ValueError, match='head must be attention beside an original_head, got "shared_pooler"'
    ):
        new_config(encoder_config=config, head="shared_pooler", original_head={"model_type": "bert"})


def test_the_folder_opens_with_its_labels(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "original", "bert")
    with_exits(folder).save_pretrained(tmp_path / "exits")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "exits")
    saved = load_model(tmp_path / "exits", LoadedClassifier)
    assert saved.label_names == ("negative", "positive")
    assert saved.has_exits
