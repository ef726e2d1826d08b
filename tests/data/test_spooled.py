"""Texts on disk: what comes back is what went in, tokenized as ever, once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import pytest

from consistentee.data import spooled
from consistentee.data.spooled import JoinedRows, SpooledRows, SpooledTexts
from consistentee.data.tokenization import encode_texts, tokenize
from consistentee.errors import DataError
from tiny import tiny_dataset, tiny_tokenizer

TEXTS = [("a good film",), ("the plot is, dull " * 9,), ("été 日本 \U0001f600",), ("a bad\tfilm\n",), ("x",)]


def read(texts: list[tuple[str, ...]], **options: int) -> SpooledTexts:
    return SpooledTexts.read(iter(texts), tiny_tokenizer(), 16, source="a list", **options)


def test_rows_come_back_as_they_were_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooled, "READ_AT_ONCE", 2)
    found = read(TEXTS)
    rows, cut = encode_texts(TEXTS, tiny_tokenizer(), 16)
    assert [found.item(row) for row in range(len(found))] == rows
    assert found.cut.tolist() == cut
    assert found.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert [found.text(row) for row in (4, 0, 2, 3, 1)] == [TEXTS[row] for row in (4, 0, 2, 3, 1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("texts", [TEXTS, [(f"film {number} " * 9,) for number in range(400)]])
def test_a_full_folder_for_temporary_files_is_named_once(
    texts: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled.tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(
        OSError, match=r"could not be written to, .* No space left on device\. Make room, or .* TMPDIR\.$"
    ):
        read(texts)
    gc.collect()  # what is left to be written is not tried once more


def test_pairs_and_types() -> None:
    pairs = [("a film", "good"), ("good", "a film"), ("a", "film")]
    found = read(pairs)
    assert found.text_pairs
    assert [found.text(row) for row in range(3)] == pairs
    types = found.item(0)["token_type_ids"]
    assert len(types) == len(found.item(0)["input_ids"])
    assert set(types) == {0, 1}
    bare = SpooledTexts.read(TEXTS, tiny_tokenizer("distilbert"), 16, source="a list")
    assert list(bare.item(1)) == ["input_ids"]


def test_duplicates_are_dropped_and_a_limit_counts_what_is_left() -> None:
    found = read([*TEXTS, TEXTS[0], ("new",), TEXTS[3]])
    assert (len(found), found.num_duplicates) == (6, 2)
    assert found.text(5) == ("new",)
    limited = read([TEXTS[0], TEXTS[0], *TEXTS[1:]], max_texts=3)
    assert [limited.text(row) for row in range(len(limited))] == TEXTS[:3]
    # The texts of a pair are not taken for another pair with the same letters.
    assert len(read([("a b", "c"), ("a", "b c")])) == 2


def test_known_texts_are_dropped_and_counted_apart() -> None:
    found = SpooledTexts.read(
        [*TEXTS, TEXTS[2], TEXTS[0]], tiny_tokenizer(), 16, source="a list", known=[TEXTS[0], ("elsewhere",)]
    )
    assert [found.text(row) for row in range(len(found))] == TEXTS[1:]
    assert (found.num_known, found.num_duplicates) == (2, 1)
    with pytest.raises(DataError, match=r"a list holds no text but 5 that are known already\."):
        SpooledTexts.read(TEXTS, tiny_tokenizer(), 16, source="a list", known=TEXTS)


def test_labelled_rows_and_others_behind_them() -> None:
    labelled = tokenize(tiny_dataset(4), tiny_tokenizer(), 16)
    rows = JoinedRows(labelled, SpooledRows(read(TEXTS), [3, 1]))
    assert len(rows) == 6
    assert rows.lengths.tolist() == [len(rows[row]["input_ids"]) for row in range(6)]
    assert rows.labels.tolist() == [*labelled.labels.tolist(), 0, 0]
    assert rows[3] == labelled[3]
    assert rows[5] == {**read(TEXTS).item(1), "labels": 0, "index": 5}


def test_a_fingerprint_is_of_all_texts_in_their_order() -> None:
    prints = {read(texts).fingerprint() for texts in (TEXTS, TEXTS[::-1], TEXTS[:-1], [*TEXTS, ("y",)])}
    assert len(prints) == 4
    assert read(TEXTS).fingerprint() in prints


def test_strings_are_texts_and_not_their_letters() -> None:
    tuples = SpooledTexts.read([("film",), ("good",)], tiny_tokenizer(), 32, source="s")
    strings = SpooledTexts.read(["film", "good"], tiny_tokenizer(), 32, source="s")
    assert strings.fingerprint() == tuples.fingerprint()
    assert strings.text(1) == ("good",)
    with pytest.raises(ValueError, match=r"must be tuples of one text or two, got a string"):
        encode_texts(cast(Any, ["film", "good"]), tiny_tokenizer(), 32)


def test_pairs_far_behind_single_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooled, "READ_AT_ONCE", 2)
    texts = [("a",), ("b",), ("c", "d")]
    with pytest.raises(
        DataError, match="s, row 3: Rows must be all single texts or all pairs, got a pair where"
    ):
        SpooledTexts.read(texts, tiny_tokenizer(), 32, source="s")


def test_some_of_the_rows_are_a_data_set() -> None:
    found = read(TEXTS)
    rows = SpooledRows(found, [3, 1])
    assert len(rows) == 2
    assert rows[1] == {**found.item(1), "labels": 0, "index": 1}
    assert rows.lengths.tolist() == found.lengths[[3, 1]].tolist()
    assert rows.num_truncated == int(found.cut[[3, 1]].sum()) == 1
    assert rows.text(0) == TEXTS[3]


def test_nothing_and_what_has_no_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a list holds no text\. Give files with texts\."):
        read([])
