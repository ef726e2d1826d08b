"""Warm-ups that trainings share which begin alike: kept in a folder by all that they depend on, taken over by others.

The first of them leaves its moment after phase 1 there, weights and optimizer; a later one that differs from it only in
what comes after goes on from that moment, and ends where it would have ended alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistentee.atomic_files import make_folder, room_in
from consistentee.training import checkpoints
from consistentee.training.run import Run

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
    """Those of all settings of a training that its warm-up reads.

    None where it also looks at the policy's rows, to count what is forgotten, and is nobody else's.
    """
    if settings.get("hardness") == "forgetting_events":
        return None
    return {name: value for name, value in settings.items() if name not in LATER}


def take_over(run: Run) -> None:
    """Go on after the warm-up of a training that began as this one does, where one is kept; first steps only."""
    folder = _folder(run)
    if folder is None or run.steps.step:
        return
    kept = run.from_main_process(checkpoints.latest_checkpoint(folder))
    if kept is not None:
        run.say(f"The warm-up is that of a training that began alike, kept in {folder}.")
        taken_over = {"seconds": checkpoints.read_progress(kept)["identity"]["seconds"]}
        run.restore(kept, own_policy=True)
        run.progress["taken_over"] = taken_over


def keep(run: Run, seconds: float) -> None:
    """Leave this moment, the end of the warm-up, to trainings that begin alike, unless one is kept.

    Args:
        run: the run.
        seconds: what it took from the first step.
    """
    folder = _folder(run)
    if folder is not None and run.accelerator.is_main_process and not checkpoints.is_claimed(folder):
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            with room_in(folder.parent):
                checkpoints.claim(partial)
            run.write_checkpoint(partial, {"seconds": seconds})
        except BaseException:
            _remove(partial)
            raise
        try:
            os.rename(partial, folder)
        except OSError:  # another run came first
            _remove(partial)
    run.accelerator.wait_for_everyone()


def discard(warm_up_dir: Path) -> None:
    """Remove what `keep` left in a folder; anything else stays."""
    if warm_up_dir.is_dir():
        for path in warm_up_dir.iterdir():
            if path.is_dir() and checkpoints.is_claimed(path):
                _remove(path)
        if not any(warm_up_dir.iterdir()):
            warm_up_dir.rmdir()


def _folder(run: Run) -> Path | None:
    """Where a run's warm-up is kept: named by all that it depends on."""
    settings = warm_up_settings(run.config.to_dict())
    if run.warm_up_dir is None or settings is None or not run.config.warmup_epochs:
        return None
    make_folder(run.warm_up_dir)
    return run.warm_up_dir / _name(run, settings)


def _name(run: Run, settings: Mapping[str, Any]) -> str:
    identity = run.identity
    depends_on = {
        "kind": identity["kind"],
        "backbone": identity["backbone_fingerprint"] or identity["backbone"],
        "data": identity["data"]["fingerprint"],
        "settings": settings,
        "steps": run.steps.total_steps,
        "processes": run.accelerator.num_processes,
        "precision": str(run.accelerator.mixed_precision),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _remove(folder: Path) -> None:
    checkpoints.remove_checkpoints(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
