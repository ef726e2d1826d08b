"""Texts that others join: each is what the generator writes behind its prompt alone, with layers and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.continuous import ContinuousTexts, JoiningPrompt, can_join
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from saved_generators import generator_folder, plain_folder
from tiny_decoders import prompt

NEW = 24
PROMPTS = [prompt(length, seed) for seed, length in enumerate((6, 3, 9, 1, 5, 4))]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["exits", "plain"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    make = generator_folder if request.param == "exits" else plain_folder
    folder = make(tmp_path_factory.mktemp("continuous") / request.param)
    return TextGenerator(load_model(folder, LoadedGenerator, device="cpu"))


@dataclass
class Heard:
    """What is told of a text."""

    pieces: list[str] = field(default_factory=list[str])
    layers: list[int] = field(default_factory=list[int])
    reasons: list[str] = field(default_factory=list[str])
    errors: list[Exception] = field(default_factory=list[Exception])
    is_gone: bool = False

    def prompt(self, token_ids: Sequence[int], limit: int = NEW) -> JoiningPrompt:
        return JoiningPrompt(
            token_ids, limit, self.on_token, self.reasons.append, self.errors.append, lambda: self.is_gone
        )

    def on_token(self, piece: str, layer: int) -> None:
        assert not self.reasons
        self.pieces.append(piece)
        self.layers.append(layer)


def write_joining(texts: ContinuousTexts, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Heard]:
    """Prompts join one every other step."""
    heard = [Heard() for _ in prompts]
    for one, token_ids in zip(heard, prompts, strict=True):
        texts.join([one.prompt(token_ids)])
        texts.step()
        texts.step()
    while len(texts):
        texts.step()
    return heard


def assert_as_alone(generator: TextGenerator, **values: Any) -> list[str]:
    """Compare with each alone; returns the reasons for the ends."""
    options = DecodingOptions(**values)
    heard = write_joining(generator.continuous_texts(options))
    for one, token_ids in zip(heard, PROMPTS, strict=True):
        (wanted,) = generator.generate_encoded(
            [token_ids], options=DecodingOptions(**values, max_new_tokens=NEW)
        )
        assert "".join(one.pieces) == wanted.text
        assert one.layers == wanted.exit_layers
        assert one.reasons == [wanted.finish_reason]
        assert one.errors == []
    return [one.reasons[0] for one in heard]


def test_texts_are_the_generators(generator: TextGenerator) -> None:
    assert_as_alone(generator)


def test_stop_strings_and_tokens(generator: TextGenerator) -> None:
    (text,) = generator.generate_encoded(PROMPTS[:1], options=DecodingOptions(max_new_tokens=NEW))
    stops = [text.text[5:7], text.text[9:10], "\ufffd", "</s>"]
    assert len(stops[0].strip()) == 2
    for stop in stops:
        reasons = assert_as_alone(generator, stop=stop)
        assert stop in ("</s>", "\ufffd") or "stop" in reasons


def test_draws_with_a_seed_are_those_of_the_text_alone(generator: TextGenerator) -> None:
    for shape in ({}, {"temperature": 1.7}, {"temperature": 0.8, "top_p": 0.7, "top_k": 9}):
        values: dict[str, Any] = {"do_sample": True, "seed": 3, **shape}
        (heard,) = write_joining(generator.continuous_texts(DecodingOptions(**values)), PROMPTS[:1])
        (wanted,) = generator.generate_encoded(
            PROMPTS[:1], options=DecodingOptions(**values, max_new_tokens=NEW)
        )
        assert "".join(heard.pieces) == wanted.text
        assert heard.layers == wanted.exit_layers
    alone, beside = (Heard() for _ in range(2))
    options = DecodingOptions(do_sample=True, seed=3)
    batches = [generator.continuous_texts(options) for _ in range(2)]
    for batch, one in zip(batches, (alone, beside), strict=True):  # draws of a batch are its own
        batch.join([one.prompt(PROMPTS[0])])
    while len(batches[0]):
        for batch in batches:
            batch.step()
    assert alone.pieces == beside.pieces
    together = generator.continuous_texts(DecodingOptions(do_sample=True, temperature=3.0))
    texts = {"".join(one.pieces) for one in write_joining(together, [PROMPTS[0]] * 4)}
    assert len(texts) == 4  # rows draw for themselves


def test_whoever_is_gone_makes_room_and_the_others_go_on(generator: TextGenerator) -> None:
    texts = generator.continuous_texts(DecodingOptions())
    heard = [Heard() for _ in range(3)]
    texts.join([one.prompt(token_ids) for one, token_ids in zip(heard, PROMPTS, strict=False)])
    texts.step()
    heard[0].is_gone = True
    texts.step()
    assert len(texts) == 2
    assert (len(heard[0].pieces), heard[0].reasons) == (len(heard[0].layers), [])
    texts.cut()
    assert len(texts) == 0
    assert [one.reasons for one in heard[1:]] == [["length"]] * 2


def test_an_error_of_one_text_is_told_to_it_alone(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = generator.continuous_texts(DecodingOptions())
    heard = [Heard() for _ in range(3)]
    broken = RuntimeError("no such piece")

    def fail(piece: str, layer: int) -> None:
        raise broken

    heard[1].on_token = fail
    texts.join([one.prompt(token_ids) for one, token_ids in zip(heard, PROMPTS, strict=False)])
    while len(texts):
        texts.step()
    assert heard[1].errors == [broken]
    for number in (0, 2):
        (wanted,) = generator.generate_encoded([PROMPTS[number]], options=DecodingOptions(max_new_tokens=NEW))
        assert "".join(heard[number].pieces) == wanted.text


def test_a_text_whose_logits_are_no_numbers_ends_alone(generator: TextGenerator) -> None:
    values: dict[str, Any] = {"do_sample": True, "temperature": 1e-4}  # as good as greedy
    wanted = write_joining(generator.continuous_texts(DecodingOptions(**values)), PROMPTS[:3])
    model: Any = generator.saved.model
    weight = model.get_input_embeddings().weight
    used = {token for row in PROMPTS for token in row} | set(
        generator.saved.tokenizer("".join("".join(one.pieces) for one in wanted))["input_ids"]
    )
    broken = max(set(range(97)) - used)
    kept = weight[broken].clone()
    try:
        with torch.no_grad():
            weight[broken] = float("nan")
        texts = generator.continuous_texts(DecodingOptions(**values))
        heard = [Heard() for _ in range(5)]
        texts.join([heard[3].prompt([5, broken]), heard[0].prompt(PROMPTS[0])])
        texts.step()
        texts.join([heard[1].prompt(PROMPTS[1]), heard[4].prompt([broken]), heard[2].prompt(PROMPTS[2])])
        while len(texts):
            texts.step()
    finally:
        with torch.no_grad():
            weight[broken] = kept
    for one in heard[3:]:
        assert [str(error) for error in one.errors] == [
            "logits must be numbers to take a token from, got NaN at layer 4. Check the model's weights, or load it "
            "in float32."
        ]
        assert (one.pieces, one.reasons) == ([], [])
    assert [one.pieces for one in heard[:3]] == [one.pieces for one in wanted]
    assert [one.errors for one in heard[:3]] == [[]] * 3


def test_the_context_is_that_of_each_text(generator: TextGenerator) -> None:
    """A long prompt and a long text beside each other, each of which fills the context."""
    longest = generator.saved.context_length
    texts = generator.continuous_texts(DecodingOptions())
    with pytest.raises(ValueError, match=f"fit into {longest} tokens beside the prompt, got 2 beside 255"):
        texts.join([Heard().prompt([5] * 255, 2)])
    prompts, limits = [prompt(5), prompt(250, 1)], [longest - 5, 6]
    heard = [Heard(), Heard()]
    texts.join([one.prompt(*row) for one, row in zip(heard, zip(prompts, limits, strict=True), strict=True)])
    while len(texts):
        texts.step()
    for one, token_ids, limit in zip(heard, prompts, limits, strict=True):
        options = DecodingOptions(max_new_tokens=limit)
        (wanted,) = generator.generate_encoded([token_ids], options=options)
        assert ("".join(one.pieces), one.layers) == (wanted.text, wanted.exit_layers)


def test_lossless_texts_are_written_alone(generator: TextGenerator) -> None:
    if not generator.saved.has_exits:
        pytest.skip("a plain model has no modes")
    options = generator.check(DecodingOptions(mode="lossless"))
    assert not can_join(generator.saved, options)
    assert can_join(generator.saved, generator.check(DecodingOptions(mode="full")))
    with pytest.raises(ValueError, match="Take stream_rows"):
        generator.continuous_texts(DecodingOptions(mode="lossless"))
