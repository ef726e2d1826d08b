"""ROUGE and BLEU against figures worked out by hand, BERTScore against one pair and one token at a time."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from consistentee.errors import MissingExtraError
from consistentee.evaluation.text_metrics import bertscore, bleu, check_text_metrics, rouge, text_metrics
from tiny import tiny_backbone
from tiny_decoders import tiny_decoder

PREDICTIONS = ["the film is good", "a bad plot", "it was very very dull and the actor was lame", "funny"]
REFERENCES = ["the movie is great fun", "a bad plot", "the scene was boring", "this warm and charming film"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("encoder"), layers=3)


def test_rouge_by_hand() -> None:
    scores = rouge(["the cat sat on the mat"], ["the cat lay on a mat"])
    # Words: the, cat, on, mat of 6 and 6. Pairs: "the cat" of 5 and 5. In order: the cat on mat.
    assert scores == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6})


def test_rouge_of_unequal_lengths_and_another_order() -> None:
    scores = rouge(["mat cat"], ["cat one mat two"])
    # Precision 2/2, recall 2/4; in order only one word.
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 0.0, "rougeL": 2 * 0.5 * 0.25 / 0.75})


def test_rouge_stems_and_ignores_case() -> None:
    assert rouge(["Cats jumped"], ["cat jumps"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_rouge_is_the_mean_over_rows_and_an_empty_prediction_scores_0() -> None:
    assert rouge(["one two", ""], ["one two", "one two"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_bleu_by_hand() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours.
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_takes_off_for_short_predictions() -> None:
    assert bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(math.exp(1 - 6 / 4))


def test_bleu_counts_over_the_corpus() -> None:
    """Words 4 of 8, pairs 3 of 6, triples 2 of 4, fours 1 of 2: the mean over the rows would be another."""
    assert bleu(["a b c d", "q r s t"], ["a b c d", "e f g h"]) == pytest.approx(0.5)


def test_bleu_at_its_ends() -> None:
    assert bleu(["a b c d e"], ["a b c d e"]) == 1.0
    assert bleu([""], ["a b c d e"]) == 0.0


@pytest.mark.parametrize("num_layers", [1, 3])
def test_bertscore_is_that_of_one_pair_and_one_token_at_a_time(encoder: Path, num_layers: int) -> None:
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)

    def states(text: str) -> torch.Tensor:
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return output.hidden_states[num_layers][0]

    def best_matches(text: str, other: str) -> float:
        inner = states(text)[1:-1]  # the frame is not counted, and may be matched
        cosines = [max(float(torch.cosine_similarity(a, b, 0)) for b in states(other)) for a in inner]
        return sum(cosines) / len(cosines)

    expected = 0.0
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        precision, recall = best_matches(prediction, reference), best_matches(reference, prediction)
        expected += 2 * precision * recall / (precision + recall) / len(PREDICTIONS)
    assert expected < 0.99
    for batch_size in (1, 3, 32):
        found = bertscore(PREDICTIONS, REFERENCES, encoder, num_layers=num_layers, batch_size=batch_size)
        assert found == pytest.approx(expected, abs=1e-5)


def test_bertscore_at_its_ends(encoder: Path) -> None:
    assert bertscore(PREDICTIONS, PREDICTIONS, encoder) == pytest.approx(1.0, abs=1e-5)
    assert bertscore(["", "good film"], ["good film", "good film"], encoder) == pytest.approx(0.5, abs=1e-5)


def test_bertscore_cuts_long_texts(encoder: Path) -> None:
    assert bertscore(["good " * 200], ["good " * 300], encoder) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet", "distilbert"])
def test_bertscore_cuts_at_the_positions_that_there_are(model_type: str, tmp_path: Path) -> None:
    encoder = tiny_backbone(tmp_path, model_type, max_position_embeddings=80)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for longest in (None, 80, 512):  # none: a tokenizer that names no length
        settings["model_max_length"] = longest or 10**30
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        assert bertscore(["good " * 200], ["good " * 300], encoder) == pytest.approx(1.0, abs=1e-5)


def test_an_encoder_without_a_tokenizer_is_found_before_texts_are_written(
    encoder: Path, tmp_path: Path
) -> None:
    check_text_metrics(encoder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(encoder / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="has no tokenizer that knows any word"):
        check_text_metrics(tmp_path)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_bertscore_of_a_layer_that_is_not_there(encoder: Path, num_layers: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_layers must be from 1 to 3, .*, got {num_layers}\. Leave it out"
    ):
        bertscore(["a"], ["a"], encoder, num_layers=num_layers)


def test_text_metrics_are_all_of_them(encoder: Path) -> None:
    plain = text_metrics(PREDICTIONS, REFERENCES)
    assert plain == {**rouge(PREDICTIONS, REFERENCES), "bleu": bleu(PREDICTIONS, REFERENCES)}
    with_model = text_metrics(PREDICTIONS, REFERENCES, bertscore_model=encoder)
    assert with_model == {**plain, "bertscore": bertscore(PREDICTIONS, REFERENCES, encoder)}


@pytest.mark.parametrize("metric", [rouge, bleu, text_metrics, partial(bertscore, model="nowhere")])
def test_texts_that_do_not_pair(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"must be of equal length, got 1 and 2\. Give one reference"):
        metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="must hold at least one text, got none"):
        metric([], [])
    with pytest.raises(ValueError, match="references must be a list of texts, got one text"):
        metric(["a"], "a")


@pytest.mark.parametrize("metric, module", [(rouge, "rouge_score"), (bleu, "sacrebleu")])
def test_missing_extra_is_named(
    metric: Callable[..., object], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"consistentee\[generation\]"):
        metric(["a"], ["a"])
    with pytest.raises(MissingExtraError, match=rf"needs {module}.*consistentee\[generation\]"):
        check_text_metrics()


def test_encoders_are_looked_at_before_texts_are_made(encoder: Path, tmp_path: Path) -> None:
    check_text_metrics()
    check_text_metrics(encoder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_text_metrics(tmp_path / "nowhere")
    tiny_decoder("llama").save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match='type "llama" is not supported'):
        check_text_metrics(tmp_path / "decoder")
