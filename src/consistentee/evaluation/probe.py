"""What exits would be worth on a model, from a few hundred texts and two minutes; nothing is kept."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from scipy import special
from torch import Tensor

from consistentee.config import RetrofitConfig
from consistentee.data.rows import Text, text_rows
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.speed_classification import ClassificationSpeedRow, measure_speed
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.functional.certificates import certify
from consistentee.functional.curves import depth_thresholds
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.training.policy_phase import run_policy_phase
from consistentee.training.run import Run
from consistentee.training.train import retrofit_task, start_retrofit

PROBED_AGREEMENTS = (0.99, 0.98)
FEWEST, MOST = 240, 4000
"""Texts that a probe reads."""
WARM_UP = 32
PASSES_OF_BACKBONE = 2.2
"""What a text costs beside running the model once: once for exits or policy, the rest of the work like another time."""
RESAMPLES = 400
TAIL = 0.025
"""Chance that is left beyond either end of an interval."""


@dataclass(frozen=True)
class ProbePoint:
    """What exits save at an agreement with the model.

    Args:
        agreement: at least that.
        threshold: of the policy.
        layer_speedup: layers over mean exit layer.
        interval: of it, 95 %: from what the texts prove to what they do not rule out.
        speed: of the engine with exits at batches of 1 and 32, against full depth.
    """

    agreement: float
    threshold: float
    layer_speedup: float
    interval: tuple[float, float]
    speed: tuple[ClassificationSpeedRow, ...]


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found.

    Args:
        num_hidden_layers: of the model.
        num_train_texts: what the exits learnt from.
        num_examples: what the policy learnt from and was judged by, cross-fitted.
        per_layer_agreement: of each exit, if all texts exited there.
        points: one for each of `PROBED_AGREEMENTS`.
        environment: hardware and versions.
        seconds: that it took.
    """

    num_hidden_layers: int
    num_train_texts: int
    num_examples: int
    per_layer_agreement: list[float]
    points: tuple[ProbePoint, ...]
    environment: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def probe(
    model: str | Path,
    texts: Iterable[Text],
    *,
    seconds: float = 120.0,
    seed: int = 0,
    report: Callable[[str], None] = lambda message: None,
) -> ProbeReport:
    """Train exits and policy on as many texts as fit into a time, and see what they would save.

    Both learn from few texts, so the figures are what is there at least: more texts make better exits. The policy is
    cross-fitted; the threshold of each agreement is read off the curve of the same texts, which flatters by about a
    text.

    Args:
        model, texts: as of `train.retrofit`.
        seconds: to keep to, about.
        seed: of everything.
        report: is given lines to show.

    Raises:
        DataError, ValueError, OSError: as of `train.retrofit`.
    """
    start = time.perf_counter()
    config = RetrofitConfig(
        seed=seed, policy_epochs=20, policy_folds=3, max_cache_mb=512.0, batch_size=16, exit_min_steps=100
    )
    original = load_model(model, LoadedClassifier)
    rows = text_rows(texts, "texts")
    first = list(itertools.islice(rows, 4 * WARM_UP))
    cost = _seconds_of_a_text(original, first, config.max_length)
    count = int(min(max(0.6 * seconds / (PASSES_OF_BACKBONE * cost), FEWEST), MOST))
    task = retrofit_task(
        model,
        itertools.chain(first, rows),
        config,
        source="texts",
        max_texts=count,
        original=original,
        policy_share=0.5,
        held_share=0.0,
    )
    with tempfile.TemporaryDirectory(prefix="consistentee-probe-") as folder:
        run = cast(Run, start_retrofit(task, Path(folder) / "run", report=report))  # the folder is new
        run.let_go()  # and nobody else's
        run.take_steps(run.steps.total_steps, task.weighted_sum(), phase="exits")
        phase = run_policy_phase(run, "policy", try_all=True)
        probs, correct = phase.choice.exit_probs, phase.data.judged_instances.correct
        saved = LoadedClassifier(run.model.eval(), original.tokenizer, {}, str(model))
        found = [speedup_at(probs, correct, agreement, seed=seed) for agreement in PROBED_AGREEMENTS]
        speed = [_timed(saved, task, threshold, 0.15 * seconds) for threshold, _, _ in found]
    return ProbeReport(
        num_hidden_layers=probs.shape[1],
        num_train_texts=len(task.parts.exits),
        num_examples=len(probs),
        per_layer_agreement=phase.per_layer_accuracy,
        points=tuple(
            ProbePoint(agreement, threshold, speedup, interval, timed)
            for agreement, (threshold, speedup, interval), timed in zip(
                PROBED_AGREEMENTS, found, speed, strict=True
            )
        ),
        environment=environment(saved.model.device, seed),
        seconds=time.perf_counter() - start,
    )


def speedup_at(
    scores: Tensor, correct: Tensor, agreement: float, *, seed: int = 0
) -> tuple[float, float, tuple[float, float]]:
    """Threshold and layer speed-up of the fastest exits that agree so often, with a 95 % interval of the speed-up.

    The interval reaches from the fastest threshold that is certified to agree so often to the fastest that is not
    refuted, each by an exact binomial test, and at both by what resampled rows say of the layers. Rows that are drawn
    anew to choose a threshold would flatter twice: of 120 rows four such intervals in five hold the truth.

    Args:
        scores: (rows, layers), exit scores.
        correct: (rows, layers), bool, whether an exit agrees with the last layer.
        agreement: the share of rows that must agree.
        seed: of the resampled rows.
    """
    rows, depth = scores.shape
    thresholds = [1.0, *depth_thresholds(scores, 200).flip(0).tolist(), 0.0]
    layers = torch.stack(
        [choose_exit_layer(scores, threshold) for threshold in thresholds]
    )  # (thresholds, rows)
    lost = torch.stack([(~correct).gather(1, layer[:, None] - 1).sum() for layer in layers])
    speedups = depth / layers.double().mean(1)
    fits = 1 - lost / rows >= agreement - 1e-9
    fastest = int(torch.where(fits, speedups, 0.0).argmax())
    chances = torch.from_numpy(
        special.bdtrc(lost.double().numpy() - 1, rows, 1 - agreement)
    )  # of as many or more
    possible = int(torch.where(chances > TAIL, speedups, 0.0).argmax())
    certified = certify(scores, (~correct).float(), max_loss=1 - agreement, confidence=1 - TAIL)
    surely = choose_exit_layer(scores, 1.0 if certified is None else certified.threshold)
    drawn = torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(seed))
    low, high = (
        float((depth / exit_layer.double()[drawn].mean(1)).quantile(end))
        for exit_layer, end in ((surely, TAIL), (layers[possible], 1 - TAIL))
    )
    return thresholds[fastest], float(speedups[fastest]), (low, high)


@torch.no_grad()
def _seconds_of_a_text(
    original: LoadedClassifier, texts: Sequence[tuple[str, ...]], max_length: int
) -> float:
    """What the model takes for one text, in batches."""
    if not texts:
        return 1.0  # reading says what is wrong
    rows, _ = encode_texts(texts, original.tokenizer, min(max_length, original.longest))
    rows.sort(key=lambda row: len(row["input_ids"]))
    batch = dict(original.tokenizer.pad(rows[:: max(1, len(rows) // WARM_UP)], return_tensors="pt"))
    batch = {name: value.to(original.model.device) for name, value in batch.items()}
    original.model(**batch)
    begin = time.perf_counter()
    original.model(**batch)
    return (time.perf_counter() - begin) / len(batch["input_ids"])


def _timed(
    saved: LoadedClassifier, task: Any, threshold: float, seconds: float
) -> tuple[ClassificationSpeedRow, ...]:
    engine = Engine(saved)
    sample = [task.data.item(int(row)) for row in task.parts.policy[:128]]
    return measure_speed(
        engine,
        sample,
        batch_sizes=(1, 32),
        throughput=False,
        rule=engine.rule("policy", threshold),
        budget=TimeBudget(seconds),
        with_onnxruntime=False,
    ).rows
