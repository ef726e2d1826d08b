"""Which precision and backend to run a model with: the fastest that keeps the labels of float32 on given inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from consistentee.errors import SettingError
from consistentee.evaluation.speed import median_seconds
from consistentee.inference.encoder.backend import Answers, EncoderParts, TokenRow
from consistentee.inference.encoder.onnx_backend import has_onnxruntime
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.encoder.torch_backend import torch_dtypes
from consistentee.inference.timing import time_in_turn
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import Engine

FEWEST_ROWS = 128
"""With fewer inputs a precision that changes labels may seem to keep them, and the clock decides by chance."""

TIMED_PASSES = 3
"""Timed passes over the inputs for each candidate, in turn."""

MARGIN = 1.05
"""How many times faster than the reference another candidate must be: less is noise."""

Candidate = tuple[str, str]
"""Backend and dtype."""


@dataclass(frozen=True)
class Trial:
    """How one candidate did.

    Args:
        backend, dtype: the candidate.
        instances_per_second: median of its passes.
        labels_kept: share of the rows with the reference's label, in [0, 1].
        exit_layers_kept: share of the rows that exited where the reference's did.
    """

    backend: str
    dtype: str
    instances_per_second: float
    labels_kept: float
    exit_layers_kept: float


@dataclass(frozen=True)
class Choice:
    """What is recommended, and why.

    Args:
        backend, dtype: the fastest candidate that kept every label, the reference where none was faster by `MARGIN`.
        rows: number of inputs.
        trials: all candidates; the first is the reference, torch in float32 unless other things were asked for.
    """

    backend: str
    dtype: str
    rows: int
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        listed = ", ".join(
            f"{trial.backend} {trial.dtype} {trial.instances_per_second:.0f}/s"
            f"{'' if trial is self.trials[0] else f' ({trial.labels_kept:.1%} of the labels kept)'}"
            for trial in self.trials
        )
        return f"Recommended: backend {self.backend}, dtype {self.dtype}. On {self.rows:,} inputs: {listed}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def recommend(
    saved: LoadedClassifier,
    rows: Sequence[TokenRow],
    *,
    dtype: str = "auto",
    backend: str = "auto",
    rule: ExitRule | None = None,
) -> Choice:
    """Compare what a model runs in here, in throughput mode.

    Args:
        saved: the model.
        rows: tokenized inputs, at least `FEWEST_ROWS`, such as it will be used on.
        dtype: `auto`, or the only one to compare backends in.
        backend: `auto`, or the only one to compare dtypes on.
        rule: when inputs exit; None takes the saved rule.

    Raises:
        SettingError: too few rows, or nothing runs so here.
    """
    if len(rows) < FEWEST_ROWS:
        raise SettingError(
            f'"auto" needs at least {FEWEST_ROWS} rows to compare labels on, got {len(rows)}. Give more rows, or a '
            "dtype and a backend."
        )
    model = cast(EncoderParts, saved.model)
    found = candidates(model, dtype, backend)
    if not found:
        raise SettingError(
            f'Model "{saved.name}" does not run in dtype "{dtype}" on backend "{backend}" here. It runs in: '
            f"{', '.join(' '.join(pair) for pair in candidates(model, 'auto', 'auto'))}."
        )
    passes: dict[Candidate, Callable[[], Answers]] = {}
    for candidate in found:
        engine = Engine(saved, backend=candidate[0], dtype=candidate[1])
        passes[candidate] = _one_pass(engine, rows, rule or engine.rule())
    return choose(passes, found[0], len(rows))


def candidates(model: EncoderParts, dtype: str, backend: str) -> tuple[Candidate, ...]:
    """Backends and dtypes that a model runs in here, of those that were asked for; the first is the reference."""
    found = [("torch", kind) for kind in torch_dtypes(model)]
    if has_onnxruntime(model):
        found.append(("onnxruntime", "float32"))
    return tuple(
        (name, kind) for name, kind in found if backend in ("auto", name) and dtype in ("auto", kind)
    )


def choose(passes: Mapping[Candidate, Callable[[], Answers]], reference: Candidate, rows: int) -> Choice:
    """Time every candidate on the same rows, in turn, and take the fastest that keeps the reference's labels.

    Args:
        passes: one pass over the sample for each candidate.
        reference: one of them, whose labels count; it is taken where no other keeps them.
        rows: size of the sample.
    """
    answers = {candidate: run() for candidate, run in passes.items()}  # builds kernels, too
    work = {" ".join(candidate): [run] for candidate, run in passes.items()}
    seconds = time_in_turn(
        work, torch.device("cpu"), TIMED_PASSES, untimed=False
    )  # answers are lists: no device waits
    wanted = answers[reference]
    trials = {
        candidate: Trial(
            *candidate,
            rows / median_seconds(seconds[" ".join(candidate)]),
            _agreement(answer.labels, wanted.labels),
            _agreement(answer.exit_layers, wanted.exit_layers),
        )
        for candidate, answer in answers.items()
    }
    faithful = [trial for trial in trials.values() if trial.labels_kept == 1]
    best = max(faithful, key=lambda trial: trial.instances_per_second)
    if best.instances_per_second < MARGIN * trials[reference].instances_per_second:
        best = trials[reference]
    ordered = (trials[reference], *(trial for key, trial in trials.items() if key != reference))
    return Choice(best.backend, best.dtype, rows, ordered)


def _one_pass(engine: Engine, rows: Sequence[TokenRow], rule: ExitRule) -> Callable[[], Answers]:
    return lambda: engine.run(rows, batch_size=None, rule=rule)


def _agreement(found: list[int], wanted: list[int]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
