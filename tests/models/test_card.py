"""The model card of every kind of record, complete and not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from consistentee.evaluation.classification import evaluate_layers
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, GENERATION_CRITERIA, check_threshold
from consistentee.models.card import model_card, write_model_card
from consistentee.training.methods import METHODS

RECORD: dict[str, Any] = {
    "kind": "early_exit",
    "task": "sst2",
    "backbone": "somebody/an-encoder",
    "data": {"train_rows": 9000, "validation_rows": 1000},
    "environment": {"consistentee": "0.1.0", "torch": "2.13.0", "device": "x86_64"},
    "thresholds": {"policy": 0.6, "patience": 2.5},
}


def evaluation() -> dict[str, Any]:
    labels = torch.tensor([0, 1, 1, 0])
    logits = torch.zeros(4, 3, 2)
    logits[torch.arange(4), :, labels] = 1.0
    probs = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.9, 0.0], [0.9, 0.0, 0.0]])
    return evaluate_layers(
        logits, probs, labels, metrics=("accuracy", "f1"), reference_predictions=labels
    ).summary()


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter() -> None:
    front = front_matter(model_card(RECORD))
    assert front["library_name"] == "consistentee"
    assert front["pipeline_tag"] == "text-classification"
    assert front["base_model"] == "somebody/an-encoder"
    assert "license" not in front


@pytest.mark.parametrize("backbone", ["/home/me/models/an-encoder", "../models/an-encoder", "~/an-encoder"])
def test_places_on_a_disk_are_not_published(backbone: str) -> None:
    card = model_card({**RECORD, "backbone": backbone})
    assert "base_model" not in front_matter(card)
    assert "`an-encoder`" in card
    assert backbone not in card


def test_figures_of_an_evaluation() -> None:
    card = model_card({**RECORD, "evaluation": evaluation()})
    assert "Measured on 4 rows that training has not seen." in card
    copies = model_card({**RECORD, "evaluation": {**evaluation(), "num_seen": 3}})
    assert "Measured on 4 rows, 3 of which are also in the training rows." in copies
    assert "| mean exit layer | 1.75 of 3 |" in card
    assert "| difference, paired | +0.0 points (standard error 0.0) |" in card
    assert "| 1 | 2 | 100.0 % | 100.0 % |" in card
    assert "policy 0.6, patience 2.5" in card
    assert "threshold=0.9" in card  # another than the saved one


@pytest.mark.parametrize(
    "kind", ["early_exit", "full_depth", "early_exit_generation", "full_depth_generation"]
)
def test_the_hub_reads_the_figures(kind: str) -> None:
    measured = {"metrics": {"rougeL": 0.31}, "num_examples": 20} if "generation" in kind else evaluation()
    card = ModelCard(model_card({**RECORD, "kind": kind, "evaluation": measured}))
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert card.data.model_name == "somebody/an-encoder, sst2"
    assert all(result.dataset_name == "sst2" for result in results.values())
    assert results.keys() == ({"rougeL"} if "generation" in kind else {"accuracy", "f1", "layer_speedup"})
    assert results["rougeL" if "generation" in kind else "accuracy"].metric_value == (
        0.31 if "generation" in kind else measured["accuracy"]
    )
    without = ModelCard(model_card({**RECORD, "kind": kind}))
    assert without.data.eval_results is None
    assert without.data.to_dict().keys() <= {"base_model", "library_name", "metrics", "pipeline_tag", "tags"}


def test_without_an_evaluation_validation_figures_are_called_so() -> None:
    validation = {"num_examples": 1000, "accuracy": 0.9, "full_depth_accuracy": 0.91, "layer_speedup": 2.0}
    card = model_card({**RECORD, "validation": validation})
    assert "Not evaluated on unseen rows yet" in card
    assert "On the 1,000 validation rows, which chose threshold and stopping:" in card
    assert "| layer speed-up | 2.00x |" in card


def test_thresholds_by_the_loss_that_is_allowed() -> None:
    points = [
        {"max_loss": 0.0, "threshold": 0.91, "accuracy": 0.91, "mean_exit_layer": 8.0, "layer_speedup": 1.5},
        {
            "max_loss": 0.005,
            "threshold": 0.72,
            "accuracy": 0.907,
            "mean_exit_layer": 5.0,
            "layer_speedup": 2.4,
        },
    ]
    validation: dict[str, Any] = {"num_examples": 1000, "accuracy": 0.91, "full_depth_accuracy": 0.91}
    validation["tolerances"] = {"policy": points[:1], "confidence": points}
    assert "| 0 | 0.91 | 0.00 | 1.50x |" in model_card({**RECORD, "validation": validation})
    validation["loss"] = {"criterion": "confidence"}
    card = model_card({**RECORD, "validation": validation, "evaluation": evaluation()})
    assert "| 0.5 | 0.72 | 0.30 | 2.40x |\n\n## Training" in card
    assert "loss allowed" not in model_card(RECORD)
    by_metric = {**RECORD, "validation": validation, "config": {"threshold_metric": "macro_f1"}}
    card = model_card(
        by_metric
    )  # what is lost there is told as accuracy, which may be more than is allowed of it
    assert "| loss of macro_f1 allowed, points | threshold | accuracy lost there | layer speed-up |" in card


@pytest.mark.parametrize("method", METHODS)
def test_who_trained_it_and_what_it_exits_by(method: str) -> None:
    exits, common = METHODS[method].exits, {"backbone": "somebody/a-model", "method": method}
    for criterion in CRITERIA:
        scale = EXIT_CRITERIA[criterion].thresholds
        values = scale.whole(4) if scale.layers else (0.3, 0.7, scale.low, scale.high)
        for threshold in values if method == "consistent" else values[:1]:
            rule = {"criterion": criterion, "threshold": threshold}
            card = model_card({**common, "kind": "early_exit" if exits else "full_depth"}, rule)
            assert ("ConsistentEE way" in card) == (method == "consistent")
            if not exits:
                assert "threshold" not in card
                continue
            assert (f"by method `{method}`" in card) == (method != "consistent")
            assert ("policy" in card) == (criterion == "policy")
            assert (f"the exit rule `{criterion}`" in card) == (criterion != "policy")
            (typed,) = set(re.findall(r"threshold[= ]([\d.e-]+)", card))
            assert check_threshold(float(typed), criterion) != threshold
    for criterion in GENERATION_CRITERIA if exits else ():
        rule = {"criterion": criterion, "threshold": 1.0}
        card = model_card({**common, "kind": "early_exit_generation"}, rule)
        assert ("ConsistentEE way" in card) == (method == "consistent")
        assert ("an exit and a policy after every layer" in card) == (criterion == "policy")
        assert (f"the exit rule `{criterion}`" in card) == (criterion != "policy")


def test_the_other_threshold_is_one_that_was_measured() -> None:
    points = [
        {"max_loss": loss, "threshold": threshold, "accuracy": 0.9, "layer_speedup": 1.5}
        for loss, threshold in ((0.0, 0.81), (0.01, 0.72), (0.02, 0.81))
    ]
    validation = {"full_depth_accuracy": 0.9, "tolerances": {"entropy": points}}
    record = {**RECORD, "method": "deebert", "validation": validation}
    card = model_card(record, {"criterion": "entropy", "threshold": 0.81})
    assert "threshold=0.72)" in card
    assert "| 0 | 0.81 | 0.00 | 1.50x |" in card


def test_thresholds_next_to_1_are_not_shown_as_1() -> None:
    points = [
        {
            "max_loss": 0.0,
            "threshold": 0.9999997,
            "accuracy": 0.9,
            "mean_exit_layer": 3.0,
            "layer_speedup": 1.2,
        },
        {
            "max_loss": 0.01,
            "threshold": 0.99998,
            "accuracy": 0.9,
            "mean_exit_layer": 2.0,
            "layer_speedup": 1.5,
        },
    ]
    by_rule = {"confidence": {"threshold": 0.9999997, "accuracy": 0.9, "mean_exit_layer": 3.0}}
    validation = {"full_depth_accuracy": 0.9, "criteria": by_rule, "tolerances": {"confidence": points}}
    record = {**RECORD, "thresholds": {"confidence": 0.9999997}, "validation": validation}
    card = model_card(record, {"criterion": "confidence", "threshold": 0.9999997})
    assert "| 0 | 0.9999997 | 0.00 | 1.20x |" in card
    assert "| confidence | 0.9999997 | 90.0 % | 3.00 |" in card
    assert "by exit rule: confidence 0.9999997." in card
    assert "threshold=0.99998)" in card


def test_what_validation_measured_has_its_name() -> None:
    criteria = {"policy": {"threshold": 0.5, "accuracy": 0.9, "mean_exit_layer": 2.0}}
    record = {"backbone": "user/sentiment", "validation": {"accuracy": 0.9, "criteria": criteria}}
    original = {"name": "user/sentiment", "revision": None, "license": None, "fingerprint": None}
    kinds = {
        "accuracy": {"kind": "early_exit"},
        "agreement with the original": {"kind": "early_exit", "method": "retrofit", "original": original},
        "token accuracy": {"kind": "early_exit_generation"},
    }
    for quality, kind in kinds.items():
        card = model_card({**record, **kind})
        assert f"| {quality} | 90.0 % |" in card
        assert f"| exit rule | threshold | {quality} | mean exit layer |" in card
        assert front_matter(card).get("metrics") == (["accuracy"] if quality == "accuracy" else None)
    measured = {**record, **kinds["agreement with the original"], "evaluation": {"accuracy": 0.8}}
    assert front_matter(model_card(measured))["metrics"] == ["accuracy"]  # there were labels
    assert "metrics" not in front_matter(model_card({"kind": "early_exit"}))


def test_plain_model() -> None:
    figures = {"num_examples": 872, "accuracy": 0.925, "metrics": {"matthews": 0.85}}
    card = model_card({"kind": "full_depth", "backbone": "an-encoder", "evaluation": figures})
    assert "# Plain classifier\n" in card
    assert "| accuracy | 92.5 % |" in card
    assert "| matthews | 0.850 |" in card
    assert "threshold" not in card


KINDS_OF_OURS = ["early_exit", "full_depth", "early_exit_generation"]


@pytest.mark.parametrize("kind", KINDS_OF_OURS)
def test_the_first_lines_say_what_to_install_and_to_import(kind: str) -> None:
    _, _, body = model_card({**RECORD, "kind": kind}).split("---\n", 2)
    first = body.split("\n\n")[1:3]
    assert "package `consistentee`" in first[0]
    assert "`pip install .`" in first[0]
    assert first[1] == "```python\nimport consistentee\n```"


def test_a_model_of_transformers_needs_nothing_else() -> None:
    card = model_card({"kind": "full_depth_generation", "backbone": "a-decoder"})
    assert "import consistentee" not in card


def test_the_import_is_what_makes_the_folder_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "consistentee"}', encoding="utf-8")
    script = (
        "import sys\n"
        "from transformers import AutoConfig\n"
        "try:\n"
        "    AutoConfig.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "import consistentee\n"
        "AutoConfig.from_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "does not recognize this architecture" in done.stdout


def test_empty_record(tmp_path: Path) -> None:
    path = write_model_card(tmp_path, {})
    assert path == tmp_path / "README.md"
    assert "Not evaluated" in path.read_text(encoding="utf-8")


def test_exits_on_a_model_that_stays_name_it() -> None:
    original = {"name": "user/sentiment", "revision": "abc123", "license": "apache-2.0", "fingerprint": None}
    record = {"kind": "early_exit", "backbone": "user/sentiment", "original": original}
    card = model_card(record)
    assert "license: apache-2.0" in card
    assert "base_model: user/sentiment" in card
    assert "`user/sentiment` at revision abc123 as it was, with a classifier after every layer" in card
    assert "holds the exits alone" not in card
    assert "holds the exits alone" in model_card({**record, "config": {"exits_only": True}})


def test_a_tuned_model_is_said_to_be_tuned_from_it() -> None:
    original = {"name": "user/sentiment", "revision": None, "license": None, "tuned": "lora"}
    evaluation = {
        "agreement_with": "user/sentiment",
        "per_layer_agreement": [0.5, 0.987],
        "mean_exit_layer": 1.5,
        "num_hidden_layers": 2,
        "layer_speedup": 1.33,
    }
    record = {
        "kind": "early_exit",
        "backbone": "user/sentiment",
        "original": original,
        "evaluation": evaluation,
    }
    certificate = {
        "goal": "max_disagreement",
        "target": 0.02,
        "num_rows": 500,
        "confidence": 0.95,
        "reference": "user/sentiment",
    }
    safe = {"criterion": "policy", "threshold": 0.5, "certificate": certificate}
    fast = {**safe, "certificate": {**certificate, "goal": "min_speedup", "target": 2.0, "bound": 0.019642}}
    card = model_card(record, {"operating_points": {"safe": safe, "fast": fast}})
    assert "at most 1.97 % of disagreement with `user/sentiment` (500 rows" in card  # not rounded down
    assert "Tuned from `user/sentiment` (LoRA adapters, merged) to give its answers early" in card
    assert "full depth is not the original" in card
    assert "as it was" not in card
    assert "own logits" not in card
    assert "| agreement of full depth | 98.7 % |" in card
    assert "at most 2 % of disagreement with `user/sentiment` (500 rows" in card
    all_weights = model_card({**record, "original": {**original, "tuned": "full"}})
    assert "Tuned from `user/sentiment` (all weights)" in all_weights
