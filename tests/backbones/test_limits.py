"""What fits: positions of every backbone, tokenizers that go with a model, and where misfits are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES, embed, load_backbone
from consistentee.backbones.limits import check_tokenizer, cut_message, longest_input, training_length
from consistentee.cli.main import main
from consistentee.data.rows import TextDataset
from consistentee.errors import UsageError
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model, write_csv

POSITIONS = 80
LONGEST = {"roberta": 78, "xlm-roberta": 78, "camembert": 78, "mpnet": 78, "modernbert": None}


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_longest_input_is_what_a_backbone_runs(tmp_path: Path, model_type: str) -> None:
    backbone = load_backbone(tiny_backbone(tmp_path, model_type)).eval()
    longest = longest_input(backbone.config)
    assert longest == LONGEST.get(model_type, POSITIONS)
    if longest is None:
        embed(backbone, torch.full((1, 500), 7))
        return
    with torch.no_grad():
        backbone(input_ids=torch.full((1, longest), 7))  # Hugging Face's own forward is the oracle
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=torch.full((1, longest + 1), 7))
        embed(backbone, torch.full((1, longest), 7))
        with pytest.raises(ValueError, match=f"at most {longest} tokens a row.*got {longest + 1}"):
            embed(backbone, torch.full((1, longest + 1), 7))


def test_relative_positions_have_no_end(tmp_path: Path) -> None:
    folder = tiny_backbone(
        tmp_path, "deberta-v2", position_biased_input=False, relative_attention=True, pos_att_type=["p2c"]
    )
    backbone = load_backbone(folder)
    assert longest_input(backbone.config) is None
    embed(backbone, torch.full((1, POSITIONS + 9), 7))


def test_padding_of_roberta_takes_no_position(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_backbone(tmp_path, "roberta"))
    ids, mask = torch.full((1, 90), 7), torch.ones(1, 90, dtype=torch.int64)
    ids[:, 78:], mask[:, 78:] = backbone.config.pad_token_id, 0
    embed(backbone, ids, mask)


def test_lengths_are_checked_by_name() -> None:
    def length(asked: int, model_type: str, **positions: int) -> int:
        backbone = AutoConfig.for_model(model_type, **positions)
        return training_length(asked, default=256, backbone=backbone, name="a-backbone")

    assert length(512, "roberta", max_position_embeddings=514) == 512
    with pytest.raises(UsageError, match='at most 512, the positions of backbone "a-backbone", got 513'):
        length(513, "roberta", max_position_embeddings=514)
    assert length(256, "gpt2", n_positions=100) == 100  # nobody asked for 256


@pytest.mark.parametrize("learn", [train, finetune])
@pytest.mark.parametrize("model_type, longest", [("roberta", 78), ("bert", 80)])
def test_training_refuses_a_length_without_positions(
    tmp_path: Path, learn: Any, model_type: str, longest: int
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", model_type)
    with pytest.raises(ValueError, match=f"max_length must be at most {longest}, .*, got {longest + 1}"):
        learn(
            backbone=backbone,
            train_data=tiny_dataset(16),
            output_dir=tmp_path / "run",
            config=quick_config(max_length=longest + 1),
        )


def training_command(folder: Path) -> list[str]:
    """`train` on a backbone in the folder."""
    data = write_csv(folder / "rows.csv", tiny_dataset(32))
    columns = ["--train-file", str(data), "--text-columns", "text", "--label-column", "label"]
    return ["train", "--backbone", str(folder / "backbone"), "--output-dir", str(folder / "run"), *columns]


def without_padding(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(
                json.dumps({k: v for k, v in values.items() if k != "pad_token"}), encoding="utf-8"
            )


def with_more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save_pretrained(folder)


MISFITS = [(without_padding, "must have a padding token"), (with_more_tokens, "resize_token_embeddings")]


@pytest.mark.parametrize("spoil, message", MISFITS)
def test_training_refuses_a_tokenizer_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    spoil(backbone)
    assert main(training_command(tmp_path)) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said


def test_a_length_that_does_not_fit_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_backbone(tmp_path / "backbone", "roberta")
    assert main([*training_command(tmp_path), "--max-length", "79"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "max_length must be at most 78" in said


@pytest.mark.parametrize("spoil, message", MISFITS)
def test_opening_refuses_a_tokenizer_that_does_not_fit(tmp_path: Path, spoil: Any, message: str) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    for folder in (
        tiny_model(tmp_path / "exits", backbone),
        tiny_full_depth_model(tmp_path / "plain", backbone),
    ):
        spoil(folder)
        for opened in (load_model, Engine.from_pretrained):
            with pytest.raises(ValueError, match=message):
                opened(folder, device="cpu")


def test_embeddings_that_were_resized_fit_again(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "exits", tiny_backbone(tmp_path / "backbone"))
    saved = load_model(folder, LoadedClassifier, device="cpu")
    before = Engine(saved).predict(["a good film"])
    saved.tokenizer.add_tokens(["zebra", "yak"])
    model: Any = saved.model
    model.resize_token_embeddings(len(saved.tokenizer))
    model.save_pretrained(folder)
    saved.tokenizer.save_pretrained(folder)
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.predict(["a good film"]) == before
    assert len(engine.predict(["a zebra", "a yak"])) == 2
    check_tokenizer(engine.saved.tokenizer, model.get_input_embeddings(), "x")


@pytest.mark.parametrize("model_type, longest", [("roberta", 78), ("bert", 80)])
def test_a_folder_with_a_greater_length_is_cut_to_what_fits(
    tmp_path: Path, model_type: str, longest: int
) -> None:
    """Such folders exist: a training on short texts never met the end."""
    backbone = tiny_backbone(tmp_path / "backbone", model_type)
    folder = tiny_model(tmp_path / "exits", backbone, max_length=200)
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.saved.max_length == longest
    long = TextDataset([("good " * 300,)], [1], ("negative", "positive"), "long")
    assert engine.predict([text for (text,) in long.texts])[0].label in long.label_names


def test_what_is_said_of_cuts() -> None:
    assert cut_message(1, 2000, "texts were longer than 128 tokens", "Do.") == (
        "1 of 2,000 texts were longer than 128 tokens and were cut. Do."
    )
