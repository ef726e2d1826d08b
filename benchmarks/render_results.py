"""Write docs/results.md from the cells of run_results.py.

Usage: python benchmarks/render_results.py benchmarks/results docs/results.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from consistentee.atomic import write_text

Cell = dict[str, Any]
TASKS = ("sst2", "mrpc", "rte", "m-cid", "stackoverflow")
TRAININGS = ("consistent", "weighted")
SPEEDS = (1.5, 2.0, 2.5, 3.0, 4.0)
ALLOWANCES = (0.0, 0.01)


def main() -> None:
    """Read the cells, write the page."""
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/render_results.py CELLS_FOLDER PAGE.md")
    cells = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(sys.argv[1]).glob("*.json"))
    ]
    if not cells:
        sys.exit(f"{sys.argv[1]} holds no finished cell. Run benchmarks/run_results.py first.")
    write_text(sys.argv[2], page(cells))


def page(cells: Sequence[Cell]) -> str:
    """The whole page."""
    parts = [
        "# Results",
        "Made by `python benchmarks/run_results.py --models MODELS --data DATA --runs RUNS --backbones "
        f"{_named(cells, 'backbone')} --tasks {_named(cells, 'task')} --seeds {_named(cells, 'seed')}` and "
        f"`python benchmarks/render_results.py benchmarks/results docs/results.md`; {_environment(cells)} "
        "Figures are means over the seeds given in each row. Accuracy is on the official dev rows (test rows for M-CID "
        "and StackOverflow), which nothing was chosen on. SST-2 uses 10,000 training rows, StackOverflow 5,000.",
        "## Accuracy and layers saved",
        "`consistent` is what `consistentee train` does by default; `weighted` has as many epochs on the weighted sum "
        "of all classifiers' losses and the same policy on top. *Plain* is the same backbone fine-tuned with one "
        "classifier at the top, at full depth, on the same rows. *At the default threshold* is what one gets: policy "
        "and threshold were chosen on validation rows. *At best* sweeps the threshold on the evaluation rows: the most "
        "layers saved with an accuracy no lower than plain's, or at most 1 point lower (0 where no threshold reaches "
        "that); for every criterion alike, so it compares them but flatters all. A row more or less right moves these "
        "columns by tens of points where the curve is flat. The last column asks for no loss against the same model's "
        "own last layer instead.",
        _gain_table(cells),
        "## Policy against confidence, and the consistent objective against the weighted sum",
        "Best accuracy at a layer speed-up or more, in percent, thresholds swept on the evaluation rows. All rows of "
        "a block had the same training rows and as many epochs.",
        _speed_table(cells),
        "Means over pairs of backbone and task (seeds of a pair averaged first); differences in points with their "
        "standard error over the pairs.",
        _difference_table(cells),
        "## Accuracy of every internal classifier alone",
        "The paper's first mechanism would show here: classifiers that need not be right everywhere should become "
        "better where inputs leave. Compare `consistent` with `weighted`.",
        _layer_table(cells, "classifier_accuracy", lambda value: f"{100 * value:.1f}"),
        "## Memorized layers",
        "Evaluation rows by memorized layer (the lowest layer from which all are right; the last also holds those it "
        "gets wrong), consistent training.",
        _layer_table(
            [cell for cell in cells if cell["method"] == "consistent"], "memorized_layer_histogram", _count
        ),
        "## Convergence of the iteration",
        "Validation rows, cross-fitted policy; the score is the mean accuracy at six layer speed-ups from 1.25 to 4.",
        _round_table(cells),
    ]
    return "\n\n".join(parts) + "\n"


def layers_saved_at(cell: Cell, criterion: str, accuracy_floor: float) -> float:
    """Most layers saved, 0 to 1, on the curve of a criterion with at least this accuracy; 0 where none has it."""
    depth = len(cell["per_layer_accuracy"])
    fits = [
        1 - layer / depth
        for _, accuracy, layer in cell["criteria"][criterion]["curve"]
        if accuracy >= accuracy_floor
    ]
    return max(fits, default=0.0)


def accuracy_at(cell: Cell, criterion: str, layer_speedup: float) -> float:
    """Best accuracy on the curve of a criterion at this layer speed-up or more."""
    depth = len(cell["per_layer_accuracy"])
    curve = cell["criteria"][criterion]["curve"]
    return max(accuracy for _, accuracy, layer in curve if depth / layer >= layer_speedup)


def _gain_table(cells: Sequence[Cell]) -> str:
    header = [
        "backbone", "task", "training", "seeds", "plain %", "early exits % (default)", "layers saved (default)",
        "saved at best, no loss", "saved at best, 1 point", "confidence: no loss", "confidence: 1 point",
        "no loss against own last layer",
    ]  # fmt: skip
    rows: list[list[str]] = []
    marks: dict[str, list[tuple[float, ...]]] = {method: [] for method in TRAININGS}
    for backbone, task in _pairs(cells):
        for method in TRAININGS:
            both = _paired_seeds(cells, backbone, task, ("plain", method))
            if not both:
                continue
            plain = [plain["metrics"]["accuracy"] for plain, _ in both]
            policy = [cell["criteria"]["policy"] for _, cell in both]
            saved = [
                _mean(
                    layers_saved_at(cell, criterion, accuracy - allowed)
                    for accuracy, (_, cell) in zip(plain, both, strict=True)
                )
                for criterion in ("policy", "confidence")
                for allowed in ALLOWANCES
            ]
            depth = len(both[0][1]["per_layer_accuracy"])
            marks[method].append(tuple(saved))
            own = _mean(layers_saved_at(cell, "policy", cell["per_layer_accuracy"][-1]) for _, cell in both)
            rows.append(
                [
                    backbone,
                    task,
                    method,
                    str(len(both)),
                    _percent(plain),
                    _percent(point["metrics"]["accuracy"] for point in policy),
                    f"{100 * _mean(1 - point['mean_exit_layer'] / depth for point in policy):.0f} %",
                    *(f"{100 * value:.0f} %" for value in (*saved, own)),
                ]
            )
    if not rows:
        return "No pair of a plain and an early-exit run is finished yet."
    return "\n\n".join([_table(header, rows), *(_marks(method, marks[method]) for method in TRAININGS)])


def _marks(method: str, saved: Sequence[tuple[float, ...]]) -> str:
    """One sentence: the mean over the pairs beside the paper's own figures."""
    if not saved:
        return f"No pair is finished for `{method}`."
    policy, policy_point, confidence, confidence_point = (
        100 * _mean(column) for column in zip(*saved, strict=True)
    )
    return (
        f"Mean over the {len(saved)} of 10 pairs of backbone and task that are finished for `{method}`: {policy:.0f} % "
        f"of layers saved at no loss (mark: 34 %; confidence {confidence:.0f} %), {policy_point:.0f} % at 1 point "
        f"(mark: 51 %; confidence {confidence_point:.0f} %)."
    )


def _speed_table(cells: Sequence[Cell]) -> str:
    header = [
        "backbone",
        "task",
        "training",
        "criterion",
        "seeds",
        *(f"{speed:g}x" for speed in SPEEDS),
        "oracle",
    ]
    rows: list[list[str]] = []
    for backbone, task in _pairs(cells):
        for method in ("weighted", "consistent"):
            found = [
                cell
                for cell in cells
                if (cell["backbone"], cell["task"], cell["method"]) == (backbone, task, method)
            ]
            if not found:
                continue
            oracle = f"{_mean(cell['oracle_speedup'] for cell in found):.1f}x"
            for criterion in ("policy", "confidence", "entropy", "patience"):
                values = [_percent(accuracy_at(cell, criterion, speed) for cell in found) for speed in SPEEDS]
                rows.append([backbone, task, method, criterion, str(len(found)), *values, oracle])
    return _table(header, rows)


def _difference_table(cells: Sequence[Cell]) -> str:
    """What the policy adds to confidence, and the weighted sum to the consistent objective, pair by pair."""
    at: dict[
        tuple[str, str, str, str], list[float]
    ] = {}  # (backbone, task, training, criterion) to one per speed
    for backbone, task in _pairs(cells):
        for method in TRAININGS:
            found = [c for c in cells if (c["backbone"], c["task"], c["method"]) == (backbone, task, method)]
            for criterion in ("policy", "confidence", "patience") if found else ():
                at[backbone, task, method, criterion] = [
                    100 * _mean(accuracy_at(cell, criterion, speed) for cell in found) for speed in SPEEDS
                ]
    rows: list[list[str]] = []
    for method in TRAININGS:
        pairs = [key[:2] for key in at if key[2:] == (method, "policy")]
        for criterion in ("policy", "confidence", "patience") if pairs else ():
            columns = zip(*(at[pair[0], pair[1], method, criterion] for pair in pairs), strict=True)
            rows.append([method, criterion, str(len(pairs)), *(f"{_mean(column):.1f}" for column in columns)])
        if len(pairs) > 1:
            ours, theirs = (
                [at[pair[0], pair[1], method, name] for pair in pairs] for name in ("policy", "confidence")
            )
            rows.append([method, "policy - confidence", str(len(pairs)), *_differences(ours, theirs)])
    both = [
        key[:2]
        for key in at
        if key[2:] == ("weighted", "policy") and (key[0], key[1], "consistent", "policy") in at
    ]
    if len(both) > 1:
        weighted, consistent = (
            [at[pair[0], pair[1], name, "policy"] for pair in both] for name in ("weighted", "consistent")
        )
        rows.append(["weighted - consistent", "policy", str(len(both)), *_differences(weighted, consistent)])
    return _table(["training", "criterion", "pairs", *(f"{speed:g}x" for speed in SPEEDS)], rows)


def _differences(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[str]:
    """Mean difference over the pairs and its standard error, for each speed."""
    shown: list[str] = []
    for our, their in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        gaps = [a - b for a, b in zip(our, their, strict=True)]
        shown.append(f"{_mean(gaps):+.1f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}")
    return shown


def _layer_table(cells: Sequence[Cell], key: str, shown: Callable[[float], str]) -> str:
    cells = [cell for cell in cells if cell["method"] != "plain"]
    depth = max((len(cell[key]) for cell in cells), default=0)
    header = ["backbone", "task", "training", "seeds", *map(str, range(1, depth + 1))]
    rows: list[list[str]] = []
    for backbone, task in _pairs(cells):
        for method in ("weighted", "consistent"):
            found = [
                cell
                for cell in cells
                if (cell["backbone"], cell["task"], cell["method"]) == (backbone, task, method)
            ]
            if found:
                means = [_mean(column) for column in zip(*(cell[key] for cell in found), strict=True)]
                rows.append([backbone, task, method, str(len(found)), *map(shown, means)])
    return _table(header, rows)


def _round_table(cells: Sequence[Cell]) -> str:
    header = [
        "backbone",
        "task",
        "seed",
        "round",
        "score",
        "reward",
        "accuracy at 0.5",
        "mean exit layer at 0.5",
        "kept",
    ]
    rows = [
        [
            cell["backbone"],
            cell["task"],
            str(cell["seed"]),
            str(figures["round"]),
            f"{figures['score']:.4f}",
            f"{figures['reward']:.4f}",
            f"{figures['accuracy']:.4f}",
            f"{figures['mean_exit_layer']:.2f}",
            "yes" if figures["round"] == cell["best_round"] else "",
        ]
        for cell in cells
        if cell["method"] == "consistent"
        for figures in cell["history"]
    ]
    return _table(header, rows)


def _environment(cells: Sequence[Cell]) -> str:
    environment = cells[0]["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("consistentee", "torch", "transformers"))
    return (
        f"{versions}, {environment['device']} with {environment['threads']} thread(s), precision "
        f"{environment['mixed_precision']}."
    )


def _named(cells: Sequence[Cell], key: str) -> str:
    return " ".join(sorted({str(cell[key]) for cell in cells}))


def _pairs(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    found = {(cell["backbone"], cell["task"]) for cell in cells}
    return sorted(found, key=lambda pair: (pair[0], TASKS.index(pair[1])))


def _paired_seeds(
    cells: Sequence[Cell], backbone: str, task: str, methods: tuple[str, str]
) -> list[tuple[Cell, Cell]]:
    """The two methods' cells of every seed that both have."""
    by_method = [
        {
            cell["seed"]: cell
            for cell in cells
            if (cell["backbone"], cell["task"], cell["method"]) == (backbone, task, method)
        }
        for method in methods
    ]
    return [
        (by_method[0][seed], by_method[1][seed]) for seed in sorted(by_method[0].keys() & by_method[1].keys())
    ]


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _percent(values: Iterable[float]) -> str:
    """Mean, and the spread over seeds where there are several, in percent."""
    listed = [100 * value for value in values]
    spread = f" ± {statistics.stdev(listed):.1f}" if len(listed) > 1 else ""
    return f"{statistics.mean(listed):.1f}{spread}"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
