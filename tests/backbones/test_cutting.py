"""A backbone cut down to its first layers gives what its first layers gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from consistentee.backbones.cutting import keep_first_layers, layers_of
from consistentee.backbones.encoders import (
    SUPPORTED_MODEL_TYPES,
    embed,
    encoder_layers,
    load_backbone,
    num_layers,
    run_layer,
)
from consistentee.errors import SettingError
from tiny import tiny_backbone


def states(backbone: torch.nn.Module, count: int) -> list[torch.Tensor]:
    ids = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7])
    state, found = embed(backbone, ids, mask), []
    for index in range(count):
        state = run_layer(backbone, index, state)
        found.append(state.hidden_states)
    return found


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_the_first_layers_are_what_they_were(model_type: str, tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "whole", model_type, layers=4)
    assert layers_of(folder) == 4
    whole, cut = load_backbone(folder).eval(), load_backbone(folder).eval()
    keep_first_layers(cut, 2)
    assert num_layers(cut) == 2
    assert len(encoder_layers(cut)) == (1 if model_type == "albert" else 2)
    with torch.no_grad():
        expected, found = states(whole, 2), states(cut, 2)
        if model_type == "modernbert":  # its final norm follows the last layer that is left
            expected[-1] = whole.get_submodule("final_norm")(expected[-1])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        cut.save_pretrained(tmp_path / "cut")
        opened = AutoModel.from_pretrained(tmp_path / "cut").eval()
        torch.testing.assert_close(states(opened, 2), found, rtol=0, atol=0)
    assert layers_of(tmp_path / "cut") == 2


@pytest.mark.parametrize("count", [0, 4])
def test_there_must_be_as_many_layers(count: int, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_backbone(tmp_path))
    with pytest.raises(
        SettingError, match=rf"^num_layers must be in \[1, 3\], the layers of the backbone, got {count}\.$"
    ):
        keep_first_layers(backbone, count)


def test_groups_of_albert_stay_whole(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path, "albert", layers=4, num_hidden_groups=2)
    whole, cut = load_backbone(folder).eval(), load_backbone(folder).eval()
    keep_first_layers(cut, 2)
    with torch.no_grad():
        torch.testing.assert_close(states(cut, 2), states(whole, 2), rtol=0, atol=0)
    with pytest.raises(SettingError, match=r"num_layers must be a multiple of 2 for this backbone.*got 3"):
        keep_first_layers(whole, 3)
