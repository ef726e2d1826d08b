"""Tokenizing, collating, and batches grouped by length."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from consistentee.data.batches import LengthGroupedBatches, TokenizedDataset, collate
from consistentee.data.rows import TextDataset
from consistentee.data.tokenization import TOKENIZED_AT_ONCE, encode_texts, tokenize
from consistentee.errors import DataError

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6, "d": 7, "e": 8}


def word_tokenizer(
    *, template: bool = True, token_types: bool = True, **special: str
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        **special,
    }
    inputs = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def singles(*texts: str) -> TextDataset:
    return TextDataset(
        [(text,) for text in texts], [index % 2 for index in range(len(texts))], ("n", "y"), "here"
    )


def test_tokenize_single_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokenize(singles("a b", "C", "a b c d e"), tokenizer, max_length=5)
    assert len(rows) == 3
    assert rows[0] == {"input_ids": [2, 4, 5, 3], "token_type_ids": [0, 0, 0, 0], "labels": 0, "index": 0}
    assert rows[1]["input_ids"] == [2, 6, 3]
    assert rows[2]["input_ids"] == [2, 4, 5, 6, 3]  # cut to max_length, special tokens kept
    assert rows.lengths.tolist() == [4, 3, 5]
    assert rows.labels.tolist() == [0, 1, 0]
    assert rows.label_names == ("n", "y")
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
        rows[3]


def test_tokenize_pairs(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = TextDataset([("a b", "c"), ("a", "b c d e")], [0, 1], ("n", "y"), "here")
    rows = tokenize(pairs, tokenizer, max_length=6)
    assert rows[0]["input_ids"] == [2, 4, 5, 3, 6, 3]
    assert rows[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert rows[1]["input_ids"] == [2, 4, 3, 5, 6, 3]  # the longer text is cut


def test_tokenize_in_chunks_equals_row_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    data = singles(*(" ".join("abcde"[: 1 + index % 5]) for index in range(TOKENIZED_AT_ONCE + 3)))
    rows = tokenize(data, tokenizer)
    for index in (0, TOKENIZED_AT_ONCE - 1, TOKENIZED_AT_ONCE, TOKENIZED_AT_ONCE + 2):
        assert rows[index]["input_ids"] == encode_texts([data.texts[index]], tokenizer)[0][0]["input_ids"]
        assert rows[index]["index"] == index


def test_a_tokenizer_without_token_types() -> None:
    plain = word_tokenizer(token_types=False)
    rows = tokenize(singles("a", "b c"), plain)
    assert rows[0].keys() == {"input_ids", "labels", "index"}
    assert "token_type_ids" not in collate([rows[0], rows[1]], plain)


def test_pairs_need_a_tokenizer_that_separates_them() -> None:
    plain = word_tokenizer(template=False)
    assert encode_texts([("a b",)], plain)[0][0]["input_ids"] == [4, 5]
    with pytest.raises(DataError, match="no separator between the two texts of a pair"):
        encode_texts([("a", "b")], plain)[0]


def test_encode_texts_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_texts([], tokenizer) == ([], [])
    with pytest.raises(ValueError, match="max_length must be above the tokenizer's 2 special tokens, got 2"):
        encode_texts([("a",)], tokenizer, max_length=2)[0]
    with pytest.raises(ValueError, match="all single texts or all pairs"):
        encode_texts([("a",), ("a", "b")], tokenizer)[0]
    with pytest.raises(DataError, match=r"leaves nothing of the text '\\u2003'"):
        encode_texts([("\u2003",)], word_tokenizer(template=False))[0]


def test_half_a_character_is_found_where_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [("good",)] * 1500 + [("so \udc80",)]
    with pytest.raises(DataError, match="row 1501: Character 4 is half a surrogate pair"):
        tokenize(singles(*(text for (text,) in texts)), tokenizer)
    with pytest.raises(DataError, match="text 2: Character 4 is half a surrogate pair"):
        encode_texts(texts[-2:], tokenizer)[0]


def test_rows_and_labels_must_match() -> None:
    with pytest.raises(ValueError, match="equally many, got 1 and 2"):
        TokenizedDataset([{"input_ids": [1]}], [0, 1])
    assert len(TokenizedDataset([], [])) == 0


def test_collate_pads_on_the_right_to_the_longest() -> None:
    tokenizer = word_tokenizer(pad_token="e", padding_side="left")
    rows = tokenize(singles("a b c", "d"), tokenizer)
    batch = collate([rows[1], rows[0]], tokenizer)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 8, 8], [2, 4, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 5, [0] * 5]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["index"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_of_texts_without_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate(encode_texts([("a",), ("b c",)], tokenizer)[0], tokenizer)
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["input_ids"].shape == (2, 4)


def test_collate_equals_the_tokenizers_own_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a b", "c d e a", "b"]
    ours = collate(encode_texts([(text,) for text in texts], tokenizer)[0], tokenizer)
    theirs = tokenizer(texts, padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(ours[key], theirs[key])


def test_collate_needs_a_padding_token() -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="must have a padding token"):
        collate([{"input_ids": [1]}], tokenizer)


LENGTHS = np.random.default_rng(0).integers(3, 100, size=1003)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_batches_hold_every_row_once(group_by_length: bool) -> None:
    batches = LengthGroupedBatches(LENGTHS, 8, seed=3, group_by_length=group_by_length)
    drawn = list(batches)
    assert len(drawn) == len(batches) == 126
    assert sorted(row for batch in drawn for row in batch) == list(range(1003))
    assert sorted(len(batch) for batch in drawn) == [3, *[8] * 125]
    assert all(type(row) is int for batch in drawn for row in batch)


def test_batches_depend_on_seed_and_epoch_only() -> None:
    first, again = LengthGroupedBatches(LENGTHS, 8, seed=3), LengthGroupedBatches(LENGTHS, 8, seed=3)
    assert list(first) == list(first) == list(again)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert list(first) != list(LengthGroupedBatches(LENGTHS, 8, seed=4))


def test_grouping_saves_padding_and_keeps_the_order_of_lengths_random() -> None:
    def padding(batches: LengthGroupedBatches) -> int:
        return sum(int((LENGTHS[batch].max() - LENGTHS[batch]).sum()) for batch in batches)

    grouped = LengthGroupedBatches(LENGTHS, 8)
    assert padding(grouped) < 0.1 * padding(LengthGroupedBatches(LENGTHS, 8, group_by_length=False))
    longest = [LENGTHS[batch].max() for batch in grouped]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("start_batch", [0, 1, 100, 126])
def test_resuming_within_an_epoch(group_by_length: bool, start_batch: int) -> None:
    whole = LengthGroupedBatches(LENGTHS, 8, group_by_length=group_by_length)
    whole.set_epoch(2)
    resumed = LengthGroupedBatches(LENGTHS, 8, group_by_length=group_by_length)
    resumed.set_epoch(2, start_batch=start_batch)
    assert list(resumed) == list(whole)[start_batch:]
    assert len(resumed) == len(whole)
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert list(resumed) == list(whole)


def test_batches_errors_and_edges() -> None:
    assert list(LengthGroupedBatches([], 4)) == []
    assert [sorted(batch) for batch in LengthGroupedBatches([5, 5], 4)] == [[0, 1]]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        LengthGroupedBatches([1], 0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        LengthGroupedBatches([1], 1, seed=-1)
    with pytest.raises(ValueError, match=r"start_batch must be in \[0, 1\], got 2"):
        LengthGroupedBatches([1], 1).set_epoch(0, start_batch=2)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        LengthGroupedBatches([1], 1).set_epoch(-1)


def test_together_in_a_data_loader(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokenize(singles(*(" ".join("abcde"[: 1 + index % 5]) for index in range(11))), tokenizer)
    batches = LengthGroupedBatches(rows.lengths, 4, seed=1)
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=partial(collate, tokenizer=tokenizer))
    seen = torch.cat([batch["index"] for batch in loader])
    assert seen.tolist() == [row for batch in batches for row in batch]
    for batch in loader:
        assert torch.equal(batch["labels"], batch["index"] % 2)
        assert torch.equal(batch["attention_mask"].sum(1), torch.from_numpy(rows.lengths)[batch["index"]])
