"""All exits against those that `calibrate --exit-layers auto` keeps, on the clock, at equal agreement with the model.

    python benchmarks/exit_layer_curves.py RETROFITTED --texts FILE... [--json out.json]

The texts are those that `consistentee retrofit` was given: its shares are drawn again, and the texts that it reported
on are used, unseen by exits and policy. Half of them choose the layers, the other half is judged: at each
agreement asked for, each set of exits has the threshold that is expected to be fastest there (swept on the judged texts
for both alike), and full depth and both are timed in turn. Run it with one thread on a machine that is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistentee import LoadedClassifier, load_model
from consistentee.atomic_files import write_text
from consistentee.config import RetrofitConfig
from consistentee.data.files import read_texts
from consistentee.data.rows import TextDataset
from consistentee.data.tokenization import encode_texts
from consistentee.evaluation.classification import run_layers
from consistentee.evaluation.exit_choice import NOBODY_EXITS, choice_lines, choose_exit_layers
from consistentee.evaluation.layer_times import TIMED_REPEATS, TIMED_ROWS, LayerTimes, times_on
from consistentee.functional.curves import SUM_ERROR, trade_off_curve
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.timing import environment, paired_ratio, time_in_turn
from consistentee.models.exit_subsets import with_exit_layers
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import retrofit_task

AGREEMENTS = (0.998, 0.995, 0.99, 0.98)
BATCH_SIZES = (1, 32)


def main() -> None:
    """Choose, sweep, time, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--target", type=float, default=0.01, help="disagreement that the choice is made for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = itertools.chain.from_iterable(read_texts(file) for file in options.texts)
    saved = load_model(options.model, LoadedClassifier)
    config = RetrofitConfig(**saved.record["config"])
    task = retrofit_task(saved.record["original"]["name"], texts, config, source="texts")
    if task.data.fingerprint() != saved.record["data"]["fingerprint"]:
        parser.error("these are not the texts that the model was retrofitted with")
    kept = [task.data.text(int(row)) for row in task.parts.report]
    choosing, judged = (
        TextDataset(part, [0] * len(part), tuple(saved.label_names), "texts")
        for part in (kept[::2], kept[1::2])
    )
    rows: list[dict[str, Any]] = []
    for size in BATCH_SIZES:
        choice = choose_exit_layers(
            saved,
            choosing,
            goal="max_disagreement",
            target=options.target,
            batch_size=size,
            backend=options.backend,
            progress=True,
        )
        print("\n".join(choice_lines(choice)), flush=True)
        rows += judge(saved, choice.exit_layers, judged, size, options.backend)
        print("\n".join(table(rows)), flush=True)
    if options.json is not None:
        found = {
            "num_choosing_rows": len(choosing),
            "num_judged_rows": len(judged),
            "target": options.target,
            "backend": options.backend,
            "rows": rows,
            "environment": environment(torch.device("cpu"), config.seed),
        }
        write_text(options.json, json.dumps(found, indent=1) + "\n")


def judge(
    saved: LoadedClassifier, exit_layers: list[int], judged: TextDataset, size: int, backend: str
) -> list[dict[str, Any]]:
    """Both sets of exits at each agreement, expected and timed."""
    times = times_on(saved, judged.texts, batch_size=size, backend=backend)
    models = {
        "all exits": with_exit_layers(saved, None),
        "chosen exits": with_exit_layers(saved, exit_layers),
    }
    points: dict[str, list[dict[str, Any]]] = {}
    answers: Tensor | None = None
    for name, model in models.items():
        states, _ = run_layers(model, judged, description=name)
        predictions = states.layer_logits.argmax(-1)
        answers = predictions[:, -1] if answers is None else answers  # of the model with all exits
        agrees = predictions == answers[:, None]
        points[name] = swept(states, agrees, model.early_exit_model.config.criterion, times)
    engines = {name: Engine(model, backend=backend) for name, model in models.items()}
    encoded, _ = encode_texts(judged.texts[:TIMED_ROWS], saved.tokenizer, saved.max_length)
    work: dict[str, Any] = {
        "full depth": [partial(engines["all exits"].run, encoded, batch_size=size, rule=NOBODY_EXITS)]
    }
    for name, at in points.items():
        for point in at:
            rule = ExitRule(point["criterion"], point["threshold"])
            work[f"{name} at {point['asked']}"] = [
                partial(engines[name].run, encoded, batch_size=size, rule=rule)
            ]
    seconds = time_in_turn(work, torch.device("cpu"), 2 * TIMED_REPEATS)
    rows: list[dict[str, Any]] = []
    for name, at in points.items():
        for point in at:
            mine = seconds[f"{name} at {point['asked']}"]
            faster, first, third = paired_ratio(seconds["full depth"], mine)
            against, low, high = paired_ratio(seconds[f"all exits at {point['asked']}"], mine)
            rows.append(
                {
                    "batch_size": size,
                    "exits": name,
                    "exit_layers": exit_layers if name == "chosen exits" else None,
                    **point,
                    "speedup": faster,
                    "speedup_quartiles": [first, third],
                    "against_all_exits": against,
                    "against_all_exits_quartiles": [low, high],
                }
            )
    return rows


def swept(states: Any, agrees: Tensor, criterion: str, times: LayerTimes) -> list[dict[str, Any]]:
    """The threshold expected to be fastest at each agreement."""
    scores = states.exit_scores(criterion)
    has_exit = [True] * scores.shape[1] if states.has_exit is None else states.has_exit[0].tolist()
    at_layers, found = times.at_layers(has_exit), list[dict[str, Any]]()
    curve = [
        (point, float(at_layers[choose_exit_layer(scores, point.threshold) - 1].mean()))
        for point in trade_off_curve(scores, agrees, criterion, limit=1000)
    ]
    for asked in AGREEMENTS:
        enough = [each for each in curve if each[0].accuracy >= asked - SUM_ERROR]
        point, spent = min(enough, key=lambda each: each[1])
        found.append(
            {
                "asked": asked,
                "criterion": criterion,
                "threshold": point.threshold,
                "agreement": point.accuracy,
                "layer_speedup": point.layer_speedup,
                "expected_ms": spent,
                "expected_speedup": times.full_depth_ms / spent,
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each agreement, batch size and set of exits."""
    lines = [
        "| batch | exits | agreement | fewer layers | faster than full depth | than all exits |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["batch_size"], -row["asked"])):
        layers = ", ".join(map(str, row["exit_layers"] or [])) or "all"
        low, high = row["against_all_exits_quartiles"]
        against = "" if layers == "all" else f"{row['against_all_exits']:.2f}x ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {row['batch_size']} | {layers} | {100 * row['agreement']:.2f} % | {row['layer_speedup']:.2f}x | "
            f"{row['speedup']:.2f}x | {against} |"
        )
    return lines


if __name__ == "__main__":
    main()
