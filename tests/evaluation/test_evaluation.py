"""Figures against a hand-made example and against the model's real exits; references; what a saved folder may lack."""

from __future__ import annotations

import html
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from consistentee.evaluation.classification import (
    class_columns,
    evaluate_layers,
    evaluate_model,
    evaluate_plain,
    predict_classes,
)
from consistentee.evaluation.plots import plot_evaluation
from consistentee.evaluation.reports import MOST_CLASSES, evaluation_tables
from consistentee.evaluation.results import Evaluation
from consistentee.functional.curves import CurvePoint
from consistentee.functional.recall import ClassRecall
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.record import RECORD_FILE, record_evaluation
from consistentee.pipelines.classifier import Engine
from tiny import (
    LABEL_NAMES,
    save,
    tiny_backbone,
    tiny_dataset,
    tiny_full_depth_model,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random heads, and its backbone and a plain sibling beside it."""
    root = tmp_path_factory.mktemp("evaluation")
    backbone = tiny_backbone(root / "backbone")
    torch.manual_seed(1)
    tiny_full_depth_model(root / "plain", backbone)
    return tiny_model(root / "model", backbone, initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def saved(folder: Path) -> LoadedClassifier:
    return load_model(folder, LoadedClassifier, device="cpu")


def logits_of(classes: list[list[int]]) -> Tensor:
    """(rows, layers, 2) logits whose argmax are these classes."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 2).float() * 2


# Four rows, three layers: what each layer predicts, and when the policy leaves at threshold 0.5.
CLASSES = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
LABELS = torch.tensor([0, 0, 1, 1])
EXIT_PROBS = torch.tensor([[0.9, 0.9, 0.0], [0.8, 0.9, 0.0], [0.1, 0.9, 0.0], [0.2, 0.3, 0.0]])


def test_hand_made_example() -> None:
    evaluation = evaluate_layers(
        logits_of(CLASSES),
        EXIT_PROBS,
        LABELS,
        threshold=0.5,
        metrics=("accuracy", "f1"),
        other_criteria={"patience": 1.5, "confidence": None},
        reference_predictions=torch.tensor([0, 1, 0, 1]),
    )
    # exit layers 1, 1, 2, 3; right: yes, no, yes, no
    assert evaluation.num_hidden_layers == 3
    assert evaluation.num_examples == 4
    assert evaluation.exit_histogram == [2, 1, 1]
    assert evaluation.exit_accuracy == [0.5, 1.0, 0.0]
    assert evaluation.accuracy == 0.5
    assert evaluation.metrics == {"accuracy": 0.5, "f1": pytest.approx(0.5)}
    assert evaluation.mean_exit_layer == 1.75
    assert evaluation.layer_speedup == pytest.approx(3 / 1.75)
    assert evaluation.layers_saved == pytest.approx(1 - 1.75 / 3)
    assert evaluation.per_layer_accuracy == [0.5, 1.0, 0.75]
    assert evaluation.classifier_accuracy == evaluation.per_layer_accuracy
    assert evaluation.class_recall == [
        ClassRecall("0", 2, recall=0.5, full_depth_recall=1.0, lost=1, gained=0),
        ClassRecall("1", 2, recall=0.5, full_depth_recall=0.5, lost=0, gained=0),
    ]
    assert evaluation.other_criteria["confidence"].point is None
    # a run of two equal predictions: rows leave at 2, 3, 3, 2, all but none wrong
    assert evaluation.other_criteria["patience"].point == CurvePoint(1.5, 1.0, 2.5, 3 / 2.5)
    reference = evaluation.reference
    assert reference is not None
    assert reference.accuracy == 0.5
    assert reference.accuracy_difference == 0.0
    differences = torch.tensor([0.0, 0.0, 1.0, -1.0])
    assert reference.standard_error == pytest.approx(float(differences.std()) / 2)


def unequal(classes: int) -> Evaluation:
    """The first class is right everywhere; of the 5 rows of each of the others the first layer finds none."""
    labels = torch.tensor([0] * 600 + [label for label in range(1, classes) for _ in range(5)])
    layers = torch.nn.functional.one_hot(torch.stack([0 * labels, labels], 1), classes).float()
    names = [f"class {label}" for label in range(classes)]
    return evaluate_layers(layers, torch.ones(len(labels), 2), labels, label_names=names)


def lines_of(evaluation: Evaluation) -> list[str]:
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(evaluation_tables(evaluation))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_report_has_every_class_and_warns() -> None:
    evaluation = unequal(2)
    lines = lines_of(evaluation)
    assert "class 0 600 100.00 100.00" in lines
    assert "class 1 5 0.00 100.00" in lines
    fallen, rare = [line for line in lines if line.startswith("Warning")]
    assert (
        'recall of class "class 1" (5 rows) falls from 100.0 % at full depth to 0.0 % at threshold 0.5.'
        in fallen
    )
    assert rare.startswith('Warning: rare among 605 rows: "class 1" (5).')
    figures = json.loads(json.dumps(evaluation.to_dict()))["class_recall"][1]
    assert figures == {
        "label": "class 1",
        "num_examples": 5,
        "recall": 0.0,
        "full_depth_recall": 1.0,
        "lost": 5,
        "gained": 0,
    }
    assert evaluation.summary()["class_recall"][1] == figures


def test_of_very_many_classes_the_report_has_those_that_lose_most() -> None:
    lines = lines_of(unequal(30))
    assert "class 0 600 100.00 100.00" not in lines
    assert sum(line.endswith(" 5 0.00 100.00") for line in lines) == MOST_CLASSES
    assert "10 more classes: --json has all of them." in lines


def test_classes_have_the_names_of_the_data_and_the_chosen_metric_is_reported(
    saved: LoadedClassifier,
) -> None:
    rows = tiny_dataset(20)
    turned = replace(rows, label_names=LABEL_NAMES[::-1])
    assert [found.label for found in evaluate_model(saved, turned).class_recall] == list(LABEL_NAMES[::-1])
    assert list(evaluate_model(saved, rows).metrics) == ["accuracy", "f1", "matthews"]
    chosen = replace(saved, record={"config": {"threshold_metric": "macro_f1"}})
    assert list(evaluate_model(chosen, rows).metrics) == ["accuracy", "f1", "matthews", "macro_f1"]


def test_exit_accuracy_is_none_where_nobody_leaves() -> None:
    evaluation = evaluate_layers(logits_of(CLASSES), EXIT_PROBS, LABELS, threshold=1.0)
    assert evaluation.exit_histogram == [0, 0, 4]
    assert evaluation.exit_accuracy == [None, None, 0.75]
    assert evaluation.layers_saved == 0.0


def test_curve_reaches_from_the_first_layer_to_the_last() -> None:
    evaluation = evaluate_layers(logits_of(CLASSES), EXIT_PROBS, LABELS)
    depths = [point.mean_exit_layer for point in evaluation.curve]
    assert min(depths) == 1.0
    assert max(depths) == 3.0
    deepest = max(evaluation.curve, key=lambda point: point.mean_exit_layer)
    assert deepest.accuracy == evaluation.per_layer_accuracy[-1]
    assert deepest.layer_speedup == 1.0


def test_json_holds_what_scripts_rely_on() -> None:
    evaluation = evaluate_layers(logits_of(CLASSES), EXIT_PROBS, LABELS)
    figures = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    wanted = (
        "num_hidden_layers num_examples threshold criterion accuracy metrics mean_exit_layer layer_speedup "
        "layers_saved exit_histogram exit_accuracy per_layer_accuracy curve reference"
    )
    assert set(wanted.split()) <= set(figures)
    assert figures["reference"] is None
    assert set(figures["curve"][0]) == {"threshold", "accuracy", "mean_exit_layer", "layer_speedup"}
    assert "curve" not in evaluation.summary()


def test_no_rows_and_bad_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        evaluate_layers(torch.empty(0, 3, 2), torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\] for policy, got 1.5"):
        evaluate_layers(logits_of(CLASSES), EXIT_PROBS, LABELS, threshold=1.5)


@pytest.mark.parametrize("criterion, threshold", [("policy", 0.5), ("confidence", 0.55), ("patience", 1.5)])
def test_agrees_with_real_exits(saved: LoadedClassifier, criterion: str, threshold: float) -> None:
    rows = tiny_dataset(50)
    evaluation = evaluate_model(saved, rows, criteria=[criterion], threshold=threshold, batch_size=16)
    predictions = Engine(saved).predict(rows.texts, criterion=criterion, threshold=threshold, batch_size=7)
    right = [p.label == LABEL_NAMES[label] for p, label in zip(predictions, rows.labels, strict=True)]
    layers = [p.exit_layer for p in predictions]
    assert evaluation.accuracy == pytest.approx(sum(right) / 50)
    assert evaluation.mean_exit_layer == pytest.approx(sum(layers) / 50)
    assert evaluation.exit_histogram == [layers.count(layer) for layer in (1, 2, 3)]
    assert set(evaluation.metrics) == {"accuracy", "f1", "matthews"}


def test_a_model_on_the_cpu_beside_a_training_on_a_gpu(saved: LoadedClassifier) -> None:
    dataset = tiny_dataset(20)
    expected = evaluate_model(saved, dataset).accuracy
    assert PartialState._shared_state["_cpu"] is False  # a training after this takes a GPU
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device("cuda:0")
    assert evaluate_model(saved, dataset).accuracy == expected


def test_label_order_of_the_data_does_not_matter(saved: LoadedClassifier) -> None:
    rows = tiny_dataset(40)
    turned = replace(rows, labels=[1 - label for label in rows.labels], label_names=("Positive", "NEGATIVE"))
    first, second = (evaluate_model(saved, data) for data in (rows, turned))
    assert first.accuracy == second.accuracy
    assert first.per_layer_accuracy == second.per_layer_accuracy


def test_labels_that_differ_are_refused(saved: LoadedClassifier) -> None:
    rows = replace(tiny_dataset(8), label_names=("bad", "good"))
    with pytest.raises(ValueError, match=r'got "negative", "positive" and "bad", "good"'):
        evaluate_model(saved, rows)


def test_plain_model_as_reference(saved: LoadedClassifier, folder: Path) -> None:
    rows = tiny_dataset(40)
    plain = load_model(folder.parent / "plain", LoadedClassifier, device="cpu")
    evaluation = evaluate_model(saved, rows, reference=plain)
    alone = evaluate_plain(plain, rows)
    assert evaluation.reference is not None
    assert evaluation.reference.accuracy == alone["accuracy"]
    assert evaluation.reference.accuracy_difference == pytest.approx(evaluation.accuracy - alone["accuracy"])
    with pytest.raises(ValueError, match=r"has no exits .* `consistentee retrofit`.* can be its --reference"):
        evaluate_model(plain, rows)


def test_an_early_exit_reference_is_called_one(saved: LoadedClassifier, folder: Path, tmp_path: Path) -> None:
    """The table, the line below it, the figures, the picture and the card say what ran, and how deep."""
    rows = tiny_dataset(24, seed=5)
    deeper = tiny_backbone(tmp_path / "backbone", layers=4)
    other = load_model(
        tiny_model(tmp_path / "other", deeper, threshold=0.45, initial_exit_bias=0.0),
        LoadedClassifier,
        device="cpu",
    )
    alone = evaluate_model(other, rows)
    assert 1 < alone.mean_exit_layer < 4
    evaluation = evaluate_model(saved, rows, reference=other, batch_size=7)
    reference = evaluation.reference
    assert reference is not None
    assert reference.name == "early-exit model, policy > 0.45"
    assert reference.accuracy == alone.accuracy
    assert reference.mean_exit_layer == pytest.approx(alone.mean_exit_layer)
    assert reference.num_hidden_layers == 4
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evaluation_tables(evaluation))
    shown = console.export_text()
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("early-exit model, policy")]
    assert f"{alone.mean_exit_layer:.2f} / 4" in row
    assert f"{alone.layer_speedup:.2f}x" in row
    assert "Difference to the early-exit model, policy > 0.45 on the same 24 inputs" in " ".join(
        shown.split()
    )
    picture = html.unescape(plot_evaluation(evaluation, tmp_path / "p.svg").read_text(encoding="utf-8"))
    assert f"early-exit model, policy > 0.45 ({alone.mean_exit_layer:.2f} of 4 layers)" in picture
    plain = evaluate_model(
        saved,
        rows,
        reference=load_model(
            tiny_full_depth_model(tmp_path / "plain", deeper), LoadedClassifier, device="cpu"
        ),
    )
    assert plain.reference is not None
    assert (plain.reference.name, plain.reference.mean_exit_layer) == ("plain model", 4)
    assert "plain model, all layers" in plot_evaluation(plain, tmp_path / "q.svg").read_text(encoding="utf-8")


def test_hugging_face_classifier_as_reference(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    save(BertForSequenceClassification(config), tokenizer, tmp_path)
    plain = load_model(tmp_path, LoadedClassifier, device="cpu")
    rows = tiny_dataset(10)
    predictions = predict_classes(plain, rows, batch_size=3)
    batch = tokenizer([text for (text,) in rows.texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = plain.model(**batch).logits.argmax(-1)
    assert torch.equal(predictions, wanted)
    assert class_columns(plain, ("no", "yes")) == [0, 1]  # LABEL_0 and LABEL_1 say nothing
    with pytest.raises(ValueError, match="must agree"):
        class_columns(plain, ("no", "perhaps", "yes"))


def test_labels_that_differ_in_case_only_are_not_merged(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    model = load_model(
        tiny_model(tmp_path / "model", backbone, label_names=("us", "US")), LoadedClassifier, device="cpu"
    )
    assert class_columns(model, ("us", "US")) == [0, 1]
    assert class_columns(model, ("US", "us")) == [1, 0]
    rows = replace(tiny_dataset(40), label_names=("us", "US"))
    answers = Engine(model).predict([text for (text,) in rows.texts])
    right = [
        answer.label == rows.label_names[label] for answer, label in zip(answers, rows.labels, strict=True)
    ]
    assert evaluate_model(model, rows).accuracy == pytest.approx(sum(right) / len(right))
    with pytest.raises(ValueError, match=r'must agree, got "us", "US" and "us", "Us"'):
        class_columns(model, ("us", "Us"))


def test_other_letters_are_understood_where_nothing_is_merged(saved: LoadedClassifier) -> None:
    assert class_columns(saved, ("Positive", "NEGATIVE")) == [1, 0]
    with pytest.raises(ValueError, match="must agree"):
        class_columns(saved, ("Positive", "positive"))


def test_thresholds_of_other_criteria_come_from_the_record(saved: LoadedClassifier, folder: Path) -> None:
    assert saved.exit_rule() == ("policy", 0.5)
    with pytest.raises(ValueError, match=r'no threshold for criterion "entropy". Give one with --threshold'):
        saved.exit_rule("entropy")
    with pytest.raises(
        ValueError, match="criterion must be one of policy, confidence, entropy, calibrated_confidence"
    ):
        saved.exit_rule("mood", 0.5)
    with_record = replace(saved, record={"thresholds": {"entropy": 0.25}})
    assert with_record.exit_rule("entropy") == ("entropy", 0.25)
    evaluation = evaluate_model(with_record, tiny_dataset(12), criteria=["policy", "entropy", "patience"])
    assert evaluation.criterion == "policy"
    assert evaluation.other_criteria["entropy"].threshold == 0.25
    assert evaluation.other_criteria["patience"].point is None


def test_evaluation_is_recorded_in_the_folder(folder: Path, saved: LoadedClassifier, tmp_path: Path) -> None:
    evaluation = evaluate_model(saved, tiny_dataset(12))
    (tmp_path / RECORD_FILE).write_text('{"kind": "early_exit", "seed": 3}', encoding="utf-8")
    record_evaluation(tmp_path, evaluation.summary())
    record = json.loads((tmp_path / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["seed"] == 3
    assert record["evaluation"]["accuracy"] == evaluation.accuracy
    assert "Measured on 12 rows" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", RECORD_FILE]
