"""The README.md of a saved folder: what the model is, what it gains, how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from consistentee.atomic_files import write_text

CARD_FILE = "README.md"
_NEEDS = (
    "**Needs the Python package `consistentee`.** Install it (`pip install .` in a checkout of its repository) and "
    "import it before `transformers` opens this folder; without it `transformers` does not recognize the architecture:",
    "",
    "```python",
    "import consistentee",
    "```",
)
"""What the card of a folder that `transformers` alone cannot open says first."""


def write_model_card(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write the model card of a saved folder.

    Args:
        folder: the saved folder.
        record: the training record; `evaluation` (an `Evaluation` as a dict) and every other key may be missing.

    Returns:
        The file.
    """
    path = Path(folder) / CARD_FILE
    write_text(path, model_card(record))
    return path


def model_card(record: Mapping[str, Any]) -> str:
    """The text of the card, Markdown with YAML front matter."""
    if str(record.get("kind")).endswith("_generation"):
        return _generation_card(record)
    exits = record.get("kind") != "full_depth"
    task = record.get("task")
    backbone = str(record.get("backbone") or "an encoder")
    front: dict[str, Any] = {
        "library_name": "consistentee",
        "pipeline_tag": "text-classification",
        "tags": ["consistentee", "early-exit", "text-classification"] if exits else ["text-classification"],
        "metrics": ["accuracy"],
    }
    if _is_hub_name(backbone):
        front["base_model"] = backbone
    of_task = f" for {task}" if task else ""
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    if exits:
        lines += [
            f"# Early-exit classifier{of_task}",
            "",
            *_NEEDS,
            "",
            f"`{_short(backbone)}` with a classifier and an exit policy after every layer, trained the ConsistentEE "
            "way ([arXiv:2312.11882](https://arxiv.org/abs/2312.11882)): easy inputs leave after a few layers, hard "
            "ones use all of them. The threshold is the dial: higher is deeper, slower and safer.",
        ]
    else:
        lines += [
            f"# Plain classifier{of_task}",
            "",
            *_NEEDS,
            "",
            f"`{_short(backbone)}` fine-tuned with one classifier at the top: the reference for early exits.",
        ]
    lines += ["", "## Figures", "", *_figures(record), "", "## Use", "", *_usage(exits, record)]
    lines += ["", "## Training", "", *_training(record)]
    return "\n".join(lines) + "\n"


def _generation_card(record: Mapping[str, Any]) -> str:
    """The card of a causal language model, with or without exits."""
    exits = record["kind"] == "early_exit_generation"
    backbone = str(record.get("backbone") or "a language model")
    front: dict[str, Any] = {
        "library_name": "consistentee" if exits else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["consistentee", "early-exit", "text-generation"] if exits else ["text-generation"],
    }
    if _is_hub_name(backbone):
        front["base_model"] = backbone
    of_task = f" for {record['task']}" if record.get("task") else ""
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    if exits:
        lines += [
            f"# Early-exit language model{of_task}",
            "",
            *_NEEDS,
            "",
            f"`{_short(backbone)}` with an exit and a policy after every layer, trained the ConsistentEE way "
            "([arXiv:2312.11882](https://arxiv.org/abs/2312.11882)): every generated token leaves at the layer that is "
            "good enough for it. The threshold is the dial: higher is deeper, slower and safer.",
        ]
    else:
        lines += [
            f"# Plain language model{of_task}",
            "",
            f"`{_short(backbone)}` fine-tuned without exits: the reference for early exits.",
        ]
    lines += ["", "## Figures", ""]
    lines += _text_figures(record.get("evaluation") or {}) + _token_figures(record.get("validation") or {})
    lines += ["", "## Use", "", *_generation_usage(exits), "", "## Training", "", *_training(record)]
    return "\n".join(lines) + "\n"


def _text_figures(evaluation: Mapping[str, Any]) -> list[str]:
    """What an evaluation found of generated texts; nothing where there is none."""
    if not evaluation:
        return []
    rows = [(name, f"{value:.4g}") for name, value in (evaluation.get("metrics") or {}).items()]
    if "mean_exit_layer" in evaluation:
        depth = evaluation["num_hidden_layers"]
        rows += [
            ("mean exit layer", f"{evaluation['mean_exit_layer']:.2f} of {depth}"),
            ("layer speed-up", f"{evaluation['layer_speedup']:.2f}x"),
        ]
    count = evaluation.get("num_examples")
    number = f"{count:,} " if count is not None else ""
    lines = [f"Measured on {number}rows that training has not seen.", ""]
    return [*lines, *_table(("figure", "value"), rows), ""]


def _token_figures(validation: Mapping[str, Any]) -> list[str]:
    """What selection saw of response tokens, each predicted from the reference text before it."""
    if "accuracy" not in validation:
        return ["None yet."]
    lines = [
        f"On {validation['num_examples']:,} response tokens of the validation texts, each predicted from the reference "
        "text before it; they chose thresholds and stopping:",
        "",
    ]
    rows = [("token accuracy", _percent(validation["accuracy"]))]
    if "full_depth_accuracy" in validation:
        rows += [
            ("token accuracy of the last layer", _percent(validation["full_depth_accuracy"])),
            ("mean exit layer", f"{validation['mean_exit_layer']:.2f}"),
            ("layer speed-up", f"{validation['layer_speedup']:.2f}x"),
        ]
    lines += _table(("figure", "value"), rows)
    if validation.get("criteria"):
        lines += ["", "By exit rule, each at the threshold that training chose for it:", ""]
        lines += _table(
            ("exit rule", "threshold", "token accuracy", "mean exit layer"),
            [
                (
                    name,
                    f"{point['threshold']:.4g}",
                    _percent(point["accuracy"]),
                    f"{point['mean_exit_layer']:.2f}",
                )
                for name, point in validation["criteria"].items()
            ],
        )
    return lines


def _generation_usage(exits: bool) -> list[str]:
    imports = ["import consistentee"] if exits else []
    return [
        "```python",
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        'model = AutoModelForCausalLM.from_pretrained("this-folder")',
        'model.generate(**tokenizer("some prompt", return_tensors="pt"), max_new_tokens=100)',
        "```",
        "",
        "Prompts are to be written as in training: the template is in "
        f"`{'config.json' if exits else 'training_record.json'}`.",
    ]


def _figures(record: Mapping[str, Any]) -> list[str]:
    evaluation = record.get("evaluation")
    if not evaluation:
        return _validation_figures(record.get("validation") or {})
    lines = [f"Measured on {evaluation['num_examples']:,} rows that training has not seen."]
    if "exit_histogram" not in evaluation:
        return [*lines, "", *_table(("metric", "value"), _metric_rows(evaluation))]
    depth = evaluation["num_hidden_layers"]
    rows = [
        *_metric_rows(evaluation),
        ("accuracy of the last layer", _percent(evaluation["per_layer_accuracy"][-1])),
        ("mean exit layer", f"{evaluation['mean_exit_layer']:.2f} of {depth}"),
        ("layer speed-up", f"{evaluation['layer_speedup']:.2f}x"),
        ("layers saved", _percent(evaluation["layers_saved"])),
    ]
    reference = evaluation.get("reference")
    if reference:
        difference, error = 100 * reference["accuracy_difference"], 100 * reference["standard_error"]
        rows.append(
            (f"accuracy of the {reference.get('name', 'plain model')}", _percent(reference["accuracy"]))
        )
        rows.append(("difference, paired", f"{difference:+.1f} points (standard error {error:.1f})"))
    lines += ["", f"Exit rule: {evaluation['criterion']} above {evaluation['threshold']:.4g}.", ""]
    lines += _table(("figure", "value"), rows)
    by_layer = zip(
        evaluation["exit_histogram"],
        evaluation["exit_accuracy"],
        evaluation["per_layer_accuracy"],
        strict=True,
    )
    lines += ["", "Layer by layer:", ""]
    lines += _table(
        ("layer", "rows that leave here", "their accuracy", "accuracy if all left here"),
        [
            (str(layer), f"{left:,}", "" if right is None else _percent(right), _percent(if_all))
            for layer, (left, right, if_all) in enumerate(by_layer, start=1)
        ],
    )
    return lines


def _validation_figures(validation: Mapping[str, Any]) -> list[str]:
    """What selection saw: a little too good to be a measurement, so it says so."""
    lines = ["Not evaluated on unseen rows yet; `consistentee evaluate` does it."]
    if "accuracy" in validation:
        rows = [("accuracy", _percent(validation["accuracy"]))]
        if "full_depth_accuracy" in validation:
            rows.append(("accuracy of the last layer", _percent(validation["full_depth_accuracy"])))
        if "layer_speedup" in validation:
            rows.append(("layer speed-up", f"{validation['layer_speedup']:.2f}x"))
        number = f"{validation['num_examples']:,} " if "num_examples" in validation else ""
        lines += [f"On the {number}validation rows, which chose threshold and stopping:", ""]
        lines += _table(("figure", "value"), rows)
    return lines


def _metric_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    metrics = {"accuracy": evaluation["accuracy"], **(evaluation.get("metrics") or {})}
    return [
        (name, _percent(value) if name != "matthews" else f"{value:.3f}") for name, value in metrics.items()
    ]


_SOME_TEXT, _SOME_PAIR = '"some text"', '("some text", "the other text")'
_LINES = {True: "`texts.txt` has one a line, separated by a tab.", False: "`texts.txt` has one a line."}


def _usage(exits: bool, record: Mapping[str, Any]) -> list[str]:
    thresholds: Mapping[str, float] = record.get("thresholds") or {}
    pairs: bool | None = (record.get("data") or {}).get("text_pairs")
    turned = other_threshold(thresholds.get("policy", 0.5))
    other = f", threshold={turned}" if exits else ""
    lines = [
        "```python",
        "from consistentee import Engine",
        "",
        'engine = Engine.from_pretrained("this-folder")',
        f"engine.predict([{_SOME_PAIR if pairs else _SOME_TEXT}]{other})",
        "```",
        "",
        "```",
        f"consistentee predict this-folder texts.txt{f' --threshold {turned}' if exits else ''}",
        "```",
    ]
    if pairs is not None:
        lines += ["", "An input is " + ("a pair of texts; " if pairs else "one text; ") + _LINES[pairs]]
    if exits and thresholds:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in thresholds.items())
        lines += ["", f"Thresholds chosen on validation rows, by exit rule: {listed}."]
    return lines


def other_threshold(threshold: float) -> float:
    """A policy threshold clearly on the other side of the given one, to show what turning the dial does."""
    return 0.5 if threshold > 0.6 else 0.9


def _training(record: Mapping[str, Any]) -> list[str]:
    data: Mapping[str, Any] = record.get("data") or {}
    environment: Mapping[str, Any] = record.get("environment") or {}
    lines: list[str] = []
    if "train_rows" in data:
        lines.append(
            f"{data['train_rows']:,} training rows, {data.get('validation_rows', 0):,} for selection."
        )
    versions = [
        f"{name} {environment[name]}"
        for name in ("consistentee", "torch", "transformers")
        if name in environment
    ]
    if versions:
        lines.append(f"Made with {', '.join(versions)} on {environment.get('device', 'an unknown device')}.")
    lines.append("All settings and the course of the training are in `training_record.json`.")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    divider = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, divider, *rows)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _is_hub_name(backbone: str) -> bool:
    """Whether it reads like "user/name" and not like a place on somebody's disk."""
    return (
        backbone.count("/") == 1 and not backbone.startswith((".", "/", "~")) and not Path(backbone).exists()
    )


def _short(backbone: str) -> str:
    return backbone if _is_hub_name(backbone) else Path(backbone).name or backbone
