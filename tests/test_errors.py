"""Messages of the errors about data and missing extras."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from consistentee.errors import DataError, MissingExtraError, require_extra


def test_data_error_names_place_problem_and_remedy() -> None:
    error = DataError("It is broken.", file=Path("a.csv"), row=3, remedy="Mend it.")
    assert str(error) == "a.csv, line 3: It is broken. Mend it."
    assert (error.file, error.row, error.problem, error.remedy) == ("a.csv", 3, "It is broken.", "Mend it.")
    assert (
        str(DataError("It is broken.", file="a.parquet", row=3, unit="row"))
        == "a.parquet, row 3: It is broken."
    )
    assert str(DataError("It is broken.")) == "It is broken."
    assert isinstance(error, ValueError)


def test_data_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("It is broken.", file="a.csv", row=3)))  # noqa: S301
    assert (str(error), error.row) == ("a.csv, line 3: It is broken.", 3)


def test_require_extra_imports_what_is_there() -> None:
    assert require_extra("plot", "json") is json


def test_require_extra_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "consistentee\[plot\]"') as caught:
        require_extra("plot", "no_such_module.inner")
    assert caught.value.name == "no_such_module.inner"
    assert isinstance(caught.value, ImportError)


def test_require_extra_leaves_the_error_of_a_broken_module_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import another_missing_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_module") as caught:
        require_extra("plot", "half_installed")
    assert not isinstance(caught.value, MissingExtraError)
