"""Tiny trainings, evaluations, predictions and texts, whose every figure `golden_runs.py` compares.

    python benchmarks/golden_cases.py FILE [CASE ...]

Writes what the cases give (by default all of them) with the `consistentee` that is imported: small values as they are,
everything else as its SHA-256. Only public names and the command line are used, so that the cases run on any revision,
whatever has moved inside; what was renamed in public stands in the tables of `golden_values.py`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from golden_models import SETTINGS, decoder_folder, encoder_folder, instruction_rows, labelled_rows
from golden_values import (
    LEFT_OUT,
    UnknownHereError,
    flatten,
    plain,
    public,
    read_json,
    saved_folder,
    settings_of,
    training_config,
    unsettle,
)
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import consistentee

CRITERIA = ("policy", "confidence", "entropy", "patience")
TOKEN_CRITERIA = ("policy", "softmax_margin", "state_similarity", "confidence_classifier", "static")

Case = Callable[[Path], dict[str, Any]]


# --- Classifiers ----------------------------------------------------------------------------------


def text_dataset(count: int, seed: int, *, pairs: bool = False) -> Any:
    """Rows as the package takes them."""
    return public("TextDataset")(*labelled_rows(count, seed, pairs=pairs), ("negative", "positive"), "rows")


def predictions(
    engine: Any, texts: Sequence[Any], sizes: Sequence[int | None], **rule: Any
) -> dict[str, Any]:
    """Labels, scores and exit layers at each batch size."""
    found: dict[str, Any] = {}
    for size in sizes:
        answers = [dataclasses.asdict(answer) for answer in engine.predict(texts, batch_size=size, **rule)]
        found[f"batch {size}"] = {key: [answer[key] for answer in answers] for key in answers[0]}
    return found


def predictions_by_rule(
    engine: Any, texts: Sequence[Any], sizes: Sequence[int | None], evaluation: Any
) -> dict[str, Any]:
    """Predictions under every criterion, at a shallow and a deep threshold of its curve, and at full depth."""
    curves = {name: other.curve for name, other in evaluation.other_criteria.items()}
    found = {
        "saved": predictions(engine, texts, sizes),
        "full depth": predictions(engine, texts, sizes, criterion="confidence", threshold=1.0),
    }
    for criterion, curve in {evaluation.criterion: evaluation.curve, **curves}.items():
        for part in (0.4, 0.8):
            threshold = curve[int(part * (len(curve) - 1))].threshold
            rule = {"criterion": criterion, "threshold": threshold}
            found[f"{criterion} {part}"] = predictions(engine, texts, sizes, **rule)
    return found


def outputs(saved: Any) -> dict[str, Any]:
    """What the model itself returns, with exits and of all layers."""
    inputs = saved.tokenizer(["the film was good", "it is a dull plot"], padding=True, return_tensors="pt")
    labels = torch.tensor([1, 0])
    with torch.no_grad():
        exits = saved.model(**inputs, labels=labels)
        torch.manual_seed(0)
        whole = saved.model.train()(**inputs, labels=labels)
    saved.model.eval()
    named = {"exits": exits, "all layers": whole}
    return {name: dict(output.items()) for name, output in named.items()}


def classifier(variant: str, folder: Path) -> dict[str, Any]:
    """Train with exits, evaluate all criteria, predict."""
    config = training_config("TrainingConfig", variant)
    backbone, model = encoder_folder(folder / "backbone"), folder / "model"
    rows, texts = text_dataset(120, 1), text_dataset(40, 2)
    public("train")(backbone=backbone, train_data=rows, output_dir=model, config=config, task="golden")
    saved = public("open_model")(model)
    evaluation = public("evaluate_model")(saved, texts, criteria=CRITERIA)
    ways: dict[str, dict[str, str]] = {"torch": {}}
    if variant == "attention":
        ways |= {
            "onnxruntime": {"backend": "onnxruntime"},
            "bfloat16": {"dtype": "bfloat16"},
            "int8": {"dtype": "int8"},
        }
    sizes = (1, 8, None) if variant == "attention" else (8,)
    found = {
        way: predictions_by_rule(public("Engine")(saved, **options), texts.texts, sizes, evaluation)
        for way, options in ways.items()
    }
    return {**saved_folder(model), "evaluation": evaluation, "predictions": found, "outputs": outputs(saved)}


def classifier_finetune(folder: Path) -> dict[str, Any]:
    """Fine-tune the plain model on pairs, and compare one with exits with it."""
    config, backbone = training_config("TrainingConfig"), encoder_folder(folder / "backbone", "roberta")
    rows, texts = text_dataset(120, 3, pairs=True), text_dataset(40, 4, pairs=True)
    for name in ("finetune", "train"):
        public(name)(backbone=backbone, train_data=rows, output_dir=folder / name, config=config)
    with_exits, without = (public("open_model")(folder / name) for name in ("train", "finetune"))
    evaluation = public("evaluate_model")(
        with_exits, texts, criteria=("confidence", "policy"), threshold=0.8, reference=without
    )
    found = predictions(public("Engine")(without), texts.texts, (1, 8, None))
    folders = {name: saved_folder(folder / name) for name in ("finetune", "train")}
    return {**folders, "evaluation": evaluation, "predictions": found}


def classifier_backbones(folder: Path) -> dict[str, Any]:
    """Random models on every type of backbone."""
    found: dict[str, Any] = {}
    texts, _ = labelled_rows(12, 5)
    for model_type in SETTINGS["classifier"]["backbones"]:
        backbone = encoder_folder(folder / model_type / "backbone", model_type)
        model = public("EarlyExitForSequenceClassification").from_backbone(
            backbone,
            label_names=("no", "yes"),
            max_length=24,
            policy_input="state",
            head="attention",
        )
        unsettle(model)
        model.save_pretrained(folder / model_type)
        PreTrainedTokenizerFast.from_pretrained(backbone).save_pretrained(folder / model_type)
        engine = public("Engine").from_pretrained(folder / model_type)
        found[model_type] = predictions(engine, texts, (1, 8)) | {"outputs": outputs(engine.saved)}
    return found


def classifier_layers(_: Path) -> dict[str, Any]:
    """Evaluate random outputs of all layers, of three classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, 3, generator=generator).cumsum(1)
    probs, labels = torch.rand(50, 5, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    values: dict[str, Any] = {"threshold": 0.6, "metrics": ("accuracy", "macro_f1", "matthews")}
    evaluate = partial(public("evaluate_layers"), logits, probs, labels, **values)
    return {criterion: evaluate(criterion=criterion) for criterion in CRITERIA}


# --- Generators -----------------------------------------------------------------------------------


def instructions(count: int, seed: int) -> Any:
    """Rows as the package takes them."""
    rows = instruction_rows(count, seed)
    columns = ([row[name] for row in rows] for name in ("prompt", "input", "response"))
    return public("InstructionDataset")(*columns, "rows")


def texts(generator: Any, sizes: Sequence[int], count: int = 6, **options: Any) -> dict[str, Any]:
    """Generated texts, their tokens, exit layers and the rest, at each batch size."""
    prompts = [(row["prompt"], row["input"]) for row in instruction_rows(count, 9)]
    found: dict[str, Any] = {}
    for size in sizes:
        written = generator.generate_texts(prompts, batch_size=size, max_new_tokens=10, **options)
        rows = [dataclasses.asdict(text) for text in written]
        found[f"batch {size}"] = {key: [row[key] for row in rows] for key in rows[0] if key not in LEFT_OUT}
    return found


def texts_by_way(generator: Any, thresholds: Mapping[str, float], sizes: Sequence[int]) -> dict[str, Any]:
    """Texts of every mode, of every criterion with both ways to treat skipped states, drawn ones, and a stream."""
    write = partial(texts, generator, sizes)
    found: dict[str, Any] = {"saved": write(), "full": write(mode="full"), "lossless": write(mode="lossless")}
    for criterion, threshold in thresholds.items():
        for skipped in ("copy", "recompute"):
            rule = {"mode": "early-exit", "criterion": criterion, "threshold": threshold}
            found[f"{criterion}, {skipped}"] = write(skipped_states=skipped, **rule)
    drawn = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
    found["drawn"] = write(mode="early-exit", stop=["."], **drawn)
    pieces: list[Any] = []
    text = generator.stream("from b by 1:", max_new_tokens=10, on_token=lambda *piece: pieces.append(piece))
    return {**found, "stream": text, "pieces": pieces}


def middle_thresholds(evaluation: Any) -> dict[str, float]:
    """Of every criterion of an evaluation the threshold in the middle of its curve."""
    curves = {name: other.curve for name, other in evaluation.other_criteria.items()}
    curves = {evaluation.criterion: evaluation.curve, **curves}
    return {criterion: curve[len(curve) // 2].threshold for criterion, curve in curves.items()}


def generator(variant: str, folder: Path) -> dict[str, Any]:
    """Train with exits, evaluate, write texts."""
    config = training_config("GenerationTrainingConfig", variant)
    backbone, model = decoder_folder(folder / "backbone"), folder / "model"
    rows = instructions(40, 1)
    public("train_generation")(
        backbone=backbone, train_data=rows, output_dir=model, config=config, task="golden"
    )
    saved = public("open_generator")(model)
    whole = variant == "lora"
    evaluation = public("evaluate_generation")(
        saved,
        instructions(6, 2),
        criteria=TOKEN_CRITERIA if whole else ("policy", "softmax_margin"),
        max_new_tokens=8,
        curve_thresholds=3,
        text_speedups=(1.3,) if whole else (),
    )
    writer = public("TextGenerator")(saved)
    if whole:
        found = texts_by_way(writer, middle_thresholds(evaluation), (1, 4))
    else:
        found = {mode: texts(writer, (4,), mode=mode) for mode in ("early-exit", "lossless")}
    return {**saved_folder(model), "evaluation": evaluation, "texts": found}


def generator_finetune(folder: Path) -> dict[str, Any]:
    """Fine-tune the plain model, and compare one with exits with it, in mode lossless."""
    config = training_config("GenerationTrainingConfig", backbone_training="full")
    backbone, rows = decoder_folder(folder / "backbone", "gpt2"), instructions(40, 3)
    names = ("finetune_generation", "train_generation")
    for name in names:
        public(name)(backbone=backbone, train_data=rows, output_dir=folder / name, config=config)
    without, with_exits = (public("open_generator")(folder / name) for name in names)
    evaluation = public("evaluate_generation")(
        with_exits,
        instructions(6, 4),
        mode="lossless",
        reference=without,
        max_new_tokens=8,
        curve_thresholds=2,
    )
    found = texts(public("TextGenerator")(without), (1, 4))
    return {**{name: saved_folder(folder / name) for name in names}, "evaluation": evaluation, "texts": found}


def generator_backbones(folder: Path) -> dict[str, Any]:
    """Random models on every type of backbone: the full model's logits, and texts of every criterion."""
    found: dict[str, Any] = {}
    thresholds: dict[str, float] = dict(zip(TOKEN_CRITERIA, (0.5, 0.3, 0.9, 0.5, 2), strict=True))
    ids = torch.arange(3, 19).reshape(2, 8)
    for number, model_type in enumerate(SETTINGS["generator"]["backbones"]):
        backbone = decoder_folder(folder / model_type / "backbone", model_type, initializer_range=0.3)
        head = ("shared", "low_rank", "separate")[number % 3]
        model = public("EarlyExitForCausalLM").from_backbone(backbone, exit_head=head, exit_head_rank=3)
        unsettle(model)
        model.save_pretrained(folder / model_type)
        PreTrainedTokenizerFast.from_pretrained(backbone).save_pretrained(folder / model_type)
        saved = public("open_generator")(folder / model_type)
        with torch.no_grad():
            logits = saved.model(input_ids=ids).logits
        sequences = saved.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        written = texts_by_way(public("TextGenerator")(saved), thresholds, (4,))
        found[model_type] = {"logits": logits, "sequences": sequences, "texts": written}
    return found


# --- The command line -----------------------------------------------------------------------------


def command(*arguments: Any) -> str:
    """What `python -m consistentee` prints; it runs in this process."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["consistentee", *map(str, arguments)]), redirect_stdout(printed):
        try:
            runpy.run_module("consistentee", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"consistentee {arguments[0]} ended with exit code {end.code}.") from end
    return printed.getvalue()


def trained_by_command(
    folder: Path, name: str, backbone: Path, data: Sequence[Any], columns: Sequence[str]
) -> dict[str, Any]:
    """Train and evaluate on files with a recipe."""
    training_config(name)  # which this revision must know
    recipe, results, model = folder / "recipe.yaml", folder / "results.json", folder / "model"
    recipe.write_text(json.dumps(settings_of(name)), encoding="utf-8")  # JSON is YAML
    given = ["--eval-file", data[1], *columns]
    run = ["--backbone", backbone, "--config", recipe, "--rounds", 1, "--output-dir", model]
    command("train", "--train-file", data[0], *given, *run)
    command("evaluate", model, *given, "--json", results)
    return {**saved_folder(model), "evaluation": read_json(results)}


def classifier_commands(folder: Path) -> dict[str, Any]:
    """Train, evaluate and predict on files."""
    data = [folder / name for name in ("train.csv", "evaluation.csv")]
    for seed, path in enumerate(data, start=6):
        rows = zip(*labelled_rows(80, seed), strict=True)
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(
                [("text", "label"), *((*row, f"class {label}") for row, label in rows)]
            )
    columns = ("--text-columns", "text", "--label-column", "label")
    backbone = encoder_folder(folder / "backbone", "distilbert")
    found = trained_by_command(folder, "TrainingConfig", backbone, data, columns)
    lines = command("predict", folder / "model", data[1], "--batch-size", 4)
    return {**found, "predictions": lines.splitlines()}


def generator_commands(folder: Path) -> dict[str, Any]:
    """Train, evaluate and generate on files."""
    data = [folder / name for name in ("train.jsonl", "evaluation.jsonl")]
    for (seed, count), path in zip(((6, 30), (7, 5)), data, strict=True):
        lines = [json.dumps(row) + "\n" for row in instruction_rows(count, seed)]
        path.write_text("".join(lines), encoding="utf-8")
    columns = ("--prompt-column", "prompt", "--input-column", "input", "--response-column", "response")
    backbone = decoder_folder(folder / "backbone", "qwen3")
    found = trained_by_command(folder, "GenerationTrainingConfig", backbone, data, columns)
    printed = command("generate", folder / "model", data[1], "--max-new-tokens", 6, "--show-exits")
    return {**found, "texts": printed.splitlines()}


# --- All of it ------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    **{f"classifier {name}": partial(classifier, name) for name in SETTINGS["classifier"]["variants"]},
    "classifier finetune": classifier_finetune,
    "classifier backbones": classifier_backbones,
    "classifier layers": classifier_layers,
    "classifier commands": classifier_commands,
    **{f"generator {name}": partial(generator, name) for name in SETTINGS["generator"]["variants"]},
    "generator finetune": generator_finetune,
    "generator backbones": generator_backbones,
    "generator commands": generator_commands,
}


def run_cases(names: Sequence[str]) -> dict[str, Any]:
    """What cases give, on one thread: {"source": folder, "values": {"case: path": value}, "skipped": {case: why}}."""
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        # The clock stands still, as mode lossless drafts only where that is faster.
        with tempfile.TemporaryDirectory() as folder, mock.patch("time.perf_counter", return_value=0.0):
            try:
                found = flatten(plain(CASES[name](Path(folder))))
            except UnknownHereError as why:
                skipped[name] = str(why)
                continue
        values |= {f"{name}: {path}": value for path, value in found.items()}
    torch.set_num_threads(threads)
    return {"source": str(Path(consistentee.__file__).parent), "values": values, "skipped": skipped}


def main() -> None:
    """Run the cases and write what they give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    result = run_cases(options.cases or list(CASES))
    options.file.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
