"""Trainings that are killed by a real signal and then resumed: the work of test_training_resume, in its own process.

    python interrupted_runs.py BACKBONE OUTPUT

Every run is a fork of this process, which has imported everything and computed nothing, so that a dozen of them do not
take minutes. How each ended and what it said goes to OUTPUT/outcomes.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistentee.training import checkpoints, policy_phase
from consistentee.training import run as runs
from consistentee.training.methods import consistent
from consistentee.training.steps import OptimizerSteps
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_dataset

CONFIG = quick_config(
    warmup_epochs=2,
    consistent_epochs=2,
    head_dropout=0.3,
    policy_input="auto",
    policy_epochs=1,
    max_grad_norm=0.1,
    checkpoint_every=3,
)  # epochs of 2 steps: warm-up to step 4, the consistent phase to step 8; checkpoints at 3 and 6, and after each phase
INTERRUPTED = 130


@dataclass(frozen=True)
class Interruption:
    """The n-th call of a function of `owner` sends a signal to its own process, before it does anything else."""

    owner: Any
    name: str
    call: int
    signal: int = signal.SIGKILL
    how: Callable[..., Path] = train

    def arm(self) -> None:
        original, calls = getattr(self.owner, self.name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                os.kill(os.getpid(), self.signal)
            return original(*args, **kwargs)

        setattr(self.owner, self.name, counted)


CASES = {
    "warm-up": Interruption(OptimizerSteps, "_step", 4),
    "warm-up, Ctrl-C": Interruption(OptimizerSteps, "_step", 4, signal.SIGINT),
    "policy": Interruption(policy_phase, "choose_policy", 2),
    "best weights kept, not yet a checkpoint": Interruption(consistent, "record_round", 1),
    "policy fitted": Interruption(OptimizerSteps, "_step", 5),
    "consistent phase": Interruption(OptimizerSteps, "_step", 8),
    "writing a checkpoint": Interruption(checkpoints, "write_json", 6),
    "final policy": Interruption(policy_phase, "choose_policy", 4),
    "writing the model": Interruption(runs, "write_model_card", 1),
    "model in place": Interruption(checkpoints, "remove_checkpoints", 1),
    "fine-tuning": Interruption(OptimizerSteps, "_step", 6, how=finetune),
}
UNINTERRUPTED = {"train": train, "finetune": finetune}


Outcome = dict[str, Any]


def run(
    how: Callable[..., Path], backbone: Path, folder: Path, arm: Callable[[], None], resume: bool
) -> Outcome:
    """Run a training in a fork of this process; gives its exit code (minus the signal's number) and what it said."""
    said = folder.with_suffix(".resumed" if resume else ".said")
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with said.open("w", encoding="utf-8", buffering=1) as stream:
                arm()
                how(
                    backbone=backbone,
                    train_data=tiny_dataset(50),
                    output_dir=folder,
                    config=CONFIG,
                    resume=resume,
                    report=lambda line: print(line, file=stream),
                )
            code = 0
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    checkpoint_dir = folder / checkpoints.FOLDER
    left = sorted(path.name for path in checkpoint_dir.iterdir()) if checkpoint_dir.is_dir() else []
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "said": said.read_text(encoding="utf-8"),
        "checkpoints": left,
    }


def main(backbone: Path, output: Path) -> None:
    # A shell's background job starts with Ctrl-C ignored, and what it starts inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: dict[str, list[Outcome]] = {}
    for name, how in UNINTERRUPTED.items():
        outcomes[name] = [run(how, backbone, output / name, lambda: None, resume=False)]
    for name, case in CASES.items():
        first = run(case.how, backbone, output / name, case.arm, resume=False)
        outcomes[name] = [first, run(case.how, backbone, output / name, lambda: None, resume=True)]
    (output / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
