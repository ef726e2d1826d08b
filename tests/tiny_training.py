"""Tiny causal language models with a byte tokenizer, and texts to train them on in a second or two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from consistentee.config import GenerationTrainingConfig
from consistentee.data.rows import InstructionDataset
from consistentee.models.causal_lm import EarlyExitForCausalLM

VOCABULARY = 258
QUICK: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 3e-3,
    "head_learning_rate": 3e-3,
    "backbone_training": "full",
    "validation_fraction": 0.4,
    "max_length": 48,
    "prompt_template": "plain",
    "warmup_epochs": 1.0,
    "consistent_epochs": 1.0,
    "layers_per_step": 1,
    "lora_rank": 2,
    "exit_head_rank": 2,
    "policy_hidden_size": 4,
    "policy_tokens": 150,
    "policy_epochs": 2,
    "policy_min_steps": 1,
    "policy_batch_size": 32,
    "logit_rows": 50,
    "mixed_precision": "no",
}


def quick_generation_config(**changes: Any) -> GenerationTrainingConfig:
    """Settings for a run of a few steps in full precision."""
    return GenerationTrainingConfig(**{**QUICK, **changes})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    symbols = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_decoder_config(model_type: str = "llama", layers: int = 3, **changes: Any) -> Any:
    """Configuration of a decoder with few, narrow layers."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model(model_type, **{**values, **changes})


def tiny_exit_model(
    layers: int = 3, exit_head: str = "shared", seed: int = 0, **changes: Any
) -> EarlyExitForCausalLM:
    """A random model with exits, in evaluation mode."""
    torch.manual_seed(seed)
    backbone = AutoModelForCausalLM.from_config(tiny_decoder_config(layers=layers, **changes))
    model = EarlyExitForCausalLM.from_backbone(
        backbone, exit_head=exit_head, exit_head_rank=2, policy_hidden_size=4, policy_dropout=0.0
    )
    with torch.no_grad():  # so that the exits differ from each other and from the last layer
        for parameter in model.exit_heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_decoder(folder: Path, **changes: Any) -> Path:
    """A saved random decoder with its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_decoder_config(**changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_instructions(rows: int = 30, seed: int = 0) -> InstructionDataset:
    """Requests to repeat a letter: easy, and of different lengths."""
    rng = random.Random(seed)
    letters = [rng.choice("abcd") for _ in range(rows)]
    times = [rng.randint(3, 12) for _ in range(rows)]
    return InstructionDataset(
        [f"say {letter}:" for letter in letters],
        [""] * rows,
        [letter * count for letter, count in zip(letters, times, strict=True)],
        "tiny",
    )


def tiny_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of three rows: a prompt each, and responses of 4, 2 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, VOCABULARY, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    labels = torch.full_like(input_ids, -100)
    labels[0, 3:] = input_ids[0, 3:]
    labels[1, 3:5] = input_ids[1, 3:5]
    labels[2, 5:6] = input_ids[2, 5:6]
    return input_ids, mask, labels
