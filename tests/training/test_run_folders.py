"""Output folders of both kinds of training: nothing of anybody else's is touched, no other run goes on there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consistentee.backbones.loading import backbone_fingerprint
from consistentee.cli.main import main
from consistentee.training import checkpoints
from consistentee.training.run_folders import check_output_dir
from consistentee.training.steps import OptimizerSteps
from consistentee.training.train import finetune, train
from quick import quick_config, weight_bytes
from tiny import tiny_backbone, tiny_dataset
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions


@dataclass
class Kind:
    """One of the four trainings, and what it needs."""

    how: Callable[..., Path]
    other_how: Callable[..., Path]
    backbone: Path
    data: Callable[..., Any]
    config: Callable[..., Any]
    other_backbone: Callable[[Path], Path]
    rows: int  # for three steps an epoch, of which there are two

    def run(self, output_dir: Path, **changes: Any) -> Path:
        options = {
            "backbone": self.backbone,
            "train_data": self.data(self.rows),
            "config": self.config(),
            **changes,
        }
        return changes.pop("how", self.how)(
            **{name: value for name, value in options.items() if name != "how"}, output_dir=output_dir
        )


HOWS = {
    "train": (train, finetune),
    "finetune": (finetune, train),
    "train_generation": (train, finetune),
    "finetune_generation": (finetune, train),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return tiny_backbone(root / "encoder", layers=2), tiny_decoder(root / "decoder", layers=2)


@pytest.fixture(params=HOWS)
def kind(request: pytest.FixtureRequest, backbones: tuple[Path, Path]) -> Kind:
    how, other = HOWS[request.param]
    if request.param.endswith("generation"):
        return Kind(
            how,
            other,
            backbones[1],
            tiny_instructions,
            quick_generation_config,
            lambda folder: tiny_decoder(folder, layers=2, initializer_range=0.3),
            30,
        )
    return Kind(
        how,
        other,
        backbones[0],
        tiny_dataset,
        quick_config,
        lambda folder: tiny_backbone(folder, layers=2, seed=1),
        80,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Folders of others.


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/000000001/progress.json", "training_record.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_others_is_refused_and_stays(kind: Kind, tmp_path: Path, name: str, resume: bool) -> None:
    folder = tmp_path / "folder"
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 3}', encoding="utf-8")
    with pytest.raises(
        FileExistsError, match=rf'holds "{Path(name).parts[0]}", which no run of consistentee left'
    ):
        kind.run(folder, resume=resume)
    assert contents(folder) == {name: b'{"step": 3}'}


def test_a_backbones_folder_is_refused_by_whatever_name(kind: Kind, tmp_path: Path) -> None:
    backbone = shutil.copytree(kind.backbone, tmp_path / "models" / "backbone")
    (tmp_path / "link").symlink_to(backbone)
    before = contents(backbone)
    for folder, word in (
        (backbone, "is"),
        (tmp_path / "link", "is"),
        (backbone.parent, "holds"),
        (backbone / "new", "lies in"),
        (tmp_path / "link" / "new", "lies in"),
        (tmp_path / "models" / ".." / "link", "is"),
    ):
        with pytest.raises(
            ValueError, match=rf"Output folder .* {word} the folder of the backbone, .* beside it"
        ):
            kind.run(folder, backbone=backbone)
    with pytest.raises(ValueError, match="is the folder of the backbone"):
        kind.run(backbone, backbone=tmp_path / "link")
    assert contents(backbone) == before


def test_the_command_refuses_before_it_reads_data(
    tmp_path: Path, backbones: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train", "finetune"):
        arguments = [command, "--backbone", str(backbones[0]), "--train-file", "missing.csv"]
        columns = ["--text-columns", "a", "--label-column", "b"]
        assert main([*arguments, *columns, "--output-dir", str(backbones[0])]) == 2
        assert "is the folder of the backbone" in capsys.readouterr().err
        (tmp_path / "mine.txt").touch()
        assert main([*arguments, *columns, "--output-dir", str(tmp_path)]) == 1
        assert 'holds "mine.txt", which no run' in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"file is a file\. Choose another"):
        check_output_dir(tmp_path / "file", None)


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(
        FileExistsError, match=r"link is a link to .*gone, which does not exist\. Choose another"
    ):
        check_output_dir(tmp_path / "link", None)
    (tmp_path / "gone").mkdir()
    assert check_output_dir(tmp_path / "link", None) == "nothing"


# A run's own folder, with something of others in it.


def interrupt(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> None:
    step, calls = OptimizerSteps._step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerSteps, "_step", counted)
        with pytest.raises(KeyboardInterrupt):
            kind.run(folder, config=kind.config(checkpoint_every=1))


def test_only_our_own_files_go(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    interrupt(kind, folder, monkeypatch)
    own = folder / checkpoints.FOLDER
    (numbered,) = [path for path in own.iterdir() if path.is_dir()]
    strangers = [
        own / "notes.txt",
        numbered / "notes.txt",
        folder / "checkpoints" / "x.txt",
        folder / "log.txt",
    ]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    kind.run(folder, config=kind.config(checkpoint_every=1), resume=True)
    assert [path.read_text(encoding="utf-8") for path in strangers] == ["mine"] * 4
    left = {path for path in contents(folder) if path.startswith(checkpoints.FOLDER)}
    assert left == {str(path.relative_to(folder)) for path in strangers[:2]}


def test_a_finished_model_overwrites_no_file_of_others(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "m", kind.config(checkpoint_every=1)
    interrupt(kind, folder, monkeypatch)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"README\.md has come there since the run began.*Move it away"):
        kind.run(folder, config=config, resume=True)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert not (folder / "config.json").exists()
    (folder / "README.md").rename(tmp_path / "README.md")
    kind.run(folder, config=config, resume=True)
    assert weight_bytes(folder) == weight_bytes(kind.run(tmp_path / "whole", config=config))


def test_moving_a_model_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.claim(tmp_path)
    staged, moved = tmp_path / checkpoints.FOLDER / checkpoints.STAGING, list[str]()
    names = ["a.json", "deep/b.json", "record.json"]

    def stage(content: str) -> None:
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(content, encoding="utf-8")

    def replace(source: Path, target: Path) -> None:
        if target.name == "record.json":
            raise KeyboardInterrupt
        moved.append(target.name)
        shutil.move(source, target)

    stage("first")
    with monkeypatch.context() as patch:
        patch.setattr("consistentee.training.checkpoints.os.replace", replace)
        patch.setattr("consistentee.training.checkpoints.write_marker", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.place_model(tmp_path, last="record.json")
    assert moved == ["a.json", "b.json"]  # the record comes last
    checkpoints.write_marker(tmp_path, names)
    stage("second")
    checkpoints.place_model(tmp_path, last="record.json")
    checkpoints.remove_checkpoints(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(names, b"second")


def test_a_run_that_was_killed_while_it_began_is_begun_again(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / checkpoints.FOLDER).mkdir(parents=True)
    (folder / checkpoints.FOLDER / ".run.123456.json").touch()
    assert (kind.run(folder) / "training_record.json").is_file()


def test_an_unfinished_run_of_the_first_version_goes_on(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "m", kind.config(checkpoint_every=1)
    interrupt(kind, folder, monkeypatch, after=5)
    earlier = (folder / checkpoints.FOLDER).rename(folder / "checkpoints")
    (earlier / checkpoints.MARKER).unlink()
    for path in earlier.glob("*/progress.json"):
        progress = json.loads(path.read_text(encoding="utf-8"))
        del progress["identity"]["backbone_fingerprint"]
        path.write_text(json.dumps(progress), encoding="utf-8")
    (earlier / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds an unfinished run\. Continue it with --resume"):
        kind.run(folder, config=config)
    with pytest.raises(ValueError, match="has seed = 0, this one 1"):
        kind.run(folder, config=kind.config(checkpoint_every=1, seed=1), resume=True)
    said: list[str] = []
    kind.run(folder, config=config, resume=True, report=said.append)
    assert any(line.startswith("Resumed at step ") for line in said)
    assert [path.name for path in earlier.iterdir()] == ["notes.txt"]
    assert not (folder / checkpoints.FOLDER).exists()


# Finished runs.


def test_a_finished_run_goes_on_for_nobody_else(kind: Kind, tmp_path: Path) -> None:
    folder = kind.run(tmp_path / "m")
    before = contents(folder)
    for name, changes in {
        "seed": {"config": kind.config(seed=1)},
        "learning_rate": {"config": kind.config(learning_rate=2e-3)},
        "data fingerprint": {"train_data": kind.data(kind.rows, seed=1)},
        "backbone": {"backbone": kind.other_backbone(tmp_path / "other")},
        "kind": {"how": kind.other_how},
    }.items():
        message = rf"The finished model in .*m has {name} = .*, this one .*\. Resume with the same settings, backbone"
        with pytest.raises(ValueError, match=message):
            kind.run(folder, resume=True, **changes)
    with pytest.raises(ValueError, match=r"has learning_rate = .*, this one 0.5; seed = 0, this one 3\."):
        kind.run(folder, resume=True, config=kind.config(seed=3, learning_rate=0.5))
    assert contents(folder) == before
    kind.run(folder, resume=True)
    assert contents(folder) == before


def test_settings_that_the_method_does_not_read_make_no_other_run(kind: Kind, tmp_path: Path) -> None:
    folder = kind.run(tmp_path / "m")
    before = contents(folder)
    others = {"max_accuracy_loss": 0.25, "patience": 9, "policy_hidden_size": 5}
    texts = {"passes": 7} if hasattr(kind.config(), "passes") else {}  # of which there are none here
    for name, value in (texts | (others if kind.how is finetune else {})).items():
        assert kind.run(folder, resume=True, config=kind.config(**{name: value})) == folder
    if kind.how is train:
        for name, value in others.items():
            with pytest.raises(ValueError, match=rf"has {name} = .*, this one {value}\."):
                kind.run(folder, resume=True, config=kind.config(**{name: value}))
    assert contents(folder) == before


def test_a_backbone_is_known_by_its_content(kind: Kind, tmp_path: Path) -> None:
    moved = shutil.copytree(kind.backbone, tmp_path / "moved")
    folder = kind.run(tmp_path / "m", backbone=moved)
    assert kind.run(folder, resume=True) == folder  # the same weights in another place
    kind.other_backbone(moved)
    with pytest.raises(
        ValueError, match=r"has backbone = .*moved \(content \w{8}\), this one .*moved \(content"
    ):
        kind.run(folder, backbone=moved, resume=True)  # other weights in the same place


def test_what_a_backbone_fingerprint_reads(tmp_path: Path, backbones: tuple[Path, Path]) -> None:
    folder = shutil.copytree(backbones[0], tmp_path / "backbone")
    first = backbone_fingerprint(folder)
    (folder / "README.md").write_text("words", encoding="utf-8")
    os.utime(folder / "config.json", (0, 0))
    assert backbone_fingerprint(folder) == first
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert backbone_fingerprint(folder) != first
    assert backbone_fingerprint("user/name") is None


def test_a_record_of_the_first_version_is_compared_by_what_it_has(kind: Kind, tmp_path: Path) -> None:
    folder = kind.run(tmp_path / "m")
    path = folder / "training_record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["backbone_fingerprint"], record["config"]["max_grad_norm"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert kind.run(folder, resume=True) == folder
    with pytest.raises(ValueError, match=r"has max_grad_norm = \d\.\d, this one 9"):
        kind.run(folder, config=kind.config(max_grad_norm=9.0), resume=True)
    with pytest.raises(ValueError, match="has backbone = "):
        kind.run(folder, backbone=tmp_path / "elsewhere", resume=True)


def test_there_is_no_room_for_the_model(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "m", kind.config(checkpoint_every=1)

    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("consistentee.training.run.write_model_card", fill)
        with pytest.raises(
            OSError, match=r"m could not be written to, .* Make room, then go on with --resume \(compare and "
        ):
            kind.run(folder, config=config)
    kind.run(folder, config=config, resume=True)
    assert not (folder / checkpoints.FOLDER).exists()


# Two runs in one folder.


@pytest.mark.parametrize("resume, when", [(False, r"\d steps"), (True, "Round 0|Epoch 1")])
def test_a_second_run_waits_for_the_first(kind: Kind, tmp_path: Path, resume: bool, when: str) -> None:
    folder, refused = tmp_path / "m", list[str]()

    def say(line: str) -> None:
        if not refused and re.search(when, line):
            with pytest.raises(FileExistsError) as error:
                kind.run(folder, resume=resume)
            refused.append(str(error.value))

    kind.run(folder, report=say)
    assert refused == [f"Output folder {folder} is in use by another run. Wait for it, or choose another."]
    assert weight_bytes(folder) == weight_bytes(kind.run(tmp_path / "alone"))
    assert not (folder / checkpoints.FOLDER).exists()


def test_a_folder_is_free_after_an_error(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    with monkeypatch.context() as patch:
        patch.setattr("consistentee.training.train.set_seed", lambda seed: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kind.run(folder)
    assert not folder.exists()
    interrupt(kind, folder, monkeypatch)
    assert not (folder / checkpoints.FOLDER / checkpoints.LOCK).exists()
    checkpoints.hold(folder)()
    kind.run(folder, config=kind.config(checkpoint_every=1), resume=True)


def test_the_lock_of_a_killed_run_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / checkpoints.FOLDER).mkdir()
    (tmp_path / checkpoints.FOLDER / checkpoints.LOCK).touch()
    assert check_output_dir(tmp_path, None) == "nothing"
    let_go = checkpoints.hold(tmp_path)
    with pytest.raises(FileExistsError, match="is in use by another run"):
        checkpoints.hold(tmp_path)
    let_go()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_where_there_are_no_locks_runs_go_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lock(path: Path) -> None:
        path.touch()
        raise error

    monkeypatch.setattr(checkpoints, "try_lock", lock)
    checkpoints.hold(tmp_path / "new")()
    assert list(tmp_path.iterdir()) == []
