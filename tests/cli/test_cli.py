"""The command line: exit codes, one line for a failure, recipe precedence, files that are whole."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee import __version__
from consistentee.cli.data import check_held_out, save_held_out
from consistentee.cli.main import main
from consistentee.cli.options import TrainingDataOptions
from consistentee.config import ClassificationTrainingConfig
from consistentee.data.rows import TextDataset
from consistentee.models.record import RECORD_FILE
from consistentee.training.checkpoints import claim
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model, write_csv

COLUMNS = ("--text-columns", "text", "--label-column", "label")


@dataclasses.dataclass
class Files:
    """Saved models and data that the tests share; none of them is written to."""

    model: Path
    plain: Path
    backbone: Path
    train: Path
    evaluation: Path


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("cli")
    backbone = tiny_backbone(root / "backbone")
    torch.manual_seed(3)
    return Files(
        model=tiny_model(root / "model", backbone, initial_exit_bias=0.0),
        plain=tiny_full_depth_model(root / "plain", backbone),
        backbone=backbone,
        train=write_csv(root / "train.csv", tiny_dataset(60, seed=1)),
        evaluation=write_csv(root / "evaluation.csv", tiny_dataset(30, seed=2)),
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def training(files: Files, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace `train` by something that notes its arguments and leaves a saved model."""
    calls: list[dict[str, Any]] = []

    def fake(**arguments: Any) -> Path:
        calls.append(arguments)
        source = files.plain if arguments["method"] == "plain" else files.model
        return shutil.copytree(source, arguments["output_dir"])

    monkeypatch.setattr("consistentee.training.train.train", fake)
    return calls


def one_line(outcome: Outcome) -> str:
    """The single line on standard error."""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("consistentee: ")
    return outcome.err


class TestValuesThatDoNotFit:
    """Usage errors that only show once the model is there, or the machine is asked."""

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--dtype int4", 'dtype must be one of float32, bfloat16, float16, int8, got "int4"'),
            ("--dtype auto", 'dtype and backend must be named, got "auto". `consistentee benchmark MODEL'),
            ("--device tpu", "device must be one that is there: cpu"),
            ("--backend jax", 'backend must be one of torch, onnxruntime, got "jax"'),
            ("--backend onnxruntime --dtype bfloat16", 'got a model of type "bert" in bfloat16'),
            ("--threshold 7", "threshold must be in [0, 1] for policy, got 7.0"),
        ],
    )
    def test_of_predict(self, call: Call, files: Files, arguments: str, message: str) -> None:
        outcome = call("predict", files.model, files.evaluation, *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)
        assert outcome.out == ""

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--max-length 2", "max_length must be above the tokenizer's 2 special tokens, got 2"),
            ("--mixed-precision fp16", "mixed_precision fp16 needs a GPU"),
        ],
    )
    @pytest.mark.parametrize("command", ["train", "finetune"])
    def test_of_training(
        self, call: Call, files: Files, tmp_path: Path, command: str, arguments: str, message: str
    ) -> None:
        if "GPU" in message and torch.cuda.is_available():
            pytest.skip("There is a GPU here.")
        data = ["--backbone", files.backbone, "--train-file", files.train, *COLUMNS]
        outcome = call(command, *data, "--output-dir", tmp_path / "o", *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("trian", 'Unknown command "trian"'),
            ("train", "--output-dir requires an argument"),
            ("train --output-dir o --no-such 1", "Unknown option"),
            ("train --output-dir o --task sst2", "Give --backbone"),
            ("train --output-dir o --backbone b", "Give --task, or --train-file"),
            ("train --output-dir o --backbone b --task sst2 --train-file f", "exclude each other"),
            ("train --output-dir o --backbone b --task sst2 --text-columns a", "a task knows its own"),
            (
                "train --output-dir o --backbone b --task sst2 --eval-file e",
                "--eval-file goes with --train-file",
            ),
            (
                "train --output-dir o --backbone b --train-file f --text-columns a b c --label-column y",
                "one column or two, got 3",
            ),
            (
                "train --output-dir o --backbone b --train-file f --text-columns a --label-column y --data-dir d",
                "--data-dir goes with --task",
            ),
            ("train --output-dir o --backbone b --task sst", 'Did you mean "sst2"'),
            ("train --output-dir o --backbone b --task sst2 --head none", "Choose from"),
            (
                "train --output-dir o --backbone b --task sst2 --method pabee",
                "It is weighted_sum with the exit",
            ),
            ("train --output-dir o --backbone b --task sst2 --batch-size many", "unable to convert"),
            (
                "train --output-dir o --backbone b --task sst2 --batch-size 0",
                "batch_size must be above 0, got 0",
            ),
            (
                "train --output-dir o --backbone b --task sst2 --max-train-samples 1",
                "must be at least 2, got 1",
            ),
            (
                "train --output-dir o --backbone b --task sst2 --seed -3",
                "seed must be from 0 to 4294967295, got -3",
            ),
            (
                "train --output-dir o --backbone b --task sst2 --head shared_pooler --classifier-hidden-size 8",
                "--classifier-hidden-size goes with --head attention and has no effect here",
            ),
            (
                "finetune --output-dir o --backbone b --task sst2 --layer-costs 0.1",
                "--layer-costs is about exits, which finetune does not train",
            ),
            ("evaluate", "requires an argument"),
            ("evaluate m --criterion mood", "Choose from"),
            ("evaluate m --plot p.bmp", "must end in .png"),
            ("evaluate m --max-samples 0", "--max-samples must be at least 1, got 0"),
            ("predict m --batch-size 0", "--batch-size must be at least 1, got 0"),
            ("predict m f --text-columns a b c", "one column or two, got 3"),
            ("predict m f g", "Unused Tokens"),
        ],
    )
    def test_exit_code_2_and_one_line(self, call: Call, arguments: str, message: str) -> None:
        outcome = call(*arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)
        assert outcome.out == ""

    def test_a_threshold_that_does_not_fit(self, call: Call, files: Files) -> None:
        for command in (["predict", files.model, files.train], ["evaluate", files.model]):
            outcome = call(*command, "--threshold", 1.5)
            assert outcome.code == 2
            assert "threshold must be in [0, 1] for policy, got 1.5" in one_line(outcome)

    def test_another_criterion_needs_a_threshold_that_the_record_may_have(
        self, call: Call, files: Files, tmp_path: Path
    ) -> None:
        arguments = ["--eval-file", files.evaluation, *COLUMNS, "--criterion", "confidence"]
        outcome = call("evaluate", files.model, *arguments)
        assert outcome.code == 2
        assert "Give one with --threshold" in one_line(outcome)
        folder = Path(shutil.copytree(files.model, tmp_path / "model"))
        (folder / RECORD_FILE).write_text('{"thresholds": {"confidence": 0.75}}', encoding="utf-8")
        outcome = call("evaluate", folder, *arguments)
        assert outcome.code == 0
        assert "confidence > 0.75" in outcome.out

    def test_help_and_version(self, call: Call) -> None:
        assert __version__ in call("--version").out
        assert "finetune" in call("--help").out
        text = " ".join(call("train", "--help").out.replace("│", " ").split())
        for field in dataclasses.fields(ClassificationTrainingConfig):
            assert f"--{field.name.replace('_', '-')}"[:28] in text
        assert (
            "Peak learning rate of the backbone, or of its adapters, in the warm-up. [default: 5e-05]" in text
        )

    def test_answers_before_torch_is_imported(self) -> None:
        code = (
            "import sys; sys.argv = ['/usr/bin/consistentee']; import consistentee.cli.start\n"
            "from consistentee.cli.main import main\n"
            "assert main(['--help']) == 0 and main(['train']) == 2 and 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_interrupted_while_it_is_imported(self, tmp_path: Path) -> None:
        interrupted = (
            "import sys\n"
            "class Interrupted:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name in ('cyclopts', 'torch'): raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupted())\n"
        )
        code = (
            f"{interrupted}sys.argv = ['/usr/bin/consistentee', '--help']\n"
            "from consistentee.cli.start import run_command_line; sys.exit(run_command_line())"
        )
        (tmp_path / "sitecustomize.py").write_text(interrupted, encoding="utf-8")
        paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        for command, variables in (
            (["-c", code], {}),
            (["-m", "consistentee", "--help"], {"PYTHONPATH": paths}),
        ):
            done = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **variables},
            )
            assert (done.returncode, done.stderr) == (130, "consistentee: Interrupted.\n")
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        assert '\nconsistentee = "consistentee.cli.start:run_command_line"\n' in project


class TestFailures:
    def test_exit_code_1_and_one_line(self, call: Call, files: Files, tmp_path: Path) -> None:
        for arguments, message in (
            (["evaluate", tmp_path / "no", "--task", "sst2"], "does not exist. Check the path"),
            (["evaluate", files.plain, "--task", "sst2"], "has no exits"),
            (
                ["evaluate", files.model, "--task", "sst2", "--data-dir", tmp_path / "no"],
                "There is no such folder",
            ),
            (["evaluate", files.model, "--eval-file", tmp_path / "no.csv", *COLUMNS], "no such file"),
            (["predict", files.model, tmp_path / "no.txt"], "There is no such file"),
            (
                ["train", "--output-dir", tmp_path / "o", "--config", tmp_path / "no.yaml"],
                "Give the path of a YAML",
            ),
        ):
            outcome = call(*arguments)
            assert outcome.code == 1
            assert message in one_line(outcome)

    def test_a_recipe_with_a_wrong_key(self, call: Call, tmp_path: Path) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text("learning_rat: 1e-5\n", encoding="utf-8")
        outcome = call("train", "--output-dir", tmp_path / "o", "--config", recipe)
        assert outcome.code == 1
        assert 'Did you mean "learning_rate"?' in one_line(outcome)

    def test_a_surprise_names_its_type_and_debug_shows_where(
        self, call: Call, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("two\nlines")

        monkeypatch.setattr("consistentee.pipelines.classifier.Engine.from_pretrained", fail)
        outcome = call("predict", files.model, files.train)
        assert outcome.code == 1
        assert "RuntimeError: two lines (run again with --debug for the traceback)" in one_line(outcome)
        outcome = call("predict", files.model, files.train, "--debug")
        assert outcome.code == 1
        assert "Traceback" in outcome.err

    @pytest.mark.parametrize("command", ["train", "finetune"])
    def test_interrupted(
        self, call: Call, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        def interrupt(**_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("consistentee.training.train.train", interrupt)
        arguments = ["--train-file", files.train, *COLUMNS, "--backbone", files.backbone]
        outcome = call(command, *arguments, "--output-dir", tmp_path / "o")
        assert outcome.code == 130
        assert (
            one_line(outcome) == "consistentee: Interrupted. Continue with the same command and --resume.\n"
        )


class TestTrain:
    def test_command_line_before_recipe_before_defaults(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"task: mrpc\nbackbone: {files.backbone}\nlearning_rate: 1e-5\nbatch_size: 16\ngroup_by_length: false\n"
            "layer_costs: [0.5]\npatience: 7\n",
            encoding="utf-8",
        )
        data = ["--train-file", files.train, "--eval-file", files.evaluation, *COLUMNS]
        options = ["--batch-size", 8, "--layer-costs", 0.02, 0.04, "--group-by-length", "--seed", 5]
        outcome = call("train", "--config", recipe, *data, *options, "--output-dir", tmp_path / "o")
        assert outcome.code == 0, outcome.err
        (arguments,) = training
        config = arguments["config"]
        assert config == ClassificationTrainingConfig(
            learning_rate=1e-5,
            batch_size=8,
            layer_costs=(0.02, 0.04),
            group_by_length=True,
            patience=7,
            seed=5,
        )
        assert arguments["backbone"] == str(files.backbone)
        assert arguments["task"] is None  # files on the command line win over the recipe's task
        assert arguments["resume"] is False
        assert len(arguments["train_data"]) == 60

    @pytest.mark.parametrize("options, method", [([], "sweet"), (["--method", "berxit"], "berxit")])
    def test_a_recipe_names_its_method(
        self,
        options: list[str],
        method: str,
        call: Call,
        files: Files,
        tmp_path: Path,
        training: list[dict[str, Any]],
    ) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text("method: sweet\n", encoding="utf-8")
        data = ["--train-file", files.train, "--eval-file", files.evaluation, *COLUMNS]
        more = ["--backbone", files.backbone, "--output-dir", tmp_path / "o"]
        outcome = call("train", "--config", recipe, *data, *more, *options)
        assert outcome.code == 0, outcome.err
        (arguments,) = training
        assert arguments["method"] == method

    @pytest.mark.parametrize(
        "recipe, options, message",
        [
            ("method: pabee\n", [], 'method must be one of consistent, .*, got "pabee"'),
            ("", ["--method", "static"], "num_layers must be given for the method static, got none"),
        ],
    )
    def test_a_method_that_cannot_train_this(
        self, recipe: str, options: list[str], message: str, call: Call, files: Files, tmp_path: Path
    ) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(recipe or "seed: 1\n", encoding="utf-8")
        data = ["--train-file", files.train, *COLUMNS, "--backbone", files.backbone]
        outcome = call("train", "--config", path, *data, *options, "--output-dir", tmp_path / "o")
        assert outcome.code == 2
        assert re.search(message, one_line(outcome))
        assert not (tmp_path / "o").exists()

    def test_task_of_a_recipe_with_a_local_folder(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        (tmp_path / "r.yaml").write_text("task: sst2\n", encoding="utf-8")
        for name, rows in (("train", 20), ("dev", 10)):
            texts = [
                f"{text}\t{label}"
                for (text,), label in zip(*_columns(tiny_dataset(rows, seed=rows)), strict=True)
            ]
            (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *texts]), encoding="utf-8")
        outcome = call(
            *("train", "--config", tmp_path / "r.yaml", "--data-dir", tmp_path, "--backbone", files.backbone),
            *("--max-train-samples", 12, "--resume", "--output-dir", tmp_path / "o"),
        )
        assert outcome.code == 0, outcome.err
        assert training[0]["task"] == "sst2"
        assert training[0]["resume"] is True
        assert len(training[0]["train_data"]) == 12
        assert "On 10 rows that training has not seen" in outcome.out

    def test_rows_that_are_there_twice_are_counted(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        rows = tiny_dataset(60, seed=1)
        twice = write_csv(tmp_path / "twice.csv", rows.select([*range(60), *range(60)]))
        command = (
            "train",
            "--backbone",
            files.backbone,
            *COLUMNS,
            "--validation-fraction",
            0.25,
            "--train-file",
        )
        outcome = call(*command, twice, "--output-dir", tmp_path / "o")
        assert outcome.code == 0, outcome.err
        lines = (tmp_path / "o" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        held_out = [json.loads(line) for line in lines]
        train = training[0]["train_data"]
        seen = sum((row["text"],) in train.texts for row in held_out)
        assert 6 < seen <= 12
        assert f"On 12 rows, {seen} of which are also in the training rows ({twice}):" in outcome.out
        kept, held = train.split(0.25, 0)
        copies = sum(train.texts[row] in train.select(kept).texts for row in held)
        said = f"{copies} of the 27 validation rows are also in the rows that the model learns from."
        assert said in outcome.out
        assert json.loads((tmp_path / "o" / RECORD_FILE).read_text())["evaluation"]["num_seen"] == seen
        card = (tmp_path / "o" / "README.md").read_text(encoding="utf-8")
        assert f"Measured on 12 rows, {seen} of which are also in the training rows." in card
        outcome = call(*command, files.train, "--eval-file", files.train, "--output-dir", tmp_path / "same")
        assert f"On 60 rows, 60 of which are also in the training rows ({files.train}):" in outcome.out
        outcome = call(
            *command, files.train, "--eval-file", files.evaluation, "--output-dir", tmp_path / "other"
        )
        assert "On 30 rows that training has not seen" in outcome.out
        assert "validation rows" not in outcome.out

    def test_figures_go_into_the_folder(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        data = ["--train-file", files.train, *COLUMNS, "--backbone", files.backbone]
        for command in ("train", "finetune"):
            folder = tmp_path / command
            outcome = call(command, *data, "--output-dir", folder)
            assert outcome.code == 0, outcome.err
            record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            assert record["evaluation"]["num_examples"] == 6
            assert "curve" not in record["evaluation"]
            assert "Measured on 6 rows" in (folder / "README.md").read_text(encoding="utf-8")
        first, second = training
        assert first["train_data"].texts == second["train_data"].texts  # the plain model sees the same rows
        # Without an evaluation file some rows were held out; they can be evaluated on again.
        held_out = tmp_path / "train" / "held_out.jsonl"
        assert str(held_out) in outcome.out or (tmp_path / "finetune" / "held_out.jsonl").is_file()
        kept = {text for (text,) in first["train_data"].texts}
        rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 6
        assert len(first["train_data"]) == 54
        assert {row["label"] for row in rows} == {"negative", "positive"}
        assert len(kept) > 40
        outcome = call("evaluate", tmp_path / "train", "--eval-file", held_out, *COLUMNS)
        assert outcome.code == 0, outcome.err

    def test_rows_to_report_on_overwrite_no_file_of_others(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        data = ["--train-file", files.train, *COLUMNS, "--backbone", files.backbone]
        folder, file = tmp_path / "o", tmp_path / "o" / "held_out.jsonl"
        claim(folder)  # as an unfinished run leaves it
        file.write_text("my own notes", encoding="utf-8")
        outcome = call("train", *data, "--output-dir", folder, "--resume")
        assert outcome.code == 1
        assert f"{file} is no file of these rows" in one_line(outcome)
        assert not training
        assert file.read_text(encoding="utf-8") == "my own notes"
        file.unlink()
        rows, options = tiny_dataset(5), TrainingDataOptions(text_columns=["text"], label_column="label")
        assert not check_held_out(folder, rows, options)
        assert save_held_out(folder, rows, options) == save_held_out(folder, rows, options) == file
        assert check_held_out(folder, rows, options)

    def test_really_trains(
        self, call: Call, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))  # shells leave "~" where it stands behind "="
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.chdir(files.train.parent)
        options = (
            "--warmup-epochs 1 --rounds 0 --policy-input log_odds --policy-epochs 1 --policy-min-steps 1"
        )
        data = [
            "--train-file",
            files.train,
            "--eval-file",
            files.evaluation,
            *COLUMNS,
            "--backbone",
            files.backbone,
        ]
        options += " --policy-folds 2 --layer-costs 0.02 --mixed-precision no"
        outcome = call("train", *data, "--output-dir=~/o", *options.split())
        assert outcome.code == 0, outcome.err
        assert (tmp_path / "o" / "config.json").is_file()
        assert not Path("~").exists()
        outcome = call("train", *data, "--output-dir", tmp_path / "o", *options.split())
        assert outcome.code == 1
        assert "holds a finished model" in one_line(outcome)

    def test_the_metric_of_thresholds(
        self, call: Call, files: Files, training: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        three = tmp_path / "three.csv"
        three.write_text("text,label\n" + "good,a\nbad,b\nflat,c\n" * 20, encoding="utf-8")
        command = ["train", *COLUMNS, "--backbone", files.backbone, "--output-dir", tmp_path / "o"]
        outcome = call(*command, "--train-file", three, "--threshold-metric", "f1")
        assert outcome.code == 2
        assert "threshold_metric f1 needs a task with two classes, got 3. Use macro_f1" in one_line(outcome)
        outcome = call(*command, "--train-file", files.train, "--threshold-metric", "recall")
        assert outcome.code == 2
        assert not training
        outcome = call(*command, "--train-file", files.train, "--threshold-metric", "macro_f1")
        assert outcome.code == 0, outcome.err
        assert training[0]["config"].threshold_metric == "macro_f1"
        assert "recall % at the last layer" in outcome.out


class TestEvaluate:
    def test_table_json_and_picture(self, call: Call, files: Files, tmp_path: Path) -> None:
        outcome = call(
            *("evaluate", files.model, "--eval-file", files.evaluation, *COLUMNS, "--threshold", 0.5),
            *("--criterion", "policy", "patience", "--criterion", "entropy", "--reference", files.plain),
            *("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png"),
        )
        assert outcome.code == 0, outcome.err
        assert "plain model" in outcome.out
        assert "policy > 0.5" in outcome.out
        figures = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
        assert figures["num_examples"] == 30
        assert figures["criterion"] == "policy"
        assert set(figures["other_criteria"]) == {"patience", "entropy"}
        assert 0 <= figures["reference"]["accuracy"] <= 1
        assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
        assert len(list(tmp_path.iterdir())) == 2

    def test_no_data_and_contradicting_data(self, call: Call, files: Files) -> None:
        outcome = call("evaluate", files.model)
        assert outcome.code == 2
        assert "Give --task with --data-dir, or --eval-file" in one_line(outcome)
        outcome = call("evaluate", files.model, "--task", "sst2", "--eval-file", files.evaluation, *COLUMNS)
        assert outcome.code == 2

    def test_max_samples(self, call: Call, files: Files, tmp_path: Path) -> None:
        data = ["--eval-file", files.evaluation, *COLUMNS, "--max-samples", 10, "--json", tmp_path / "e.json"]
        assert call("evaluate", files.model, *data).code == 0
        assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["num_examples"] == 10


class TestPredict:
    def test_lines_in_the_order_of_the_input(self, call: Call, files: Files) -> None:
        outcome = call("predict", files.model, files.evaluation, "--batch-size", 4)
        assert outcome.code == 0
        assert outcome.err == ""
        lines = [json.loads(line) for line in outcome.out.splitlines()]
        assert [line["text"] for line in lines] == [text for (text,) in tiny_dataset(30, seed=2).texts]
        assert set(lines[0]) == {"text", "label", "score", "exit_layer", "truncated"}

    def test_standard_input_and_pairs(
        self, call: Call, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO("a film\tbäd\n".encode()), encoding="utf-8")
        )
        outcome = call("predict", files.model)
        assert outcome.code == 0
        assert json.loads(outcome.out)["text"] == ["a film", "bäd"]
        assert "bäd" in outcome.out

    def test_output_is_whole_or_not_there(self, call: Call, files: Files, tmp_path: Path) -> None:
        outcome = call("predict", files.model, files.evaluation, "--output", tmp_path / "p.jsonl")
        assert (outcome.code, outcome.out) == (0, "")
        before = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
        assert len(before.splitlines()) == 30
        broken = tmp_path / "broken.txt"
        broken.write_text("good\n" * 50 + "\nbad\n", encoding="utf-8")
        outcome = call("predict", files.model, broken, "--output", tmp_path / "p.jsonl", "--batch-size", 4)
        assert outcome.code == 1
        assert "broken.txt, line 51: The line is empty" in one_line(outcome)
        assert (tmp_path / "p.jsonl").read_text(encoding="utf-8") == before
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_reader_that_has_had_enough(self, files: Files, tmp_path: Path) -> None:
        texts = tmp_path / "texts.txt"
        texts.write_text("a good film and a bad plot\n" * 800, encoding="utf-8")
        command = [sys.executable, "-m", "consistentee", "predict", str(files.model), str(texts)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


class TestBenchmark:
    def test_table_json_and_picture(self, call: Call, files: Files, tmp_path: Path) -> None:
        json_file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
        outcome = call(
            *("benchmark", files.model, "--data-file", files.evaluation, "--exit-distribution", "even"),
            *("--batch-sizes", "1,8", "--throughput", "--repeats", 1, "--json", json_file, "--plot", plot),
        )
        assert outcome.code == 0, outcome.err
        assert outcome.err.startswith("This takes about ")
        assert "transformers" in outcome.out
        figures = json.loads(json_file.read_text(encoding="utf-8"))
        assert {"hardware", "torch", "threads", "seed"} <= set(figures["environment"])
        wanted = "name mode batch_size backend dtype latency_ms_p50 latency_ms_p95 instances_per_second padding_share "
        wanted += "mean_exit_layer layer_speedup wall_clock_speedup efficiency peak_memory_mb"
        assert all(set(wanted.split()) <= set(row) for row in figures["rows"])
        assert {row["batch_size"] for row in figures["rows"]} == {1, 8, None}
        assert str(tmp_path) not in json_file.read_text(encoding="utf-8")
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_a_time_to_keep_to(self, call: Call, files: Files, tmp_path: Path) -> None:
        arguments = ["benchmark", files.model, "--data-file", files.evaluation, "--json", tmp_path / "s.json"]
        outcome = call(*arguments, "--seconds", 1e-6)
        assert outcome.code == 0, outcome.err
        assert (
            "Left out, as 1e-06 seconds are too few: batch size 8, batch size 32, batch size 128"
            in outcome.out
        )
        figures = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
        assert {(row["batch_size"], row["rows"], row["repeats"]) for row in figures["rows"]} == {(1, 8, 3)}
        assert figures["workload"]["seconds"] == 1e-6

    def test_the_models_own_rule_and_one_mode(self, call: Call, files: Files, tmp_path: Path) -> None:
        outcome = call(
            *(
                "benchmark",
                files.model,
                "--data-file",
                files.evaluation,
                "--threshold",
                "1",
                "--batch-sizes",
                "4",
            ),
            *("--repeats", 1, "--json", tmp_path / "speed.json", "--dtype", "bfloat16"),
        )
        assert outcome.code == 0, outcome.err
        rows = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["rows"]
        assert {(row["batch_size"], row["dtype"], row["mean_exit_layer"]) for row in rows} == {
            (4, "bfloat16", 3)
        }

    @pytest.mark.parametrize(
        "arguments,message",
        [
            ("", "Give a model (with --data-file or --task), or --config-name"),
            ("MODEL", "A model needs --data-file, or --task"),
            ("--config-name bert-huge", "config-name must be one of"),
            ("--config-name bert-base --sequence-length 9999", "sequence-length must be in"),
            ("--config-name bert-base --dtype auto", "needs a trained model"),
            ("--config-name bert-base --batch-sizes 0", "--batch-sizes must be whole numbers from 1 on"),
            ("--config-name bert-base --repeats 0", "--repeats must be at least 1"),
            ("MODEL --data-file FILE --exit-distribution 1,0", "one share for each of 3 layers, got 2"),
            ("MODEL --data-file FILE --threshold 3", "threshold must be in [0, 1]"),
            ("MODEL --data-file FILE --data-dir d", "--data-dir goes with --task, not with --data-file"),
            ("MODEL --data-dir d", "A model needs --data-file, or --task"),
            ("MODEL --data-file FILE --sequence-length 9", "--sequence-length goes with --config-name"),
            ("MODEL --data-file FILE --labels 3", "--labels goes with --config-name, not with a model"),
            (
                "MODEL --data-file FILE --classifier-hidden-size 3",
                "--classifier-hidden-size goes with --config-",
            ),
            ("MODEL --task sst2 --text-columns a", "--text-columns goes with --data-file"),
            ("--config-name bert-base --data-dir d", "--data-dir goes with a model, not with --config-name"),
            ("--config-name bert-base --text-columns a", "--text-columns goes with a model"),
            (
                "--config-name bert-base --threshold 1",
                "--threshold goes with a model, not with --config-name",
            ),
            ("--config-name bert-base --seconds 0", "--seconds must be above 0, got 0"),
            ("--config-name bert-base --num-rows 9 --repeats 2 --seconds 9", "both are given: leave one out"),
            ("MODEL --data-file FILE --threshold 1 --exit-distribution even", "exclude each other"),
        ],
    )
    def test_usage(self, call: Call, files: Files, arguments: str, message: str) -> None:
        places = {"MODEL": files.model, "FILE": files.evaluation}
        outcome = call("benchmark", *(places.get(word, word) for word in arguments.split()))
        assert outcome.code == 2
        assert message in one_line(outcome)


class TestInterruptedPrediction:
    @pytest.mark.parametrize("number, to_a_file", [(signal.SIGINT, False), (signal.SIGTERM, True)])
    def test_a_signal_leaves_whole_lines(
        self, number: int, to_a_file: bool, files: Files, tmp_path: Path
    ) -> None:
        texts = tmp_path / "texts.txt"
        texts.write_text("a good film and a bad plot\n" * 300_000, encoding="utf-8")
        output = tmp_path / "whole.jsonl"
        command = [sys.executable, "-m", "consistentee", "predict", str(files.model), str(texts)]
        with subprocess.Popen(
            [*command, *(("--output", str(output)) if to_a_file else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=_hear_interrupts,
            bufsize=0,  # so that nothing read ahead is lost between readline and communicate
        ) as process:
            assert process.stdout is not None
            if to_a_file:
                assert _eventually(lambda: len(list(tmp_path.iterdir())) > 1)
                lines = b""
            else:
                lines = process.stdout.readline()
            process.send_signal(number)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert errors.count(b"\n") == 1
        assert (lines + rest).endswith(b"\n") or to_a_file
        for line in (lines + rest).splitlines():
            assert set(json.loads(line)) == {"text", "label", "score", "exit_layer", "truncated"}
        assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def _hear_interrupts() -> None:
    """A job that a shell started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _columns(rows: TextDataset) -> tuple[list[tuple[str, ...]], list[int]]:
    return rows.texts, rows.labels


def test_importing_the_package_is_enough_for_the_auto_classes(files: Files) -> None:
    code = (
        "import sys, consistentee\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)\n"
        "[getattr(consistentee, name) for name in consistentee.__all__]\n"
    )
    command = [sys.executable, "-c", code, str(files.model)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.split()[0] == "EarlyExitForSequenceClassification"


def test_options_where_pydantic_is_loaded() -> None:
    """Defaults are then held to the types of their options: a setting that is not given has none."""
    pytest.importorskip("pydantic")
    code = (
        "import pydantic\n"
        "from consistentee.cli.main import main\n"
        "for command in ('train --batch-size 8', 'finetune --seed 3', 'retrofit x --texts y --passes 2', 'ablate',\n"
        "                'compare --methods plain --max-length 9 --mixed-precision no'):\n"
        "    main([*command.split(), '--backbone', 'b', '--output-dir', 'o', '--no-such-option'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "validation error" not in found.stderr
    assert found.stderr.count("Unknown option") == 5, found.stderr
