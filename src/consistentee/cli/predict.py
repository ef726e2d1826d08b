"""The command `predict`."""

from __future__ import annotations

import json
from pathlib import Path

from consistentee.cli.options import Columns, Flag, check_column_count, check_one_or_two
from consistentee.cli.terminal import at_least_one, say_reading, text_stream, usage
from consistentee.config import Criterion


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
    debug: Flag = False,
) -> None:
    """Predict labels: one JSON line for each input, with label, score and exit layer, in the order of the input.

    "truncated" in a line says whether the input was longer than the model takes, and was cut.

    Args:
        model: Folder of a trained model, or its name on the hub.
        file: Texts, one a line (for a model of pairs, two separated by a tab), CSV, TSV, JSONL or Parquet; "-" is
            standard input.
        text_columns: The column of the text, or the two columns of a pair. [default: the usual names]
        criterion: Exit rule. [default: the saved one]
        threshold: Leave at the first layer whose exit score exceeds it. [default: the one chosen in training]
        operating_point: In place of both, a name that `consistentee calibrate` gave.
        batch_size: Inputs that go through the model together. [default: as many as are fastest, from a growing window]
        dtype: Precision: float32, bfloat16, float16 or int8; `consistentee benchmark --dtype auto` recommends one.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        backend: What runs the layers: torch or onnxruntime.
        output: Write here instead of to standard output; the file appears when it is complete.
        debug: Show tracebacks and the messages of other libraries.
    """
    check_one_or_two(text_columns)
    at_least_one(batch_size=batch_size)
    from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
    from consistentee.data.files import read_texts
    from consistentee.pipelines.classifier import Engine
    from consistentee.progress import rows_about, show_progress

    engine = Engine.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    say_reading(file, "texts")
    pairs = engine.saved.text_pairs
    check_column_count(text_columns, pairs, model)
    texts_in = read_texts(file, text_columns, pairs=pairs)
    windows = usage(
        lambda: engine.windows(
            texts_in,
            batch_size=batch_size,
            threshold=threshold,
            criterion=criterion,
            operating_point=operating_point,
        )
    )
    count, num_truncated = 0, 0
    is_file = output is not None
    with (
        text_stream(output) as stream,
        show_progress(
            "predictions", rows_about(file) if is_file else None, unit="text", shown=is_file
        ) as shower,
    ):
        for texts, predictions in windows:
            for text, prediction in zip(texts, predictions, strict=True):
                line = {
                    "text": text[0] if len(text) == 1 else list(text),
                    "label": prediction.label,
                    "score": round(prediction.score, 6),
                    "exit_layer": prediction.exit_layer,
                    "truncated": prediction.truncated,
                }
                count += 1
                num_truncated += prediction.truncated
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            shower.update(len(texts))
    texts_cut = f"texts were longer than the model's {engine.saved.max_length} tokens"
    say_cuts(num_truncated, count, texts_cut, LONGER_TRAINING)
