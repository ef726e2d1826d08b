"""The command `predict`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from consistentee.cli.options import Columns, Flag, check_column_count, check_one_or_two
from consistentee.cli.terminal import at_least_one, say_reading, text_stream, usage
from consistentee.config import Criterion
from consistentee.errors import UsageError

CUT = '"truncated": true}\n'
"""How the line of an input ends that was cut."""


def predict(
    model: str,
    file: str = "-",
    /,
    *,
    text_columns: Columns = None,
    criterion: Criterion | None = None,
    threshold: float | None = None,
    operating_point: str | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    backend: str = "torch",
    output: Path | None = None,
    ray: Flag = False,
    ray_address: str | None = None,
    ray_workers: int | None = None,
    ray_blocks: Path | None = None,
    debug: Flag = False,
) -> None:
    """Predict labels: one JSON line for each input, with label, score and exit layer, in the order of the input.

    "truncated" in a line says whether the input was longer than the model takes, and was cut.

    Args:
        model: Folder of a trained model, or its name on the hub.
        file: Texts, one a line (for a model of pairs, two separated by a tab), CSV, TSV, JSON, Parquet, a `datasets`
            folder or hf:user/name (of several splits "test", else "validation", else "train"); "-" is standard input.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        batch_size: Inputs that go through the model together. [default: as many as are fastest, from a growing window]
        dtype: Precision: float32, bfloat16, float16 or int8; `consistentee benchmark --dtype auto` recommends one.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...; with --ray auto, cpu or cuda.
        backend: What runs the layers: torch or onnxruntime.
        output: Write here instead of to standard output; the file appears when it is complete.
        ray: Predict with many engines, on a Ray cluster or with all cores of this machine; prints when all is finished.
        ray_address: With --ray: the cluster, host:port, or "auto" for the one that runs on this machine. [default: that
            of RAY_ADDRESS, else Ray is started here for this run]
        ray_workers: With --ray: engines, each with one CPU, or one GPU. [default: as many as there are]
        ray_blocks: With --ray, a folder: finished blocks of lines are kept there, and the same command goes on
            from them.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_one_or_two(text_columns)
    at_least_one(batch_size=batch_size, ray_workers=ray_workers)
    _check_ray(ray, ray_address=ray_address, ray_workers=ray_workers, ray_blocks=ray_blocks)
    from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
    from consistentee.data.files import read_texts
    from consistentee.pipelines.classifier import Engine
    from consistentee.progress import rows_about, show_progress

    # On Ray the workers have the GPUs; here the model is opened for what is checked first.
    engine = Engine.from_pretrained(model, device="cpu" if ray else device, dtype=dtype, backend=backend)
    say_reading(file, "texts")
    pairs = engine.saved.text_pairs
    check_column_count(text_columns, pairs, model)
    texts_in = read_texts(file, text_columns, pairs=pairs, skip_broken=False)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "threshold": threshold,
        "criterion": criterion,
        "operating_point": operating_point,
    }
    if ray:
        usage(lambda: engine.rule(criterion, threshold, operating_point))
        chunks = _chunks_of_ray(
            engine, texts_in, ray_blocks, address=ray_address, workers=ray_workers, device=device, **how
        )
    else:
        chunks = _chunks(usage(lambda: engine.windows(texts_in, **how)))
    count, num_truncated = 0, 0
    is_file = output is not None
    with (
        text_stream(output) as stream,
        show_progress(
            "predictions", rows_about(file) if is_file else None, unit="text", shown=is_file and not ray
        ) as shower,
    ):
        for lines in chunks:
            count += len(lines)
            num_truncated += sum(line.endswith(CUT) for line in lines)
            stream.write("".join(lines))
            stream.flush()
            shower.update(len(lines))
    texts_cut = f"texts were longer than the model's {engine.saved.max_length} tokens"
    say_cuts(num_truncated, count, texts_cut, LONGER_TRAINING)


def _chunks(windows: Iterable[tuple[list[tuple[str, ...]], list[Any]]]) -> Iterator[list[str]]:
    """The lines of one window after another."""
    for texts, predictions in windows:
        yield [prediction.line(text) for text, prediction in zip(texts, predictions, strict=True)]


def _chunks_of_ray(engine: Any, texts: Any, folder: Path | None, **how: Any) -> Iterator[list[str]]:
    """The lines of one block after another, once all are finished; without a folder they go to a temporary one."""
    from consistentee.pipelines.ray_blocks import predict_blocks
    from consistentee.progress import show_progress

    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="consistentee-")))
        with show_progress("predictions", unit="text") as shower:
            blocks = predict_blocks(engine, texts, folder, on_rows=shower.update, **how)
        yield from blocks.chunks()


def _check_ray(ray: bool, **values: Any) -> None:
    """Raise UsageError where what goes with --ray is given without it."""
    for name, value in values.items():
        if value is not None and not ray:
            raise UsageError(f"--{name.replace('_', '-')} goes with --ray.")
