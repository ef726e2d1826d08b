"""Tiny models and data for tests: a random encoder with a tokenizer, texts whose class can be told, saved models."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from consistentee.backbones.encoders import build_backbone, embed, num_layers, run_layer
from consistentee.data.rows import TextDataset
from consistentee.heads.exit_signals import LearntToExit
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)

SPECIAL = ("[CLS]", "[PAD]", "[SEP]", "[UNK]")  # padding at 1, from where roberta and its kin count positions
POSITIVE = ("good", "fine", "great", "lovely", "superb", "charming", "funny", "warm")
NEGATIVE = ("bad", "dull", "awful", "boring", "dreadful", "lame", "bland", "flat")
NEUTRAL = (
    "the",
    "a",
    "film",
    "movie",
    "plot",
    "actor",
    "scene",
    "is",
    "was",
    "and",
    "of",
    "it",
    "this",
    "very",
)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-:;\"()")
LABEL_NAMES = ("negative", "positive")

_PARTICULAR: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": None, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "modernbert": {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2},
}
_NO_TOKEN_TYPES = ("roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "modernbert")


def tiny_tokenizer(model_type: str = "bert", max_length: int = 64) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of about a hundred words and letters that falls back on letters."""
    words = [
        *dict.fromkeys((*SPECIAL, *POSITIVE, *NEGATIVE, *NEUTRAL, *LETTERS)),
        *("##" + c for c in LETTERS[:36]),
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=max_length,
        model_input_names=names
        if model_type in _NO_TOKEN_TYPES
        else ["input_ids", "token_type_ids", *names[1:]],
    )


def tiny_backbone(
    folder: Path, model_type: str = "bert", layers: int = 3, seed: int = 0, **config_values: Any
) -> Path:
    """Save a random encoder with its tokenizer: 32 wide, a few layers, dropout off.

    Args:
        folder: where it is saved; made if missing.
        model_type: one of the supported types.
        layers: number of layers.
        seed: same seed, same weights; torch's generator is left as it was.
        **config_values: further fields of the Hugging Face config.

    Returns:
        The folder.
    """
    config = tiny_config(model_type, layers, **config_values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(config)
    save(backbone, tiny_tokenizer(model_type), folder)
    return folder


def tiny_config(model_type: str, layers: int, **config_values: Any) -> Any:
    """The Hugging Face config of `tiny_backbone`."""
    tokenizer = tiny_tokenizer(model_type)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
        **_PARTICULAR.get(model_type, {}),
        **config_values,
    }
    if "n_layers" in values:
        values["n_layers"] = layers
    return AutoConfig.for_model(model_type, **values)


def tiny_classifier(
    folder: Path, model_type: str = "bert", layers: int = 4, seed: int = 0, **config_values: Any
) -> Path:
    """Save a random Hugging Face classifier with its tokenizer, sharp enough to have opinions; arguments as above."""
    values = {"id2label": dict(enumerate(LABEL_NAMES)), **config_values}
    if "num_labels" in config_values:
        del values["id2label"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(tiny_config(model_type, layers, **values))
    save(model, tiny_tokenizer(model_type), folder)
    return folder


def tiny_dataset(rows: int = 64, seed: int = 0) -> TextDataset:
    """Sentences of a few neutral words and one or two that give the class away; balanced, shuffled."""
    rng = random.Random(seed)
    texts: list[tuple[str, ...]] = []
    labels = [row % 2 for row in range(rows)]
    rng.shuffle(labels)
    for label in labels:
        words = rng.choices(NEUTRAL, k=rng.randint(2, 8)) + rng.choices(
            (NEGATIVE, POSITIVE)[label], k=rng.randint(1, 2)
        )
        rng.shuffle(words)
        texts.append((" ".join(words),))
    return TextDataset(texts, labels, LABEL_NAMES, f"tiny_dataset({rows}, {seed})")


def write_csv(path: Path, dataset: TextDataset) -> Path:
    """Write a data set as CSV with the columns text (or text_a and text_b) and label, labels by name."""
    columns = ("text",) if len(dataset.texts[0]) == 1 else ("text_a", "text_b")
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow((*columns, "label"))
        for texts, label in zip(dataset.texts, dataset.labels, strict=True):
            writer.writerow((*texts, dataset.label_names[label]))
    return path


def tiny_model(folder: Path, backbone: Path, **config_values: Any) -> Path:
    """Save an early-exit model with random heads and policy on a backbone folder, with its tokenizer."""
    model = EarlyExitForSequenceClassification.from_backbone(
        backbone, **{"label_names": LABEL_NAMES, "max_length": 64, **config_values}
    )
    unsettle(model)
    save(model, PreTrainedTokenizerFast.from_pretrained(backbone), folder)
    return folder


def unsettle(model: EarlyExitForSequenceClassification) -> None:
    """Give random weights to what a policy begins with at zero, and let confidence weigh little: exits everywhere."""
    policy: Any = model.policy
    with torch.no_grad():
        if policy.reads_log_odds:
            policy.confidence_weight.fill_(0.1)
        if policy.reads_signals:
            policy.confidence_weight.zero_()
            policy.signal_output.weight.normal_(std=0.3)
        if "state" in policy.policy_input:
            policy.state_output.normal_()


def fit_at_random(model: EarlyExitForSequenceClassification) -> None:
    """Give a model what training fits for some criteria, of no meaning."""
    network = LearntToExit(model.config.pooled_size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network.weight.normal_()
        network.bias.normal_()
    numbers = torch.linspace(0.5, 2.0, model.num_layers).tolist()
    model.set_fitted(temperatures=numbers, layer_weights=numbers[::-1], learnt_to_exit=network)


def random_signals(rows: int, layers: int, classes: int) -> dict[str, torch.Tensor]:
    """What criteria read beside predictions and exit probabilities."""
    return {
        "classifier_logits": torch.randn(rows, layers, classes),
        "temperatures": torch.linspace(0.5, 2.0, layers).expand(rows, -1),
        "layer_weights": torch.linspace(0.9, 0.5, layers).expand(rows, -1),
        "right_probs": torch.rand(rows, layers),
        "null_shares": torch.rand(rows, layers),
    }


def tiny_full_depth_model(folder: Path, backbone: Path, **config_values: Any) -> Path:
    """Save a plain model with a random head on a backbone folder, with its tokenizer; returns the folder."""
    model = FullDepthForSequenceClassification.from_backbone(
        backbone, **{"label_names": LABEL_NAMES, "max_length": 64, **config_values}
    )
    save(model, PreTrainedTokenizerFast.from_pretrained(backbone), folder)
    return folder


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer without a progress bar."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def all_hidden_states(
    backbone: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run every layer and give the hidden states after each; the arguments are those of `embed`.

    Returns:
        One (batch, tokens, hidden) tensor per layer, first layer first.
    """
    state = embed(backbone, input_ids, attention_mask, token_type_ids)
    states: list[torch.Tensor] = []
    for layer_index in range(num_layers(backbone)):
        state = run_layer(backbone, layer_index, state)
        states.append(state.hidden_states)
    return tuple(states)
