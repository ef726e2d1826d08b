"""What our classes open, and what they say about anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from tiny import tiny_backbone, tiny_full_depth_model, tiny_model
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
