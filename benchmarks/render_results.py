"""Write docs/results.md from the cells of run_results.py.

Usage: python benchmarks/render_results.py benchmarks/results docs/results.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from consistentee.atomic_files import write_text
from consistentee.training.methods import METHODS as TRAINING_METHODS

Cell = dict[str, Any]
TASKS = ("sst2", "mrpc", "rte", "m-cid", "stackoverflow")
TRAININGS = ("consistent", "weighted")
METHODS = ("plain", "weighted", "consistent")
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
        "Made by",
        "\n".join(["<!-- needs: time -->", "```", *commands(cells), "```"]),
        f"{_environment(cells)} Figures are means over the seeds named in each row (± their standard deviation). "
        "Accuracy is on the official dev rows (test rows for M-CID and StackOverflow), which nothing was chosen on. "
        "SST-2 uses 10,000 training rows, StackOverflow 5,000, a fifth of them for validation.",
        "## Accuracy and layers saved",
        "`consistent` is what `consistentee train` does by default, but for its epochs of warm-up "
        f"({_warmups(cells)}) and a default threshold that may lose nothing on validation rows (`max_accuracy_loss` 0 "
        "in place of half a point); `weighted` has as many epochs on the weighted sum of all classifiers' losses and "
        "the same policy on top. *Plain* is the same backbone fine-tuned with one classifier at the top, at full "
        "depth, on the same rows. *At the default threshold* is what one gets: policy and threshold were chosen on "
        "validation rows. *At best* sweeps the threshold on the evaluation rows: the most layers saved with an "
        "accuracy no lower than plain's, or at most 1 point lower (0 where no threshold reaches that); for every "
        "criterion alike, so it compares them but flatters all. A row more or less right moves these columns by tens "
        "of points where the curve is flat. The last column asks for no loss against the same model's own last layer "
        "instead.",
        _gain_table(cells),
        "## Policy against confidence, and the consistent objective against the weighted sum",
        "Best accuracy at a layer speed-up or more, in percent, thresholds swept on the evaluation rows. All rows of "
        "a block had the same training rows and as many epochs.",
        _speed_table(cells),
        "Means over pairs of backbone and task, of the seeds that all three ways of training have "
        f"({_shared_seeds(cells)}; seeds of a pair averaged first); differences, seed by seed, in points with their "
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
        "## Other methods",
        f"The rivals ({_rivals()}), as published and on equal exits, beside ours: "
        "[results-methods.md](results-methods.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _rivals() -> str:
    """The methods of others with their pages; criteria that need no training of their own among them."""
    names = [name for name, row in TRAINING_METHODS.items() if row.labels and name != "consistent"]
    return ", ".join(f"[{name}](methods/{name}.md)" for name in [*names, "pcee", "f_pabee"])


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
            both = same_seeds(cells, backbone, task, ("plain", method))
            if not both:
                continue
            plain = [plain["metrics"]["accuracy"] for plain, _ in both]
            policy = [cell["criteria"]["policy"] for _, cell in both]
            saved = _saved_at_best(both)
            depth = len(both[0][1]["per_layer_accuracy"])
            of_all = same_seeds(cells, backbone, task, METHODS)
            if of_all:
                marks[method].append(
                    tuple(_saved_at_best([(row[0], row[METHODS.index(method)]) for row in of_all]))
                )
            own = _mean(layers_saved_at(cell, "policy", cell["per_layer_accuracy"][-1]) for _, cell in both)
            rows.append(
                [
                    backbone,
                    task,
                    method,
                    _seeds(cell for _, cell in both),
                    _percent(plain),
                    _percent(point["metrics"]["accuracy"] for point in policy),
                    f"{100 * _mean(1 - point['mean_exit_layer'] / depth for point in policy):.0f} %",
                    *(f"{100 * value:.0f} %" for value in (*saved, own)),
                ]
            )
    if not rows:
        return "No pair of a plain and an early-exit run is finished yet."
    return "\n\n".join([_table(header, rows), *(_marks(method, marks[method]) for method in TRAININGS)])


def _saved_at_best(pairs: Sequence[tuple[Cell, ...]]) -> list[float]:
    """Layers saved at plain's accuracy and a point below, by the policy, then by confidence: means over the seeds."""
    return [
        _mean(
            layers_saved_at(cell, criterion, plain["metrics"]["accuracy"] - allowed) for plain, cell in pairs
        )
        for criterion in ("policy", "confidence")
        for allowed in ALLOWANCES
    ]


def _marks(method: str, saved: Sequence[tuple[float, ...]]) -> str:
    """One sentence: the mean over the pairs beside the paper's own figures."""
    if not saved:
        return f"No pair is finished for `{method}`."
    policy, policy_point, confidence, confidence_point = (
        100 * _mean(column) for column in zip(*saved, strict=True)
    )
    return (
        f"Mean over the {len(saved)} pairs of backbone and task for `{method}` (seeds that all three ways have): "
        f"{policy:.0f} % of layers saved at no loss (mark: 34 %; confidence {confidence:.0f} %), {policy_point:.0f} % "
        f"at 1 point (mark: 51 %; confidence {confidence_point:.0f} %)."
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
                rows.append([backbone, task, method, criterion, _seeds(found), *values, oracle])
    return _table(header, rows)


def _difference_table(cells: Sequence[Cell]) -> str:
    """What the policy adds to confidence, and the weighted sum to the consistent objective, seed by seed."""
    at: dict[tuple[str, str], list[list[float]]] = defaultdict(
        list
    )  # (training, criterion): a row for each pair
    gaps: dict[str, list[list[float]]] = defaultdict(list)  # the same for differences
    for backbone, task in _pairs(cells):
        rows = same_seeds(cells, backbone, task, METHODS)
        if not rows:
            continue
        found = {
            (method, criterion): [
                [100 * accuracy_at(row[METHODS.index(method)], criterion, speed) for speed in SPEEDS]
                for row in rows
            ]
            for method, criterion in product(TRAININGS, ("policy", "confidence", "patience"))
        }  # (training, criterion): a row for each seed
        for key, by_seed in found.items():
            at[key].append(_column_means(by_seed))
        for method in TRAININGS:
            gaps[method].append(_gap(found[method, "policy"], found[method, "confidence"]))
        gaps["weighted - consistent"].append(_gap(found["weighted", "policy"], found["consistent", "policy"]))
    lines: list[list[str]] = []
    for method in TRAININGS:
        for criterion in ("policy", "confidence", "patience"):
            pairs = at[method, criterion]
            lines.append(
                [method, criterion, str(len(pairs)), *(f"{value:.1f}" for value in _column_means(pairs))]
            )
        lines.append([method, "policy - confidence", str(len(gaps[method])), *_spread(gaps[method])])
    between = gaps["weighted - consistent"]
    lines.append(["weighted - consistent", "policy", str(len(between)), *_spread(between)])
    return _table(["training", "criterion", "pairs", *(f"{speed:g}x" for speed in SPEEDS)], lines)


def _gap(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds, (seeds, speeds) each, of ours minus theirs: one for each speed."""
    return [a - b for a, b in zip(_column_means(ours), _column_means(theirs), strict=True)]


def _column_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(column) for column in zip(*rows, strict=True)]


def _spread(gaps: Sequence[Sequence[float]]) -> list[str]:
    """Mean difference over the pairs, (pairs, speeds), and its standard error where there are several."""
    return [
        f"{_mean(column):+.1f}"
        + (f" ± {statistics.stdev(column) / len(column) ** 0.5:.1f}" if len(column) > 1 else "")
        for column in zip(*gaps, strict=True)
    ]


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
                rows.append([backbone, task, method, _seeds(found), *map(shown, means)])
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
    """Versions and hardware of all cells; those that differ are named side by side."""
    names = ("consistentee", "torch", "transformers", "device", "threads", "mixed_precision")
    found = [cell["environment"] for cell in cells]  # of earlier records "device" is the hardware
    found = [{**each, "device": each.get("hardware", each["device"])} for each in found]
    place = {name: " and ".join(sorted({str(each[name]) for each in found})) for name in names}
    versions = ", ".join(f"{name} {place[name]}" for name in names[:3])
    return (
        f"with {versions}, {place['device']} with {place['threads']} thread(s), precision "
        f"{place['mixed_precision']}."
    )


def commands(cells: Sequence[Cell]) -> list[str]:
    """The commands that make these cells, no more and no less."""
    by_seed: dict[int, set[tuple[str, str, str]]] = defaultdict(set)
    for cell in cells:
        by_seed[cell["seed"]].add((cell["backbone"], cell["task"], cell["method"]))
    together: dict[frozenset[tuple[str, str, str]], list[int]] = defaultdict(list)  # cells to all their seeds
    for seed, made in sorted(by_seed.items()):
        together[frozenset(made)].append(seed)
    lines: list[str] = []
    for made, seeds in together.items():
        for backbones, tasks, methods in _products(made):
            options = f"--backbones {' '.join(backbones)} --tasks {' '.join(tasks)}"
            if methods != sorted(METHODS):
                options += f" --methods {' '.join(methods)}"
            lines.append(
                "python benchmarks/run_results.py --models MODELS --data DATA --runs RUNS "
                f"{options} --seeds {' '.join(map(str, seeds))}"
            )
    return [*lines, "python benchmarks/render_results.py benchmarks/results docs/results.md"]


def _products(
    made: frozenset[tuple[str, str, str]],
) -> list[tuple[list[str], list[str], list[str]]]:
    """Backbones, tasks and methods whose products are exactly the cells made: one if that will do, else by method."""
    axes = [sorted({run[axis] for run in made}) for axis in range(3)]
    if set(product(*axes)) == made:
        return [(axes[0], axes[1], axes[2])]
    for axis in (2, 0, 1):
        if len(axes[axis]) > 1:
            parts = [frozenset(run for run in made if run[axis] == value) for value in axes[axis]]
            return [found for part in parts for found in _products(part)]
    return []  # unreachable: one backbone, task and method are a product


def _warmups(cells: Sequence[Cell]) -> str:
    """Epochs of warm-up of the consistent training, task by task."""
    epochs = {
        cell["task"]: cell["config"]["warmup_epochs"] for cell in cells if cell["method"] == "consistent"
    }
    return ", ".join(f"{epochs[task]:g} for {task}" for task in TASKS if task in epochs)


def _shared_seeds(cells: Sequence[Cell]) -> str:
    """Which seeds all ways of training have, pair by pair; pairs of which the seeds are the same are not named."""
    found: dict[str, list[str]] = defaultdict(list)
    for backbone, task in _pairs(cells):
        rows = same_seeds(cells, backbone, task, METHODS)
        if rows:
            found[_seeds(row[0] for row in rows)].append(f"{backbone} on {task}")
    if not found:
        return "none yet"
    usual = max(found, key=lambda seeds: len(found[seeds]))
    others = [f"{seeds} for {', '.join(pairs)}" for seeds, pairs in found.items() if seeds != usual]
    return "; ".join([f"seed {usual}", *others])


def _seeds(cells: Iterable[Cell]) -> str:
    """The seeds of some cells, "1, 2, 3"."""
    return ", ".join(str(seed) for seed in sorted(cell["seed"] for cell in cells))


def _pairs(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    found = {(cell["backbone"], cell["task"]) for cell in cells}
    return sorted(found, key=lambda pair: (pair[0], TASKS.index(pair[1])))


def same_seeds(
    cells: Sequence[Cell], backbone: str, task: str, methods: Sequence[str]
) -> list[tuple[Cell, ...]]:
    """The cells of some methods, side by side, for every seed that all of them have."""
    by_method = [
        {
            cell["seed"]: cell
            for cell in cells
            if (cell["backbone"], cell["task"], cell["method"]) == (backbone, task, method)
        }
        for method in methods
    ]
    shared = set.intersection(*(set(found) for found in by_method))
    return [tuple(found[seed] for found in by_method) for seed in sorted(shared)]


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
