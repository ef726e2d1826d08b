"""What our classes open, what they are made of, and what they say about anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from tiny import tiny_backbone, tiny_classifier, tiny_full_depth_model, tiny_model
from tiny_decoders import tiny_decoder

CLASSES = (EarlyExitForSequenceClassification, FullDepthForSequenceClassification, EarlyExitForCausalLM)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    backbone = tiny_backbone(root / "bert")
    tiny_decoder("llama").save_pretrained(root / "llama")
    return {
        "bert": backbone,
        "exits": tiny_model(root / "exits", backbone),
        "plain": tiny_full_depth_model(root / "plain", backbone),
        "classifier": tiny_classifier(root / "classifier"),
        "llama": root / "llama",
    }


@pytest.mark.parametrize(
    "model_class, folder, message",
    [
        (
            0,
            "plain",
            '"consistentee" here, got "consistentee_full_depth". Open it with FullDepthForSequenceCl',
        ),
        (
            0,
            "bert",
            r'"consistentee" here, got "bert". Make one of it with .*Classification.from_backbone\(\), or ',
        ),
        (
            1,
            "exits",
            '"consistentee_full_depth" here, got "consistentee". Open it with EarlyExitForSequenceCl',
        ),
        (1, "bert", r"got .bert.. Make one of it with FullDepthForSequenceClassification.from_backbone\(\)"),
        (2, "llama", r"got .llama.. Make one of it with EarlyExitForCausalLM.from_backbone\(\)"),
        (2, "exits", "got .consistentee.. Open it with EarlyExitForSequenceClassification"),
    ],
)
def test_other_types_are_refused(
    folders: dict[str, Path], model_class: int, folder: str, message: str
) -> None:
    opened: Any = CLASSES[model_class]
    with pytest.raises(ValueError, match=message):
        opened.from_pretrained(folders[folder])
    with pytest.raises(ValueError, match=message):
        opened.from_pretrained(str(folders[folder]), num_labels=2)


def test_a_given_configuration_counts(folders: dict[str, Path]) -> None:
    config = EarlyExitConfig.from_pretrained(folders["exits"], threshold=0.9)
    model = EarlyExitForSequenceClassification.from_pretrained(folders["exits"], config=config)
    assert model.config.threshold == 0.9


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "num_querys",
            'fields of EarlyExitConfig or options of opening a model, got "num_querys". Did you mean "num_qu',
        ),
        ("revison", 'got "revison". Did you mean "revision"'),
        ("xyzzy", 'got "xyzzy".$'),
    ],
)
def test_unknown_keywords_are_refused(folders: dict[str, Path], name: str, message: str) -> None:
    values: dict[str, Any] = {name: 7}
    with pytest.raises(ValueError, match=message):
        EarlyExitForSequenceClassification.from_backbone(folders["bert"], num_labels=2, **values)
    with pytest.raises(ValueError, match=message):
        EarlyExitForSequenceClassification.from_classifier(folders["classifier"], **values)
    with pytest.raises(ValueError, match=f'got "{name}"'):
        EarlyExitForCausalLM.from_backbone(folders["llama"], **values)


def test_a_plain_model_has_no_exit_rule(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r'fields of FullDepthConfig or .* got "threshold"'):
        FullDepthForSequenceClassification.from_backbone(folders["bert"], num_labels=2, threshold=0.5)


def made(kind: str, folders: dict[str, Path], **options: Any) -> Any:
    if kind == "classifier":
        return EarlyExitForSequenceClassification.from_classifier(folders[kind], **options)
    if kind == "llama":
        return EarlyExitForCausalLM.from_backbone(folders[kind], **options)
    return EarlyExitForSequenceClassification.from_backbone(folders[kind], num_labels=2, **options)


@pytest.mark.parametrize("kind", ["bert", "classifier", "llama"])
def test_options_of_opening_reach_what_is_opened(folders: dict[str, Path], kind: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        model = made(kind, folders, **options)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(model(input_ids=ids).logits).all()
    model = made(kind, folders, attn_implementation="eager")
    assert model.config._attn_implementation == model.backbone.config._attn_implementation == "eager"
    assert {weight.dtype for weight in made(kind, folders).parameters()} == {torch.float32}
    inside = made(kind, {kind: folders[kind].parent}, subfolder=folders[kind].name, cache_dir="/nowhere")
    assert inside.num_layers == model.num_layers


def test_options_of_opening_do_not_go_with_an_open_model(folders: dict[str, Path]) -> None:
    backbone = made("llama", folders).backbone
    with pytest.raises(ValueError, match="dtype must not be given beside a model, which is open already"):
        EarlyExitForCausalLM.from_backbone(backbone, dtype=torch.bfloat16)
