"""What the pages say of generation in figures is what the kept files say: sentences written anew from the files."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark_scripts import RESULTS, ROOT, missing, read, script


def at_depths(task: str, criterion: str) -> list[str]:
    """ROUGE-L, and in brackets the texts' layers, where the references leave after 24 and 20 layers."""
    evaluation = read("generation", f"{task}.json")["evaluation"]
    points = script("render_generation").points_of(evaluation, criterion)[1:]
    return [f"{100 * p['metrics']['rougeL']:.1f} ({p['mean_exit_layer']:.1f})" for p in points]


def test_rules_at_equal_layers() -> None:
    rows: list[str] = []
    for title, criterion in (
        ("policy", "policy"),
        ("CALM softmax margin", "softmax_margin"),
        ("CALM classifier", "confidence_classifier"),
    ):
        rows.append(
            " | ".join(
                [f"| {title}", *(f for t in ("xsum", "dolly", "alpaca") for f in at_depths(t, criterion))]
            )
        )
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").replace("**", "")
    assert [row for row in rows if row not in page] == []
    margin, policy = (
        [point["tokens_per_second"] for point in script("render_generation").points_of(evaluation, criterion)]
        for evaluation in [read("generation", "alpaca.json")["evaluation"]]
        for criterion in ("softmax_margin", "policy")
    )
    ratios = [a / b for a, b in zip(margin, policy, strict=True)]
    sentence = f"which writes {min(ratios):.2f} to {max(ratios):.2f} times as many tokens a second"
    assert missing("docs/experiments.md", sentence) == []


def rouge_l(point: dict[str, Any]) -> float:
    """In points, as the pages show it: their differences are of what a reader sees."""
    return round(100 * point["metrics"]["rougeL"], 1)


def test_what_exits_cost_in_texts() -> None:
    figures: dict[str, dict[str, float]] = {}
    for task in ("xsum", "alpaca"):
        kept = read("generation", f"{task}.json")
        evaluation = kept["evaluation"]
        fastest = evaluation["generated"][-1]
        copied, own_exit, recomputed, _ = map(rouge_l, kept["variants"])
        figures[task] = {
            "plain": rouge_l(evaluation["reference"]),
            "full": rouge_l(evaluation["full_depth"]),
            "own": rouge_l(evaluation),
            "own_speed": evaluation["layer_speedup"],
            "fastest": rouge_l(fastest),
            "fastest_speed": fastest["layer_speedup"],
            "first": copied - own_exit,
            "copied": copied,
            "recomputed": recomputed,
        }
    x, a = figures["xsum"], figures["alpaca"]
    sentences = [
        f"At {x['fastest_speed']:.2f}x fewer layers XSum's texts are {x['full'] - x['fastest']:.1f} points below the "
        f"same model at full depth. The plain model is another {x['plain'] - x['full']:.1f} ahead",
        f"On Alpaca full depth is {a['plain'] - a['full']:.1f} below plain, and the exits lose "
        f"{a['full'] - a['fastest']:.1f} at {a['fastest_speed']:.2f}x.",
        f"gives {x['own']:.1f} of {x['full']:.1f} at {x['own_speed']:.2f}x on XSum, {a['own']:.1f} of {a['full']:.1f} "
        f"at {a['own_speed']:.2f}x on Alpaca.",
        f"costs {x['first']:.1f} points on XSum and {a['first']:.1f} on Alpaca; recomputed states gain nothing any "
        f"more ({x['recomputed']:.1f} for {x['copied']:.1f}, {a['recomputed']:.1f} for {a['copied']:.1f})",
    ]
    assert missing("docs/experiments.md", *sentences) == []
    if "ROUGE-L" in (ROOT / "README.md").read_text(encoding="utf-8"):
        own = f"ROUGE-L {a['own']:.1f} at {a['own_speed']:.2f}x fewer layers"
        others = (
            f"{a['fastest']:.1f} at {a['fastest_speed']:.2f}x, where the plain model gives {a['plain']:.1f}"
        )
        assert missing("README.md", own, others) == []


EARLIER = ("generation", "error-both")  # models paid by errors, against reference and last layer alike


def test_texts_of_the_earlier_models() -> None:
    points_of = script("render_generation").points_of
    rules = ("policy", "softmax_margin", "confidence_classifier", "state_similarity", "static")
    kept = {task: read(*EARLIER, f"{task}.json") for task in ("xsum", "dolly", "alpaca")}
    at = {
        (task, rule): points_of(kept[task]["evaluation"], rule)[1:]
        for task in ("xsum", "dolly", "alpaca")
        for rule in rules
    }  # where the references leave after 24 and 20 layers
    row = " | ".join(
        f"{rouge_l(point):.1f} ({point['mean_exit_layer']:.1f})"
        for task in kept
        for point in at[task, "policy"]
    )
    shown = {key: [f"{rouge_l(point):.1f}" for point in points] for key, points in at.items()}
    policy, margin = shown["xsum", "policy"], shown["xsum", "softmax_margin"]
    speed = {
        rule: [point["tokens_per_second"] for point in points_of(kept["xsum"]["evaluation"], rule)]
        for rule in rules[:2]
    }
    right = {
        (task, rule): [f"{point['metrics']['token_accuracy']:.3f}".lstrip("0") for point in at[task, rule]]
        for task in ("xsum", "alpaca")
        for rule in rules[:2]
    }
    score = {
        rule: f"{value:.3f}".lstrip("0")
        for rule, value in kept["xsum"]["training"]["policy"]["scores"].items()
    }
    full = kept["xsum"]["evaluation"]["full_depth"]
    copied, own_exit, recomputed, recomputed_own = map(rouge_l, kept["xsum"]["variants"])
    ours, others = at["alpaca", "policy"][1], [at["alpaca", rule][1]["mean_exit_layer"] for rule in rules[1:]]
    evaluation = kept["alpaca"]["evaluation"]
    plain, top = evaluation["reference"]["metrics"], evaluation["full_depth"]["metrics"]
    alpaca = {rule: shown["alpaca", rule] for rule in rules}
    sentences = [
        f"| policy before (`error`, `both`) | {row} |",
        f"(curve score {score['policy']}; margin {score['softmax_margin']}, classifier "
        f"{score['confidence_classifier']}, similarity {score['state_similarity']}, static {score['static']})",
        f"margin is level with it at 24 layers ({right['xsum', 'softmax_margin'][0]}, {right['xsum', 'policy'][0]}) "
        f"and behind at 20 ({right['xsum', 'softmax_margin'][1]}, {right['xsum', 'policy'][1]})",
        f"{margin[0]} for {policy[0]} where the references leave after 24 layers, {margin[1]} for {policy[1]} after 20",
        f"(mean exit layer {at['xsum', 'policy'][0]['mean_exit_layer']:.1f} where the references have 24.0)",
        f"{min(speed['softmax_margin']):.0f} to {max(speed['softmax_margin']):.0f} tokens a second, where the policy "
        f"writes {min(speed['policy']):.0f} to {max(speed['policy']):.0f} and all layers "
        f"{full['tokens_per_second']:.0f}",
        f"recomputing gives ROUGE-L {recomputed:.1f} for {copied:.1f} copied",
        f"costs {recomputed - recomputed_own:.1f} to {copied - own_exit:.1f}.",
        f"ROUGE-L of the plain model {100 * plain['rougeL']:.1f}, of all layers with exits {100 * top['rougeL']:.1f}.",
        f"in BLEU ({100 * top['bleu']:.1f} for {100 * plain['bleu']:.1f}), token accuracy "
        f"({top['token_accuracy']:.3f} for {plain['token_accuracy']:.3f}) and perplexity ({top['perplexity']:.1f} for "
        f"{plain['perplexity']:.1f})".replace("(0.", "(.").replace("for 0.", "for ."),
        f"where the references leave after 20 layers {alpaca['policy'][1]}, CALM's classifier "
        f"{alpaca['confidence_classifier'][1]}, margin {alpaca['softmax_margin'][1]}, static depth "
        f"{alpaca['static'][1]}, state similarity {alpaca['state_similarity'][1]}, and its texts took "
        f"{ours['mean_exit_layer']:.1f} layers a token "
        f"({ours['layer_speedup']:.1f}x), the others' {min(others):.1f} to {max(others):.1f}.",
        f"{alpaca['policy'][0]}, margin {alpaca['softmax_margin'][0]}, classifier "
        f"{alpaca['confidence_classifier'][0]}, static {alpaca['static'][0]}, similarity "
        f"{alpaca['state_similarity'][0]}.",
        f"{right['alpaca', 'softmax_margin'][0]} for {right['alpaca', 'policy'][0]} right at layer 24",
        f"The default threshold gives {rouge_l(evaluation):.1f} at {evaluation['layer_speedup']:.2f}x.",
    ]
    clock = {
        row["batch_size"]: (row["wall_clock_speedup"], 100 * (1 - 1 / row["layer_speedup"]))
        for name in ("alpaca-float32", "alpaca-float32-batch-32")
        for row in read(*EARLIER, "speed", f"{name}.json")["rows"]
        if row["name"] == "engine"
    }
    sentences.append(
        f"the default threshold gave {clock[1][0]:.2f}x, {clock[8][0]:.2f}x and {clock[32][0]:.2f}x of our own full "
        f"depth at batches 1, 8 and 32: it saves {min(saved for _, saved in clock.values()):.0f} to "
        f"{max(saved for _, saved in clock.values()):.0f} % of the layers."
    )
    assert missing("docs/experiments.md", *sentences) == []


def speeds(name: str, row: str, key: str) -> list[float]:
    return [
        found[key] for found in read("generation", "speed", f"{name}.json")["rows"] if found["name"] == row
    ]


def test_speed_of_generation() -> None:
    trained = ("alpaca-float32", "alpaca-float32-batch-32")
    clock, layers = (
        [value for name in trained for value in speeds(name, "engine", key)]
        for key in ("wall_clock_speedup", "layer_speedup")
    )
    names = [path.stem for path in (RESULTS / "generation" / "speed").glob("*.json")]
    full = [
        value for name in names for value in speeds(name, "engine-full-depth", "speedup_over_transformers")
    ]
    (one,), (margin,) = (
        speeds(f"smollm2-float32-{name}", "engine", "wall_clock_speedup") for name in ("one-text", "margin")
    )
    sentences = [
        f"the policy makes decoding {one:.2f}x faster than all layers, CALM's margin makes it {1 / margin:.1f} times "
        f"slower ({margin:.2f}x)",
        f"it runs {min(layers):.2f}x to {max(layers):.2f}x fewer layers, and decoding is "
        f"{clock[0]:.2f}x, {clock[1]:.2f}x and {clock[2]:.2f}x as fast as our own full depth at batches 1, 8 and 32.",
        f"Full depth alone is {min(full):.2f}x to {max(full):.2f}x as fast as `transformers`.",
    ]
    assert missing("docs/generation.md", *sentences) == []
    if "as fast as `transformers`" in (ROOT / "README.md").read_text(encoding="utf-8"):
        own = f"{clock[0]:.2f}x, {clock[1]:.2f}x and {clock[2]:.2f}x at batches 1, 8 and 32"
        over = f"{min(full):.2f}x to {max(full):.2f}x as fast as `transformers`"
        assert missing("README.md", own, over) == []
    checked = read("generation", "lossless.json")["rows"]
    (large,) = speeds("alpaca-float32-batch-32", "engine-lossless", "wall_clock_speedup")
    sentence = (
        f"it is {checked[0]['speedup']:.2f}x and {checked[1]['speedup']:.2f}x on {checked[0]['texts']} texts "
        f"(`lossless.json`), and {large:.2f}x (`alpaca-float32-batch-32.json`)"
    )
    assert missing("docs/experiments.md", sentence) == []


def test_schedules_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    script("decoding_schedules").main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4
    assert missing("docs/generation.md", *rows) == []
