"""What the golden runs work on: tiny random backbones with tokenizers, and rows. Knows nothing of this package."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

SETTINGS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("golden_settings.yaml").read_text(encoding="utf-8")
)
NEUTRAL = ["the", "a", "film", "plot", "actor", "scene", "is", "was", "and", "of", "it", "this"]
NEGATIVE = ["bad", "dull", "awful", "boring", "dreadful", "lame"]
POSITIVE = ["good", "fine", "great", "lovely", "superb", "funny"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-:;\"()"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 1,
}


def encoder_folder(folder: Path, model_type: str = "bert") -> Path:
    """A saved random encoder with a WordPiece tokenizer that falls back on letters."""
    special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    words = [*special.values(), *NEUTRAL, *NEGATIVE, *POSITIVE, *LETTERS, *("##" + c for c in LETTERS[:36])]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    if model_type not in ("bert", "albert", "electra", "deberta-v2"):
        inputs.remove("token_type_ids")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **special
    ).save_pretrained(folder)
    values = {"vocab_size": len(vocabulary), "max_position_embeddings": 80, "initializer_range": 0.1}
    torch.manual_seed(0)
    AutoModel.from_config(_config("classifier", model_type, values)).save_pretrained(folder)
    return folder


def decoder_folder(folder: Path, model_type: str = "llama", initializer_range: float = 0.1) -> Path:
    """A saved random decoder with a tokenizer of bytes."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    symbols = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    values = {"vocab_size": len(symbols), "max_position_embeddings": 256, "tie_word_embeddings": True}
    values |= {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": initializer_range}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_config("generator", model_type, values)).save_pretrained(folder)
    return folder


def _config(kind: str, model_type: str, values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **(SIZES | values | SETTINGS[kind]["backbones"][model_type]))


def labelled_rows(count: int, seed: int, *, pairs: bool = False) -> tuple[list[tuple[str, ...]], list[int]]:
    """Sentences, or pairs of them, with words that mostly give the class away; one label in twelve is wrong."""
    rng = random.Random(seed)
    texts: list[tuple[str, ...]] = []
    labels: list[int] = []
    for _ in range(count):
        label = int(rng.random() < 0.6)
        words = rng.choices(NEUTRAL, k=rng.randint(1, 12))
        words += rng.choices((NEGATIVE, POSITIVE)[label], k=rng.randint(1, 3))
        if rng.random() < 0.3:
            words += rng.choices(NEGATIVE + POSITIVE, k=2)
        rng.shuffle(words)
        second = " ".join(rng.choices(NEUTRAL, k=rng.randint(1, 5)))
        texts.append((" ".join(words), second) if pairs else (" ".join(words),))
        labels.append(1 - label if rng.random() < 1 / 12 else label)
    return texts, labels


def instruction_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Requests to say a row of letters, the next one one or two further on, with an input or without."""
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    for _ in range(count):
        start, step, length = rng.randrange(8), rng.choice([1, 2]), rng.randint(2, 9)
        said = "".join("abcdefgh"[(start + step * place) % 8] for place in range(length))
        prompt = f"from {said[0]} by {step}:"
        rows.append({"prompt": prompt, "input": rng.choice(["", "é twice"]), "response": said + "."})
    return rows
