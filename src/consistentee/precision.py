"""Which precision and backend to run with: the fastest that keeps the labels of float32 on a sample of real inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from consistentee.backend import Answers

REPEATS = 3
"""Timed passes over the sample for each candidate, in turn."""

Candidate = tuple[str, str]
"""Backend and dtype."""


@dataclass(frozen=True)
class Trial:
    """How one candidate did on the sample.

    Args:
        backend, dtype: the candidate.
        instances_per_second: median of its passes.
        labels_kept: share of the rows with the reference's label, in [0, 1].
        exit_layers_kept: share of the rows that left where the reference's did.
    """

    backend: str
    dtype: str
    instances_per_second: float
    labels_kept: float
    exit_layers_kept: float


@dataclass(frozen=True)
class Choice:
    """What `auto` took, and why.

    Args:
        backend, dtype: the fastest candidate that kept every label.
        rows: size of the sample.
        trials: all candidates; the first is the reference, torch in float32 unless other things were asked for.
    """

    backend: str
    dtype: str
    rows: int
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        listed = ", ".join(
            f"{trial.backend} {trial.dtype} {trial.instances_per_second:.0f}/s"
            f"{'' if trial.labels_kept == 1 else f' ({1 - trial.labels_kept:.1%} of labels differ)'}"
            for trial in self.trials
        )
        return f"Running on {self.backend} in {self.dtype}, chosen on the first {self.rows} inputs: {listed}."


def choose(passes: Mapping[Candidate, Callable[[], Answers]], reference: Candidate, rows: int) -> Choice:
    """Time every candidate on the same rows, in turn, and take the fastest that keeps the reference's labels.

    Args:
        passes: one pass over the sample for each candidate.
        reference: one of them, whose labels count; it is taken where no other keeps them.
        rows: size of the sample.
    """
    answers = {candidate: run() for candidate, run in passes.items()}  # builds kernels, too
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in passes}
    for _ in range(REPEATS):
        for candidate, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[candidate].append(time.perf_counter() - start)
    wanted = answers[reference]
    trials = {
        candidate: Trial(
            *candidate,
            rows / statistics.median(seconds[candidate]),
            _agreement(answer.labels, wanted.labels),
            _agreement(answer.exit_layers, wanted.exit_layers),
        )
        for candidate, answer in answers.items()
    }
    faithful = [trial for trial in trials.values() if trial.labels_kept == 1]
    best = max(faithful, key=lambda trial: trial.instances_per_second)
    ordered = (trials[reference], *(trial for key, trial in trials.items() if key != reference))
    return Choice(best.backend, best.dtype, rows, ordered)


def _agreement(found: list[int], wanted: list[int]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
