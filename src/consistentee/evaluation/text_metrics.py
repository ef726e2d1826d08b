"""Metrics of generated text against references: ROUGE, BLEU and BERTScore, all from 0 to 1; extra `generation`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from consistentee.backbones.encoders import architecture_of, load_backbone
from consistentee.backbones.limits import longest_input
from consistentee.backbones.loading import load_config, load_tokenizer
from consistentee.data.literal import take_literally
from consistentee.errors import require_extra

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
ROUGE_MODULE, BLEU_MODULE = "rouge_score.rouge_scorer", "sacrebleu"


def check_text_metrics(bertscore_model: str | Path | None = None) -> None:
    """See that `text_metrics` will have what it needs, before texts are generated for it, which takes long.

    Args:
        bertscore_model: as of `text_metrics`.

    Raises:
        MissingExtraError, FileNotFoundError, OSError, ValueError: as `text_metrics`, about packages and the encoder.
    """
    for module in (ROUGE_MODULE, BLEU_MODULE):
        require_extra("generation", module)
    if bertscore_model is not None:
        architecture_of(load_config(bertscore_model))
        load_tokenizer(bertscore_model)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE of words, pairs of words and the longest common subsequence, averaged over the rows.

    Words are lower-cased and stemmed (Porter). Only a-z and 0-9 count, as in the package `rouge-score`: a text in
    another script scores 0.

    Args:
        predictions: (rows,) generated texts; an empty one scores 0.
        references: (rows,) the text each is compared with.

    Returns:
        `rouge1`, `rouge2` and `rougeL`: the mean F-measure, in [0, 1].

    Raises:
        MissingExtraError: rouge-score is not installed.
        ValueError: the lists are empty or of unequal length.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. Difference: none of its
    bootstrapped intervals.
    """
    _check_pairs(predictions, references)
    scorer = require_extra("generation", ROUGE_MODULE).RougeScorer(ROUGE_NAMES, use_stemmer=True)
    totals = dict.fromkeys(ROUGE_NAMES, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(reference, prediction)
        for name in ROUGE_NAMES:
            totals[name] += float(scores[name].fmeasure)
    return {name: total / len(predictions) for name, total in totals.items()}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the whole corpus with one reference for each row, as `sacrebleu` computes it (tokens "13a").

    Args:
        predictions: (rows,) generated texts.
        references: (rows,) the text each is compared with.

    Returns:
        A number in [0, 1], a hundredth of what sacrebleu shows; 0 where no prediction has four words.

    Raises:
        MissingExtraError: sacrebleu is not installed.
        ValueError: the lists are empty or of unequal length.

    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002; Post,
    arXiv:1804.08771 (how its tokens are made). Difference: the scale.
    """
    _check_pairs(predictions, references)
    score = require_extra("generation", BLEU_MODULE).corpus_bleu(list(predictions), [list(references)]).score
    return min(float(score) / 100, 1.0)  # sacrebleu's best is 100 and some rounding


@torch.no_grad()
def bertscore(
    predictions: Sequence[str],
    references: Sequence[str],
    model: str | Path,
    *,
    num_layers: int | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> float:
    """BERTScore: how well the tokens of two texts match, one by one, in the states of an encoder.

    Every token of one text is matched with the most similar token of the other (cosine of their states). The mean
    over the prediction's tokens is the precision P, the mean over the reference's the recall R.

    Args:
        predictions: (rows,) generated texts; an empty one scores 0.
        references: (rows,) the text each is compared with.
        model: folder or hub name of a supported encoder with its tokenizer.
        num_layers: the states after this many layers are compared; None takes the last. Published figures use
            17 of `roberta-large` and 9 of `bert-base-uncased`; figures of different models do not compare.
        batch_size: rows per step; does not change the result.
        device: where the encoder runs.

    Returns:
        F = 2PR / (P + R), averaged over the rows, at most 1. Texts that have nothing in common score well above 0.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks its config, its weights or its tokenizer.
        OSError: the hub has no such model, or a file cannot be read.
        ValueError: the encoder is not supported or has fewer layers, or the lists are empty or of unequal length.

    Source: Zhang et al., arXiv:1904.09675, eq. 1-3 and section 3. Differences: no weights by inverse document
    frequency, no rescaling by a baseline. As in the authors' package the tokens that frame a text ([CLS], [SEP])
    may be matched and are not counted.
    """
    _check_pairs(predictions, references)
    encoder: Any = load_backbone(model)
    encoder.to(device).eval()
    depth = int(encoder.config.num_hidden_layers)
    layer = depth if num_layers is None else num_layers
    if not 1 <= layer <= depth:
        raise ValueError(
            f'num_layers must be from 1 to {depth}, the layers of "{model}", got {num_layers}. '
            "Leave it out for the last layer."
        )
    tokenizer = load_tokenizer(model)
    take_literally(tokenizer)
    total = 0.0
    for start in range(0, len(predictions), batch_size):
        rows = slice(start, start + batch_size)
        candidate, candidate_mask, candidate_weight = _states(predictions[rows], encoder, tokenizer, layer)
        reference, reference_mask, reference_weight = _states(references[rows], encoder, tokenizer, layer)
        similarity = candidate @ reference.transpose(1, 2)  # (rows, candidate tokens, reference tokens)
        to_reference = similarity.masked_fill(~reference_mask[:, None, :], -torch.inf).amax(2)
        to_candidate = similarity.masked_fill(~candidate_mask[:, :, None], -torch.inf).amax(1)
        precision = _weighted_mean(to_reference, candidate_weight)  # (rows,)
        recall = _weighted_mean(to_candidate, reference_weight)  # (rows,)
        positive = (precision > 0) & (recall > 0)
        total += float((2 * precision * recall / (precision + recall))[positive].double().sum())
    return total / len(predictions)


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """All metrics of generated text.

    Args:
        predictions: (rows,) generated texts.
        references: (rows,) the text each is compared with.
        bertscore_model: folder or hub name of the encoder that BERTScore needs; None leaves BERTScore out.
        device: where that encoder runs.

    Returns:
        `rouge1`, `rouge2`, `rougeL`, `bleu` and, with a model, `bertscore`, each from 0 to 1.

    Raises:
        MissingExtraError: rouge-score or sacrebleu is not installed.
        FileNotFoundError: the folder of BERTScore's encoder is not there or not whole.
        OSError: the hub has no such encoder, or a file cannot be read.
        ValueError: the lists are empty or of unequal length, or the encoder is not supported.
    """
    metrics = {**rouge(predictions, references), "bleu": bleu(predictions, references)}
    if bertscore_model is not None:
        metrics["bertscore"] = bertscore(predictions, references, bertscore_model, device=device)
    return metrics


def _states(texts: Sequence[str], encoder: Any, tokenizer: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """States of unit length (rows, tokens, hidden), where a token is, and what it weighs: 1, or 0 for framing."""
    batch = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=min(int(tokenizer.model_max_length), longest_input(encoder.config) or 512, 512),
        return_special_tokens_mask=True,
        return_tensors="pt",
    ).to(encoder.device)
    special = batch.pop("special_tokens_mask").bool()  # (rows, tokens), padding too
    states = encoder(**batch, output_hidden_states=True).hidden_states[layer]
    mask = batch["attention_mask"].bool()
    return normalize(states.float(), dim=-1), mask, (mask & ~special).float()


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over tokens, 0 where none counts; padding's values may be anything, infinite included."""
    return values.masked_fill(weight == 0, 0).sum(1) / weight.sum(1).clamp(min=1)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts, got one text. Put it into a list.")
    if len(predictions) != len(references):
        raise ValueError(
            "predictions and references must be of equal length, "
            f"got {len(predictions)} and {len(references)}. Give one reference for each prediction."
        )
    if not len(predictions):
        raise ValueError("predictions and references must hold at least one text, got none.")
