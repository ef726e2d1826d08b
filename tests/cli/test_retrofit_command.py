"""`consistentee retrofit`: from a folder and a file of texts to a folder with exits, its figures, and what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from consistentee.cli.main import main
from consistentee.cli.retrofit import read_texts_of, retrofit_lines
from consistentee.data.classification import NotedLabels
from consistentee.functional.criteria import CRITERIA
from consistentee.models.loaded import load_model
from consistentee.training.train import finetune
from quick import quick_config
from tiny import tiny_backbone, tiny_classifier, tiny_dataset, write_csv

QUICK = (
    "--passes 2 --exit-min-steps 1 --policy-epochs 2 --policy-min-steps 1 --policy-folds 2 --classifier-hidden-size 8 "
    "--num-queries 2 --head-learning-rate 0.005 --mixed-precision no"
)
KEYS = {
    "num_hidden_layers",
    "num_train_texts",
    "num_policy_texts",
    "num_examples",
    "curve",
    "other_criteria",
    "threshold",
    "agreement",
    "layer_speedup",
    "seconds",
    "certificate",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("original"), "distilbert", layers=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(f"{text}\n" for (text,) in tiny_dataset(500, seed=5).texts))
    return path


def test_a_folder_with_exits_and_its_figures(
    original: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_csv(tmp_path / "more.csv", tiny_dataset(60, seed=6))
    folder, figures = tmp_path / "exits", tmp_path / "figures.json"
    command = ["retrofit", str(original), "--texts", str(texts), str(more), "--output-dir", str(folder)]
    assert main([*command, *QUICK.split(), "--max-disagreement", "0.2", "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found.keys() >= KEYS
    assert found["num_hidden_layers"] == 3
    total = sum(
        found[f"num_{part}"] for part in ("train_texts", "policy_texts", "calibration_texts", "examples")
    )
    assert f"{total:,} different texts" in out
    assert found["num_examples"] == total // 10
    assert sum(found["exit_histogram"]) == found["num_examples"]
    assert found["certificate"]["losses"] <= found["certificate"]["losses_allowed"]
    assert found["certificate"]["threshold"] == found["threshold"]
    at = min(found["curve"], key=lambda point: abs(point["threshold"] - found["threshold"]))
    assert abs(at["agreement"] - found["agreement"]) < 0.1
    assert found["curve"][-1]["agreement"] == 1.0
    assert {"policy", *found["other_criteria"]} == set(CRITERIA)
    assert "Agrees with your model on" in out
    assert "certified: at least 80 %, confidence 95 %" in out
    assert {row["name"] for row in found["speed"]} >= {"engine", "engine-full-depth", "transformers"}
    model = load_model(folder).early_exit_model
    assert model.config.threshold == found["threshold"]
    assert model.config.operating_points["certified"]["threshold"] == found["threshold"]
    low, high = found["agreement_interval"]
    assert low <= found["agreement"] <= high
    record = json.loads((folder / "training_record.json").read_text())
    assert record["evaluation"]["agreement"] == found["agreement"]
    assert main(["predict", str(folder), str(texts), "--output", str(tmp_path / "answers.jsonl")]) == 0
    # The same command again finds it finished, and reports the same.
    assert main([*command, *QUICK.split(), "--max-disagreement", "0.2", "--resume"]) == 0
    assert "holds a finished model: nothing to resume" in capsys.readouterr().out


def test_what_to_type_next_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consistentee.evaluation.calibration.calibration_lines", lambda _: ["found"])
    found = {"agreement": 0.9, "num_examples": 10, "layer_speedup": 2.0, "agreement_with": None}
    report = SimpleNamespace(
        evaluation=SimpleNamespace(**found),
        calibration=SimpleNamespace(certified=True),
        max_disagreement=0.1,
        confidence=0.95,
        speed=(),
        accuracy=None,
        is_worth_it=True,
    )
    *_, predict, benchmark, serve = retrofit_lines(report, Path("my exits"))
    assert predict == "  echo \"A text.\" | consistentee predict 'my exits'"
    assert benchmark == "  consistentee benchmark 'my exits' --data-file YOUR_TEXTS"
    assert serve == "  consistentee serve 'my exits'"


def test_exits_that_save_little_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the agreement that was found: the one asked for may be far from it where nothing was certified."""
    monkeypatch.setattr("consistentee.evaluation.calibration.calibration_lines", lambda _: ["found"])
    found = {"agreement": 0.9975, "num_examples": 400, "layer_speedup": 1.04, "layers_saved": 0.04}
    report = SimpleNamespace(
        evaluation=SimpleNamespace(**found, agreement_with=None),
        calibration=SimpleNamespace(certified=False, num_rows=40, rows_needed=300),
        max_disagreement=0.01,
        confidence=0.95,
        speed=(),
        accuracy=None,
        is_worth_it=False,
    )
    (line,) = [line for line in retrofit_lines(report, Path("exits")) if "hardly worth it" in line]
    assert line.startswith(
        "Exits are hardly worth it here: at 99.75 % agreement they save 4 % of the layers."
    )


def test_labels_are_reported_on_and_not_learnt_from(original: Path, tmp_path: Path) -> None:
    rows = tiny_dataset(400, seed=8)
    file = write_csv(tmp_path / "rows.csv", rows)
    found: list[dict[str, Any]] = []
    for name, labels in (("with", ["--label-column", "label"]), ("without", [])):
        command = ["retrofit", str(original), "--texts", str(file), "--text-columns", "text", *labels]
        figures = tmp_path / f"{name}.json"
        command += ["--output-dir", str(tmp_path / name), "--json", str(figures), *QUICK.split()]
        assert main(command) == 0
        found.append(json.loads(figures.read_text()))
    with_labels, without = found
    assert with_labels["num_labelled"] == with_labels["num_examples"]
    assert 0.3 < with_labels["full_depth_accuracy"] < 0.8  # a random model
    assert without["accuracy"] is None
    assert with_labels["curve"] == without["curve"]


def test_texts_of_standard_input(
    original: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_csv(tmp_path / "more.csv", tiny_dataset(60, seed=6))
    found: list[dict[str, Any]] = []
    for given in ("-", str(texts)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(texts.read_bytes())))
        folder, figures = tmp_path / f"exits-{len(found)}", tmp_path / "figures.json"
        command = ["retrofit", str(original), "--texts", str(more), given, "--output-dir", str(folder)]
        assert main([*command, *QUICK.split(), "--json", str(figures)]) == 0
        found.append(json.loads(figures.read_text()))
    assert found[0]["curve"] == found[1]["curve"]


def test_plain_text_beside_named_columns(original: Path, tmp_path: Path) -> None:
    rows, lines = tmp_path / "rows.csv", tmp_path / "lines.txt"
    rows.write_text("review,label\none,0\n")
    lines.write_text("two, three\n")
    noted = NotedLabels(["review"], "label")
    found = list(read_texts_of(str(original), [str(rows), str(lines)], ["review"], noted))
    assert found == [("one",), ("two, three",)]
    assert noted.classes_of(found, ["0", "1"]) == {("one",): 0}


def test_labels_where_there_are_some(
    original: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, file = tiny_dataset(200, seed=8), tmp_path / "rows.jsonl"
    values = [
        {"text": text, "label": rows.label_names[label]}
        for (text,), label in zip(rows.texts, rows.labels, strict=True)
    ]
    values[1]["label"], values[2]["label"] = "", None
    del values[3]["label"]
    file.write_text("".join(json.dumps(row) + "\n" for row in values))
    figures = tmp_path / "figures.json"
    command = ["retrofit", str(original), "--texts", str(file), str(texts), "--text-columns", "text"]
    command += ["--output-dir", str(tmp_path / "exits"), "--json", str(figures), *QUICK.split()]
    assert main([*command, "--label-column", "label"]) == 0
    found = json.loads(figures.read_text())
    assert 0 < found["num_labelled"] < found["num_examples"]

    command[command.index(str(tmp_path / "exits"))] = str(tmp_path / "no")
    assert main([*command, "--label-column", "labl"]) == 1
    assert 'rows.jsonl, line 1: There is no column "labl". Columns here: "text", "label".' in (
        capsys.readouterr().err
    )
    values[-1]["label"] = "neither"
    file.write_text("".join(json.dumps(row) + "\n" for row in values))
    assert main([*command, "--label-column", "label"]) == 1
    assert 'line 200: Label "neither" is not known; known labels:' in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_too_few_texts_certify_nothing_and_it_is_said(
    original: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    command = ["retrofit", str(original), "--texts", str(texts), "--output-dir", str(tmp_path / "exits")]
    assert main([*command, *QUICK.split(), "--max-texts", "120", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["certificate"] is None
    out = capsys.readouterr().out
    assert "12 rows can certify no 1 point at 95 %: 299 can." in out
    assert "not certified" in out


def test_another_report_forgets_the_one_before(
    original: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exits"
    command = ["retrofit", str(original), "--texts", str(texts), "--output-dir", str(folder), *QUICK.split()]
    command += ["--max-disagreement", "0.3", "--confidence"]
    assert main([*command, "0.9"]) == 0
    certified = json.loads((folder / "config.json").read_text())
    assert certified["operating_points"]["certified"]["threshold"] == certified["threshold"]
    of_the_policy = json.loads((folder / "training_record.json").read_text())["thresholds"]["policy"]
    assert certified["threshold"] != of_the_policy
    capsys.readouterr()
    assert main([*command, "0.99999999999", "--resume"]) == 0
    assert "The threshold is the one that the policy's own texts suggest." in capsys.readouterr().out
    after = json.loads((folder / "config.json").read_text())
    assert after["threshold"] == of_the_policy
    assert not after["operating_points"]
    another = {"criterion": "policy", "threshold": 0.5, "certificate": {"rows_fingerprint": "others"}}
    (folder / "config.json").write_text(json.dumps({**after, "operating_points": {"certified": another}}))
    assert main([*command, "0.99999999999", "--resume"]) == 0  # one that `calibrate` made of other rows
    assert load_model(folder).early_exit_model.config.operating_points == {"certified": another}
    assert main([*command, "0.9", "--resume"]) == 0
    assert json.loads((folder / "config.json").read_text()) == certified | {
        "operating_points": json.loads((folder / "config.json").read_text())["operating_points"]
    }


def test_a_tuned_backbone_is_held_to_the_original(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = finetune(
        backbone=tiny_backbone(tmp_path / "backbone"),
        train_data=tiny_dataset(200),
        output_dir=tmp_path / "plain",
        config=quick_config(warmup_epochs=6.0, learning_rate=3e-3, rounds=0),
    )
    folder, figures = tmp_path / "tuned", tmp_path / "figures.json"
    command = ["retrofit", str(original), "--texts", str(texts), "--output-dir", str(folder)]
    options = f"{QUICK} --tune-backbone full --learning-rate 0.003 --max-disagreement 0.5 --json {figures}"
    command += options.replace("--passes 2 --exit-min-steps 1", "--passes 1").split()
    assert main(command) == 0
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found["agreement_with"] == str(original)
    assert found["full_depth_agreement"] == found["per_layer_agreement"][-1] < 1
    assert (
        f"At full depth the tuned model agrees with it on {100 * found['full_depth_agreement']:.2f} %." in out
    )
    assert f'points of disagreement with model "{original}", confidence 95 %' in out
    assert found["certificate"]["reference"] == str(original)
    assert f"of disagreement with `{original.name}`" in (folder / "README.md").read_text()

    def evaluated(*options: str) -> dict[str, Any]:
        file = tmp_path / "evaluation.json"
        call = ["evaluate", str(folder), "--texts", str(texts), "--threshold", "0.9", "--json", str(file)]
        assert main([*call, *options]) == 0
        return json.loads(file.read_text())

    rows = [text for (text,) in tiny_dataset(500, seed=5).texts]
    model, kept = load_model(folder), load_model(original)
    batch = kept.tokenizer(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModelForSequenceClassification.from_pretrained(original)(**batch).logits.argmax(-1)
        at_exit = model.model(**batch, threshold=0.9).logits.argmax(-1)
        full = model.model(**batch, threshold=1.0).logits.argmax(-1)
    with_itself = evaluated()
    out = capsys.readouterr().out
    assert (
        f"Its backbone was tuned, so that is not the model that it was made of: for that give --reference {original}"
        in (" ".join(out.split()))
    )
    assert with_itself["agreement"] == pytest.approx(float((at_exit == full).double().mean()))
    with_original = evaluated("--reference", str(original))
    out = capsys.readouterr().out
    assert f'get the class of model "{original}".' in " ".join(out.split())
    assert "Its backbone was tuned" not in out
    assert with_original["agreement_with"] == str(original)
    assert with_original["agreement"] == pytest.approx(float((at_exit == wanted).double().mean()))
    assert with_original["per_layer_agreement"][-1] == pytest.approx(float((full == wanted).double().mean()))
    assert with_original["agreement"] != with_itself["agreement"]

    more = tmp_path / "more.txt"
    more.write_text("".join(f"{text}\n" for (text,) in tiny_dataset(400, seed=77).texts))
    calibrate = ["calibrate", str(folder), "--file", str(more), "--overwrite"]
    assert main([*calibrate, "--max-disagreement", "0.6", "--reference", str(original)]) == 0
    assert f'of disagreement with model "{original}"' in " ".join(capsys.readouterr().out.split())
    assert main([*calibrate, "--max-disagreement", "0.02", "--reference", str(original)]) == 1
    assert "Full depth itself gives another class than model" in capsys.readouterr().err
    assert main([*calibrate, "--max-disagreement", "0.6"]) == 0
    assert "Agreement is with this folder's own full depth" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-disagreement", "0"], "--max-disagreement must be above 0, got 0"),
        (["--max-disagreement", "1.5"], "--max-disagreement must be in [0, 1), got 1.5"),
        (["--confidence", "1"], "--confidence must be in [0, 1), got 1"),
        (["--tune-backbone", "lora", "--exits-only"], "exits_only must be false for tune_backbone lora"),
        (["--learning-rate", "1e-4"], "--learning-rate goes with --tune-backbone lora or full"),
        (["--tune-backbone", "full", "--lora-rank", "4"], "--lora-rank goes with --tune-backbone lora"),
        (
            ["--tune-backbone", "full", "--exit-min-steps", "9"],
            "--exit-min-steps goes with --tune-backbone none",
        ),
        (["--tune-backbone", "full", "--max-disk-mb", "9"], "--max-disk-mb goes with --tune-backbone none"),
        (["--num-rollouts", "4"], "--num-rollouts goes with --estimator sampled"),
        (["--reward", "uniform", "--hardness", "el2n"], "--hardness goes with --reward hardness"),
        (
            ["--policy-input", "log_odds", "--policy-dropout", "0.1"],
            "--policy-dropout goes with a --policy-input",
        ),
        (["--passes", "0"], "passes must be above 0, got 0"),
        (["--max-texts", "0"], "--max-texts must be at least 1, got 0"),
        (["--label-column", "label"], "--label-column goes with --text-columns."),
        (["--text-columns", "a", "b", "c"], "--text-columns takes one column or two, got 3"),
    ],
)
def test_options_that_make_no_sense(
    original: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    command = ["retrofit", str(original), "--texts", str(texts), "--output-dir", str(tmp_path / "exits")]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "exits").exists()


def test_models_and_texts_that_cannot_be_used(
    original: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(model: Path, file: Path) -> str:
        command = ["retrofit", str(model), "--texts", str(file), "--output-dir", str(tmp_path / "exits")]
        assert main(command) == 1
        assert not (tmp_path / "exits").exists()
        return capsys.readouterr().err

    assert "There is no such file" in error(original, tmp_path / "nothing.txt")
    assert "is a multi-label classifier" in error(
        tiny_classifier(tmp_path / "several", problem_type="multi_label_classification"), texts
    )
    assert "not of an encoder alone" in error(tiny_backbone(tmp_path / "encoder"), texts)
