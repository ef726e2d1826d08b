"""Folders of tiny text generators, one token a byte, that tests open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consistentee.data.rows import InstructionDataset
from consistentee.data.templates import PromptTemplate
from tiny_decoders import tiny_decoder, tiny_exit_model
from tiny_tokenizers import byte_tokenizer

BYTES = {"vocab_size": 258, "max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 1}
TEMPLATE = PromptTemplate("short", "<{instruction}|{input}>", "<{instruction}>")


def generator_folder(folder: Path, **exit_values: Any) -> Path:
    """A saved early-exit model with a tokenizer."""
    values = {"prompt_template": TEMPLATE.to_dict(), "max_sequence_length": 64, **exit_values}
    tiny_exit_model("llama", exit_values=values, **BYTES).save_pretrained(folder)
    byte_tokenizer(begin=True).save_pretrained(folder)
    return folder


def plain_folder(folder: Path) -> Path:
    """A saved causal language model without exits: the same backbone."""
    tiny_decoder("llama", **BYTES).save_pretrained(folder)
    byte_tokenizer(begin=True).save_pretrained(folder)
    return folder


def tiny_rows(count: int) -> InstructionDataset:
    """Short instructions, some with an input, and short references."""
    return InstructionDataset(
        [f"do {row}" * (1 + row % 3) for row in range(count)],
        ["a, b" if row % 2 else "" for row in range(count)],
        [f"{row} très bien"[: 4 + row % 7] for row in range(count)],
        "tiny rows",
    )
