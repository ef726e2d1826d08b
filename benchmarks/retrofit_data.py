"""SST-2 as `retrofit` is measured on it: rows to fine-tune on, all other training sentences as texts, and dev.

    python benchmarks/retrofit_data.py GLUE/SST-2 OUT --rows 10000

Writes `finetune.tsv` (rows drawn with seed 0), `texts.txt` (the others, without labels), `dev.tsv` and `dev.txt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

HEADER = "sentence\tlabel\n"


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = _read(options.source / "train.tsv")
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = [rows[row] for row in order[: options.rows]]
    dev = _read(options.source / "dev.tsv")
    texts = "".join(f"{rows[row][0]}\n" for row in order[options.rows :])
    (options.out / "finetune.tsv").write_text(HEADER + _lines(chosen), encoding="utf-8")
    (options.out / "texts.txt").write_text(texts, encoding="utf-8")
    (options.out / "dev.tsv").write_text(HEADER + _lines(dev), encoding="utf-8")
    (options.out / "dev.txt").write_text("".join(f"{text}\n" for text, _ in dev), encoding="utf-8")


def _read(path: Path) -> list[tuple[str, str]]:
    """Sentence and label of every row of a GLUE file."""
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    return [(text.strip(), label) for text, label in (line.split("\t") for line in lines if line)]


def _lines(rows: list[tuple[str, str]]) -> str:
    return "".join(f"{text}\t{label}\n" for text, label in rows)


if __name__ == "__main__":
    main()
