"""Which runs go with `--discard-models`, and when: comparisons and ablations whose trainings make no model."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from consistentee.errors import DataError, SettingError
from consistentee.evaluation.ablation import ablate as ablating
from consistentee.evaluation.comparison import cells, claims
from consistentee.evaluation.comparison import compare as comparing
from consistentee.evaluation.comparison.plan import ComparedSet
from tiny import tiny_dataset

Run = Callable[..., set[str]]


class _Trainings:
    """In place of training, measuring and studying: a run is a folder with a file, and a study says nothing."""

    def __init__(self) -> None:
        self.run: list[str] = []
        self.before_study: Callable[[], object] = lambda: None

    def train(self, *, output_dir: Path, **_: Any) -> None:
        self.run.append(output_dir.name)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "model").touch()

    def study(self, _: object) -> dict[str, Any]:
        self.before_study()
        return {"areas": [], "confidence_area": 0.5}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> _Trainings:
    found = _Trainings()
    figures = {"correct": "", "num_hidden_layers": 3, "criterion": None, "metrics": {}, "criteria": {}}
    monkeypatch.setattr(cells, "train", found.train)
    monkeypatch.setattr(cells, "load_model", lambda *_: SimpleNamespace(record={}))
    monkeypatch.setattr(cells, "measure", lambda *_: figures)
    monkeypatch.setattr(comparing, "render", lambda *_, **__: {})
    monkeypatch.setattr(ablating, "load_model", lambda *_: None)
    monkeypatch.setattr(ablating, "studied", lambda *_: None)
    monkeypatch.setattr(ablating, "STUDIES", {"policy_rows": found.study})
    monkeypatch.setattr(ablating, "write_answers", lambda *_, **__: {})
    return found


@pytest.fixture
def ablate(tmp_path: Path, trainings: _Trainings) -> Run:
    """Ask a question that studies a model; gives the names of what is in the folder of runs."""
    (tmp_path / "small").mkdir()
    rows = ComparedSet("rows", tiny_dataset(20), tiny_dataset(10, seed=9))

    def run(*seeds: int, keep_models: bool = False, **more: Any) -> set[str]:
        ablating.ablate(
            questions=["policy_rows"],
            backbones=[str(tmp_path / "small")],
            sets=[rows],
            output_dir=tmp_path / "out",
            seeds=seeds or (1,),
            keep_models=keep_models,
            **more,
        )
        return {path.name for path in (tmp_path / "out" / "runs").iterdir()}

    return run


MODELS = {f"small_rows_{label}_1" for label in ("plain", "consistent", "consistent-seen_rows")}


def _remove_studies(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out" / "studies")


def test_models_that_were_there_before_stay(tmp_path: Path, ablate: Run, trainings: _Trainings) -> None:
    assert ablate(keep_models=True) == MODELS
    _remove_studies(tmp_path)
    assert ablate(1, 2) == MODELS  # those of seed 2 went
    assert len(trainings.run) == 6


def test_models_go_when_an_interrupted_command_is_given_again(ablate: Run, trainings: _Trainings) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    trainings.before_study = stop
    with pytest.raises(KeyboardInterrupt):
        ablate()
    trainings.before_study = lambda: None
    assert ablate() == set()
    assert len(trainings.run) == 3  # each once


def test_they_stay_where_a_command_is_given_without(
    tmp_path: Path, ablate: Run, trainings: _Trainings
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    trainings.before_study = stop
    with pytest.raises(KeyboardInterrupt):
        ablate()
    comparing.compare(
        methods=["consistent"],
        backbones=[str(tmp_path / "small")],
        sets=[ComparedSet("rows", tiny_dataset(20), tiny_dataset(10, seed=9))],
        output_dir=tmp_path / "out",
    )
    trainings.before_study = lambda: None
    assert ablate() == MODELS - {"small_rows_consistent-seen_rows_1"}
    _remove_studies(tmp_path)
    trainings.before_study = stop
    with pytest.raises(KeyboardInterrupt):
        ablate(2)
    trainings.before_study = lambda: None
    assert {f"small_rows_{label}_2" for label in ("plain", "consistent")} < ablate(2, keep_models=True)


def test_models_that_another_command_may_need_go_at_the_end(
    tmp_path: Path, ablate: Run, trainings: _Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FileLock(tmp_path / "out" / ".locks" / "other.lock")
    trainings.before_study = other.acquire
    seen: list[bool] = []

    def later(*, output_dir: Path, **more: Any) -> None:
        if "seen" in output_dir.name:  # behind the study
            seen.append((output_dir.parent / "small_rows_consistent_1").is_dir())
            other.release()
        trainings.train(output_dir=output_dir, **more)

    monkeypatch.setattr(cells, "train", later)
    assert ablate() == set()
    assert seen == [True]


def test_a_discarded_model_is_missed_before_anything_is_trained(
    tmp_path: Path, ablate: Run, trainings: _Trainings
) -> None:
    assert ablate() == set()
    _remove_studies(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(
            DataError, match=r"needs the trained model of small_rows_consistent_1, which is no"
        ):
            ablate(1, 2, dry_run=dry_run)
    assert len(trainings.run) == 3


def test_an_interrupted_removal_leaves_no_half_of_a_model(
    ablate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path, **_: Any) -> None:
        if Path(folder).is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            ablate()
    assert not (tmp_path / "out" / "runs" / "small_rows_plain_1").exists()
    assert ablate() == set()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"backbone": "small", "set": "rows"}'])
def test_a_study_that_is_none_is_named(tmp_path: Path, ablate: Run, text: str) -> None:
    (tmp_path / "out" / "studies").mkdir(parents=True)
    (tmp_path / "out" / "studies" / "small_rows_consistent_1_policy_rows.json").write_text(text)
    with pytest.raises(
        DataError, match=r"policy_rows\.json: It is no study .*Remove it; ablate makes it anew"
    ):
        ablate()


def test_a_file_is_no_output_folder(tmp_path: Path, ablate: Run, trainings: _Trainings) -> None:
    (tmp_path / "out").touch()
    for dry_run in (True, False):
        with pytest.raises(
            SettingError, match=r'output_dir must be a folder, and ".*out" is none\. Give another'
        ):
            ablate(dry_run=dry_run)
    assert trainings.run == []


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_where_there_are_no_locks_each_takes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lock(path: Path) -> None:
        path.touch()
        raise error

    monkeypatch.setattr(claims, "try_lock", lock)
    work = {"a": 1, "b": 2}
    assert dict(claims.taken_in_turns(work, tmp_path, lambda _: None)) == work
    assert not claims.is_shared_now(tmp_path)
