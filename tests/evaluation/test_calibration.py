"""Calibration and agreement of saved models, against running all layers and choosing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from consistentee.data.rows import TextDataset
from consistentee.data.sketches import seen_rows, text_sketch
from consistentee.errors import DataError
from consistentee.evaluation.agreement import agreement_of_layers, evaluate_agreement
from consistentee.evaluation.calibration import (
    GOALS,
    LEAST_TOLD,
    calibrate_layers,
    calibrate_model,
    calibration_lines,
    fingerprint_of_texts,
)
from consistentee.evaluation.classification import evaluate_layers
from consistentee.functional.bounds import binomial_upper_bound, losses_allowed
from consistentee.functional.criteria import CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from tiny import random_signals, tiny_backbone, tiny_dataset, tiny_model


def outputs(
    rows: int = 3000, layers: int = 6, classes: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that settle with depth, exit probabilities that know a little, labels that the last layer mostly gives."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    ease = torch.randn(rows, 1, generator=generator)
    surer = ease + torch.linspace(0, 3, layers)
    logits = torch.randn(rows, layers, classes, generator=generator)
    logits += 2 * surer[..., None].clamp_min(0) * torch.nn.functional.one_hot(labels, classes)[:, None]
    probs = torch.sigmoid(2 * surer - 2 + torch.randn(rows, layers, generator=generator))
    return logits, probs, labels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedClassifier:
    root = tmp_path_factory.mktemp("calibration")
    torch.manual_seed(3)
    return load_model(tiny_model(root / "model", tiny_backbone(root / "backbone")), LoadedClassifier)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_disagreement_is_counted_at_the_exits(criterion: str) -> None:
    logits, probs, _ = outputs()
    signals = random_signals(*logits.shape)
    informed = logits.softmax(-1).amax(-1)  # what foretells anything at all
    signals |= {"classifier_logits": logits, "right_probs": informed}
    found = calibrate_layers(
        logits, probs, goal="max_disagreement", target=0.05, criterion=criterion, signals=signals
    )
    assert found.certified
    assert found.threshold is not None
    exit_layer = choose_exit_layer(exit_scores(criterion, logits, probs, **signals), found.threshold)
    given = logits.argmax(-1).gather(1, exit_layer[:, None] - 1).squeeze(1)
    lost = int((given != logits[:, -1].argmax(-1)).sum())
    assert (found.losses, found.losses_allowed) == (lost, losses_allowed(3000, 0.05))
    assert found.agreement == pytest.approx(1 - lost / 3000)
    assert found.mean_exit_layer == pytest.approx(float(exit_layer.double().mean()))
    assert found.bound == pytest.approx(binomial_upper_bound(lost, 3000))
    assert lost <= losses_allowed(3000, 0.05)
    assert (found.accuracy, found.rows_needed, found.num_choosing_rows) == (None, 59, 0)


def test_accuracy_loss_counts_what_full_depth_gets_right_and_the_exit_wrong() -> None:
    logits, probs, labels = outputs()
    found = calibrate_layers(logits, probs, goal="max_accuracy_loss", target=0.05, labels=labels)
    assert found.threshold is not None
    evaluation = evaluate_layers(logits, probs, labels, threshold=found.threshold)
    assert found.accuracy == pytest.approx(evaluation.accuracy)
    assert found.full_depth_accuracy == pytest.approx(evaluation.per_layer_accuracy[-1])
    exit_layer = choose_exit_layer(probs, found.threshold)
    right = logits.argmax(-1) == labels[:, None]
    lost = right[:, -1] & ~right.gather(1, exit_layer[:, None] - 1).squeeze(1)
    assert found.losses == int(lost.sum())
    lost_accuracy = evaluation.full_depth_accuracy - evaluation.accuracy
    assert lost_accuracy <= int(lost.sum()) / 3000  # what is won back is not counted
    with pytest.raises(ValueError, match="labels must be given"):
        calibrate_layers(logits, probs, goal="max_accuracy_loss", target=0.05)


def test_a_reference_takes_the_place_of_full_depth() -> None:
    logits, probs, labels = outputs()
    generator = torch.Generator().manual_seed(1)
    other = torch.where(torch.rand(3000, generator=generator) < 0.05, labels, logits[:, -1].argmax(-1))
    predictions = logits.argmax(-1)
    lost_at = {
        "max_disagreement": predictions != other[:, None],
        "max_accuracy_loss": (other == labels)[:, None] & (predictions != labels[:, None]),
    }
    for goal, lost in lost_at.items():
        found = calibrate_layers(logits, probs, goal=goal, target=0.1, labels=labels, answers=other)
        assert found.threshold is not None
        chosen = choose_exit_layer(probs, found.threshold)[:, None] - 1
        assert found.losses == int(lost.gather(1, chosen).sum())
        assert found.agreement == pytest.approx(
            float((predictions.gather(1, chosen)[:, 0] == other).double().mean())
        )
        assert found.full_depth_losses == int(lost[:, -1].sum()) > 0
        refused = replace(
            calibrate_layers(logits, probs, goal=goal, target=0.001, labels=labels, answers=other),
            reference="user/original",
        )
        assert not refused.certified
        (line,) = calibration_lines(refused)
        assert f"on {found.full_depth_losses} of 3,000 rows, and 0.1 points at 95 % allows fewer" in line
    itself = calibrate_layers(logits, probs, goal="max_disagreement", target=0.1)
    same = calibrate_layers(
        logits, probs, goal="max_disagreement", target=0.1, answers=logits[:, -1].argmax(-1)
    )
    assert replace(same, full_depth_losses=None) == itself
    assert same.full_depth_losses == 0
    agreement = agreement_of_layers(logits, probs, threshold=0.6, answers=other)
    assert agreement.per_layer_agreement == (predictions == other[:, None]).double().mean(0).tolist()
    assert agreement.curve[-1].agreement == pytest.approx(agreement.per_layer_agreement[-1])


def test_a_speedup_is_chosen_on_some_rows_and_judged_on_the_others() -> None:
    logits, probs, _ = outputs()
    found = calibrate_layers(logits, probs, goal="min_speedup", target=2.0)
    assert (found.num_rows, found.num_choosing_rows) == (2250, 750)
    assert found.layer_speedup is not None
    assert 2.0 <= found.layer_speedup < 2.2
    assert found.losses_allowed is None
    assert found.bound == pytest.approx(binomial_upper_bound(found.losses or 0, 2250))
    # What the judging rows say has no part in the choice.
    other = logits.clone()
    other[:, :-1] = other[:, -1:]
    again = calibrate_layers(other, probs, goal="min_speedup", target=2.0)
    assert (again.threshold, again.losses) == (found.threshold, 0)


def test_a_speedup_that_is_missed_by_chance_and_one_that_no_threshold_gives() -> None:
    logits, probs, _ = outputs(400)
    depth = logits.shape[1]
    how: dict[str, Any] = {
        "goal": "min_speedup",
        "criterion": "confident_patience",
    }  # nobody exits at layer 1
    found = calibrate_layers(logits, None, target=float(depth), **how)
    assert (found.layer_speedup, found.most_speedup) == (depth / 2, depth / 2)
    assert "most_speedup" not in found.operating_point()["certificate"]
    said = calibration_lines(found)[-1]
    assert said == f"No threshold gives them the {depth}x asked for: the lowest gives {depth / 2:.2f}x."
    missed = replace(calibrate_layers(logits, probs, goal="min_speedup", target=2.0), layer_speedup=1.9)
    assert missed.most_speedup == depth
    assert calibration_lines(missed)[-1] == "The rows that judged stay below the 2x asked for, by chance."


def test_what_is_bounded_is_not_rounded_down() -> None:
    logits, probs, _ = outputs(400)
    found = calibrate_layers(logits, probs, goal="min_speedup", target=2.0)
    for bound, said in ((0.019642, "1.97"), (0.0196, "1.96"), (0.00003, "0.01")):
        first = calibration_lines(replace(found, bound=bound))[0]
        assert f"at most {said} % of all" in first


def test_bounds_at_a_chosen_speedup_hold() -> None:
    """On 200 draws of rows the bound is below the table's truth no more often than stated."""
    logits, probs, _ = outputs(20_000, seed=1)
    predictions = logits.argmax(-1)

    def differs(threshold: float) -> float:
        given = predictions.gather(1, choose_exit_layer(probs, threshold)[:, None] - 1).squeeze(1)
        return float((given != predictions[:, -1]).double().mean())

    assert differs(0.5) == pytest.approx(1 - agreement_of_layers(logits, probs, threshold=0.5).agreement)
    broken = 0
    for seed in range(200):
        drawn = torch.randint(20_000, (400,), generator=torch.Generator().manual_seed(seed))
        found = calibrate_layers(logits[drawn], probs[drawn], goal="min_speedup", target=2.0)
        assert found.bound is not None
        assert found.threshold is not None
        broken += differs(found.threshold) > found.bound
    assert stats.binomtest(broken, 200, 0.05, alternative="greater").pvalue > 0.02


def test_too_few_rows_say_how_many_would_do() -> None:
    logits, probs, _ = outputs(244)
    found = calibrate_layers(logits, probs, goal="max_disagreement", target=0.01)
    assert (found.certified, found.threshold, found.losses_allowed, found.rows_needed) == (
        False,
        None,
        None,
        299,
    )
    assert calibration_lines(found) == ["244 rows can certify no 1 point at 95 %: 299 can."]


def test_what_is_said() -> None:
    logits, probs, labels = outputs()
    (first, second) = calibration_lines(calibrate_layers(logits, probs, goal="max_disagreement", target=0.02))
    assert first.startswith("policy threshold 0.")
    assert (
        "disagreements of 47 allowed in 3,000 rows; certified: at most 2 points of disagreement with" in first
    )
    assert "Layer speed-up" in second
    (first, second) = calibration_lines(
        calibrate_layers(logits, probs, goal="max_accuracy_loss", target=0.02, labels=labels)
    )
    assert "losses of 47 allowed" in first
    assert "(full depth " in second
    first = calibration_lines(calibrate_layers(logits, probs, goal="min_speedup", target=2.0))[0]
    assert "disagreements in 2,250 rows: at most" in first
    assert "750 other rows chose the threshold" in first
    never_right = logits.clone()
    never_right[:, :-1] = -never_right[:, -1:]
    lines = calibration_lines(calibrate_layers(never_right, probs, goal="max_disagreement", target=0.001))
    assert lines[-1].startswith("No row exits early at a threshold that passes")


def test_of_a_saved_model_it_is_what_the_engine_does(saved: LoadedClassifier) -> None:
    rows = tiny_dataset(400)
    found = calibrate_model(
        saved, rows.texts, goal="max_disagreement", target=0.2, source="/somewhere/rows.csv"
    )
    assert found.threshold is not None
    engine = Engine(saved)
    exits = engine.predict(rows.texts, threshold=found.threshold)
    full = engine.predict(rows.texts, threshold=1.0)
    assert found.losses == sum(one.label != other.label for one, other in zip(exits, full, strict=True))
    assert found.mean_exit_layer == pytest.approx(sum(one.exit_layer for one in exits) / 400)
    assert found.rows_fingerprint == fingerprint_of_texts(rows.texts) != fingerprint_of_texts(rows.texts[1:])
    point = found.operating_point()
    assert (point["criterion"], point["threshold"]) == ("policy", found.threshold)
    assert point["certificate"]["rows_source"] == "rows.csv"  # and not whose disk it lies on
    assert point["certificate"]["losses"] == found.losses
    labelled = calibrate_model(saved, rows, goal="max_disagreement", target=0.2)
    assert (labelled.threshold, labelled.losses) == (found.threshold, found.losses)
    assert labelled.accuracy is not None


def test_rows_that_training_has_seen_are_told(saved: LoadedClassifier) -> None:
    rows = tiny_dataset(200)
    record = {"data": {"fingerprint": "another", "text_sketch": text_sketch(rows.texts[:100])}}
    trained = LoadedClassifier(saved.model, saved.tokenizer, record, "trained")
    with pytest.raises(DataError, match="and its thresholds chosen, on these rows"):
        calibrate_model(trained, rows.texts[:100], goal="max_disagreement", target=0.3)
    some = calibrate_model(trained, rows.texts[50:], goal="max_disagreement", target=0.3)
    assert some.share_seen == pytest.approx(1 / 3, abs=0.05)
    assert calibration_lines(some)[-1].startswith("Warning: about 3")
    few = replace(some, share_seen=0.003)
    assert calibration_lines(few)[-1].startswith("Warning: about 0.3 % of the rows are among those")
    fresh = calibrate_model(trained, [("something",), ("else",)] * 20, goal="max_disagreement", target=0.3)
    assert fresh.share_seen == 0
    assert not calibration_lines(fresh)[-1].startswith("Warning")
    assert calibrate_model(saved, rows.texts, goal="max_disagreement", target=0.3).share_seen is None


def test_one_repeated_text_does_not_refuse_the_others(saved: LoadedClassifier) -> None:
    """Of a large training set the sketch tells few rows: here one, which happens to be known."""
    known = [(f"text {number}",) for number in range(20_000)]
    sketch = text_sketch(known)
    others = [(f"other {number}",) for number in range(60)]
    repeated = next(text for text in known if seen_rows(sketch, [text]) == (1, 1))
    rows = [*(text for text in others if seen_rows(sketch, [text]) == (0, 0)), repeated]
    record = {"data": {"fingerprint": "another", "text_sketch": sketch}}
    trained = LoadedClassifier(saved.model, saved.tokenizer, record, "trained")
    found = calibrate_model(trained, rows, goal="max_disagreement", target=0.3)
    assert found.share_seen == 1
    nine = [text for text in known if seen_rows(sketch, [text]) == (1, 1)][: LEAST_TOLD - 1]
    calibrate_model(trained, nine, goal="max_disagreement", target=0.3)
    ten = [text for text in known if seen_rows(sketch, [text]) == (1, 1)][:LEAST_TOLD]
    with pytest.raises(DataError, match="on these rows"):
        calibrate_model(trained, ten, goal="max_disagreement", target=0.3)


def test_rows_that_chose_the_thresholds_are_refused(saved: LoadedClassifier) -> None:
    rows = tiny_dataset(50)
    trained = LoadedClassifier(
        saved.model, saved.tokenizer, {"data": {"fingerprint": rows.fingerprint()}}, "trained"
    )
    with pytest.raises(
        DataError, match='Model "trained" was trained, and its thresholds chosen, on these rows'
    ):
        calibrate_model(trained, rows, goal="max_disagreement", target=0.2)
    calibrate_model(trained, tiny_dataset(50, seed=1), goal="max_disagreement", target=0.2)
    with pytest.raises(DataError, match="at least one row"):
        calibrate_model(saved, [], goal="max_disagreement", target=0.2)


@pytest.mark.parametrize("goal", [*GOALS, "least"])
def test_targets_out_of_range(goal: str) -> None:
    logits, probs, labels = outputs(50)
    with pytest.raises(ValueError, match=r"goal must be one of|must be in"):
        calibrate_layers(logits, probs, goal=goal, target=9.0, labels=labels)


def test_agreement_is_accuracy_against_the_last_layers_classes(saved: LoadedClassifier) -> None:
    logits, probs, _ = outputs(500)
    others = {"confidence": 0.7, "patience": None}
    found = agreement_of_layers(logits, probs, threshold=0.6, other_criteria=others)
    last = logits[:, -1].argmax(-1)
    oracle = evaluate_layers(logits, probs, last, threshold=0.6, other_criteria=others)
    assert found.agreement == found.metrics["agreement"] == oracle.accuracy
    assert found.exit_agreement == oracle.exit_accuracy
    assert found.per_layer_agreement == oracle.per_layer_accuracy
    assert found.per_layer_agreement[-1] == 1
    assert found.exit_histogram == oracle.exit_histogram
    expected = (oracle.accuracy * (1 - oracle.accuracy) / 499) ** 0.5
    assert found.agreement_standard_error == pytest.approx(expected)

    def plain(curve: Any, quality: str) -> list[tuple[float, ...]]:
        return [(at.threshold, getattr(at, quality), at.mean_exit_layer, at.layer_speedup) for at in curve]

    assert plain(found.curve, "agreement") == plain(oracle.curve, "accuracy")
    for name, other in found.other_criteria.items():
        assert plain(other.curve, "agreement") == plain(oracle.other_criteria[name].curve, "accuracy")
    confidence, its_oracle = (
        found.other_criteria["confidence"].point,
        oracle.other_criteria["confidence"].point,
    )
    assert plain([confidence], "agreement") == plain([its_oracle], "accuracy")
    assert found.other_criteria["patience"].point is None
    with pytest.raises(ValueError, match="at least one row"):
        agreement_of_layers(logits[:0], probs[:0])


def test_agreement_of_a_saved_model(saved: LoadedClassifier) -> None:
    rows = tiny_dataset(60)
    found = evaluate_agreement(saved, rows.texts, criteria=["confidence"], threshold=0.6)
    engine = Engine(saved)
    exits = engine.predict(rows.texts, criterion="confidence", threshold=0.6)
    full = engine.predict(rows.texts, threshold=1.0)
    assert (
        found.agreement == sum(one.label == other.label for one, other in zip(exits, full, strict=True)) / 60
    )
    assert found.environment["dtype"] == "float32"
    with pytest.raises(ValueError, match="at least one text"):
        evaluate_agreement(saved, [])
    of_strings = evaluate_agreement(
        saved, [text for (text,) in rows.texts], criteria=["confidence"], threshold=0.6
    )
    assert of_strings.curve == found.curve


def test_a_dataset_of_the_wrong_classes(saved: LoadedClassifier) -> None:
    rows = TextDataset([("a",), ("b",)], [0, 1], ("yes", "no"), "rows")
    with pytest.raises(ValueError, match="Labels of model"):
        calibrate_model(saved, rows, goal="max_accuracy_loss", target=0.5)
