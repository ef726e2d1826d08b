"""The folder of `export --format web`: behind a plain file server it says what the engine says; it asks nobody else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")

from accessibility import barriers
from browser import Browser
from consistentee.cli.main import main
from consistentee.errors import SettingError
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.export import FILES, WEB_FILES, WEIGHTS_FILE, export_onnx
from consistentee.serving import web_folder
from consistentee.serving.web_folder import PACKAGES, export_web
from npm_packages import JS, npm_folder
from playground_clicks import ask, ask_as_engine, choose, exits, start, text_of, wait
from served import serving_files
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model

TEXTS = [
    *(text for (text,) in tiny_dataset(12, seed=5).texts),
    "good [SEP] bad",
    "Ünïcode, FILM!",
    "very " * 90,
]
LONG = "a bad film " * 40
POINTS: dict[str, Any] = {
    "calm": {"criterion": "policy", "threshold": 0.55},
    "other": {"criterion": "confidence", "threshold": 0.6},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedClassifier]:
    root = tmp_path_factory.mktemp("web")
    backbone = tiny_backbone(root / "backbone", layers=4)
    found: dict[str, LoadedClassifier] = {}
    for kind in ("texts", "pairs"):
        torch.manual_seed(5)
        values = {
            "initial_exit_bias": 0.0,
            "threshold": 0.6,
            "operating_points": POINTS,
        }
        model = tiny_model(root / kind, backbone, text_pairs=kind == "pairs", **values)
        found[kind] = load_model(model, LoadedClassifier, device="cpu")
    plain = tiny_full_depth_model(root / "plain", backbone)
    found["plain"] = load_model(plain, LoadedClassifier, device="cpu")
    return found


@pytest.fixture(scope="module")
def root(saved: dict[str, LoadedClassifier], tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm_folder(*PACKAGES)
    place = tmp_path_factory.mktemp("folders")
    for kind, model in saved.items():
        export_web(model, place / kind, npm=JS)
    export_web(
        saved["texts"], place / "int8", npm=JS, precision="int8", criterion="confidence", threshold=0.6
    )
    return place


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with serving_files(root) as address:
        yield address


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)])
def test_it_says_what_the_engine_says(
    browser: Browser, saved: dict[str, LoadedClassifier], url: str, width: int, dark: bool
) -> None:
    engine = Engine(saved["texts"])
    start(browser, f"{url}/texts/", width=width, dark=dark)
    seen = set()
    for text in TEXTS if dark else TEXTS[:4]:
        said, exit_layer = ask_as_engine(browser, engine, text)
        assert ("The text was cut after 64 tokens." in said) == (len(text) > 300)
        assert browser.value("document.querySelectorAll('#layers tr').length") == 4
        seen.add(exit_layer)
    assert len(seen) > 1
    wait(browser, "document.getElementById('figure-exit').textContent !== '\u2026'")
    assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    assert barriers(browser) == []
    assert {request.split("/")[2] for request in browser.requests if not request.startswith("data:")} == {
        url[7:]
    }
    assert not browser.problems


def test_dial_and_points(browser: Browser, saved: dict[str, LoadedClassifier], url: str) -> None:
    engine = Engine(saved["texts"])
    start(browser, f"{url}/texts/")
    ask(browser, TEXTS[0])
    options = "[...document.querySelectorAll('#point option')].map((one) => one.value)"
    assert browser.value(options) == ["saved", "full-depth", "calm", ""]  # not the other criterion's
    choose(browser, "calm")
    assert exits(browser) == engine.predict([TEXTS[0]], operating_point="calm")[0].exit_layer
    choose(browser, "full-depth")
    assert exits(browser) == 4
    steps = browser.value("Number(document.getElementById('threshold').max)")
    for step in range(0, steps + 1, 9):
        browser.value(
            f"(() => {{ const one = document.getElementById('threshold'); one.value = {step}; "
            "one.dispatchEvent(new Event('input')); })()"
        )
        threshold = float(text_of(browser, "threshold-value"))
        assert exits(browser) == engine.predict([TEXTS[0]], threshold=threshold)[0].exit_layer
    assert not browser.problems


def test_pairs_plain_models_and_8_bits(
    browser: Browser, saved: dict[str, LoadedClassifier], url: str
) -> None:
    engine = Engine(saved["pairs"])
    start(browser, f"{url}/pairs/", width=360)
    for pair in ((TEXTS[0], TEXTS[1]), (LONG, TEXTS[1]), (TEXTS[0], LONG), (LONG, LONG)):
        browser.value(f"document.getElementById('pair').value = {pair[1]!r}")
        ask(browser, pair[0])
        (wanted,) = engine.predict([pair])
        assert text_of(browser, "lead").startswith(f"{wanted.label} ({100 * wanted.score:.1f} %)")
        assert exits(browser) == wanted.exit_layer
    start(browser, f"{url}/plain/")
    ask(browser, TEXTS[0])
    (wanted,) = Engine(saved["plain"]).predict([TEXTS[0]])
    assert text_of(browser, "lead").startswith(
        f"{wanted.label} ({100 * wanted.score:.1f} %), after all 4 layers"
    )
    start(browser, f"{url}/int8/")
    ask(browser, TEXTS[0])
    assert text_of(browser, "score-head") == "Exit score (confidence)"
    assert text_of(browser, "lead").split()[0] in saved["texts"].label_names
    assert not browser.problems


def test_what_is_in_it(root: Path) -> None:
    for kind in ("texts", "pairs", "plain", "int8"):
        assert {path.name for path in (root / kind).iterdir()} == {*FILES, *WEB_FILES} - {WEIGHTS_FILE}
    page = (root / "texts" / "index.html").read_text()
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert not re.search(
        r"https?://|\son\w+=|innerHTML|unsafe-inline|unsafe-eval", page.replace("wasm-unsafe-eval", "")
    )
    assert "Apache License" in (root / "texts" / "tokenizers.LICENSE.txt").read_text()
    assert "MIT License" in (root / "texts" / "onnxruntime-web.LICENSE.txt").read_text()
    about = json.loads((root / "texts" / "playground.json").read_text())
    assert (about["operating_point"], about["graph"]["bytes"]) == (
        "saved",
        (root / "texts" / "model.onnx").stat().st_size,
    )
    assert json.loads((root / "int8" / "playground.json").read_text())["operating_point"] == "other"
    assert "python -m http.server" in (root / "texts" / "README.md").read_text()


def test_versions_are_those_of_the_tests() -> None:
    tested = json.loads((JS / "package.json").read_text())["dependencies"]
    assert PACKAGES.items() <= tested.items()


def test_packages_that_are_not_there(
    saved: dict[str, LoadedClassifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = r"Run `npm install onnxruntime-web@\S+ @huggingface/tokenizers@\S+` in a folder and name it with --npm"
    with pytest.raises(
        SettingError, match=rf"--npm must be a folder with .* onnxruntime-web, got .*{remedy}"
    ):
        export_web(saved["texts"], tmp_path / "out", npm=tmp_path)
    for name in PACKAGES:
        (tmp_path / "node_modules" / name).mkdir(parents=True)
        (tmp_path / "node_modules" / name / "package.json").write_text('{"version": "0.0.1"}')
    with pytest.raises(SettingError, match=rf"--npm must have onnxruntime-web 1.30.0, got 0.0.1. {remedy}"):
        export_web(saved["texts"], tmp_path / "out", npm=tmp_path)
    monkeypatch.setattr(web_folder, "PACKAGES", dict.fromkeys(PACKAGES, "0.0.1"))
    with pytest.raises(SettingError, match=r"must have all of onnxruntime-web, and dist/.* is missing"):
        export_web(saved["texts"], tmp_path / "out", npm=tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SettingError, match=f"needs npm packages, and npm is not installed. {remedy}"):
        export_web(saved["texts"], tmp_path / "out")
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho no registry here >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    with pytest.raises(SettingError, match=rf"npm could not fetch .* \(no registry here\). {remedy}"):
        export_web(saved["texts"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    saved: dict[str, LoadedClassifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npm_folder(*PACKAGES)
    model, out = saved["texts"].name, tmp_path / "out"
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS[:8]))
    command = ["export", model, "--output", str(out), "--npm", str(JS / "node_modules")]
    assert main(command) == 2
    assert "--npm goes with --format web." in capsys.readouterr().err
    assert main([*command, "--format", "web", "--calibration-file", str(texts)]) == 0
    said = capsys.readouterr().out
    assert "on 8 texts: 0 labels and 0 exit layers differ." in said
    assert f"python -m http.server --bind 127.0.0.1 --directory {out}" in said
    export_onnx(saved["texts"], out)  # an export of either kind is replaced
    assert not (out / "index.html").exists()
