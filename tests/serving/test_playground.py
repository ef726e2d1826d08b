"""The playground in a browser: it shows what the engine says; by mouse, by keyboard, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accessibility import barriers
from browser import Browser
from consistentee.pipelines.classifier import Engine
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from playground_clicks import (
    ask,
    ask_as_engine,
    choose,
    exits,
    give_token,
    is_dark,
    start,
    tab_to,
    text_of,
    wait,
)
from served import running
from tiny import tiny_backbone, tiny_dataset, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
TOKEN = "a-token-of-some-length"
POINTS: dict[str, Any] = {
    "calm": {"criterion": "patience", "threshold": 1.5},
    "never": {"criterion": "policy", "threshold": 0.99},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("playground")
    torch.manual_seed(5)
    backbone = tiny_backbone(root / "backbone", layers=4)
    names = (HOSTILE, "positive")
    values = {
        "initial_exit_bias": 0.0,
        "threshold": 0.6,
        "operating_points": POINTS,
        "label_names": names,
        "text_pairs": False,
    }
    return Engine.from_pretrained(tiny_model(root / "model", backbone, **values), device="cpu")


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(classifier_app(ClassifierService(engine))) as address:
        yield address


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)])
def test_a_text_climbs_the_layers(browser: Browser, engine: Engine, url: str, width: int, dark: bool) -> None:
    start(browser, f"{url}/", width=width, dark=dark)
    seen = set()
    for text in TEXTS[:4]:
        _, exit_layer = ask_as_engine(browser, engine, text)
        assert browser.value("document.querySelectorAll('#layers tr').length") == 4
        assert browser.value("document.querySelectorAll('tr.beyond').length") == 4 - exit_layer
        seen.add(exit_layer)
    assert len(seen) > 1
    assert browser.value("document.title") == "Playground: consistentee serve"
    assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    assert is_dark(browser) == dark
    assert set(browser.requests) == {f"{url}/", f"{url}/layers"}
    assert barriers(browser) == []
    assert not browser.problems


def test_by_keyboard_alone(browser: Browser, engine: Engine, url: str) -> None:
    start(browser, f"{url}/", width=1280)
    seen = tab_to(browser, "text")
    assert seen[0] == "skip"
    text = next(text for text in TEXTS if engine.predict([text])[0].exit_layer in (2, 3))
    browser.value(f"document.activeElement.value = {text!r}")
    browser.press("Enter", 13, modifiers=2)
    wait(browser, "document.getElementById('lead').textContent !== ''")
    order = []
    for _ in range(4):
        browser.press("Tab", 9)
        order.append(browser.value("document.activeElement.id || document.activeElement.className"))
    assert order == ["run", "point", "threshold", "scroll"]
    browser.press("Tab", 9, modifiers=8)
    depths = {}
    for key, code in (("Home", 36), ("ArrowRight", 39), ("End", 35)):
        browser.press(key, code)
        threshold = float(text_of(browser, "threshold-value"))
        depths[key] = exits(browser)
        assert depths[key] == engine.predict([text], threshold=threshold)[0].exit_layer
        spoken = browser.value("document.activeElement.getAttribute('aria-valuetext')")
        assert spoken.startswith(f"{threshold:g}: ")
    assert (depths["Home"], depths["End"]) == (1, 4)
    wait(browser, "document.getElementById('said').textContent.includes('after all 4 layers')")
    assert not browser.problems


def test_points_by_name(browser: Browser, engine: Engine, url: str) -> None:
    start(browser, f"{url}/", width=360)
    text = next(text for text in TEXTS if engine.predict([text])[0].exit_layer == 2)
    ask(browser, text)
    choose(browser, "never")
    assert exits(browser) == 4
    choose(browser, "calm")
    wait(browser, "document.getElementById('score-head').textContent === 'Exit score (patience)'")
    assert exits(browser) == engine.predict([text], operating_point="calm")[0].exit_layer
    assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    choose(browser, "full-depth")
    wait(browser, "document.getElementById('score-head').textContent === 'Exit probability'")
    assert exits(browser) == 4
    fields = "[...document.querySelectorAll('input, textarea, select')]"
    assert browser.value(f"{fields}.every(one => one.labels.length === 1)")
    assert not browser.problems


def test_the_token_stays_in_the_page(browser: Browser, engine: Engine) -> None:
    with running(classifier_app(ClassifierService(engine), token=TOKEN.encode())) as address:
        browser.open(f"{address}/", width=360)
        wait(browser, "!document.getElementById('token-form').hidden")
        assert browser.value("document.getElementById('all').hidden")
        give_token(browser, "wrong")
        wait(browser, "document.getElementById('error').textContent.includes('does not take')")
        give_token(browser, TOKEN)
        wait(browser, "!document.getElementById('all').hidden")
        ask(browser, TEXTS[0])
        assert exits(browser) == engine.predict([TEXTS[0]])[0].exit_layer
        kept = "JSON.stringify([location.href, localStorage, sessionStorage, document.cookie])"
        assert browser.value("document.getElementById('token').value") == ""
        assert TOKEN not in browser.value(kept)
        assert all(TOKEN not in request for request in browser.requests)
        assert all(
            "401" in problem for problem in browser.problems
        )  # the browser's own line about each of them
