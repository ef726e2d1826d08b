"""The page of generation results, from the figures that the other scripts about generation kept.

    python benchmarks/render_generation.py [--pictures]

Writes docs/results-generation.md, and with --pictures the pictures in docs/images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from generation_speed_tables import speed_section

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "generation"
PAGE = ROOT / "docs" / "results-generation.md"
IMAGES = ROOT / "docs" / "images"
TASKS = ("alpaca", "xsum", "dolly", "cnndm")
TITLES = {"alpaca": "Alpaca", "xsum": "XSum", "dolly": "Dolly", "cnndm": "CNN/DailyMail"}
NAMES = {
    "policy": "ConsistentEE policy",
    "softmax_margin": "CALM softmax margin",
    "confidence_classifier": "CALM classifier",
    "state_similarity": "CALM state similarity",
    "static": "static depth",
}
INTRO = """# Generation: what token-level exits give

SmolLM2-135M (30 layers of 576, vocabulary 49,152, weights that were once in 4 bits), every token leaving at its own
layer. Made by

<!-- needs: time -->
```
python benchmarks/run_generation.py --backbone DIR/smollm2-30l --data DIR --runs runs/generation --tasks alpaca xsum \\
    --measure dolly=alpaca cnndm=xsum
python benchmarks/run_generation.py --backbone DIR/smollm2-30l --data DIR --runs runs/generation --tasks \\
    --lossless alpaca --lossless-tokens 24 --threads 2
benchmarks/run_generation_speed.sh cpu benchmarks/results/generation/speed runs/generation/alpaca-exits DIR/alpaca
python benchmarks/generation_memory.py --layers 10 30 --batch-size 4 --json benchmarks/results/generation/memory.json
python benchmarks/render_generation.py --pictures
```

and kept in `benchmarks/results/generation`, settings included. One seed (0). Layers are counted (1-based, the
end-of-text token included); tokens per second are of this shared machine, so read ratios within a table, not levels.
Perplexity is of the references' tokens, each predicted at the layer where it leaves, with the states that leaving
leaves behind. All was measured before commit 7fc83c1, since which the LM head is read otherwise in int8 and equal
logits give the lowest token: times, and texts in bfloat16, can differ; they have not been measured again. The tables
named `-avx512` are from after it, of a processor without AMX: `consistentee benchmark --config-name smollm2-135m-shape
--dtype float32 --batch-sizes 1,8,32 --new-tokens 64 --repeats 2 --seed 0`, and with bfloat16.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", action="store_true", help="draw the pictures, too")
    options = parser.parse_args()
    cells = read_cells()
    from consistentee.atomic_files import write_text

    write_text(PAGE, page(cells, read_speeds(), read_memory(), read_lossless()))
    if options.pictures:
        draw(cells)


def read_cells() -> dict[str, dict[str, Any]]:
    """Measured tasks, in order."""
    paths = {task: RESULTS / f"{task}.json" for task in TASKS}
    return {task: _read(path) for task, path in paths.items() if path.is_file()}


def read_speeds() -> dict[str, dict[str, Any]]:
    """Speed reports by name."""
    return {path.stem: _read(path) for path in sorted((RESULTS / "speed").glob("*.json"))}


def read_memory() -> list[dict[str, Any]]:
    """Rows of the memory benchmark."""
    path = RESULTS / "memory.json"
    return _read(path) if path.is_file() else []


def read_lossless() -> dict[str, Any]:
    """What the check of lossless decoding found."""
    path = RESULTS / "lossless.json"
    return _read(path) if path.is_file() else {}


def page(
    cells: dict[str, dict[str, Any]],
    speeds: dict[str, dict[str, Any]],
    memory: list[dict[str, Any]],
    lossless: dict[str, Any],
) -> str:
    """The whole page."""
    parts = [INTRO]
    missing = [TITLES[task] for task in TASKS if task not in cells]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}. The script goes on where it stopped.\n")
    parts += [_task(task, cell) for task, cell in cells.items()]
    if lossless:
        parts.append(_lossless(lossless))
    if speeds:
        parts.append(speed_section(speeds))
    if memory:
        parts.append(_memory(memory))
    return "\n".join(parts)


def points_of(evaluation: dict[str, Any], criterion: str) -> list[dict[str, Any]]:
    """Generated points of an exit rule, deepest first."""
    if criterion == evaluation["criterion"]:
        own = {
            key: evaluation[key]
            for key in ("metrics", "mean_exit_layer", "layer_speedup", "tokens_per_second", "threshold")
        }
        points = [own, *evaluation["generated"]]
    else:
        points = evaluation["other_criteria"][criterion]["generated"]
    return sorted(points, key=lambda point: -point["threshold"])


def depth_on_references(evaluation: dict[str, Any], criterion: str, threshold: float) -> float:
    """Mean exit layer of the references' tokens at a threshold that lies on the rule's curve."""
    own = criterion == evaluation["criterion"]
    curve = evaluation["curve"] if own else evaluation["other_criteria"][criterion]["curve"]
    return next(point["mean_exit_layer"] for point in curve if point["threshold"] == threshold)


def _task(task: str, cell: dict[str, Any]) -> str:
    evaluation = cell["evaluation"]
    depth, full = evaluation["num_hidden_layers"], evaluation["full_depth"]
    reference = evaluation["reference"]
    other = "" if cell["trained_on"] == task else f", with the model trained on {TITLES[cell['trained_on']]}"
    lines = [
        f"## {TITLES[task]}",
        "",
        f"{cell['rows']} prompts that no training saw{other}; at most {evaluation['max_new_tokens']} new tokens, batch "
        f"size {evaluation['batch_size']}, {evaluation['environment']['dtype']}.",
        "",
        "| | threshold | ROUGE-1 | ROUGE-2 | ROUGE-L | BLEU | perplexity | mean exit layer of the references' tokens | "
        "of the texts' | layer speed-up of the texts | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if reference is not None:
        lines.append(_row("plain model, fine-tuned", "", reference, depth, depth))
    lines.append(_row("with exits, all layers", "", full, depth, depth))
    for criterion in (evaluation["criterion"], *evaluation["other_criteria"]):
        points = points_of(evaluation, criterion)
        for point in points:
            forced = depth_on_references(evaluation, criterion, point["threshold"])
            lines.append(_row(NAMES[criterion], f"{point['threshold']:.3g}", point, depth, forced))
    lines += ["", *_equal_layers(evaluation), *_equal_text_layers(evaluation), *_verdict(evaluation), ""]
    lines += _training(cell)
    if cell["variants"]:
        lines += _variants(cell["variants"], evaluation)
    picture = IMAGES / f"generation-{task}.png"
    if picture.is_file() or task in ("alpaca", "xsum"):
        lines += [f"![Quality against depth on {TITLES[task]}](images/generation-{task}.png)", ""]
    lines += _examples(evaluation)
    return "\n".join(lines)


def _row(name: str, threshold: str, point: dict[str, Any], depth: int, forced: float) -> str:
    metrics = point["metrics"]
    scores = [f"{100 * metrics[key]:.1f}" for key in ("rouge1", "rouge2", "rougeL", "bleu")]
    perplexity = metrics.get("perplexity")
    cells = [
        name,
        threshold,
        *scores,
        "" if perplexity is None else f"{perplexity:.2f}",
        f"{forced:.2f} / {depth}",
        f"{point['mean_exit_layer']:.2f} / {depth}",
        f"{point['layer_speedup']:.2f}x",
        f"{point['tokens_per_second']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _equal_layers(evaluation: dict[str, Any]) -> list[str]:
    """ROUGE-L of all rules at thresholds where the references' tokens leave at the same depths."""
    rules = [evaluation["criterion"], *evaluation["other_criteria"]]
    lines = [
        "ROUGE-L at equal layers: thresholds at which the references' tokens leave after so many layers on average. In "
        "brackets the mean exit layer of the texts that came out; one that runs in a loop leaves early and is long.",
        "",
        "| layers | " + " | ".join(NAMES[name] for name in rules) + " |",
        "|---|" + "---|" * len(rules),
    ]
    for point in evaluation["generated"]:
        aim = depth_on_references(evaluation, rules[0], point["threshold"])
        cells: list[str] = []
        for name in rules:
            near = min(
                points_of(evaluation, name),
                key=lambda other: abs(depth_on_references(evaluation, name, other["threshold"]) - aim),
            )
            cells.append(f"{100 * near['metrics']['rougeL']:.1f} ({near['mean_exit_layer']:.1f})")
        lines.append(f"| {aim:.1f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _equal_text_layers(evaluation: dict[str, Any]) -> list[str]:
    """ROUGE-L of all rules where the texts themselves took so many layers, linear between what was measured."""
    rules = [evaluation["criterion"], *evaluation["other_criteria"]]
    num_layers, full = evaluation["num_hidden_layers"], evaluation["full_depth"]["metrics"]["rougeL"]
    lines = [
        "The same where the texts took so many layers a token, linear between measured points (full depth is one):",
        "",
        "| layers of the texts | " + " | ".join(NAMES[name] for name in rules) + " |",
        "|---|" + "---|" * len(rules),
    ]
    for depth in (0.9 * num_layers, 0.8 * num_layers, num_layers / 1.5):
        cells: list[str] = []
        for name in rules:
            points = [(p["mean_exit_layer"], p["metrics"]["rougeL"]) for p in points_of(evaluation, name)]
            points = sorted({*points, (float(num_layers), full)})
            layers, scores = zip(*points, strict=True)
            inside = layers[0] <= depth
            cells.append(f"{100 * float(np.interp(depth, layers, scores)):.1f}" if inside else "")
        lines.append(f"| {depth:.0f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _verdict(evaluation: dict[str, Any]) -> list[str]:
    """The mark: ROUGE-L within 1 point of the plain model at 1.5x fewer layers."""
    reference = evaluation["reference"]
    if reference is None:
        return []
    goal = reference["metrics"]["rougeL"]
    points = [*points_of(evaluation, evaluation["criterion"]), evaluation["full_depth"]]
    good = [point for point in points if point["metrics"]["rougeL"] >= goal - 0.01]
    fastest = max((point["layer_speedup"] for point in good), default=None)
    top = min(1.5, max(point["layer_speedup"] for point in points))
    best = max(point["metrics"]["rougeL"] for point in points if point["layer_speedup"] >= top)
    reached = "at no depth" if fastest is None else f"up to {fastest:.2f}x fewer layers"
    return [
        f"Mark (ROUGE-L within 1 point of the plain model's {100 * goal:.1f} at 1.5x fewer layers): the policy's "
        f"ROUGE-L at {top:.2f}x{' and above' if top == 1.5 else ', its fastest texts,'} is {100 * best:.1f}; within 1 "
        f"point it is {reached}."
    ]


def _training(cell: dict[str, Any]) -> list[str]:
    settings, history = cell["settings"], cell["training"].get("history") or []
    warmup = cell["training"].get("warmup") or {}
    lines = [
        "Training: "
        + ", ".join(
            f"{name} {settings[name]}"
            for name in (
                "backbone_training",
                "exit_head",
                "exit_head_rank",
                "learning_rate",
                "head_learning_rate",
                "warmup_epochs",
                "rounds",
                "consistent_epochs",
                "reward",
                "reward_loss",
                "reward_target",
                "policy_tokens",
                "policy_epochs",
                "max_length",
                "batch_size",
            )
        )
        + "."
    ]
    accuracy = warmup.get("per_layer_accuracy")
    if accuracy:
        lines.append(
            "Token accuracy by layer after warm-up: " + " ".join(f"{value:.3f}" for value in accuracy) + "."
        )
    for entry in history:
        after = entry.get("per_layer_accuracy")
        if after:
            lines.append(
                f"After round {entry['round']}: last layer {after[-1]:.3f}, layer 20 {after[19]:.3f}, layer 15 "
                f"{after[14]:.3f}, score {entry['score']:.4f}."
            )
    return [*lines, ""]


def _variants(variants: Sequence[dict[str, Any]], evaluation: dict[str, Any]) -> list[str]:
    depth = evaluation["num_hidden_layers"]
    lines = [
        f"Keys and values of skipped layers, and the first token (policy, threshold {variants[0]['threshold']:.3g}):",
        "",
        "| skipped layers | first token | ROUGE-L | mean exit layer | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for variant in variants:
        first = "last layer" if variant["full_depth_first_token"] else "own exit"
        states = "copied" if variant["skipped_states"] == "copy" else "recomputed"
        lines.append(
            f"| {states} | {first} | {100 * variant['metrics']['rougeL']:.1f} | {variant['mean_exit_layer']:.2f} / "
            f"{depth} | {variant['tokens_per_second']:.0f} |"
        )
    return [*lines, "", _same_rule(variants[0], evaluation), ""]


def _same_rule(variant: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """How the first variant, which is what the main table has, compares with what stands there."""
    points = points_of(evaluation, evaluation["criterion"])
    point = next(point for point in points if point["threshold"] == variant["threshold"])
    here, there = (100 * found["metrics"]["rougeL"] for found in (variant, point))
    if all(point["metrics"][name] == value for name, value in variant["metrics"].items()):
        return "The first row is the policy of the first table at this threshold, generated again: the same texts."
    return (
        f"The first row is the policy of the first table at this threshold, generated again: ROUGE-L {here:.1f} here, "
        f"{there:.1f} there, of the same prompts and model. The batches differed (here the first "
        f"{evaluation['batch_size']} prompts and then the others, there all of them sorted by length), and "
        f"{evaluation['environment']['dtype']} rounds differently in another batch. Compare the rows of this table "
        "with one another; a gap of that size is none."
    )


def _lossless(cell: dict[str, Any]) -> str:
    place = cell["environment"]
    lines = [
        "## Lossless decoding",
        "",
        f"Against all layers, float32, the model trained on {TITLES[cell['trained_on']]}, prompts of Alpaca, at most "
        f"{cell['new_tokens']} new tokens, drafting paused where it does not pay; {place['hardware']}, "
        f"{place['threads']} thread(s). Both in turn, {len(cell['rows'][0]['speedup_by_turn'])} turns.",
        "",
        "| batch | texts | identical | times faster | turn by turn | tokens from drafts |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['batch_size']} | {row['texts']} | {row['identical']} | {row['speedup']:.2f}x | "
        f"{min(row['speedup_by_turn']):.2f} to {max(row['speedup_by_turn']):.2f} | {100 * row['drafted_share']:.0f} % |"
        for row in cell["rows"]
    ]
    return "\n".join([*lines, ""])


def _examples(evaluation: dict[str, Any]) -> list[str]:
    lines = [
        "Texts with the layer at which tokens left (⟨12⟩ stands behind those that left at layer 12):",
        "",
    ]
    for example in evaluation["examples"][:2]:
        prompt = " ".join(example["prompt"].split())
        marked = marked_tokens(example["pieces"][:60], example["exit_layers"][:60])
        lines += [f"> **{prompt[:160]}**", ">", f"> {' '.join(marked.split())}", ""]
    return lines


def marked_tokens(pieces: Sequence[str], exit_layers: Sequence[int]) -> str:
    """The text, and behind each row of tokens that left at one layer that layer; white space comes after the mark."""
    marked = ""
    for layer, tokens in groupby(zip(pieces, exit_layers, strict=True), key=lambda token: token[1]):
        run = "".join(piece for piece, _ in tokens)
        visible = run.rstrip()
        marked += f"{visible}⟨{layer}⟩{run[len(visible) :]}" if visible else run
    return marked


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [
        "## Memory of training",
        "",
        f"Peak resident memory of a step with AdamW, SmolLM2's width, {rows[0]['batch_size']} texts of "
        f"{rows[0]['tokens']} tokens, bfloat16 autocast, less what the process held before. At most 1,024 (token, "
        "layer) rows of logits are held at once (`logit_rows`): 192 MiB, whatever the number of layers.",
        "",
        "| layers | " + " | ".join(ways) + " | weighted-sum / hugging-face | consistent / hugging-face |",
        "|---|" + "---|" * (len(ways) + 2),
    ]
    for layers in dict.fromkeys(row["layers"] for row in rows):
        peak = {row["way"]: row["peak_mb"] for row in rows if row["layers"] == layers}
        cells = [f"{peak[way]:,.0f} MB" for way in ways]
        cells += [f"{peak[way] / peak['hugging-face']:.2f}" for way in ("weighted-sum", "consistent")]
        lines.append(f"| {layers} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def draw(cells: dict[str, dict[str, Any]]) -> None:
    """The pictures of the page."""
    from consistentee.evaluation.plots import plot_evaluation

    for task, cell in cells.items():
        if task in ("alpaca", "xsum"):
            title = f"SmolLM2-135M, {TITLES[task]}"
            plot_evaluation(_evaluation(cell["evaluation"]), IMAGES / f"generation-{task}.png", title)


def _evaluation(values: dict[str, Any]) -> Any:
    """The dataclass that was written as plain values."""
    from consistentee.evaluation.results import (
        GeneratedPoint,
        GenerationEvaluation,
        GenerationExample,
        GenerationPoint,
        OtherGenerationCriterion,
    )

    def generated(point: dict[str, Any] | None) -> GeneratedPoint | None:
        return None if point is None else GeneratedPoint(**point)

    rivals = {
        name: OtherGenerationCriterion(
            rival["threshold"],
            [GenerationPoint(**point) for point in rival["curve"]],
            [GeneratedPoint(**point) for point in rival["generated"]],
        )
        for name, rival in values["other_criteria"].items()
    }
    return GenerationEvaluation(
        **{
            **values,
            "curve": [GenerationPoint(**point) for point in values["curve"]],
            "full_depth": generated(values["full_depth"]),
            "generated": [GeneratedPoint(**point) for point in values["generated"]],
            "other_criteria": rivals,
            "reference": generated(values["reference"]),
            "examples": [GenerationExample(**example) for example in values["examples"]],
        }
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
