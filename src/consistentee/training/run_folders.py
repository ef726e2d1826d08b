"""Whose an output folder is, and whether a run that is to go on there is the one that began there.

Nothing of anybody else's is overwritten or deleted: a folder is taken if it is new, empty, or provably left by a run of
this library. A resumed run has the settings, backbone and data of the one before, or it stops before it does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from consistentee.atomic_files import user_path
from consistentee.backbones.loading import backbone_fingerprint
from consistentee.config import RENAMED
from consistentee.functional.tables import GENERATION
from consistentee.models.record import RECORD_FILE, read_record
from consistentee.training import checkpoints
from consistentee.training.idle_settings import idle_settings

Contents = Literal["nothing", "unfinished", "finished"]
"""What a run finds in its output folder."""


def check_output_dir(output_dir: Path, backbone: str | Path | None) -> Contents:
    """See that nothing of anybody else's lies where a run is to write.

    Args:
        output_dir: the run's folder.
        backbone: hub name or local folder; None for none.

    Returns:
        What is there.

    Raises:
        FileExistsError: something that no run of ours has left, or no folder at all.
        ValueError: the backbone's folder, one above it, or one in it.
    """
    if backbone is not None and user_path(backbone).is_dir():
        _check_apart(output_dir, user_path(backbone))
    must_be_folder("Output folder", output_dir)
    if not output_dir.exists():
        return "nothing"
    if _is_our_record(output_dir):
        return "finished"
    if checkpoints.is_claimed(output_dir) or checkpoints.is_earlier_run(output_dir):
        return "unfinished"
    strangers = sorted(path.name for path in output_dir.iterdir() if not _is_just_begun(path))
    if strangers:
        raise FileExistsError(
            f'Output folder {output_dir} holds "{strangers[0]}", which no run of consistentee left there. '
            "Choose a new or an empty folder."
        )
    return "nothing"


def must_be_folder(what: str, path: Path) -> None:
    """Raise FileExistsError for what is there and can be no folder: a file, or a link to nowhere."""
    if path.is_symlink() and not path.exists():
        raise FileExistsError(
            f"{what} {path} is a link to {os.readlink(path)}, which does not exist. Choose another."
        )
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{what} {path} is a file. Choose another.")


@dataclass(frozen=True)
class OpenedFolder:
    """An output folder in which a run can begin or go on.

    Attributes:
        accelerator: of the run.
        newest: its last checkpoint, or None.
        let_go: leaves the folder to other runs.
    """

    accelerator: Accelerator
    newest: Path | None
    let_go: Callable[[], None]


def open_output(
    output_dir: Path,
    *,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any],
    resume: bool,
    report: Callable[[str], None],
    new_accelerator: Callable[[], Accelerator],
) -> OpenedFolder | None:
    """Keep an output folder to a run, or None if it holds that run's finished model.

    Args:
        output_dir: the run's folder.
        identity: of this run, from `run_identity`.
        defaults: of the settings, for those that a run of an earlier version did not have.
        resume: whether to go on with what is there.
        report: is told of a finished model.
        new_accelerator: makes the run's accelerator.

    Raises:
        FileExistsError: the folder holds another run and `resume` is not set, another run is in it now, or something of
            anybody else's.
        ValueError: it holds a run with other settings, backbone or data, it is the backbone's, or processes differ.
    """
    finished = check_output_dir(output_dir, identity["backbone"]) == "finished"
    accelerator = new_accelerator()
    holds = accelerator.is_main_process and not (finished and not (output_dir / checkpoints.FOLDER).is_dir())
    let_go, contents, newest, problem = _nothing, None, None, None
    try:
        if holds:
            let_go = checkpoints.hold(output_dir)
        contents, newest = _look(output_dir, identity, defaults, resume)
    except (OSError, ValueError) as error:
        problem = error
    try:
        _check_processes(accelerator, (contents, newest and newest.name), identity, defaults, problem)
        if accelerator.is_main_process:
            checkpoints.take_over_earlier(output_dir)
            if contents == "finished":  # the run may have ended just before it removed them
                checkpoints.remove_checkpoints(output_dir)
                report(f"{output_dir} holds a finished model: nothing to resume.")
        accelerator.wait_for_everyone()
    except BaseException:
        let_go()
        raise
    if contents == "finished":
        let_go()
        return None
    return OpenedFolder(accelerator, checkpoints.latest_checkpoint(output_dir), let_go)


def _nothing() -> None:
    """What lets go of a folder that another process holds."""


def _check_processes(
    accelerator: Accelerator,
    found: tuple[Contents | None, str | None],
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any],
    problem: Exception | None,
) -> None:
    """Wait until all processes have looked; raise in all of them what one has found, or wherein they differ.

    Args:
        accelerator: of this process.
        found: what the folder holds, and the name of the newest checkpoint.
        identity, defaults: as of `open_output`.
        problem: why this process cannot begin.
    """
    if problem is None and accelerator.num_processes == 1:
        return
    mine = {"found": found, "identity": identity, "problem": None if problem is None else str(problem)}
    every: list[Any] = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    if problem is not None:
        raise problem
    for number, other in enumerate(every):
        if other["problem"] is not None:
            raise ValueError(f"Process {number} cannot begin: {other['problem']}")
    for number, other in enumerate(every[1:], start=1):
        differing = _differences(every[0]["identity"], other["identity"], defaults)
        if differing:
            listed = "; ".join(f"{name} = {one}, in process {number} {two}" for name, one, two in differing)
            raise ValueError(
                f"All processes must be given the same settings, backbone and data, got in process 0 {listed}. Save "
                "texts that come from a stream, or at random, to a file, and give that."
            )
        if other["found"] != every[0]["found"]:
            raise ValueError(
                f"All processes must find the same in the output folder, got in process 0 {_words(every[0]['found'])}, "
                f"in process {number} {_words(other['found'])}. Give a folder that all of them see."
            )


def _words(found: tuple[Contents, str | None]) -> str:
    contents, newest = found
    what = {"nothing": "nothing", "unfinished": "an unfinished run", "finished": "a finished model"}[contents]
    return what if newest is None else f"{what} with checkpoint {newest}"


def _look(
    output_dir: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any], resume: bool
) -> tuple[Contents, Path | None]:
    """What a folder holds, and the newest checkpoint in it; errors as of `open_output`."""
    contents, newest = check_output_dir(output_dir, identity["backbone"]), None
    if contents == "finished":
        if not resume:
            raise FileExistsError(
                f"Output folder {output_dir} holds a finished model. Choose another, or remove it."
            )
        check_same_run(f"The finished model in {output_dir}", read_record(output_dir), identity, defaults)
    elif contents == "unfinished":
        newest = checkpoints.latest_checkpoint(output_dir)
        if not resume and (newest is not None or checkpoints.is_earlier_run(output_dir)):
            raise FileExistsError(
                f"Output folder {output_dir} holds an unfinished run. Continue it with --resume, or remove it."
            )
        newest = newest or checkpoints.latest_earlier(output_dir)
        if newest is not None:
            progress = checkpoints.read_progress(newest)
            whose, unread = f"The unfinished run in {output_dir}", _unread(progress)
            check_same_run(whose, progress["identity"], identity, defaults, unread=unread)
    return contents, newest


def _unread(progress: Mapping[str, Any]) -> frozenset[str]:
    """Settings that an unfinished run has read nothing of yet: room for the states of texts without labels."""
    has_texts = "unlabelled_fingerprint" in progress["identity"]["data"]
    return frozenset({"max_disk_mb"} if has_texts and not progress.get("stage_step") else ())


def run_identity(
    kind: str,
    method: str,
    backbone: str | Path,
    settings: Mapping[str, Any],
    data_fingerprint: str,
    unlabelled: str | None = None,
) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on with, as plain JSON values.

    Args:
        kind, method, backbone, settings: of the run.
        data_fingerprint: of its data.
        unlabelled: fingerprint of the texts without labels that it has beside them.
    """
    return {
        "kind": kind,
        "method": method,
        "backbone": str(backbone),
        "backbone_fingerprint": backbone_fingerprint(backbone),
        "config": dict(settings),
        "data": {
            "fingerprint": data_fingerprint,
            **({} if unlabelled is None else {"unlabelled_fingerprint": unlabelled}),
        },
    }


def check_same_run(
    whose: str,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    unread: frozenset[str] = frozenset(),
) -> None:
    """Raise ValueError unless both are the same run; the message names all that differs.

    Settings that the run's method does not read may differ.

    Args:
        whose: what the saved one is, for the message.
        saved: identity of a run, as `run_identity` gives it; further keys are not read.
        current: identity of this one.
        defaults: of the settings, for those that a run of an earlier version did not have.
        unread: names of further settings that may differ.
    """
    differing = _differences(saved, current, defaults, unread)
    if differing:
        listed = "; ".join(f"{name} = {before}, this one {now}" for name, before, now in differing)
        raise ValueError(
            f"{whose} has {listed}. Resume with the same settings, backbone and data, or choose another output folder."
        )


def _differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    defaults: Mapping[str, Any],
    unread: frozenset[str] = frozenset(),
) -> list[tuple[str, Any, Any]]:
    """Wherein two identities are not the same run's: name, the one's and the other's; as of `check_same_run`."""

    def shown(name: str, of: Mapping[str, Any]) -> Any:
        if name == "backbone":
            content = of.get("backbone_fingerprint")
            return of["backbone"] if content is None else f"{of['backbone']} (content {content[:8]})"
        if name == "data fingerprint":
            return of["data"]["fingerprint"]
        if name == "unlabelled texts":
            return of["data"].get("unlabelled_fingerprint", "none")
        if name == "method":  # of 0.1.0 there was one for each kind
            return of.get("method", "plain" if of["kind"].startswith("full_depth") else "consistent")
        if name == "kind":
            return of["kind"]
        settings = {RENAMED.get(key, key): value for key, value in of["config"].items()}
        return settings.get(name, defaults[name])

    def differs(name: str) -> bool:
        if name == "backbone" and saved.get("backbone_fingerprint") and current.get("backbone_fingerprint"):
            return saved["backbone_fingerprint"] != current["backbone_fingerprint"]  # wherever it lies
        if name == "backbone":
            return saved["backbone"] != current["backbone"]
        return shown(name, saved) != shown(name, current)

    same_kind = saved["kind"] == current["kind"]
    idle = unread | idle_settings(
        current["method"],
        classifier=not current["kind"].endswith(f"_{GENERATION}"),
        unlabelled="unlabelled_fingerprint" in current["data"],
    )
    names = (
        name
        for name in (
            "kind",
            *(("method",) if same_kind else ()),
            "backbone",
            "data fingerprint",
            "unlabelled texts",
            *(setting for setting in current["config"] if setting not in idle),
        )
        if differs(name)
    )
    return [(name, shown(name, saved), shown(name, current)) for name in names]


def _check_apart(output_dir: Path, backbone: Path) -> None:
    """Raise if one of the folders lies in the other, by whatever names and links."""
    output, source = output_dir.resolve(), backbone.resolve()
    place = None
    if _same(output, source):
        place = "is"
    elif any(_same(output, above) for above in source.parents):
        place = "holds"
    elif any(_same(above, source) for above in output.parents):
        place = "lies in"
    if place is not None:
        raise ValueError(
            f"Output folder {output_dir} {place} the folder of the backbone, {backbone}, which is not to be changed. "
            "Choose a folder beside it."
        )


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _is_our_record(output_dir: Path) -> bool:
    """Whether a training of ours left its record here, the last thing that it writes."""
    record = read_record(output_dir) if (output_dir / RECORD_FILE).is_file() else {}
    return {"kind", "backbone", "config", "data"} <= record.keys() and isinstance(record["config"], dict)


def _is_just_begun(path: Path) -> bool:
    """Whether it is what a run leaves that is killed while it claims a folder."""
    if path.name != checkpoints.FOLDER or not path.is_dir():
        return False
    left = (checkpoints.LOCK, f".{Path(checkpoints.MARKER).stem}.*")
    return all(any(map(inside.match, left)) for inside in path.iterdir())
