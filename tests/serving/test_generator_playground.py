"""The generator's playground in a browser: what it streams is what the generator writes, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from accessibility import barriers
from browser import Browser
from consistentee.data.templates import PLAIN
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.generator import GeneratedText, TextGenerator
from consistentee.serving.completions import generator_app
from consistentee.serving.descriptions import describe_generator
from consistentee.serving.generation import GeneratorService
from playground_clicks import give_token, is_dark, start, tab_to, text_of, wait
from saved_generators import TEMPLATE, generator_folder, plain_folder
from served import running

PROMPT = "1, 2 and"
TOKEN = "a-token-of-some-length"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    folder = generator_folder(tmp_path_factory.mktemp("generator") / "exits", draft_threshold=0.835)
    return TextGenerator(load_model(folder, LoadedGenerator, device="cpu"), template=TEMPLATE)


@pytest.fixture(scope="module")
def url(generator: TextGenerator) -> Iterator[str]:
    with running(generator_app(GeneratorService(generator))) as address:
        yield address


def written(generator: TextGenerator, plain: bool = True, **values: Any) -> GeneratedText:
    template = PLAIN if plain else TEMPLATE
    (text,) = TextGenerator(generator.saved, template=template).generate_texts([(PROMPT, "")], **values)
    return text


def put(browser: Browser, name: str, value: str) -> None:
    one = f"document.getElementById({name!r})"
    browser.value(f"{one}.value = {value!r}; {one}.dispatchEvent(new Event('change'))")


def write(browser: Browser, form: str = "text", length: int = 24) -> None:
    put(browser, "text", PROMPT)
    put(browser, "form", form)
    put(browser, "length", str(length))
    browser.value("document.getElementById('run').click()")
    wait(browser, "!document.getElementById('run').disabled")


def shown(browser: Browser, column: str) -> tuple[str, list[int]]:
    """The text of a column, and the exit layers of its tokens."""
    text = browser.value(f"document.getElementById('{column}-text').textContent")
    tokens = f"[...document.querySelectorAll('#{column}-text .token')]"
    return text, browser.value(f"{tokens}.map((one) => Number(one.dataset.layer))")


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)])
def test_both_texts_are_the_generators(
    browser: Browser, generator: TextGenerator, url: str, width: int, dark: bool
) -> None:
    start(browser, f"{url}/", width=width, dark=dark)
    write(browser)
    wanted, full = (written(generator, max_new_tokens=24, mode=mode) for mode in (None, "full"))
    layers = generator.saved.num_hidden_layers
    assert shown(browser, "exits") == (wanted.text, wanted.exit_layers)
    assert shown(browser, "full") == (full.text, [layers] * len(full.token_ids))
    assert len(set(wanted.exit_layers)) > 1
    assert text_of(browser, "exits-layer") == f"{wanted.mean_exit_layer:.2f} of {layers}"
    assert text_of(browser, "exits-tokens") == str(len(wanted.token_ids))
    assert float(text_of(browser, "exits-pace")) > 0
    assert text_of(browser, "lead").startswith(f"{wanted.mean_exit_layer:.2f} of {layers} layers a token, ")
    assert ("writes the same text." in text_of(browser, "lead")) == (wanted.text == full.text)
    said = text_of(browser, "said")
    assert said.startswith(f"With exits: {len(wanted.token_ids)} tokens, mean exit layer ")
    assert "Full depth: " in said
    legend = browser.value("[...document.querySelectorAll('#legend li')].map((one) => one.textContent)")
    shares = {
        layer: 100 * wanted.exit_layers.count(layer) / len(wanted.exit_layers)
        for layer in range(1, layers + 1)
    }
    assert [" ".join(item.split()) for item in legend] == [
        f"{layer}: {shares[layer]:.1f} %" for layer in shares
    ]
    tokens = "[...document.querySelectorAll('#exits-text .token')]"
    colours = f"new Set({tokens}.map((one) => getComputedStyle(one).borderBottomColor)).size"
    assert browser.value(colours) == len(set(wanted.exit_layers))
    browser.value("document.getElementById('numbers').click()")
    number = browser.value(f"getComputedStyle({tokens}[0], '::after').content")
    assert number == f'"{wanted.exit_layers[0]}"'
    assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    assert is_dark(browser) == dark
    assert barriers(browser) == []
    assert set(browser.requests) == {f"{url}/", f"{url}/layers", f"{url}/v1/completions"}
    assert not browser.problems


def test_dial_instructions_and_lossless(browser: Browser, generator: TextGenerator, url: str) -> None:
    start(browser, f"{url}/")
    about = httpx.get(f"{url}/layers").json()
    for step in (0, len(about["thresholds"]) - 1):
        browser.value(f"document.getElementById('threshold').value = {step}")
        write(browser, "instruction", 12)
        wanted = written(generator, plain=False, max_new_tokens=12, threshold=about["thresholds"][step])
        assert shown(browser, "exits") == (wanted.text, wanted.exit_layers)
    dial = "Number(document.getElementById('threshold').value)"
    put(browser, "mode", "lossless")
    assert about["thresholds"][browser.value(dial)] == about["draft_threshold"] == 0.835
    put(browser, "mode", "early-exit")
    assert about["thresholds"][browser.value(dial)] == about["threshold"]
    put(browser, "mode", "lossless")
    write(browser, "text", 12)
    text, drafted = shown(browser, "exits")
    assert text == shown(browser, "full")[0] == written(generator, max_new_tokens=12, mode="full").text
    assert max(drafted) <= generator.saved.num_hidden_layers
    assert "Full depth writes the same text." in text_of(browser, "lead")
    assert not browser.problems


def test_drafts_begin_at_their_own_threshold(generator: TextGenerator, tmp_path: Path) -> None:
    about = describe_generator(generator, name="a model")
    assert (about["threshold"], about["draft_threshold"]) == (generator.saved.exit_rule()[1], 0.835)
    assert {about["threshold"], about["draft_threshold"]} < set(about["thresholds"])
    folder = generator_folder(tmp_path / "exits")
    without = TextGenerator(load_model(folder, LoadedGenerator, device="cpu"), template=TEMPLATE)
    about = describe_generator(without, name="a model")
    assert about["draft_threshold"] == about["threshold"]


def test_by_keyboard_and_stopped(browser: Browser, url: str) -> None:
    start(browser, f"{url}/")
    assert tab_to(browser, "text")[0] == "skip"
    browser.value(f"document.activeElement.value = {PROMPT!r}")
    assert tab_to(browser, "run") == ["form", "length", "mode", "threshold", "run"]
    put(browser, "length", "200")
    # As soon as there is a token: stop.
    browser.value(
        "new MutationObserver(() => document.getElementById('stop').click())"
        ".observe(document.getElementById('exits-text'), { childList: true })"
    )
    browser.value("document.getElementById('text').focus()")
    browser.press("Enter", 13, modifiers=2)
    wait(browser, "document.getElementById('said').textContent.includes('It was stopped.')")
    assert 1 <= int(text_of(browser, "exits-tokens")) < 200
    assert text_of(browser, "full-text") == ""
    assert browser.value("document.activeElement.id") == "text"
    fields = "[...document.querySelectorAll('input, textarea, select')]"
    assert browser.value(f"{fields}.every(one => one.labels.length === 1)")
    assert not browser.problems


def test_the_token_and_a_model_without_exits(browser: Browser, tmp_path: Path) -> None:
    plain = TextGenerator(load_model(plain_folder(tmp_path / "plain"), LoadedGenerator, device="cpu"))
    with running(generator_app(GeneratorService(plain), token=TOKEN.encode())) as address:
        assert httpx.get(f"{address}/layers").status_code == 401
        browser.open(f"{address}/", width=360)
        wait(browser, "!document.getElementById('token-form').hidden")
        assert browser.value("document.querySelector('nav').hidden")
        give_token(browser, TOKEN)
        wait(browser, "!document.getElementById('all').hidden")
        write(browser, length=9)
        wanted = written(plain, max_new_tokens=9)
        assert shown(browser, "full") == (wanted.text, wanted.exit_layers)
        assert browser.value(
            "[...document.querySelectorAll('.exits-only, #exits')].every((one) => one.hidden)"
        )
        put(browser, "length", "3000")
        browser.value("document.getElementById('length').removeAttribute('max')")
        write(browser, length=3000)
        assert "must fit into 256 tokens" in text_of(browser, "error")
        assert all(TOKEN not in request for request in browser.requests)
