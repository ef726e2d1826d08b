"""Train and measure token-level early exit on real tasks: the figures behind docs/results-generation.md.

    python benchmarks/run_generation.py --backbone DIR/smollm2-30l --data DIR --runs runs/generation --tasks alpaca xsum

For each task: the plain model (`consistentee finetune`) and the model with exits (`consistentee train`), by the same
recipe and number of steps; then texts of both, of every exit rule at several depths, and of lossless decoding. Each
measured task is one JSON file in `benchmarks/results/generation` and is not run again; interrupted trainings are
resumed. `--measure dolly=alpaca` reports on a task with the model trained for another one (a sample too small to train
on). Then `python benchmarks/render_generation.py` writes the page.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import consistentee
from consistentee import (
    GenerationTrainingConfig,
    InstructionDataset,
    LoadedGenerator,
    load_generation_task,
    load_model,
)
from consistentee.atomic_files import write_json
from consistentee.data.tokenization import encode_prompts
from consistentee.evaluation.text_metrics import text_metrics
from consistentee.inference.timing import environment
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import GeneratedText, TextGenerator

CELLS = Path(__file__).parent / "results" / "generation"
COMMON = {
    "backbone_training": "full",
    "exit_head": "low_rank",
    "exit_head_rank": 64,
    "learning_rate": 3e-4,
    "head_learning_rate": 2e-3,
    "gradient_accumulation_steps": 2,
    "policy_tokens": 20_000,
    "policy_epochs": 20,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "alpaca": {"warmup_epochs": 0.7, "consistent_epochs": 0.3, "max_length": 256, "checkpoint_every": 40},
    "xsum": {"warmup_epochs": 1.0, "consistent_epochs": 0.5, "max_length": 192, "checkpoint_every": 30},
}
LOSSLESS_TEXTS, LOSSLESS_TURN = 200, 40
CRITERIA = ("policy", "softmax_margin", "confidence_classifier", "state_similarity", "static")


def main() -> None:
    """Train what is not there yet, measure what is not measured yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--tasks", nargs="*", default=["alpaca", "xsum"], choices=list(SETTINGS))
    parser.add_argument("--measure", nargs="*", default=[], metavar="TASK=TRAINED", help="see above")
    parser.add_argument("--rows", type=int, default=100, help="prompts, at most")
    parser.add_argument(
        "--speedups", type=float, nargs="*", default=[1.25, 1.5], help="layer speed-ups of further texts"
    )
    parser.add_argument(
        "--lossless", metavar="TRAINED", choices=list(SETTINGS), help="lossless texts of this model"
    )
    parser.add_argument("--lossless-tokens", type=int, default=64, help="tokens of each lossless text")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for task in options.tasks:
        folders = train(task, options)
        measure(task, *folders, options)
    for pair in options.measure:
        task, _, trained = pair.partition("=")
        measure(task, options.runs / f"{trained}-exits", options.runs / f"{trained}-plain", options)
    if options.lossless:
        lossless(options.runs / f"{options.lossless}-exits", options)


def train(task: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """Folders of the model with exits and of the plain one."""
    rows, _ = load_generation_task(task, options.data / task, need_train=True)
    if rows is None:
        raise ValueError(f"There are no rows to train on in {options.data / task}.")
    config = GenerationTrainingConfig.from_dict({**COMMON, **SETTINGS[task], "seed": options.seed})
    exits, plain = options.runs / f"{task}-exits", options.runs / f"{task}-plain"
    for folder, run in ((exits, consistentee.train), (plain, consistentee.finetune)):
        run(
            backbone=options.backbone,
            train_data=rows,
            output_dir=folder,
            config=config,
            task=task,
            resume=True,
            report=print,
        )
    return exits, plain


def measure(task: str, exits: Path, plain: Path, options: argparse.Namespace) -> None:
    """Texts and figures of one task, into one file."""
    cell = CELLS / f"{task}.json"
    if cell.is_file():
        print(f"{cell.name}: measured before")
        return
    start = time.time()
    _, rows = load_generation_task(task, options.data / task)
    rows = rows.max_samples(options.rows, options.seed)
    saved = load_model(exits, LoadedGenerator, dtype=options.dtype)
    reference = load_model(plain, LoadedGenerator, dtype=options.dtype) if plain.is_dir() else None
    evaluation = consistentee.evaluate_generation(
        saved,
        rows,
        criteria=CRITERIA,
        reference=reference,
        batch_size=64,
        max_new_tokens=128,
        text_speedups=options.speedups,
        curve_thresholds=2,
        progress=True,
        seed=options.seed,
    )
    record: dict[str, Any] = {
        "task": task,
        "trained_on": exits.name.removesuffix("-exits"),
        "rows": len(rows),
        "settings": dict(saved.record["config"]),
        "training": {key: saved.record.get(key) for key in ("history", "policy", "warmup", "environment")},
        "variants": variants(saved, rows, evaluation),
        "seconds": round(time.time() - start),
        "evaluation": evaluation.to_dict(),
    }
    write_json(cell, record)
    print(f"{cell.name}: {record['seconds']} s")


def variants(saved: Any, rows: InstructionDataset, evaluation: Any) -> list[dict[str, Any]]:
    """Skipped states copied and recomputed, the first token at full depth or not, at the policy's shallowest point.

    Prompts are batched as in the evaluation: what it has measured already gives the same texts again.
    """
    points = [(evaluation.mean_exit_layer, evaluation.threshold)]
    points += [(point.mean_exit_layer, point.threshold) for point in evaluation.generated]
    threshold = min(points)[1]
    generator = TextGenerator(saved)
    options = DecodingOptions(
        threshold=threshold,
        max_new_tokens=evaluation.max_new_tokens,
        max_prompt_length=saved.max_length,
    )
    limit = generator.check(options).max_prompt_length or saved.max_length
    prompts = encode_prompts(rows, saved.tokenizer, generator.template, max_prompt_length=limit)[0]
    found: list[dict[str, Any]] = []
    for skipped_states in ("copy", "recompute"):
        for first in (True, False):
            saved.early_exit_model.config.full_depth_first_token = first
            written = list(
                generator.generate_encoded(
                    prompts,
                    batch_size=evaluation.batch_size,
                    options=replace(options, skipped_states=skipped_states),
                )
            )
            layers = [layer for text in written for layer in text.exit_layers]
            found.append(
                {
                    "skipped_states": skipped_states,
                    "full_depth_first_token": first,
                    "threshold": threshold,
                    "metrics": text_metrics([text.text.strip() for text in written], rows.references),
                    "mean_exit_layer": sum(layers) / len(layers),
                    "tokens_per_second": len(layers) / sum(text.seconds for text in written),
                }
            )
    saved.early_exit_model.config.full_depth_first_token = True
    return found


def lossless(exits: Path, options: argparse.Namespace) -> None:
    """Whether lossless text is the full model's, in float32, and how long both take in turn, batch by batch."""
    cell = CELLS / "lossless.json"
    if cell.is_file():
        print(f"{cell.name}: measured before")
        return
    _, rows = load_generation_task("alpaca", options.data / "alpaca")
    rows = rows.max_samples(LOSSLESS_TEXTS, options.seed)
    generator = TextGenerator(load_model(exits, LoadedGenerator, dtype="float32"))
    asked = list(zip(rows.instructions, rows.inputs, strict=True))
    found: list[dict[str, Any]] = []
    for mode in ("full", "lossless"):  # weights are laid out at the first text
        list(generator.generate_texts(asked[:1], mode=mode, max_new_tokens=4))
    for batch_size in (1, 8):
        seconds: dict[str, list[float]] = {"full": [], "lossless": []}
        same = tokens = early = 0
        for turn, start in enumerate(range(0, len(asked), LOSSLESS_TURN)):
            texts: dict[str, list[GeneratedText]] = {}
            for mode in ("full", "lossless") if turn % 2 else ("lossless", "full"):
                texts[mode] = list(
                    generator.generate_texts(
                        asked[start : start + LOSSLESS_TURN],
                        batch_size=batch_size,
                        mode=mode,
                        max_new_tokens=options.lossless_tokens,
                    )
                )
                seconds[mode].append(sum(text.seconds for text in texts[mode]))
            pairs = zip(texts["full"], texts["lossless"], strict=True)
            same += sum(full.token_ids == drafted.token_ids for full, drafted in pairs)
            layers = [layer for text in texts["lossless"] for layer in text.exit_layers]
            tokens += len(layers)
            early += sum(layer < generator.saved.num_hidden_layers for layer in layers)
        ratios = [full / drafted for full, drafted in zip(seconds["full"], seconds["lossless"], strict=True)]
        found.append(
            {
                "batch_size": batch_size,
                "texts": len(asked),
                "identical": same,
                "speedup": sum(seconds["full"]) / sum(seconds["lossless"]),
                "speedup_by_turn": ratios,
                "drafted_share": early / tokens,
            }
        )
        print(found[-1])
    place = environment(torch.device("cpu"), options.seed)
    head = {"trained_on": exits.name.removesuffix("-exits"), "new_tokens": options.lossless_tokens}
    write_json(cell, {**head, "environment": place, "rows": found})


if __name__ == "__main__":
    main()
