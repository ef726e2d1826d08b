"""Checkpoints: everything comes back bit for bit, and an interrupted write leaves the one before."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from consistentee.errors import DataError
from consistentee.training import checkpoints
from consistentee.training.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    remove_checkpoints,
    save_checkpoint,
    save_weights,
)


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after a few steps, so that its optimizer has something to remember."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, number: int, seed: int = 0, **progress: Any) -> dict[str, Tensor]:
    model, optimizer = trained(seed)
    state = {"optimizer": optimizer.state_dict(), "scaler": None}
    save_checkpoint(folder, number, weights=model.state_dict(), optimizer=state, progress=progress)
    return model.state_dict()


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path):
    model, optimizer = trained()
    progress = {"step": 12, "history": [{"score": 0.1 + 0.2}], "best_score": None, "name": "früh"}
    state = {"optimizer": optimizer.state_dict(), "scaler": None}
    save_checkpoint(tmp_path, 1, weights=model.state_dict(), optimizer=state, progress=progress)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    weights, loaded, same_progress = load_checkpoint(folder)
    assert same_progress == progress
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    # Training goes on from it as if nothing had happened.
    other, other_optimizer = trained(seed=1)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(loaded["optimizer"])
    batch = torch.randn(5, 4)
    for net, step in ((model, optimizer), (other, other_optimizer)):
        net(batch).square().sum().backward()
        step.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_is_kept_and_the_ones_before_go(tmp_path: Path):
    save(tmp_path, 9, step=9)
    save(tmp_path, 10, step=10)
    assert latest_checkpoint(tmp_path) == tmp_path / checkpoints.FOLDER / "000000010"
    assert [path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()] == ["000000010"]


def test_the_best_weights_outlive_the_checkpoints(tmp_path: Path):
    best = tmp_path / checkpoints.FOLDER / "best.safetensors"
    weights = trained()[0].state_dict()
    save_weights(best, weights)
    save(tmp_path, 1)
    save(tmp_path, 2)
    loaded = load_weights(best)
    assert all(torch.equal(value, loaded[name]) for name, value in weights.items())
    save_weights(best, {name: value + 1 for name, value in weights.items()})
    assert torch.equal(load_weights(best)["0.bias"], weights["0.bias"] + 1)
    assert sorted(path.name for path in best.parent.iterdir()) == ["000000002", "best.safetensors"]


def test_no_checkpoint_is_none(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / checkpoints.FOLDER).mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("broken_at", ["save_file", "write_json", "os.replace"])
def test_an_interrupted_write_leaves_the_checkpoint_before(
    broken_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1, step=1)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"consistentee.training.checkpoints.{broken_at}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, step=2)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    assert load_checkpoint(folder)[2] == {"step": 1}
    save(tmp_path, 2, step=2)  # and the next write clears up
    assert [path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()] == ["000000002"]


FULL = {
    "save_file": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8\nframe #0"),
    "write_json": OSError(errno.ENOSPC, "No space left on device"),
    "sync_tree": OSError(errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_is_said_to_be_one_and_leaves_the_checkpoint_before(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1, step=1)

    def fill(*_: Any, **__: Any) -> None:
        raise FULL[writer]

    monkeypatch.setattr(f"consistentee.training.checkpoints.{writer}", fill)
    said = r"consistentee-checkpoints could not be written to, [\d,]+ MB are free there: [^\n]+\. Make room, then go on"
    with pytest.raises(OSError, match=said):
        save(tmp_path, 2, step=2)
    assert [path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()] == ["000000001"]
    if writer == "save_file":
        with pytest.raises(OSError, match=r"with --resume \(compare and "):
            save_weights(tmp_path / "best.safetensors", {})
        assert not list(tmp_path.glob("best*"))


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("consistentee.training.checkpoints.torch.save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(tmp_path, 1)


def test_a_folder_without_progress_is_not_complete(tmp_path: Path):
    save(tmp_path, 1, step=1)
    (tmp_path / checkpoints.FOLDER / "000000007").mkdir()
    (tmp_path / checkpoints.FOLDER / "000000008.partial").mkdir()
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "000000001"


def test_weights_that_share_memory_are_saved(tmp_path: Path):
    layer = torch.randn(3, 3)
    weights = {"one": layer, "same": layer, "turned": layer.T}
    save_checkpoint(tmp_path, 1, weights=weights, optimizer={}, progress={})
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    loaded = load_checkpoint(folder)[0]
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    save(tmp_path, 1)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    torch.save({"optimizer": Harmful()}, folder / "optimizer.pt")
    with pytest.raises(DataError, match=r"The checkpoint is broken \(Weights only load failed"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", checkpoints.CHECKPOINT_FILES)
def test_a_broken_checkpoint_is_named_wherever_it_was_cut_off(name: str, tmp_path: Path):
    save(tmp_path, 1, step=1)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    path = folder / name
    whole = path.read_bytes()
    ends = {0, 1, 4, 7, 8, 9, 30, 64, len(whole) // 2, len(whole) - 8, len(whole) - 1}
    for end in (end for end in sorted(ends) if end < len(whole.rstrip())):
        path.write_bytes(whole[:end])
        with pytest.raises(
            DataError, match=rf"{name}: The checkpoint is broken \(.+\)\. .* remove .*000000001: the run"
        ):
            load_checkpoint(folder)
    path.unlink()
    if name != checkpoints.PROGRESS:
        with pytest.raises(DataError, match=r"is broken \(.*No such file.* remove"):
            load_checkpoint(folder)


def test_weights_whose_writing_was_killed_do_not_pile_up(tmp_path: Path):
    save(tmp_path, 1)
    own = tmp_path / checkpoints.FOLDER
    unfinished = [own / "000000002.partial" / ".tmpX2dmz8", own / ".tmpdytkr0"]
    unfinished[0].parent.mkdir()
    for path in unfinished:
        path.write_bytes(b"half")
    save(tmp_path, 2)
    assert sorted(path.name for path in own.rglob("*")) == [
        ".tmpdytkr0",
        "000000002",
        *sorted(checkpoints.CHECKPOINT_FILES),
    ]
    save_weights(own / checkpoints.BEST, {})
    assert not unfinished[1].exists()
    checkpoints.write_marker(tmp_path, ["model.safetensors"])
    (own / checkpoints.STAGING).mkdir()
    for path in (
        own / ".tmpAAAAAA",
        own / "000000002" / ".tmpBBBBBB",
        own / checkpoints.STAGING / ".tmpCCCCCC",
    ):
        path.write_bytes(b"half")
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_removal_was_interrupted_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    unlink = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path)
    assert checkpoints.latest_checkpoint(tmp_path) is None


def test_remove_checkpoints(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "model.safetensors").write_bytes(b"")
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    remove_checkpoints(tmp_path)
