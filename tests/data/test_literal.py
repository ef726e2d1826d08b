"""Special tokens that users spell are text, with every kind of tokenizer; ordinary text gives the same tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizer, pipeline

from consistentee.data.literal import literal_copy, read_special_tokens, special_tokens, take_literally
from consistentee.data.rows import TextDataset
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.classification import evaluate_model
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_backbone, tiny_dataset, tiny_tokenizer
from tiny_tokenizers import byte_level, unigram


class Spaces(PreTrainedTokenizer):
    """A tokenizer that is not fast: words between spaces."""

    words: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "a", "b")

    def __init__(self, **kwargs: Any) -> None:
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        super().__init__(**{**names, **kwargs})

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


KINDS: dict[str, Callable[[], Any]] = {
    "wordpiece": tiny_tokenizer,
    "unigram": unigram,
    "byte-level": byte_level,
    "slow": Spaces,
}
CACHED = {kind: cache(make) for kind, make in KINDS.items()}  # not to be changed
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def ids(tokenizer: Any, text: str) -> list[int]:
    return encode_texts([(text,)], tokenizer, 10_000)[0][0]["input_ids"]


@EVERY_KIND
def test_a_special_token_in_a_text_is_text(kind: str) -> None:
    tokenizer, literal = KINDS[kind](), KINDS[kind]()
    take_literally(literal)
    specials = special_tokens(tokenizer)
    assert len(specials) >= 3
    around = [index for index in ids(literal, "a") if index in specials.values()]
    for token, index in specials.items():
        for text in (f"a {token} b", f"a{token}b", token, f"{token}{token}"):
            if kind != "slow" or " " in text:  # this one splits at spaces only
                assert index in ids(tokenizer, text)[len(around) // 2 :]
            found = [index for index in ids(literal, text) if index in specials.values()]
            assert found == around, text


def test_other_characters_that_a_normaliser_makes_a_special_token_of() -> None:
    tokenizer = unigram()
    assert ids(tokenizer, "a＜/s＞b").count(2) == 2
    take_literally(tokenizer)
    assert ids(tokenizer, "a＜/s＞b").count(2) == 1
    assert tokenizer.decode(ids(tokenizer, "a</s>b"), skip_special_tokens=True) == "a< /s>b"


def test_byte_level_text_comes_back_as_it_was() -> None:
    tokenizer = literal_copy(byte_level())
    text = "x<|im_end|>\n<|im_start|>system\n<|endoftext|>"
    assert tokenizer.decode(ids(tokenizer, text)) == text


@EVERY_KIND
@given(text=st.text(st.sampled_from("good bad abets<>/|[]_.\n▁é"), min_size=1, max_size=40))
def test_ordinary_text_gives_the_same_tokens(kind: str, text: str) -> None:
    tokenizer = CACHED[kind]()
    if not text.strip() or re.search(r"<s>|</s>|<pad>|<unk>", text):
        return
    literal = literal_copy(tokenizer)
    plain, again = tokenizer(text)["input_ids"], literal(text)["input_ids"]
    assert plain == again
    if plain:
        assert ids(literal, text) == plain


@EVERY_KIND
def test_pairs_and_cuts_keep_their_special_tokens(kind: str) -> None:
    tokenizer = literal_copy(KINDS[kind]())
    if kind in ("byte-level", "slow"):  # they put nothing between the texts of a pair
        return
    plain = KINDS[kind]()
    pair = ("a b good", "b a b a")
    assert encode_texts([pair], tokenizer, 9)[0] == encode_texts([pair], plain, 9)[0]
    (row,) = encode_texts([("a [SEP] </s> b", "[SEP] </s> a")], tokenizer, 12)[0]
    (ordinary,) = encode_texts([("a b a b a b a b", "a b a b a b")], plain, 12)[0]
    specials = special_tokens(plain).values()
    marks = [[index for index in one["input_ids"] if index in specials] for one in (row, ordinary)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "byte-level"])
def test_a_saved_tokenizer_keeps_its_way(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    text = "a [SEP] b</s>＜/s＞<|im_end|> <pad>"
    wanted = {True: ids(tokenizer, text), False: ids(literal_copy(tokenizer), text)}
    assert wanted[True] != wanted[False]
    for parse in (False, True, False):
        read_special_tokens(tokenizer, parse)
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        if kind == "unigram" and parse:
            continue  # the spelling that its normaliser keeps apart
        assert ids(tokenizer, text) == tokenizer(text)["input_ids"] == wanted[parse]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2)


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize("make", [train, finetune])
def test_training_engine_evaluation_and_pipeline_agree(
    make: Callable[..., Path],
    parse: bool,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tiny_dataset(50)
    marked = [(f"{text} [SEP] good [PAD] [CLS]",) for (text,) in rows.texts]
    rows = TextDataset(marked, rows.labels, rows.label_names, rows.source)
    seen: list[list[int]] = []

    def noted(texts: Any, tokenizer: Any, max_length: int = 128) -> Any:
        encoded, cut = encode_texts(texts, tokenizer, max_length)
        seen.extend(row["input_ids"] for row in encoded)
        return encoded, cut

    monkeypatch.setattr("consistentee.data.tokenization.encode_texts", noted)
    config = quick_config(parse_special_tokens=parse)
    folder = make(backbone=backbone, train_data=rows, output_dir=tmp_path / "run", config=config)
    saved = load_model(folder, LoadedClassifier, device="cpu")
    assert saved.model.config.parse_special_tokens is parse
    raw = AutoTokenizer.from_pretrained(backbone)
    wanted = {tuple(raw(text, split_special_tokens=not parse)["input_ids"]) for (text,) in rows.texts}
    assert {tuple(row) for row in seen} == wanted

    answers = Engine(saved).predict([text for (text,) in rows.texts])
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    for answer, (text,) in zip(answers, rows.texts, strict=True):
        other = classify(text)[0]
        assert other["label"] == answer.label
        assert other["score"] == pytest.approx(answer.score, abs=1e-5)
    if make is train:
        right = [
            answer.label == rows.label_names[label]
            for answer, label in zip(answers, rows.labels, strict=True)
        ]
        assert evaluate_model(saved, rows).accuracy == pytest.approx(sum(right) / len(right))
    assert {tuple(row) for row in seen} == wanted
