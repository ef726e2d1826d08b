"""An exported folder: what is in it, what it never touches, and that it says elsewhere what the engine says."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmark_scripts import ROOT
from browser import Browser
from consistentee.cli.main import main
from consistentee.data.classification import load_task
from consistentee.errors import SettingError
from consistentee.inference.encoder import onnx_runner
from consistentee.inference.encoder.onnx_sessions import make_session
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.operating_points import save_operating_point
from consistentee.pipelines import export
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.export import export_onnx, tokenizer_json
from npm_packages import JS, node, npm_folder
from saved_generators import generator_folder
from served import serving_files
from tiny import save, tiny_backbone, tiny_classifier, tiny_dataset, tiny_full_depth_model, tiny_model

ALONE = Path(__file__).parents[1] / "exported_alone.py"
ROWS, REAL_ROWS, LONGEST = 64, 500, 512
AWKWARD = ["good [SEP] bad", "[CLS]", "a film [PAD] of [UNK]", "Ünïcode, FILM!", "x", "very " * 90 + "bad"]


def inputs_by_kind() -> dict[str, list[list[str]]]:
    """500 inputs of real tasks where they are at hand, of SST-2 and of MRPC; else made-up ones; and awkward texts."""
    glue = ROOT.parent / "shared" / "data" / "glue"
    if (glue / "SST-2" / "dev.tsv").is_file():
        rows = {task: load_task(task, glue) for task in ("sst2", "mrpc")}
        texts = [list(parts) for parts in rows["sst2"][1].texts[:REAL_ROWS]]
        pairs = [list(parts) for part in rows["mrpc"][::-1] if part is not None for parts in part.texts]
        return {"texts": [*texts, *([text] for text in AWKWARD)], "pairs": pairs[:REAL_ROWS]}
    some = [text for (text,) in tiny_dataset(ROWS, seed=5).texts]
    return {
        "texts": [[text] for text in [*some[: -len(AWKWARD)], *AWKWARD]],
        "pairs": [list(pair) for pair in zip(some, reversed(some), strict=True)],
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of texts and of pairs; beside each its export, with its inputs and the engine's answers."""
    place = tmp_path_factory.mktemp("exported")
    shape = {"intermediate_size": 256, "max_position_embeddings": LONGEST}
    backbone = tiny_backbone(place / "backbone", layers=4, **shape)
    found: dict[str, Path] = {}
    inputs = inputs_by_kind()
    for kind in inputs:
        torch.manual_seed(3)
        model = tiny_model(
            place / kind,
            backbone,
            text_pairs=kind == "pairs",
            threshold=0.5,
            initial_exit_bias=0.0,
            num_queries=2,
            classifier_hidden_size=16,
            max_length=LONGEST if kind == "pairs" else 64,  # the tokenizer of JavaScript does not cut pairs
        )
        saved = load_model(model, LoadedClassifier, device="cpu")
        found[kind] = place / f"{kind}-onnx"
        export_onnx(saved, found[kind])
        wanted = Engine(saved).predict([tuple(row) for row in inputs[kind]], batch_size=7)
        (found[kind] / "inputs.json").write_text(json.dumps(inputs[kind]))
        answers = [[answer.label, answer.exit_layer] for answer in wanted]
        (found[kind] / "answers.json").write_text(json.dumps(answers))
        assert len({layer for _, layer in answers}) > 1
    return found


def answers_of(folder: Path) -> Any:
    return json.loads((folder / "answers.json").read_text())


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_in_python_without_torch(folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    found = json.loads(run(sys.executable, ALONE, folder, folder / "inputs.json", 1, 7, 64))
    assert found == [answers_of(folder)] * 3


def test_in_node(folders: dict[str, Path]) -> None:
    found = json.loads(run(node(), JS / "node.mjs", 8, *folders.values()))
    assert found == [answers_of(folder) for folder in folders.values()]


def test_in_a_browser(folders: dict[str, Path], tmp_path: Path, browser: Browser) -> None:
    npm_folder("onnxruntime-web")
    (tmp_path / "js").symlink_to(JS)
    for kind, folder in folders.items():
        (tmp_path / kind).symlink_to(folder)
    with serving_files(tmp_path) as address:
        browser.open(f"{address}/js/page.html", width=800)
        for kind, folder in folders.items():
            assert browser.value(f"ask('/{kind}', 8)") == answers_of(folder)
        assert {request.split("/")[2] for request in browser.requests if "://" in request} == {address[7:]}


def test_what_is_in_it(folders: dict[str, Path]) -> None:
    folder = folders["texts"]
    assert {path.name for path in folder.iterdir()} - {"inputs.json", "answers.json"} == {
        "model.onnx",
        "tokenizer.json",
        "config.json",
        "README.md",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert (config["criterion"], config["threshold"], config["max_length"]) == ("policy", 0.5, 64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.num_special_tokens_to_add() == 2


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_the_examples_of_its_page_run(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    page = (folders[kind] / "README.md").read_text()
    python, javascript = re.findall(r"```(?:python|js)\n(.*?)```", page, re.S)
    (tmp_path / "example.py").write_text(python)
    shutil.copytree(folders[kind], tmp_path / "folder")
    found = run(sys.executable, tmp_path / "example.py", cwd=tmp_path / "folder")
    assert re.fullmatch(r"\[('(posi|nega)tive'(, )?){2}\] \[\d \d\]\n", found)
    assert max(len(python.splitlines()), len(javascript.splitlines())) < 20
    program = node()
    (tmp_path / "folder" / "node_modules").symlink_to(JS / "node_modules")
    (tmp_path / "folder" / "example.mjs").write_text(javascript)
    assert "BigInt64Array" in run(program, "example.mjs", cwd=tmp_path / "folder")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), text_pairs=False)
    point = {"criterion": "confidence", "threshold": 0.6, "certificate": {}}
    save_operating_point(model, "brisk", point)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for (text,) in tiny_dataset(20).texts))
    command = ["export", str(model), "--format", "onnx", "--output", str(tmp_path / "out")]
    assert main([*command, "--calibration-file", str(texts)]) == 0
    assert (
        "Against the model in float32 on 20 texts: 0 labels and 0 exit layers differ."
        in capsys.readouterr().out
    )
    options = ["--operating-point", "brisk", "--precision", "int8", "--portable", "--opset", "20"]
    assert main([*command, *options, "--calibration-file", str(texts), "--max-samples", "9"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"int8, opset 20, confidence > 0.6\).\n.* on 9 texts: \d labels and \d exit layers", out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["threshold"], config["operating_points"]) == (0.6, {"brisk": 0.6})
    assert (config["opset"], config["precision"], config["portable"]) == (20, "int8", True)
    assert "Rows must be at least 1" not in (tmp_path / "out" / "README.md").read_text()
    assert main([*command, "--precision", "int8"]) == 0
    assert "Rows must be at least 1: on a batch" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "model", "out", "texts.txt"]
    for wrong, message in (
        (["--opset", "16"], r"opset must be in \[17, 21\], got 16"),
        (["--operating-point", "other"], 'has no operating point "other"'),
        (["--max-samples", "3"], "--max-samples goes with --calibration-file"),
        (["--threshold", "3"], r"threshold must be in \[0, 1\]"),
    ):
        assert main([*command, *wrong]) in (1, 2)
        assert re.search(message, capsys.readouterr().err)


def test_texts_are_cut_on_the_side_that_the_tokenizer_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), max_length=8)
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**values, "truncation_side": "left"}))
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{' '.join(['film'] * 9)} {text}\n" for (text,) in tiny_dataset(20).texts))
    command = ["export", str(model), "--output", str(tmp_path / "out"), "--calibration-file", str(texts)]
    assert main(command) == 0
    assert "on 20 texts: 0 labels and 0 exit layers differ." in capsys.readouterr().out
    engine = Engine.from_pretrained(model)
    wanted = [row["input_ids"] for row in engine.tokenize(texts.read_text().splitlines())[0]]
    rows = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    rows.no_padding()
    assert [row.ids for row in rows.encode_batch(texts.read_text().splitlines())] == wanted
    assert "Inputs are cut to 8 tokens, on the left." in (tmp_path / "out" / "README.md").read_text()
    # The comparison is with what the folder's own tokenizer gives.
    right = tokenizer_json(engine.saved)
    right["truncation"]["direction"] = "Right"
    monkeypatch.setattr(export, "tokenizer_json", lambda saved: right)
    assert main(command) == 0
    assert "0 labels and 0 exit layers differ" not in capsys.readouterr().out


def test_token_types_that_the_tokenizer_does_not_give(tmp_path: Path) -> None:
    """The graph does not ask for them: tokenizer.json alone would count the second text of a pair as type 1."""
    backbone = tiny_backbone(tmp_path / "backbone", "roberta", type_vocab_size=2)
    torch.manual_seed(3)
    model = tiny_model(tmp_path / "model", backbone, text_pairs=True)
    saved = load_model(model, LoadedClassifier, device="cpu")
    assert "token_type_ids" not in saved.tokenizer.model_input_names
    texts = [text for (text,) in tiny_dataset(24).texts]
    pairs = [*zip(texts, reversed(texts), strict=True)]
    found = export_onnx(saved, tmp_path / "out", criterion="confidence", threshold=0.6, compare_texts=pairs)
    assert (found.labels_differ, found.exit_layers_differ) == (0, 0)
    session = make_session(str(tmp_path / "out" / "model.onnx"), torch.device("cpu"))
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert "`token_type_ids`" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for tokens in ("[USR]", "[URL]"), ("covid", "brexit"):
        tokenizer.add_tokens(list(tokens), special_tokens=tokens[0] == "[USR]")
    model: Any = load_model(folder, LoadedClassifier).model
    model.resize_token_embeddings(len(tokenizer))
    save(model, tokenizer, tmp_path / "added")
    saved = load_model(tmp_path / "added", LoadedClassifier)
    texts = [("the covid film was good",), ("brexit is bad",), ("the [USR] is [SEP] bad [URL]",)]
    found = export_onnx(saved, tmp_path / "out", compare_texts=texts)
    assert (found.labels_differ, found.exit_layers_differ) == (0, 0)
    rows, _ = Engine(saved).tokenize(texts)
    assert [
        row["input_ids"] for row in export._tokens_of_file(tmp_path / "out" / "tokenizer.json", texts)
    ] == [row["input_ids"] for row in rows]
    assert rows[0]["input_ids"][2] == len(tokenizer) - 2
    assert "[USR]" not in (tmp_path / "out" / "tokenizer.json").read_text()


def test_added_tokens_that_would_get_other_ids_are_refused(tmp_path: Path) -> None:
    saved = load_model(tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone")))
    values = json.loads(saved.tokenizer.backend_tokenizer.to_str())
    gap = {**values["added_tokens"][0], "id": len(saved.tokenizer) + 7, "content": "late", "special": False}
    with pytest.raises(
        SettingError, match=r'added token "late" must have the id \d+, and would be read as \d+'
    ):
        export._require_ids({**values, "added_tokens": [gap]}, "model")


def test_a_threshold_that_nobody_reaches_is_a_number_of_json(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
    save_operating_point(model, "never", {"criterion": "patience", "threshold": 9.0, "certificate": {}})
    saved = load_model(model, LoadedClassifier)
    export_onnx(saved, tmp_path / "out", criterion="patience", threshold=math.inf)
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (config["threshold"], config["operating_points"]) == (3.0, {"never": 3.0})  # of three layers


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = generator_folder(tmp_path / "generator")
    other = tiny_classifier(tmp_path / "other")
    backbone = tiny_backbone(tmp_path / "modernbert", "modernbert")
    modern = tiny_model(tmp_path / "modern", backbone)
    for model, message in (
        (generator, "is a text generator, whose tokens exit one by one"),
        (other, "was not saved by this library"),
        (modern, 'got a model of type "modernbert"'),
    ):
        assert main(["export", str(model), "--output", str(tmp_path / "out")]) in (1, 2)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "version, layers, opens", [("1.28.0", 3, False), ("1.28.0", 2, True), ("1.29.0", 3, True)]
)
def test_an_onnxruntime_that_would_open_it_for_hours(
    version: str, layers: int, opens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    monkeypatch.setattr(onnx_runner, "MOST_LAYERS_BEFORE", 2)
    saved = load_model(tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone", layers=layers)))
    texts = [("one text",), ("and another",)]
    if opens:
        assert export_onnx(saved, tmp_path / "out", compare_texts=texts).compared == len(texts)
        return
    with pytest.raises(
        SettingError,
        match=r"^compare_texts needs onnxruntime 1.29 or newer for a model of 3 layers, got 1.28.0, ",
    ):
        export_onnx(saved, tmp_path / "out", compare_texts=texts)
    assert not (tmp_path / "out").exists()
    assert export_onnx(saved, tmp_path / "out").compared == 0


def test_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
    saved = load_model(model, LoadedClassifier, device="cpu")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(SettingError, match=r"is not empty \(README.md|is not empty \(config.json"):
        export_onnx(saved, model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    with pytest.raises(SettingError, match="is a file"):
        export_onnx(saved, model / "config.json")
    (tmp_path / "out").mkdir()
    export_onnx(saved, tmp_path / "out")
    first = (tmp_path / "out" / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "_readme", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(saved, tmp_path / "out", criterion="confidence", threshold=0.9)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "model", "out"]
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SettingError, match="and no export"):
        export_onnx(saved, tmp_path / "out")


def test_a_folder_that_has_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_model(tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone")), LoadedClassifier)
    volume, link = tmp_path / "volume", tmp_path / "link"
    volume.mkdir()
    link.symlink_to(volume)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == volume)
    export_onnx(saved, link)
    first = (volume / "model.onnx").read_bytes()
    monkeypatch.chdir(volume)
    export_onnx(saved, ".", criterion="confidence", threshold=0.9)
    assert (volume / "model.onnx").read_bytes() != first
    assert sorted(os.listdir(volume)) == ["README.md", "config.json", "model.onnx", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path)) == ["backbone", "link", "model", "volume"]
    assert link.is_symlink()


def test_plain_models_and_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    texts = tiny_dataset(20).texts
    plain = load_model(tiny_full_depth_model(tmp_path / "plain", backbone), LoadedClassifier, device="cpu")
    found = export_onnx(plain, tmp_path / "plain-onnx", compare_texts=texts)
    assert (found.labels_differ, found.exit_layers_differ, found.criterion) == (0, 0, None)
    with pytest.raises(SettingError, match="has no exits: criterion, threshold"):
        export_onnx(plain, tmp_path / "plain-onnx", threshold=0.5)
    saved = load_model(tiny_model(tmp_path / "model", backbone), LoadedClassifier, device="cpu")
    monkeypatch.setattr(export, "MOST_BYTES", 1)
    found = export_onnx(saved, tmp_path / "large", compare_texts=texts)
    assert (found.compared, found.labels_differ, found.exit_layers_differ) == (20, 0, 0)
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size > 2 * (
        tmp_path / "large" / "model.onnx"
    ).stat().st_size


def test_heads_that_models_came_with(tmp_path: Path) -> None:
    from consistentee.models.sequence_classification import EarlyExitForSequenceClassification

    texts = tiny_dataset(24).texts
    for model_type in ("bert", "roberta", "electra", "distilbert", "albert", "mpnet"):
        original = tiny_classifier(tmp_path / model_type, model_type)
        model: Any = EarlyExitForSequenceClassification.from_classifier(original, max_length=64)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(original)
        saved = LoadedClassifier(model.eval(), tokenizer, {}, model_type)
        for threshold in (0.5, 0.7):
            found = export_onnx(
                saved, tmp_path / "out", criterion="confidence", threshold=threshold, compare_texts=texts
            )
            assert (found.labels_differ, found.exit_layers_differ) == (0, 0)
