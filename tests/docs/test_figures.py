"""What the other pages say in figures is what the kept files say: sentences and tables, written anew from the files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmark_scripts import RESULTS, ROOT, missing, read, script

TABLE_TASKS = {
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "rte": "RTE",
    "m-cid": "M-CID",
    "stackoverflow": "StackOverflow",
}
PAIRS = [(backbone, task) for backbone in ("e5-12l", "mpnet-12l") for task in TABLE_TASKS]
EPOCH_SPEEDS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def cell(backbone: str, task: str, method: str, seed: int = 1) -> dict[str, Any]:
    return read(f"{backbone}_{task}_{method}_{seed}.json")


def spread(values: Sequence[float], digits: int) -> str:
    return (
        f"{statistics.mean(values):+.{digits}f} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    )


# Classification: docs/experiments.md.


def scores(found: dict[str, Any], criterion: str) -> list[float]:
    return [100 * history["scores"][criterion] for history in found["history"]]


def test_rounds_of_the_consistent_phase() -> None:
    rows: list[str] = []
    gaps: dict[str, list[float]] = {"policy": [], "confidence": []}
    for backbone, task in PAIRS:
        for criterion, found in gaps.items():
            rounds = scores(cell(backbone, task, "consistent"), criterion)
            (throughout,) = scores(cell(backbone, task, "weighted"), criterion)
            shown = " | ".join(f"{value:.2f}" for value in (*rounds, throughout))
            rows.append(f"| {backbone}, {TABLE_TASKS[task]} | {criterion} | {shown} |")
            found.append(throughout - rounds[-1])
    sentence = (
        f"Weighted minus consistent (round 2) over the ten pairs: {spread(gaps['policy'], 2)} on validation rows with "
        f"the policy, {spread(gaps['confidence'], 2)} with confidence."
    )
    assert missing("docs/experiments.md", *rows, sentence) == []


def test_the_weighted_sum_against_the_consistent_objective() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (row,) = [line for line in results.splitlines() if line.startswith("| weighted - consistent |")]
    at = [part.strip() for part in row.strip("|").split("|")][3:]
    sentence = f"{at[0]} points at 1.5x, then {at[1]}, {at[2]}, {at[3]} and {at[4]} at 2x, 2.5x, 3x and 4x"
    assert missing("docs/experiments.md", sentence) == []


def best(backbone: str, task: str, method: str) -> list[float]:
    accuracy_at = script("render_results").accuracy_at
    return [100 * accuracy_at(cell(backbone, task, method), "policy", speed) for speed in EPOCH_SPEEDS]


def test_where_the_weighted_sum_leads() -> None:
    gaps = {
        pair: [a - b for a, b in zip(best(*pair, "weighted"), best(*pair, "consistent"), strict=True)]
        for pair in PAIRS
    }
    first, second = sorted(PAIRS, key=lambda pair: -sum(gaps[pair][:3]))[:2]
    assert (first, second) == (("mpnet-12l", "mrpc"), ("e5-12l", "sst2"))
    sentence = (
        f"The weighted sum leads most on MRPC with mpnet-12l ({min(gaps[first][:3]):.1f} to {max(gaps[first][:3]):.1f} "
        f"points on {cell(*first, 'plain')['num_examples']} dev rows up to 2.5x) and on SST-2 with e5-12l "
        f"({min(gaps[second][:3]):.1f} to {max(gaps[second][:3]):.1f} points on "
        f"{cell(*second, 'plain')['num_examples']} dev rows up to 2.5x, level at 3x)"
    )
    assert abs(gaps[second][3]) < 0.2
    rows = [
        f"| {title} | {scores(cell(*second, method), 'policy')[-1]:.2f} | "
        + " | ".join(f"{value:.1f}" for value in best(*second, method))
        + " |"
        for title, method in (
            ("at the middle price (default)", "consistent"),
            ("none: weighted sum throughout", "weighted"),
        )
    ]
    assert missing("docs/experiments.md", sentence, *rows) == []


def test_no_policy_collapsed_and_the_default_threshold_is_bold() -> None:
    for path in RESULTS.glob("*_consistent_*.json"):
        assert not any(
            history["collapsed"] for history in read(path.name)["history"]
        )  # "none did in any cell"
    figures = [
        (policy["metrics"]["accuracy"], 1 - policy["mean_exit_layer"] / 12)
        for policy in (
            cell("e5-12l", "m-cid", "consistent", seed)["criteria"]["policy"] for seed in (1, 2, 3)
        )
    ]
    first, *others = (f"{100 * accuracy:.1f} % with {100 * saved:.0f} % saved" for accuracy, saved in figures)
    assert missing("docs/experiments.md", ", ".join([first, *others])) == []


def test_noise_of_gradients_and_what_it_costs() -> None:
    folder = RESULTS / "ablate" / "studies"
    studies = [json.loads(path.read_text()) for path in sorted(folder.glob("e5-12l_rte_*_estimator.json"))]
    assert len(studies) == 3
    rows: list[str] = []
    for stage in ("untrained", "fitted"):
        noise = [study["noise"][stage] for study in studies]
        ratios = [
            statistics.mean(one["sampling_noise"][k] / one["batch_noise"] for one in noise)
            for k in ("1", "8", "32")
        ]
        rows.append("| noise, {} policy | {:.1f} | {:.2f} | {:.2f} | 0 |".format(stage, *ratios))
    areas = [100 * statistics.mean(s["fits"][k]["area"] for s in studies) for k in ("1", "8", "32", "exact")]
    rows.append("| area of a policy fitted by it, % | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(*areas))
    confidence = 100 * statistics.mean(study["confidence_area"] for study in studies)
    counts = [
        json.loads(path.read_text())["areas"] for path in sorted(folder.glob("*_rte_*_policy_rows.json"))
    ]
    fewer = [100 * statistics.mean(one[place]["area"] for one in counts) for place in range(3)]
    rows.append(f"Confidence has an area of {confidence:.1f} there")
    rows.append("124, 249 and all 498 rows {:.1f}, {:.1f} and {:.1f}:".format(*fewer))
    assert [place["rows"] for place in counts[0]] == [124, 249, 498]
    assert missing("docs/experiments.md", *rows) == []


# Speed of classifiers: docs/performance.md.

MARKS = {
    "minilm": "minilm-float32",
    "64 wide": "minilm-float32-narrow-exits",
    "64 wide, onnxruntime": "minilm-float32-narrow-exits-onnxruntime",
    "minilm, onnxruntime": "minilm-float32-onnxruntime",
    "minilm, bfloat16": "minilm-bfloat16",
    "bert-base, onnxruntime": "base-float32-onnxruntime",
    "bert-base, bfloat16": "base-bfloat16",
}


def test_tables_of_speed() -> None:
    render = script("render_speed").render
    tables = [render(read("speed", path.name)) for path in sorted((RESULTS / "speed").glob("*.json"))]
    assert len(tables) == 12
    assert missing("docs/performance.md", *tables) == []


def test_sentences_about_a_gpu() -> None:
    rows = read("speed", "gpu-bert-base-bfloat16-even.json")["rows"]
    sizes = (1, 8, 32, 128, None)

    def of(row: str, key: str) -> list[float]:
        return [next(r[key] for r in rows if (r["batch_size"], r["name"]) == (size, row)) for size in sizes]

    exits, effect = of("engine", "wall_clock_speedup"), of("engine", "efficiency")
    full = of("engine-full-depth", "speedup_over_transformers")
    page = "docs/performance.md"
    words = "{:.2f}x at batch 1, {:.2f}x at 8, {:.2f}x at 32, {:.2f}x at 128 and {:.2f}x in"
    assert missing(page, words.format(*exits)) == []
    assert missing(page, "{:.2f}x, {:.2f}x, {:.2f}x, {:.2f}x and {:.2f}x as fast".format(*full)) == []
    words = "efficiency {:.2f}, {:.2f}, {:.2f}, {:.2f} at batch 1, 8, 32, 128; {:.2f} in throughput mode"
    assert missing(page, words.format(*effect)) == []
    one, few, many = of("engine-full-depth", "latency_ms_p50")[:3]
    slower = [
        a - b for a, b in zip(of("engine-nobody-leaves", "latency_ms_p50"), (one, few, many), strict=False)
    ]
    assert (f"{one:.1f}", f"{many:.1f}") == ("3.4", "3.3")
    assert {f"{value / 12:.1f}" for value in slower} == {"0.6"}


def of_mode(name: str, size: int | None, row: str, key: str) -> float:
    rows = read("speed", f"{name}.json")["rows"]
    return next(found[key] for found in rows if (found["batch_size"], found["name"]) == (size, row))


def efficiency(size: int | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for title, name in MARKS.items():
        if any(row["batch_size"] == size for row in read("speed", f"{name}.json")["rows"]):
            found[title] = f"{of_mode(name, size, 'engine', 'efficiency'):.2f}"
    return found


def efficiencies(size: int | None) -> str:
    """What the table of marks shows of the sizes at which everything was run."""
    found = efficiency(size)
    return (
        f"minilm {found['minilm']} float32 (64 wide: {found['64 wide']}, ONNX Runtime "
        f"{found['64 wide, onnxruntime']}), {found['minilm, bfloat16']} bfloat16; bert-base "
        f"{found['bert-base, onnxruntime']} float32 (ONNX Runtime), {found['bert-base, bfloat16']} bfloat16"
    )


def test_marks_of_speed() -> None:
    eight, large = efficiency(8), efficiency(128)
    sentences = [
        *(f"| {efficiencies(size)} |" for size in (1, 32, None)),
        f"| minilm {eight['minilm']} float32 (64 wide: {eight['64 wide']}), {eight['minilm, bfloat16']} bfloat16; "
        f"bert-base {eight['bert-base, onnxruntime']} (ONNX Runtime), {eight['bert-base, bfloat16']} bfloat16 |",
        f"| minilm {large['minilm']} float32 (64 wide: {large['64 wide']}, ONNX Runtime "
        f"{large['64 wide, onnxruntime']}), {large['minilm, bfloat16']} bfloat16; bert-base "
        f"{large['bert-base, bfloat16']} bfloat16 |",
    ]
    over = {
        (name, size): of_mode(name, size, "engine-full-depth", "speedup_over_transformers")
        for name in (*MARKS.values(), "minilm-int8")
        for size in (1, 32)
    }
    sentences += [
        f"minilm {over['minilm-float32', 1]:.1f}x float32, {over['minilm-bfloat16', 1]:.1f}x bfloat16, "
        f"{over['minilm-int8', 1]:.1f}x int8 against float32; bert-base {over['base-float32-onnxruntime', 1]:.1f}x, "
        f"{over['base-bfloat16', 1]:.1f}x bfloat16",
        f"minilm {over['minilm-float32-onnxruntime', 32]:.2f}x float32 (ONNX Runtime), "
        f"{over['minilm-bfloat16', 32]:.2f}x bfloat16; bert-base {over['base-float32-onnxruntime', 32]:.2f}x, "
        f"{over['base-bfloat16', 32]:.2f}x",
    ]
    faster: dict[str, list[str]] = {}
    for name in ("minilm-float32-onnxruntime", "base-float32-onnxruntime"):
        for size in (1, 32):
            ours, theirs = (
                of_mode(name, size, row, "instances_per_second")
                for row in ("engine-full-depth", "onnxruntime")
            )
            faster.setdefault(name, []).append(f"{100 * (ours / theirs - 1):.0f} %")
    minilm, base = faster.values()
    sentences.append(f"faster: minilm {minilm[0]} at batch 1 and at 32; bert-base {base[0]} and {base[1]}")
    assert minilm[0] == minilm[1]
    single, half = (
        of_mode(f"rte-{dtype}", None, "engine-full-depth", "speedup_over_transformers")
        for dtype in ("float32", "bfloat16")
    )
    padding = of_mode("rte-float32", None, "transformers", "padding_share")
    sentences.append(
        f"{min(single, half):.1f}x bfloat16, {max(single, half):.2f}x float32 (e5-12l, RTE, no exits; "
        f"{100 * padding:.0f} % of a batch in arrival order is padding, 0 to "
        f"{100 * of_mode('rte-bfloat16', None, 'engine', 'padding_share'):.1f} % here)"
    )
    worst = (
        of_mode("minilm-float32", size, "engine-nobody-leaves", "wall_clock_speedup") for size in (1, 32)
    )
    narrow = of_mode("minilm-float32-narrow-exits", 1, "engine-nobody-leaves", "wall_clock_speedup")
    first, last = (f"{value:.2f}x" for value in worst)
    sentences.append(f"{first} at batch 1 (64 wide: {narrow:.2f}x), {last} at 32.")
    assert missing("docs/performance.md", *sentences) == []


# README.md, where it has the table of results.


def mean_of_the_ten() -> str:
    """The last row: seeds of a pair averaged first."""
    rendering = script("render_results")
    cells = [read(path.name) for path in RESULTS.glob("*.json")]
    columns: list[list[float]] = []
    for pair in PAIRS:
        found = rendering.same_seeds(cells, *pair, ("plain", "consistent"))
        policies = [ours["criteria"]["policy"] for _, ours in found]
        values = (
            [plain["metrics"]["accuracy"] for plain, _ in found],
            [policy["metrics"]["accuracy"] for policy in policies],
            [1 - policy["mean_exit_layer"] / 12 for policy in policies],
        )
        columns.append([*map(statistics.mean, values), *rendering._saved_at_best(found)])
    plain, exits, saved, *best = (100 * statistics.mean(column) for column in zip(*columns, strict=True))
    free, point, free_confidence, point_confidence = (f"{value:.0f} %" for value in best)
    return (
        f"| **mean over the ten** | {plain:.1f} % | {exits:.1f} %, {saved:.0f} % | **{free} ({free_confidence}); "
        f"{point} ({point_confidence})** |"
    )


def test_the_table_of_the_readme() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    table: dict[tuple[str, str], list[str]] = {}
    for line in results:
        parts = [part.strip() for part in line.strip("|").split("|")]
        if len(parts) == 12 and parts[2] == "consistent" and "%" in parts[6]:
            table[parts[0], parts[1]] = parts[4:]
    assert set(table) == set(PAIRS)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.startswith(("| e5-12l", "| mpnet-12l"))]
    names = {f"{backbone}, {TABLE_TASKS[task]}": (backbone, task) for backbone, task in PAIRS}
    means = [line for line in lines if line.startswith("| **mean over the ten** |")]
    assert [line for line in means if line != mean_of_the_ten()] == []
    for line in shown:
        title, rest = line.strip("| ").split(" | ", 1)
        plain, exits, saved, free, point, free_confidence, point_confidence, _ = table[
            names[title.split(" (")[0]]
        ]
        percent = "" if rest.startswith(f"{plain} % | {exits} %, {saved} |") else " of layers saved"
        assert rest == (
            f"{plain} % | {exits} %, {saved}{percent} | {free} ({free_confidence}); {point} ({point_confidence})"
        )


def test_the_graph_against_the_whole_model() -> None:
    reports = [read("graph", f"minilm-onnxruntime-{run}.json") for run in (1, 2)]
    assert missing("docs/export.md", script("render_graph").render(reports)) == []
    rows = {(row["batch_size"], row["name"]): row for row in reports[1]["rows"]}
    found = [rows[size, "engine"]["efficiency"] for size in (1, 8, 32, 128, None)]
    assert min(found) >= 0.89  # docs/performance.md


def test_the_graph_answers_as_the_engine() -> None:
    for task, rows in (("sst2", 872), ("mrpc", 408)):
        found = read("graph", f"answers-{task}.json")["found"]
        assert [(each["batch_size"], each["rows"]) for each in found] == [(1, rows), (7, rows), (64, rows)]
        assert all((each["other_labels"], each["other_exit_layers"]) == (0, 0) for each in found)
        assert missing("docs/export.md", f"all {rows} ") == []
