"""An exported graph against the engine on all of a task's rows: labels and exit layers, at several batch sizes.

    python benchmarks/exported_answers.py MODEL --task sst2 --data-dir DIR [--batch-sizes 1 7 64] [--json out.json]

The graph runs in a process of its own that has no torch (`tests/exported_alone.py`, in a checkout), at the thresholds
given or the model's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from consistentee import Engine, load_task
from consistentee.atomic_files import write_text
from consistentee.inference.timing import environment
from consistentee.pipelines.export import export_onnx

ALONE = Path(__file__).parents[1] / "tests" / "exported_alone.py"


def main() -> None:
    """Export, run both, and count what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 7, 64])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = Engine.from_pretrained(options.model, device="cpu")
    _, rows = load_task(options.task, options.data_dir, label_names=engine.saved.label_names)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        graph, inputs = Path(root) / "graph", Path(root) / "inputs.json"
        export_onnx(engine.saved, graph)
        inputs.write_text(json.dumps([list(texts) for texts in rows.texts]), encoding="utf-8")
        command = [sys.executable, ALONE, graph, inputs, *map(str, options.batch_sizes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for size, answers in zip(options.batch_sizes, json.loads(done.stdout), strict=True):
            wanted = engine.predict(rows.texts, batch_size=size)
            pairs = list(zip(wanted, answers, strict=True))
            found.append(
                {
                    "batch_size": size,
                    "rows": len(pairs),
                    "exit_layers": len({answer.exit_layer for answer in wanted}),
                    "other_labels": sum(answer.label != label for answer, (label, _) in pairs),
                    "other_exit_layers": sum(answer.exit_layer != layer for answer, (_, layer) in pairs),
                }
            )
            print(found[-1], flush=True)
    if options.json is not None:
        where = environment(torch.device("cpu"))
        write_text(
            options.json,
            json.dumps({"task": options.task, "found": found, "environment": where}, indent=1) + "\n",
        )


if __name__ == "__main__":
    main()
