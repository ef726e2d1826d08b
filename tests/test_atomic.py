"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from consistentee.atomic import atomic_path, write_json, write_text


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


def test_json_has_no_name_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"accuracy": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"accuracy": 0.5}
