"""First steps that trainings share which begin alike: kept in a folder by all they depend on, taken over by others.

The first of them leaves its moments there, weights and optimizer: after its warm-up, and after its last step where all
are of one phase. A later one that differs from it only in what comes after goes on from the furthest of these, and ends
where it would have ended alone; also where it is of another method, whose first phase is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from consistentee.atomic_files import make_folder, room_in
from consistentee.errors import DataError
from consistentee.training import checkpoints
from consistentee.training.methods import METHODS
from consistentee.training.run import Run
from consistentee.training.steps import Objective

_LATER = (
    "rounds consistent_epochs consistent_learning_rate weighted_sum_share estimator num_rollouts reward reward_loss "
    "reward_target hardness layer_costs layer_cost_mode policy_input policy_data policy_tokens policy_hidden_size "
    "policy_dropout policy_epochs policy_min_steps policy_batch_size policy_learning_rate policy_weight_decay "
    "policy_folds entropy_bonus layer_cost_warmup initial_exit_bias patience max_accuracy_loss threshold_margin "
    "threshold_metric ensemble_decay passes exit_min_steps policy_texts max_disk_mb checkpoint_every "
    "max_cache_mb tracker"
)
LATER = frozenset(_LATER.split())
"""Settings that nothing reads before the end of the warm-up, but for how many steps there will be in all."""


def warm_up_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of all settings of a training that its first phase reads.

    None where it also looks at the policy's rows, to count what is forgotten, and is nobody else's.
    """
    if settings.get("hardness") == "forgetting_events":
        return None
    return {name: value for name, value in settings.items() if name not in LATER}


def take_steps(
    run: Run,
    objective: Objective,
    stops: Sequence[int],
    *,
    phase: str,
    at_stop: Callable[[], None] | None = None,
) -> None:
    """Take the steps of a method's first phase, but for those that a training which began alike has left.

    Args:
        run: the run, of a method that `begins_with` something.
        objective: of the phase.
        stops: steps at which its moment is kept, in their order; the last is the end.
        phase: for showing.
        at_stop: is called at every stop that is come to; None: nothing is to be done at them.
    """
    shares = _shares(run)
    if not shares and at_stop is None:
        stops = stops[-1:]
    if shares and not run.steps.step:
        _take_over(run, [stop for stop in stops if stop])
    for stop in stops:
        if run.steps.step < stop:
            run.take_steps(stop, objective, phase=phase)
            if at_stop is not None:
                at_stop()
            if shares:
                _keep(run, stop)


def _take_over(run: Run, stops: Sequence[int]) -> None:
    """Go on at the furthest of the stops that another training has left."""
    for stop in reversed(stops):
        folder = _folder(run, _moment(run, stop))
        kept = run.from_main_process(checkpoints.latest_checkpoint(folder))
        if kept is not None:
            run.say(
                f"The first {stop} of {run.steps.total_steps} steps are those of a training that began alike, kept in "
                f"{folder}."
            )
            run.restore(kept, own_policy=True)
            run.progress["taken_over"] = {"seconds": run.steps.seconds}
            return


def _keep(run: Run, stop: int) -> None:
    """Leave this moment to trainings that begin alike, unless one is kept."""
    moment = _moment(run, stop)
    folder = _folder(run, moment)
    if run.accelerator.is_main_process and not checkpoints.is_claimed(folder):
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            with room_in(folder.parent):
                checkpoints.claim(partial)
            run.write_checkpoint(partial, moment)
            with suppress(OSError):  # another run came first
                os.rename(partial, folder)
        except OSError as error:  # it is for others, and this training can do without
            run.say(f"What others could go on from was not kept: {error}")
        finally:
            _remove(partial)
    run.accelerator.wait_for_everyone()


def discard(warm_up_dir: Path, is_needed: Callable[[Mapping[str, Any]], bool] = lambda moment: False) -> None:
    """Remove the moments that trainings left in a folder; anything else stays.

    Args:
        warm_up_dir: the folder.
        is_needed: whether one is to stay, by what it depends on: `begins_with`, `backbone`, `data`, `settings`, `stop`
            and `steps`.
    """
    if warm_up_dir.is_dir():
        for path in warm_up_dir.iterdir():
            if path.is_dir() and checkpoints.is_claimed(path):
                moment = _kept_moment(path)
                if moment is None or not is_needed(moment):
                    _remove(path)
        if not any(warm_up_dir.iterdir()):
            warm_up_dir.rmdir()


def _kept_moment(folder: Path) -> Mapping[str, Any] | None:
    """What the moment in a folder depends on; None where nobody can go on from it."""
    kept = checkpoints.latest_checkpoint(folder)
    if folder.name.startswith(".") or kept is None:  # left by one that was killed as it wrote
        return None
    try:
        moment = checkpoints.read_progress(kept)["identity"]
    except (DataError, LookupError):
        return None
    return moment if "begins_with" in moment else None  # earlier versions did not say


def _shares(run: Run) -> bool:
    return run.warm_up_dir is not None and warm_up_settings(run.config.to_dict()) is not None


def _moment(run: Run, stop: int) -> dict[str, Any]:
    """All that a run's moment at a stop depends on, as plain JSON values."""
    identity = run.identity
    moment = {
        "kind": identity["kind"],
        "begins_with": METHODS[identity["method"]].begins_with,
        "backbone": identity["backbone_fingerprint"] or identity["backbone"],
        "data": identity["data"]["fingerprint"],
        "settings": warm_up_settings(run.config.to_dict()),
        "stop": stop,
        "steps": run.steps.total_steps,
        "processes": run.accelerator.num_processes,
        "precision": str(run.accelerator.mixed_precision),
    }
    return cast("dict[str, Any]", json.loads(json.dumps(moment)))


def _folder(run: Run, moment: Mapping[str, Any]) -> Path:
    """Where a moment is kept: named by all that it depends on."""
    root = cast(Path, run.warm_up_dir)
    make_folder(root)
    return root / hashlib.sha256(json.dumps(moment, sort_keys=True).encode()).hexdigest()[:16]


def _remove(folder: Path) -> None:
    checkpoints.remove_checkpoints(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
