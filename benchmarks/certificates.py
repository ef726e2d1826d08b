"""How often certificates are broken on the outcomes of a real model: many draws of its rows, judged by all of them.

    python benchmarks/certificates.py MODEL TEXTS --max-disagreement 0.01 --rows 500 1000 2000 --json certificates.json

All layers run once over the texts (`--cache` keeps what they give). Each draw takes rows with replacement, certifies a
threshold on them as `consistentee calibrate` does, and looks up how often that threshold disagrees with full depth in
the whole table, which is the truth the rows were drawn from: at most 1 - confidence of the draws may find more than was
promised. Beside it: what allowing the promised share itself would do ("naive"); half of the rows against the other
half, whose own luck adds to it; and the shorter half of the texts against the longer, where rows are of another kind.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistentee.data.files import read_texts
from consistentee.evaluation.agreement import unlabelled_rows
from consistentee.evaluation.classification import run_layers
from consistentee.functional.certificates import ThresholdPieces, certify, threshold_pieces
from consistentee.functional.criteria import exit_scores
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedClassifier, load_model

Table = tuple[Tensor, Tensor]
"""Exit scores, and losses of 0 or 1, both (rows, layers)."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", help="in every form that `consistentee predict` reads")
    parser.add_argument("--text-columns", nargs="+")
    parser.add_argument("--criteria", nargs="+", default=["policy", "confidence"])
    parser.add_argument("--rows", nargs="+", type=int, default=[500, 1000, 2000], help="rows of a draw")
    parser.add_argument("--max-disagreement", nargs="+", type=float, default=[0.01, 0.02])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="keep the outcomes of all layers, or read them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    logits, probs, lengths = outcomes(options)
    results: list[dict[str, Any]] = []
    for criterion in options.criteria:
        scores = exit_scores(criterion, logits, probs)
        predictions = logits.argmax(-1)
        table = scores, (predictions != predictions[:, -1:]).float()
        for max_loss in options.max_disagreement:
            for rows in options.rows:
                for name, draws, judge in experiments(table, lengths, rows, options.draws, options.seed):
                    naive = name == "naive"
                    found = judge_draws(draws, judge, criterion, max_loss, options.confidence, naive)
                    results.append(
                        {"criterion": criterion, "max_loss": max_loss, "rows": rows, "how": name} | found
                    )
                    print(line(results[-1]), flush=True)
    report = {
        "model": Path(options.model).name,
        "texts": Path(options.texts).name,
        "num_texts": len(logits),
        "num_hidden_layers": logits.shape[1],
        "draws": options.draws,
        "confidence": options.confidence,
        "seed": options.seed,
        "results": results,
        "environment": environment(torch.device("cpu")),
        "seconds": time.perf_counter() - start,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def outcomes(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer's logits and exit probabilities, and the texts' lengths in characters."""
    if options.cache and options.cache.is_file():
        kept = torch.load(options.cache, weights_only=True)
        return kept["logits"], kept["probs"], kept["lengths"]
    saved = load_model(options.model, LoadedClassifier)
    texts = list(read_texts(options.texts, options.text_columns, pairs=saved.text_pairs))
    rows = unlabelled_rows(texts, saved.label_names, options.texts)
    states, _ = run_layers(saved, rows, batch_size=options.batch_size, description="all layers")
    lengths = torch.tensor([sum(map(len, parts)) for parts in texts])
    if options.cache:
        torch.save(
            {"logits": states.layer_logits, "probs": states.exit_probs, "lengths": lengths}, options.cache
        )
    return states.layer_logits, states.exit_probs, lengths


def experiments(
    table: Table, lengths: Tensor, rows: int, draws: int, seed: int
) -> Iterator[tuple[str, Iterator[Table], Iterator[Table]]]:
    """By name: the rows of each draw, and what judges it."""
    count = len(lengths)

    def drawn(pool: Tensor) -> Iterator[Table]:
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            chosen = pool[torch.from_numpy(rng.integers(0, len(pool), rows))]
            yield table[0][chosen], table[1][chosen]

    def same(part: Table) -> Iterator[Table]:
        for _ in range(draws):
            yield part

    def halves(which: int) -> Iterator[Table]:
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            chosen = torch.from_numpy(rng.permutation(count))
            part = (chosen[:rows], chosen[rows:])[which]
            yield table[0][part], table[1][part]

    everything = torch.arange(count)
    order = lengths.argsort()
    shorter, longer = order[: count // 2], order[count // 2 :]
    yield "drawn from all", drawn(everything), same(table)
    yield "naive", drawn(everything), same(table)
    if 2 * rows <= count:
        yield "split in two", halves(0), halves(1)
    yield "shorter texts, longer judged", drawn(shorter), same((table[0][longer], table[1][longer]))


def judge_draws(
    draws: Iterator[Table],
    judges: Iterator[Table],
    criterion: str,
    max_loss: float,
    confidence: float,
    naive: bool,
) -> dict[str, Any]:
    """How many draws certify, how many of all break their promise, and what the certified thresholds save."""
    certified = broken = total = 0
    speedups: list[float] = []
    risks: list[float] = []
    truth: ThresholdPieces | None = None
    judged_before: Tensor | None = None
    for (scores, losses), judge in zip(draws, judges, strict=True):
        total += 1
        if truth is None or judge[0] is not judged_before:
            truth, judged_before = threshold_pieces(*judge, criterion), judge[0]
        if naive:
            threshold = fastest_within(threshold_pieces(scores, losses, criterion), max_loss)
        else:
            found = certify(scores, losses, max_loss=max_loss, confidence=confidence, criterion=criterion)
            threshold = None if found is None else found.threshold
        if threshold is None:
            continue
        piece = truth.piece_of(threshold)
        risks.append(float(truth.losses[piece]) / truth.num_rows)
        speedups.append(truth.num_layers / truth.mean_exit_layer(piece))
        certified += 1
        broken += risks[-1] > max_loss
    share = broken / total
    return {
        "certified": certified / total,
        "broken": share,
        "standard_error": math.sqrt(share * (1 - share) / total),
        "mean_loss": float(np.mean(risks)) if risks else None,
        "layer_speedup": float(np.mean(speedups)) if speedups else None,
    }


def fastest_within(pieces: ThresholdPieces, max_loss: float) -> float:
    """The last threshold before the rows themselves lose more than is allowed: what a validation set would choose."""
    within = pieces.losses <= max_loss * pieces.num_rows
    passed = len(within) if within.all() else int(np.argmin(within))
    return pieces.threshold(max(0, passed - 1))


def line(result: dict[str, Any]) -> str:
    head = f"{result['criterion']:10} {100 * result['max_loss']:g} % {result['rows']:6,} rows  {result['how']:28}"
    if result["layer_speedup"] is None:
        return f"{head} certifies nothing"
    return (
        f"{head} certified {100 * result['certified']:5.1f} %, broken {100 * result['broken']:5.1f} % "
        f"(+-{100 * result['standard_error']:.1f}), true loss {100 * result['mean_loss']:.2f} %, "
        f"layer speed-up {result['layer_speedup']:.2f}x"
    )


if __name__ == "__main__":
    main()
