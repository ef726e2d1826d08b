"""Texts from prompts: order, batches, pieces that are the text, exit layers, streams; and folders that open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.data.templates import PLAIN
from consistentee.errors import DataError
from consistentee.inference.decoder.lossless import DraftClock
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.pipelines.pieces import PieceDecoder, decode_pieces
from consistentee.pipelines.stops import StopTexts
from saved_generators import TEMPLATE, generator_folder, plain_folder, tiny_rows
from tiny_tokenizers import byte_tokenizer, spaced

PROMPTS = list(zip(tiny_rows(11).instructions, tiny_rows(11).inputs, strict=True))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generators")
    return {"exits": generator_folder(root / "exits"), "plain": plain_folder(root / "plain")}


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path]) -> LoadedGenerator:
    return load_model(folders["exits"], LoadedGenerator, device="cpu")


@pytest.fixture(scope="module")
def generator(saved: LoadedGenerator) -> TextGenerator:
    return TextGenerator(saved)


class TestPieces:
    def test_of_characters_that_take_several_tokens(self) -> None:
        tokenizer = byte_tokenizer()
        for text in ("très bien", "日本語 ok", "a😀b", "x�y", ""):
            token_ids = tokenizer(text)["input_ids"]
            pieces = decode_pieces(tokenizer, token_ids)
            assert len(pieces) == len(token_ids)
            assert "".join(pieces) == text

    def test_belong_to_the_token_that_completes_them(self) -> None:
        tokenizer = byte_tokenizer()
        assert decode_pieces(tokenizer, tokenizer("é!")["input_ids"]) == ["", "é", "!"]

    def test_of_bytes_that_are_no_text(self) -> None:
        tokenizer = byte_tokenizer()
        torch.manual_seed(5)
        for _ in range(50):
            token_ids = torch.randint(2, 258, (20,)).tolist()
            assert "".join(decode_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)

    def test_special_tokens_have_none(self) -> None:
        tokenizer = byte_tokenizer()
        inside = tokenizer("hi")["input_ids"]
        assert decode_pieces(tokenizer, [0, *inside, 1]) == ["", "h", "i", ""]

    @pytest.mark.parametrize("prompt", ["rivers:", "r", "日本語", "a日本", "rivers: 日", "日 r"])
    def test_of_a_text_that_goes_on(self, prompt: str) -> None:
        """The space in front stays, and a window that begins inside a character breaks none behind it."""
        tokenizer = spaced("▁the")
        before = tokenizer(prompt)["input_ids"]
        for text in (" the rivers", "本 語", " 日本", "s, and"):
            token_ids = tokenizer(prompt + text)["input_ids"][len(before) :]
            assert "".join(decode_pieces(tokenizer, token_ids, before=before)) == text
            criterion = StopTexts(tokenizer, [text[1:3]], len(before), before=[before])
            ended = criterion(torch.tensor([[*before, *token_ids]]), None)
            assert ended.tolist() == [True]

    def test_what_is_left_over_comes_at_the_end(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = PieceDecoder(tokenizer)
        first, _ = tokenizer("é")["input_ids"]
        assert decoder.put(first) == ""
        assert decoder.end() == "�"
        assert decoder.end() == ""


class TestGenerateTexts:
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_in_input_order_and_the_same_at_every_batch_size(
        self, generator: TextGenerator, saved: LoadedGenerator, batch_size: int
    ) -> None:
        texts = list(generator.generate_texts(PROMPTS, batch_size=batch_size, max_new_tokens=9))
        assert [(text.prompt, text.input) for text in texts] == PROMPTS
        for (instruction, context), text in zip(PROMPTS, texts, strict=True):
            input_ids = torch.tensor([saved.tokenizer(TEMPLATE.render(instruction, context))["input_ids"]])
            expected = saved.early_exit_model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=9,
                return_dict_in_generate=True,
            )
            assert text.token_ids == expected.sequences[0, input_ids.shape[1] :].tolist()
            assert text.exit_layers == expected.exit_layers[0].tolist()
            assert text.text == saved.tokenizer.decode(text.token_ids, skip_special_tokens=True)
        assert len({layer for text in texts for layer in text.exit_layers}) > 1

    def test_the_end_of_text_counts_as_a_token_and_has_no_piece(
        self, saved: LoadedGenerator, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (text,) = generator.generate_texts([("go", "")], max_new_tokens=9)
        end = text.token_ids[3]
        assert end not in text.token_ids[:3]
        monkeypatch.setattr(saved.model.generation_config, "eos_token_id", [end])
        (ended, other) = generator.generate_texts([("go", ""), PROMPTS[4]], batch_size=2, max_new_tokens=9)
        assert ended.token_ids == text.token_ids[:4]
        assert ended.exit_layers == text.exit_layers[:4]
        assert ended.mean_exit_layer == sum(text.exit_layers[:4]) / 4
        assert len(ended.pieces) == 4
        assert len(other.token_ids) == len(other.exit_layers)

    def test_a_stream_is_not_read_ahead_for_ever(self, generator: TextGenerator) -> None:
        read = 0

        def endless() -> Iterator[tuple[str, str]]:
            nonlocal read
            while True:
                read += 1
                yield f"prompt {read}", ""

        texts = generator.generate_texts(endless(), batch_size=2, max_new_tokens=2)
        assert read == 0
        assert next(texts).prompt == "prompt 1"
        assert read == 2
        assert [next(texts).prompt for _ in range(40)] == [f"prompt {row}" for row in range(2, 42)]
        assert read <= 41 + 16

    def test_full_and_lossless_modes_write_the_same(self, generator: TextGenerator) -> None:
        full = list(generator.generate_texts(PROMPTS[:3], mode="full", max_new_tokens=8))
        lossless = list(generator.generate_texts(PROMPTS[:3], mode="lossless", max_new_tokens=8))
        assert [text.token_ids for text in full] == [text.token_ids for text in lossless]
        assert {layer for text in full for layer in text.exit_layers} == {4}

    def test_drafts_have_the_saved_threshold_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(DraftClock, "drafts", True)
        values: dict[str, Any] = {"threshold": 1.0, "draft_threshold": 0.1, "thresholds": {"static": 2}}
        folder = generator_folder(tmp_path, **values)
        generator = TextGenerator(load_model(folder, LoadedGenerator, device="cpu"))
        for given, wanted in (
            ({"mode": "lossless"}, 0.1),
            ({"mode": "lossless", "threshold": 0.7}, 0.7),
            ({"mode": "lossless", "criterion": "static"}, 2),
            ({"mode": "early-exit"}, 1.0),
            ({"mode": "full"}, None),
        ):
            assert generator.check(DecodingOptions(**given)).threshold == wanted
        (text,) = generator.generate_texts(PROMPTS[:1], mode="lossless", max_new_tokens=8)
        assert text.drafted

    def test_a_seed_repeats_what_is_drawn(self, generator: TextGenerator) -> None:
        draw = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 8}
        once, twice, other = (
            [text.token_ids for text in generator.generate_texts(PROMPTS[:2], seed=seed, **draw)]
            for seed in (1, 1, 2)
        )
        assert once == twice
        assert once != other

    @pytest.mark.parametrize("kind", ["exits", "plain"])
    def test_seeded_draws_belong_to_their_call(self, folders: dict[str, Path], kind: str) -> None:
        saved = load_model(folders[kind], LoadedGenerator, device="cpu")
        generator = TextGenerator(saved, template=TEMPLATE)
        options = DecodingOptions(do_sample=True, seed=7, max_new_tokens=6)
        encoded = generator.encode(PROMPTS[:5])
        calls = (
            lambda: generator.generate_texts(PROMPTS[:5], batch_size=2, options=options),
            lambda: generator.generate_encoded(encoded, batch_size=2, options=options),
        )
        torch.manual_seed(0)
        before = torch.get_rng_state()
        for call in calls:
            wanted = [text.token_ids for text in call()]
            first, second = call(), call()
            interleaved = [(one.token_ids, other.token_ids) for one, other in zip(first, second, strict=True)]
            assert interleaved == list(zip(wanted, wanted, strict=True))
            assert torch.equal(torch.get_rng_state(), before)
            disturbed: list[list[int]] = []
            for text in call():
                disturbed.append(text.token_ids)
                torch.rand(3)
            assert disturbed == wanted
            torch.set_rng_state(before)
            assert len({str(row) for row in wanted}) == 5
        streamed = [
            generator.stream(*PROMPTS[0], on_token=lambda piece, layer: None, options=options).token_ids
            for _ in range(2)
        ]
        assert streamed[0] == streamed[1]
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("kind", ["exits", "plain"])
    def test_nothing_but_the_options_decides(self, folders: dict[str, Path], kind: str) -> None:
        values: dict[str, Any] = {"max_new_tokens": 12} | ({} if kind == "plain" else {"mode": "full"})
        saved = load_model(folders[kind], LoadedGenerator, device="cpu")
        generator = TextGenerator(saved, template=TEMPLATE)
        greedy = [text.token_ids for text in generator.generate_texts(PROMPTS[:4], **values)]
        torch.manual_seed(7)
        drawn = [text.token_ids for text in generator.generate_texts(PROMPTS[:4], do_sample=True, **values)]
        config: Any = saved.model.generation_config
        config.repetition_penalty = 3.0
        config.no_repeat_ngram_size = 1
        config.suppress_tokens = sorted({token for row in greedy + drawn for token in row})
        config.min_length, config.top_k, config.temperature, config.min_p = 60, 2, 0.1, 0.5
        assert [text.token_ids for text in generator.generate_texts(PROMPTS[:4], **values)] == greedy
        torch.manual_seed(7)
        again = [text.token_ids for text in generator.generate_texts(PROMPTS[:4], do_sample=True, **values)]
        assert again == drawn

    @pytest.mark.parametrize("mode", ["early-exit", "full", "lossless", None])
    def test_settings_saved_with_the_backbone_change_no_text(
        self, folders: dict[str, Path], mode: str | None
    ) -> None:
        folder = folders["plain" if mode is None else "exits"]
        generator = TextGenerator(load_model(folder, LoadedGenerator, device="cpu"), template=TEMPLATE)
        values: dict[str, Any] = {"mode": mode, "max_new_tokens": 6}
        texts = [
            (text.token_ids, text.exit_layers) for text in generator.generate_texts(PROMPTS[:3], **values)
        ]
        config: Any = generator.saved.model.generation_config
        config.do_sample = True  # with which alone transformers takes num_return_sequences
        for name, value in {
            "use_cache": False,
            "num_return_sequences": 2,
            "token_healing": True,
            "output_scores": True,
            "output_logits": True,
            "output_attentions": True,
            "output_hidden_states": True,
            "assistant_early_exit": 2,
            "use_mtp": True,
            "force_words_ids": [[5]],
            "cache_implementation": "quantized",
        }.items():
            setattr(config, name, value)
            again = list(generator.generate_texts(PROMPTS[:3], **values))
            assert [(text.token_ids, text.exit_layers) for text in again] == texts, name
            setattr(config, name, None)

    def test_draws_are_from_all_tokens_or_as_many_as_asked_for(self, generator: TextGenerator) -> None:
        (prompt,) = generator.encode([("go", "")])
        model: Any = generator.saved.model
        ranks = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).argsort()
        drawn: dict[int | None, set[int]] = {}
        for top_k in (None, 5):
            options = DecodingOptions(
                mode="full", max_new_tokens=1, do_sample=True, temperature=20.0, top_k=top_k, seed=0
            )
            texts = generator.generate_encoded([prompt] * 200, batch_size=50, options=options)
            drawn[top_k] = {int(ranks[text.token_ids[0]]) for text in texts}
        assert max(drawn[None]) > 200  # of 258: Hugging Face's default would end at 50
        assert drawn[5] == {0, 1, 2, 3, 4}

    def test_a_model_without_exits(self, folders: dict[str, Path]) -> None:
        plain = load_model(folders["plain"], LoadedGenerator, device="cpu")
        exits = load_model(folders["exits"], LoadedGenerator, device="cpu")
        texts = list(TextGenerator(plain, template=TEMPLATE).generate_texts(PROMPTS[:4], max_new_tokens=5))
        full = list(TextGenerator(exits).generate_texts(PROMPTS[:4], mode="full", max_new_tokens=5))
        assert [text.token_ids for text in texts] == [text.token_ids for text in full]
        assert [text.exit_layers for text in texts] == [text.exit_layers for text in full]
        with pytest.raises(ValueError, match=r"threshold goes with exits, which model .* does not have"):
            TextGenerator(plain).generate_texts(PROMPTS, threshold=0.5)

    def test_an_empty_prompt_is_named_by_its_number(self, saved: LoadedGenerator) -> None:
        generator = TextGenerator(saved, template=PLAIN)
        saved_beginning = load_model(saved.name, LoadedGenerator, device="cpu")
        saved_beginning.tokenizer._tokenizer.post_processor = byte_tokenizer()._tokenizer.post_processor
        generator = TextGenerator(saved_beginning, template=PLAIN)
        with pytest.raises(DataError, match="prompt 4: The prompt has no token"):
            list(
                generator.generate_texts(
                    [*[("a", "")] * 3, ("", ""), ("b", "")], batch_size=2, max_new_tokens=2
                )
            )

    @pytest.mark.parametrize("prompt", ["Name three rivers.", "Hi", ("a",), ("a", None), {"prompt": "a"}])
    def test_what_is_no_pair_is_named_by_its_number(self, generator: TextGenerator, prompt: Any) -> None:
        with pytest.raises(DataError, match="prompt 2: It must be an instruction and an input, got "):
            list(generator.generate_texts([("a", ""), prompt], max_new_tokens=1))
        with pytest.raises(ValueError, match="texts must be a list of texts, got one text"):
            list(generator.generate_texts("Hi", max_new_tokens=1))

    @pytest.mark.parametrize("prompt", [("a \ud83d", ""), ("a", "é\udc80")])
    def test_half_a_character_is_named_by_its_prompt(
        self, generator: TextGenerator, prompt: tuple[str, str]
    ) -> None:
        before = [("é 😀", "b")] * 12
        with pytest.raises(
            DataError, match=r"prompt 13: Character [23] is half a surrogate pair .* Decode its"
        ):
            list(generator.generate_texts([*before, prompt], batch_size=2, max_new_tokens=1))
        with pytest.raises(DataError, match="prompt 1: Character"):
            generator.stream(*prompt, on_token=lambda piece, layer: None)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"mode": "fast"}, "mode must be one of early-exit, full, lossless"),
            ({"threshold": 1.5}, r"threshold must be in \[0, 1\] for policy, got 1.5"),
            ({"criterion": "softmax_margin"}, 'has no threshold for criterion "softmax_margin"'),
            ({"temperature": 0.5}, "temperature goes with do_sample"),
            ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
            ({"do_sample": True, "temperature": 1e-45}, "temperature must be at least 1e-05, got 1"),
            ({"top_k": 3}, "top_k goes with do_sample"),
            ({"do_sample": True, "top_k": 0}, "top_k must be at least 1, got 0"),
            ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
            ({"do_sample": True, "mode": "lossless"}, 'do_sample must be False in mode "lossless"'),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"max_new_tokens": 256}, "max_new_tokens must be below the 256 tokens"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ],
    )
    def test_options_are_checked_before_anything_is_read(
        self, generator: TextGenerator, values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            generator.generate_texts(iter(PROMPTS), **values)

    def test_a_long_prompt_leaves_room_for_the_text(self, generator: TextGenerator) -> None:
        (text,) = generator.generate_texts([("sum up", "word " * 200)], max_new_tokens=6)
        assert len(text.token_ids) == 6


class TestStream:
    @pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
    def test_tells_of_every_token_and_gives_the_same_text(self, generator: TextGenerator, mode: str) -> None:
        heard: list[tuple[str, int]] = []
        text = generator.stream(
            "go", on_token=lambda *token: heard.append(token), mode=mode, max_new_tokens=12
        )
        assert [layer for _, layer in heard] == text.exit_layers
        assert "".join(piece for piece, _ in heard) == text.text
        (expected,) = generator.generate_texts([("go", "")], mode=mode, max_new_tokens=12)
        assert text.token_ids == expected.token_ids


def test_options_name_the_choices() -> None:
    with pytest.raises(ValueError, match="skipped_states must be one of copy, recompute"):
        DecodingOptions(skipped_states="drop")
