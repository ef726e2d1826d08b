"""Stop strings end a text where they stand, whatever tokens they are made of, streamed or not, in every mode."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.continuous import JoiningPrompt
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import GeneratedText, TextGenerator
from consistentee.pipelines.pieces import PieceDecoder, decode_pieces
from consistentee.pipelines.stops import StopTexts, cut_at_stop, find_stop, possible_stop
from consistentee.pipelines.streaming import PieceStreamer
from saved_generators import BYTES, generator_folder, plain_folder, tiny_rows

PROMPTS = list(zip(tiny_rows(7).instructions, tiny_rows(7).inputs, strict=True))
NEW = 24

pytestmark = pytest.mark.usefixtures("one_thread")


def chunk_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three letters out of few, so that a stop string can lie in one, in two, or in a part of one."""
    rng = random.Random(1)
    pieces = ["<s>", "</s>"]
    while len(pieces) < BYTES["vocab_size"]:
        piece = "".join(rng.choices("abcé \n", k=rng.choice((1, 1, 2, 3))))
        pieces += [piece] if piece not in pieces else []
        if len(pieces) > 150:  # no more than so many of them: the rest are digits
            pieces += [str(number) for number in range(BYTES["vocab_size"] - len(pieces))]
    model = WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<s>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedGenerator:
    folder = generator_folder(tmp_path_factory.mktemp("stops") / "exits")
    chunk_tokenizer().save_pretrained(folder)
    return load_model(folder, LoadedGenerator, device="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedGenerator:
    folder = plain_folder(tmp_path_factory.mktemp("stops") / "plain")
    chunk_tokenizer().save_pretrained(folder)
    return load_model(folder, LoadedGenerator, device="cpu")


class TestPlaces:
    @given(
        pieces=st.lists(st.text("ab", max_size=3), max_size=8),
        stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    )
    def test_are_those_of_one_character_after_the_other(self, pieces: list[str], stops: list[str]) -> None:
        text = "".join(pieces)
        expected = None
        for end in range(1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                expected = (end - max(map(len, ending)), end)
                break
        assert find_stop(text, stops) == expected
        cut = cut_at_stop(pieces, stops)
        if expected is None:
            assert cut is None
            return
        assert cut is not None
        assert "".join(cut) == text[: expected[0]]
        assert len("".join(pieces[: len(cut)])) >= expected[1] > len("".join(pieces[: len(cut) - 1]))

    @given(text=st.text("ab", max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
    def test_that_may_come(self, text: str, stops: list[str]) -> None:
        held = possible_stop(text, stops)
        beginnings = [
            length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])
        ]
        assert held == max(beginnings, default=0)

    def test_criterion_looks_at_new_tokens_only(self) -> None:
        tokenizer = chunk_tokenizer()
        ids = [tokenizer.get_vocab()[letter] for letter in "abac"]
        criterion = StopTexts(tokenizer, ["ab"], 2)
        assert criterion(torch.tensor([ids]), None).tolist() == [False]
        assert criterion(torch.tensor([[*ids, ids[0], ids[1]], [*ids, ids[1], ids[0]]]), None).tolist() == [
            True,
            False,
        ]


def uncut(generator: TextGenerator, **options: Any) -> list[GeneratedText]:
    return list(generator.generate_texts(PROMPTS, max_new_tokens=NEW, **options))


def some_stops(texts: list[GeneratedText]) -> list[list[str]]:
    """Strings of all kinds out of the texts: inside a token, of one token, across two and three."""
    rng = random.Random(0)
    found: list[list[str]] = [["\n"], ["a"], ["é "], ["nowhere"]]
    for text in texts:
        place = rng.randrange(4, NEW - 4)
        for width in (1, 2, 3):
            whole = "".join(text.pieces[place : place + width])
            found += [[whole], [whole[1:]] if len(whole) > 1 else [whole], [whole[:-1] or whole, "zz"]]
    return found


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless", None])
def test_texts_end_before_them(saved: LoadedGenerator, plain: LoadedGenerator, mode: str | None) -> None:
    generator = TextGenerator(plain if mode is None else saved)
    options: dict[str, Any] = {"mode": mode}
    whole = uncut(generator, **options)
    ways: set[str] = set()
    for number, stops in enumerate(some_stops(whole)[::3]):
        for batch_size in (1, 4)[number % 2 :][:1]:
            texts = uncut(generator, stop=stops, batch_size=batch_size, **options)
            for text, full in zip(texts, whole, strict=True):
                found = find_stop(full.text, stops)
                assert text.text == (full.text if found is None else full.text[: found[0]])
                assert text.token_ids == full.token_ids[: len(text.token_ids)]
                assert len(text.token_ids) == len(text.exit_layers) == len(text.pieces)
                assert text.exit_layers == full.exit_layers[: len(text.exit_layers)]
                assert "".join(text.pieces) == text.text
                assert text.finish_reason == ("length" if found is None else "stop")
                if found is not None:
                    taken = "".join(full.pieces[: len(text.pieces)])
                    assert len(taken) >= found[1] > len(taken) - len(full.pieces[len(text.pieces) - 1])
                    last = full.pieces[len(text.pieces) - 1]
                    ways.add("across" if len(last) < found[1] - found[0] else "inside")
                if mode == "lossless":
                    assert text.draft_layers is not None
                    assert len(text.draft_layers) == len(text.token_ids)
                    assert set(text.exit_layers) == {4}
    assert ways == {"across", "inside"}


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless", None])
def test_streams_hold_back_what_may_begin_one(
    saved: LoadedGenerator, plain: LoadedGenerator, mode: str | None
) -> None:
    generator = TextGenerator(plain if mode is None else saved)
    whole = uncut(generator, mode=mode)
    for stops in [[], *some_stops(whole)[::4]]:
        for prompt, full in list(zip(PROMPTS, whole, strict=True))[:3]:
            told: list[tuple[str, int]] = []
            text = generator.stream(
                *prompt,
                on_token=lambda piece, layer: told.append((piece, layer)),  # noqa: B023
                mode=mode,
                max_new_tokens=NEW,
                stop=stops,
            )
            found = find_stop(full.text, stops)
            assert "".join(piece for piece, _ in told) == text.text
            assert text.text == (full.text if found is None else full.text[: found[0]])
            assert [layer for _, layer in told] == (text.draft_layers or text.exit_layers)


@given(
    text=st.text("aé \n", max_size=12),
    stops=st.lists(st.text("aé \n", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_streamed_text_is_never_taken_back(text: str, stops: list[str], data: st.DataObject) -> None:
    """Whatever comes next, what was told is the beginning of the text; and it is told as early as that allows."""
    tokenizer = chunk_tokenizer()
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, min(3, len(rest))))
        pieces += [rest[:size]] if rest[:size] in tokenizer.get_vocab() else list(rest[:size])
        rest = rest[size:]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert "".join(decode_pieces(tokenizer, ids)) == text
    told: list[str] = []
    streamer = PieceStreamer(PieceDecoder(tokenizer), lambda piece, _: told.append(piece), 4, stops)
    streamer.put(torch.tensor([0]))
    so_far = ""
    for token, piece in zip(ids, pieces, strict=True):
        streamer.put(torch.tensor([token]))
        so_far += piece
        found = find_stop(so_far, stops)
        certain = so_far[: found[0]] if found else so_far[: len(so_far) - possible_stop(so_far, stops)]
        assert certain.startswith("".join(told))
        if found:
            break
        assert len(certain) - len("".join(told)) < 3  # what is left is a part of a token
    streamer.end()
    cut = cut_at_stop(pieces, stops)
    assert told == (pieces if cut is None else cut)


def test_special_tokens_can_be_named(saved: LoadedGenerator, plain: LoadedGenerator) -> None:
    for one in (saved, plain):
        whole = uncut(TextGenerator(one))
        token = whole[0].token_ids[5]
        tokenizer = copy.deepcopy(one.tokenizer)
        name = tokenizer.convert_ids_to_tokens(token)
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        texts = uncut(TextGenerator(replace(one, tokenizer=tokenizer)), stop=[name], batch_size=3)
        assert texts[0].token_ids[-1] == token
        assert texts[0].finish_reason == "stop"
        assert texts[0].pieces[-1] == ""
        assert len(texts[0].token_ids) == whole[0].token_ids.index(token) + 1


@pytest.mark.parametrize("special", [True, False])
def test_ends_that_are_only_added_tokens_are_no_text(
    saved: LoadedGenerator, plain: LoadedGenerator, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ends of a turn of chat models: the tokenizer knows no role for them, `generation_config` lists them."""
    for one in (saved, plain):
        whole = uncut(TextGenerator(one))
        end = whole[0].token_ids[5]
        tokenizer = copy.deepcopy(one.tokenizer)
        name = tokenizer.convert_ids_to_tokens(end)
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)])
        assert end not in tokenizer.all_special_ids
        length = whole[0].token_ids.index(end) + 1
        monkeypatch.setattr(one.model.generation_config, "eos_token_id", [1, end])
        generator = TextGenerator(replace(one, tokenizer=tokenizer))
        for stops, reason in (([], "end"), ([name], "stop"), (["nowhere"], "end")):
            text = uncut(generator, stop=stops, batch_size=3)[0]
            assert (text.finish_reason, text.token_ids[-1]) == (reason, end)
            assert text.pieces == [*whole[0].pieces[: length - 1], ""]
            assert text.text == "".join(text.pieces)
            told: list[str] = []
            generator.stream(
                *PROMPTS[0],
                on_token=lambda piece, layer: told.append(piece),  # noqa: B023
                max_new_tokens=NEW,
                stop=stops,
            )
            assert told == text.pieces
            told.clear()
            texts = generator.continuous_texts(DecodingOptions(stop=stops))
            reasons: list[str] = []
            (ids,) = generator.encode(PROMPTS[:1])
            texts.join([JoiningPrompt(ids, NEW, lambda piece, _: told.append(piece), reasons.append, print)])  # noqa: B023
            while len(texts):
                texts.step()
            assert (told, reasons) == (text.pieces, [reason])


def test_the_models_own_end_has_its_own_reason(
    saved: LoadedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TextGenerator(saved)
    whole = uncut(generator)
    monkeypatch.setattr(saved.model.generation_config, "eos_token_id", [whole[0].token_ids[5]])
    texts = uncut(generator)
    assert texts[0].finish_reason == "end"
    assert texts[0].pieces[-1] == ""  # whatever the tokenizer makes of it
    stopped = uncut(generator, stop=whole[0].pieces[2])
    assert stopped[0].finish_reason == "stop"


def test_options() -> None:
    assert DecodingOptions(stop="\n\n").stop == ("\n\n",)
    assert DecodingOptions(stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(
        ValueError, match=r"^stop must hold strings with at least one character, got \"\"\. Leave"
    ):
        DecodingOptions(stop=["a", ""])
