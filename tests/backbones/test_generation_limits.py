"""Learned positions end: training, `generate` and texts keep to them, or say what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from consistentee.backbones import decoders
from consistentee.errors import UsageError
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.generator import TextGenerator
from consistentee.training.train import finetune, train
from saved_generators import BYTES, TEMPLATE, tiny_rows
from tiny_decoders import tiny_decoder, tiny_exit_model
from tiny_tokenizers import byte_tokenizer
from tiny_training import quick_generation_config

POSITIONS = 40

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["early-exit", "full"])
def test_generate_runs_to_the_last_position_and_no_further(mode: str) -> None:
    model = tiny_exit_model("gpt2", max_position_embeddings=POSITIONS)
    prompt = torch.randint(2, 90, (2, 9))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    for rows in (slice(0, 2), slice(0, 1)):  # the second alone is two tokens shorter
        given: Any = {"attention_mask": mask[rows], "do_sample": False, "mode": mode}
        most = POSITIONS + 1 - int(mask[rows].sum(1).max())  # the last token of a text is never read
        assert model.generate(prompt[rows], max_new_tokens=most, **given).shape[1] == 9 + most
        with pytest.raises(ValueError, match="must fit into the 40 positions that the model knows"):
            model.generate(prompt[rows], max_new_tokens=most + 1, **given)
    with pytest.raises(ValueError, match="must fit into the 40 positions that the model knows, got 41"):
        model.generate(torch.full((1, 41), 5), max_new_tokens=1)


def test_rotary_positions_do_not_end() -> None:
    model = tiny_exit_model("llama", max_position_embeddings=POSITIONS)
    assert model.generate(torch.full((1, 41), 5), max_new_tokens=8, do_sample=False).shape == (1, 49)


def test_given_texts_keep_to_the_positions() -> None:
    model = tiny_decoder("gpt2", max_position_embeddings=POSITIONS)
    decoders.decoder_state(model, torch.full((1, POSITIONS), 5))
    padded = torch.ones(1, POSITIONS + 3)
    padded[:, :3] = 0
    decoders.decoder_state(model, torch.full((1, POSITIONS + 3), 5), padded)
    with pytest.raises(ValueError, match="at most 40 tokens a row, the positions of the model, got 41"):
        decoders.decoder_state(model, torch.full((1, POSITIONS + 1), 5))


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    tiny_decoder("gpt2", **{**BYTES, "max_position_embeddings": POSITIONS}).save_pretrained(folder)
    byte_tokenizer(begin=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("learn", [train, finetune])
def test_training_refuses_a_length_without_positions(tmp_path: Path, backbone: Path, learn: Any) -> None:
    given: Any = {"backbone": backbone, "train_data": tiny_rows(12), "output_dir": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"max_length must be at most 40, .*, got 41"):
        learn(**given, config=quick_generation_config(max_length=41))
    tokenizer = byte_tokenizer(begin=True)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(backbone)
    with pytest.raises(ValueError, match=r"must have at most 258 entries.* got 259"):
        learn(**given, config=quick_generation_config(max_length=40))


def test_a_tokenizer_that_does_not_fit_is_refused(backbone: Path) -> None:
    tokenizer = byte_tokenizer(begin=True)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(backbone)
    with pytest.raises(ValueError, match=r"must have at most 258 entries.* got 259"):
        load_model(backbone, LoadedGenerator, device="cpu")


def test_texts_keep_to_the_positions(backbone: Path) -> None:
    generator = TextGenerator(load_model(backbone, LoadedGenerator, device="cpu"), template=TEMPLATE)
    for new in (5, 36):
        (text,) = generator.generate_texts([("sum up", "word " * 60)], max_new_tokens=new)
        assert 0 < len(text.token_ids) <= new
    with pytest.raises(ValueError, match="max_new_tokens must be below the 40 tokens"):
        generator.generate_texts([("a", "")], max_new_tokens=40)


@pytest.mark.parametrize("learn", [train, finetune])
def test_a_training_saves_its_positions_with_the_tokenizer(
    tmp_path: Path, backbone: Path, learn: Any
) -> None:
    """Hugging Face's pipeline then leaves out what has no room, where it is asked to."""
    config = quick_generation_config(rounds=0, max_length=32)
    folder = learn(backbone=backbone, train_data=tiny_rows(12), output_dir=tmp_path / "run", config=config)
    write: Any = pipeline("text-generation", model=str(folder), device="cpu")
    assert write.tokenizer.model_max_length == POSITIONS
    given: Any = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    short, long = "word " * 7, "word " * 400  # 35 tokens and 5 new ones are the model's 40
    cut = write(long, handle_long_generation="hole", **given)
    assert cut == write(short, add_special_tokens=False, **given)
    if learn is train:
        with pytest.raises(ValueError, match="must fit into the 40 positions that the model knows, got 2001"):
            write(long, **given)
