"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from consistentee import atomic_files as atomic
from consistentee.atomic_files import atomic_path, remove_files, write_json, write_text
from consistentee.cli.terminal import text_stream
from consistentee.evaluation.plots import picture
from consistentee.training import checkpoints


def test_new_file_in_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "zwölf")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "zwölf"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ne", encoding="utf-8")
            assert path.read_text(encoding="utf-8") == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_named_with_its_folder(tmp_path: Path) -> None:
    def write(error: OSError) -> None:
        with atomic_path(tmp_path / "a.txt"):
            raise error

    said = r"could not be written to, [\d,]+ MB are free there: .*No space left.*\. Make room, or give"
    with pytest.raises(OSError, match=re.escape(str(tmp_path)) + " " + said):
        write(OSError(errno.ENOSPC, "No space left on device"))
    for other in (
        OSError(errno.ENOSPC, "No space left on device", "elsewhere"),
        OSError(errno.EIO, "Input/output error"),
    ):
        with pytest.raises(OSError, match=re.escape(str(other))):
            write(other)
    with (
        pytest.raises(
            OSError, match=r"on device\. Make room, then go on with --resume \(compare and .*\)\.$"
        ),
        atomic.room_in(tmp_path),
    ):
        write(OSError(errno.ENOSPC, "No space left on device"))  # the run's remedy counts
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_where_a_folder_is_written(tmp_path: Path) -> None:
    said = r"could not be written to, [\d,]+ MB are free there: .*No space left.*\. Make room, or give a folder on"
    with (
        pytest.raises(atomic.FullDiskError, match=re.escape(str(tmp_path)) + " " + said),
        atomic.atomic_folder(tmp_path / "folder", lambda _: None, "last"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EIO])
def test_permissions_that_the_file_system_does_not_let_files_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    for text in ("first", "again"):  # a new file, and one in place of another
        if number == errno.EIO:
            with pytest.raises(OSError, match=os.strerror(number)):
                write_text(tmp_path / "a.txt", text)
            continue
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    write_text(written, "")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    written.chmod(0o640)
    write_text(written, "again")
    assert stat.S_IMODE(written.stat().st_mode) == 0o640


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EIO])
def test_a_file_that_is_a_mount_point_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    path = tmp_path / "a.txt"
    path.write_text("what was there before")
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "replace", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_text(path, "new")
    else:
        write_text(path, "new")
        assert path.read_text() == "new"
        assert path.stat().st_ino == inode
    assert os.listdir(tmp_path) == ["a.txt"]


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    source = os.fsdecode(b"donn\xe9es \\udce9 \xc3\xa9.csv")
    write_json(tmp_path / "a.json", {"source": source})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"source": source}


def test_json_has_no_name_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"accuracy": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"accuracy": 0.5}


# What is no regular file.


def write_stream(path: Path, text: str) -> None:
    with text_stream(path) as stream:
        stream.write(text)


@pytest.mark.parametrize("write", [write_text, write_stream])
def test_a_device_stays_a_device(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    target = tmp_path / "link"
    target.symlink_to(os.devnull)
    for path in (Path(os.devnull), target):
        write(path, "x")
        assert stat.S_ISCHR(path.stat().st_mode)
    assert target.is_symlink()


@pytest.mark.parametrize("write", [write_text, write_stream])
def test_a_named_pipe_is_written_to(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    write(pipe, "zwölf\n")
    reader.join(timeout=60)
    assert read == ["zwölf\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["a.png", "a.pdf", "a.svg"])
def test_pictures_go_into_a_pipe_too(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / name).read_bytes()), daemon=True)
    reader.start()
    with picture(tmp_path / name, "title", 2.0):
        pass
    reader.join(timeout=60)
    assert len(read[0]) > 1000


CHILD = """
import sys
from consistentee.atomic_files import write_text
from consistentee.cli.terminal import text_stream
print("before")
write_text(sys.argv[1], "text\\n")
with text_stream(__import__("pathlib").Path(sys.argv[1])) as stream:
    stream.write("lines\\n")
print("after")
"""


@pytest.mark.parametrize("to", ["pipe", "file"])
def test_our_own_standard_output_goes_on(to: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, "/dev/stdout"]
    if to == "pipe":
        written = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    else:
        with (tmp_path / "out").open("w", encoding="utf-8") as stream:
            subprocess.run(command, check=True, stdout=stream)
        written = (tmp_path / "out").read_text(encoding="utf-8")
        assert os.listdir(tmp_path) == ["out"]
    assert written == "before\ntext\nlines\nafter\n"


def test_a_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Give the name of a file"):
        write_text(tmp_path, "x")


def test_a_dangling_link_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new" / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new" / "target").read_text(encoding="utf-8") == "x"


# On the disk before it has its name.


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and rename, with the name it is about, in their order."""
    noted: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        noted.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        noted.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return noted


on_linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads names from /proc")


@on_linux
def test_content_name_and_new_folders_are_synced(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert {name for _, name in events[:2]} == {tmp_path.name, "a"}
    kinds = [kind for kind, _ in events]
    assert kinds == ["sync", "sync", "sync", "rename", "sync"]
    assert events[2][1].startswith(".c.")
    assert events[3:] == [("rename", "c.txt"), ("sync", "b")]


@on_linux
def test_a_finished_models_files_are_synced_and_its_record_comes_last(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    checkpoints.claim(tmp_path / "run")
    staged = tmp_path / "run" / checkpoints.FOLDER / checkpoints.STAGING
    (staged / "deep").mkdir(parents=True)
    for name in ("model.safetensors", "deep/b.json", "record.json"):
        (staged / name).touch()
    events.clear()
    checkpoints.place_model(tmp_path / "run", last="record.json")
    first_rename = events.index(("rename", "b.json"))
    synced = {name for kind, name in events[:first_rename] if kind == "sync"}
    assert {"model.safetensors", "b.json", "record.json", "deep", "model"} <= synced
    *before, last, end = events
    assert (last, end) == (("rename", "record.json"), ("sync", "run"))
    assert {name for kind, name in before[-2:] if kind == "sync"} == {"run", "deep"}


@on_linux
def test_a_checkpoints_files_are_synced_before_it_counts(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    checkpoints.save_checkpoint(tmp_path, 1, weights={}, optimizer={}, progress={})
    place = events.index(("rename", "000000001"))
    synced = {name for kind, name in events[:place] if kind == "sync"}
    assert {*checkpoints.CHECKPOINT_FILES, "000000001.partial"} <= synced
    assert events[place + 1] == ("sync", checkpoints.FOLDER)
    events.clear()
    checkpoints.save_weights(tmp_path / "best.safetensors", {})
    assert events == [("sync", "best.partial"), ("rename", "best.safetensors"), ("sync", tmp_path.name)]


def test_files_go_by_name_and_with_what_their_writing_left(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("a.json", ".a.0123.json", "a.json.bak", ".b.0123.json"):
        (folder / name).touch()
    remove_files(folder, ("a.json", "missing.txt"))
    assert sorted(os.listdir(folder)) == [".b.0123.json", "a.json.bak"]
    remove_files(folder, ("b.json", "a.json.bak"))
    assert not folder.exists()
    remove_files(folder, ("b.json",))


def test_file_systems_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(atomic.errno.EINVAL, "not here")

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "x"


def write_new(folder: str | Path) -> None:
    """Put a new `a` and `last` into a folder, unless it holds `mine`."""

    def require_free(place: Path) -> None:
        if place.exists() and "mine" in atomic.names_in(place):
            raise ValueError("not free")

    with atomic.atomic_folder(folder, require_free, "last") as place:
        for name in ("a", "last"):
            (place / name).write_text("new")


def is_new(folder: Path) -> bool:
    return {path.name: path.read_text() for path in folder.iterdir()} == {"a": "new", "last": "new"}


@pytest.mark.parametrize("before", ["missing", "empty", "old"])
@pytest.mark.parametrize("how", ["plain", "link", "here", "mounted", "busy", "other device"])
def test_a_folder_is_there_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, before: str
) -> None:
    root = tmp_path / "root"
    folder = root / "folder"
    root.mkdir()
    if before != "missing":
        folder.mkdir()
    if before == "old":
        for name in ("a", "b", "last"):
            (folder / name).write_text("old")
    inode = folder.stat().st_ino if folder.exists() else None
    given: Path = folder
    if how == "link":
        given = tmp_path / "link"
        given.symlink_to(folder)
    elif how == "here" and folder.exists():
        monkeypatch.chdir(folder)
        given = Path(".")
    elif how == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source == folder and how in ("busy", "other device"):
            raise OSError(atomic.errno.EBUSY if how == "busy" else atomic.errno.EXDEV, "cannot be moved")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    write_new(given)
    assert is_new(folder)
    assert os.listdir(root) == ["folder"]
    assert (tmp_path / "link").is_symlink() == (how == "link")
    if how in ("here", "mounted", "busy", "other device") and inode is not None:
        assert folder.stat().st_ino == inode
    (folder / "mine").touch()
    with pytest.raises(ValueError, match="not free"):
        write_new(given)
    assert sorted(os.listdir(folder)) == ["a", "last", "mine"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "cannot be moved"), KeyboardInterrupt("now")])
def test_an_old_folder_stays_where_the_new_one_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = tmp_path / "folder"
    write_new(folder)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(".new"):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(type(error), match=r"cannot be moved|now"):
        write_new(folder)
    assert is_new(folder)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("stays", [False, True], ids=["replaced", "file by file"])
@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o555])
def test_a_folder_keeps_its_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, stays: bool
) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    for name in ("config.json", "part/weights"):
        (folder / name).write_text("old", encoding="utf-8")
        (folder / name).chmod(0o600)
    if stays:
        monkeypatch.chdir(folder)
        (folder / "part" / "weights").unlink()  # such folders have no folders in them
        (folder / "part").rmdir()
    folder.chmod(mode if not stays else mode | 0o200)
    with atomic.atomic_folder(folder, lambda folder: None, "config.json") as place:
        for name in ("config.json", "more.json", *(["part/weights"] if not stays else [])):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("new", encoding="utf-8")
    assert folder.stat().st_mode & 0o7777 == (mode if not stays else mode | 0o200)
    assert (folder / "config.json").read_text() == "new"
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
    assert (folder / "more.json").stat().st_mode & 0o777 == 0o666 & ~atomic._umask()
    if not stays:
        assert (folder / "part" / "weights").stat().st_mode & 0o777 == 0o600
    assert not [path for path in tmp_path.iterdir() if path != folder]
