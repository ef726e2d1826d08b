"""Use the newest wheel of a folder as somebody would who has only that: `python .ci/try_wheel.py dist`.

A new environment gets the wheel with the `onnx` extra. In it, on a tiny classifier and texts made here, a retrofit, a
prediction and an export run from an empty folder; the exported file then answers in Python without this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSWER = """
import sys
import numpy, onnxruntime, pathlib, tokenizers
folder = pathlib.Path(sys.argv[1])
(graph,) = folder.glob("*.onnx")
session = onnxruntime.InferenceSession(graph)
encoded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(sys.argv[2])
given = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
wanted = {one.name for one in session.get_inputs()}
values = {name: numpy.array([ids], dtype=numpy.int64) for name, ids in given.items() if name in wanted}
logits, exit_layer = session.run(["logits", "exit_layer"], values)
assert "consistentee" not in sys.modules and "torch" not in sys.modules
print(int(logits[0].argmax()), int(exit_layer[0]))
"""


def main() -> None:
    """Install, run, compare."""
    wheels = sorted(Path(sys.argv[1]).resolve().glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SystemExit(f"{sys.argv[1]} must hold a wheel. Run make dist.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier, texts = make_classifier(folder)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        wheel = f"{wheels[-1]}[onnx]"
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        run(
            folder,
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *constraints,
            wheel,
        )
        command = folder / "env" / "bin" / "consistentee"
        print(run(folder, command, "--version").strip(), "installed from", wheels[-1].name)
        fit = ["--policy-epochs", "2", "--passes", "1"]
        run(folder, command, "retrofit", classifier, "--texts", texts, "--output-dir", "fast", *fit)
        text = texts.read_text(encoding="utf-8").splitlines()[0]
        run(folder, command, "predict", "fast", texts, "--output", "answers.jsonl")
        predicted = json.loads((folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
        run(folder, command, "export", "fast", "--format", "onnx", "--output", "graph")
        label, exit_layer = run(folder, python, "-c", ANSWER, "graph", text).split()
        names = json.loads((folder / "graph" / "config.json").read_text(encoding="utf-8"))["id2label"]
        exported, own = (names[label], int(exit_layer)), (predicted["label"], predicted["exit_layer"])
        if exported != own:
            raise SystemExit(f"The exported file answers {exported}, and predict {own}.")
        print(f"retrofit, predict and export agree: {own[0]}, exit layer {own[1]}")


def make_classifier(folder: Path) -> tuple[Path, Path]:
    """A tiny Hugging Face classifier, and texts for it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_classifier, tiny_dataset

    texts = folder / "texts.txt"
    rows = {" ".join(row) for row in tiny_dataset(400).texts}
    texts.write_text("\n".join(sorted(rows)) + "\n", encoding="utf-8")
    return tiny_classifier(folder / "classifier"), texts


def run(folder: Path, *words: str | Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, words[:3]))} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    main()
