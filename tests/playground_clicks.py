"""What a reader does on a playground's page, and what it then shows."""

from __future__ import annotations

import re
import time
from typing import Any

from browser import Browser
from consistentee.pipelines.classifier import Engine


def wait(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 20
    while not browser.value(condition):
        assert time.monotonic() < end, (condition, browser.problems)
        time.sleep(0.02)


def start(browser: Browser, url: str, **how: Any) -> None:
    """Open a playground and wait for what its page reads first."""
    browser.open(url, **{"width": 1280, **how})
    wait(browser, "!document.getElementById('all').hidden")


def give_token(browser: Browser, token: str) -> None:
    """Put a bearer token in."""
    browser.value(
        f"document.getElementById('token').value = {token!r}; document.querySelector('#token-form button').click()"
    )


def tab_to(browser: Browser, name: str) -> list[str]:
    """Press Tab until an element is in focus; the names of those that were, each with a ring around it."""
    seen: list[str] = []
    while not seen or seen[-1] != name:
        browser.press("Tab", 9)
        seen.append(browser.value("document.activeElement.id || document.activeElement.className"))
        assert len(seen) < 20, seen
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none"
    return seen


def is_dark(browser: Browser) -> bool:
    """Whether the page's ground is."""
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    return max(map(int, re.findall(r"\d+", paper))) < 60


def text_of(browser: Browser, name: str) -> str:
    return " ".join(browser.value(f"document.getElementById('{name}').textContent").split())


def ask(browser: Browser, text: str, how: str = "document.getElementById('run').click()") -> None:
    """Put a text in and run it."""
    browser.value(
        f"document.getElementById('text').value = {text!r}; document.getElementById('lead').textContent = ''"
    )
    browser.value(how)
    wait(browser, "document.getElementById('lead').textContent !== ''")


def choose(browser: Browser, point: str) -> None:
    """Choose an operating point, as a click on it does."""
    one = "document.getElementById('point')"
    browser.value(f"{one}.value = {point!r}; {one}.dispatchEvent(new Event('change'))")


def exits(browser: Browser) -> int:
    return browser.value("Number.parseInt(document.querySelector('tr.exit th').textContent)")


def ask_as_engine(browser: Browser, engine: Engine, text: str) -> tuple[str, int]:
    """Run a text; the page says what the engine says. Gives its sentence and the exit layer."""
    ask(browser, text)
    (wanted,) = engine.predict([text])
    (full,) = engine.predict([text], threshold=1.0)
    said = text_of(browser, "lead")
    assert said.startswith(f"{wanted.label} ({100 * wanted.score:.1f} %)"), said
    assert exits(browser) == wanted.exit_layer
    if wanted.exit_layer < engine.backend.num_layers:
        says = "the same" if full.label == wanted.label else full.label
        assert f"Full depth says {says} ({100 * full.score:.1f} %)." in said
    return said, wanted.exit_layer
