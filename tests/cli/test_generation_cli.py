"""Commands that make text: what they print and write, which kind of model an option belongs to, errors of one line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consistentee.cli.kinds import CLASSIFIERS, GENERATORS, Kind
from consistentee.cli.main import main
from consistentee.cli.options import TrainingDataOptions
from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig
from consistentee.data.generation import load_generation_files
from consistentee.errors import UsageError
from consistentee.models.record import RECORD_FILE
from saved_generators import TEMPLATE, generator_folder, plain_folder, tiny_rows
from tiny import tiny_backbone, tiny_dataset, tiny_model, write_csv

KEYS = {"rouge1", "rouge2", "rougeL", "bleu", "perplexity"}


@dataclasses.dataclass
class Files:
    """Saved models and data that the tests share; none of them is written to."""

    exits: Path
    plain: Path
    classifier: Path
    rows: Path
    prompts: Path
    classified: Path


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("generation-cli")
    rows = tiny_rows(12)
    columns = zip(rows.instructions, rows.inputs, rows.references, strict=True)
    lines = [{"ask": ask, "about": about, "say": say} for ask, about, say in columns]
    _write_jsonl(root / "rows.jsonl", lines)
    _write_jsonl(root / "prompts.jsonl", [{"prompt": f"number {row}" * (1 + row % 3)} for row in range(7)])
    return Files(
        exits=generator_folder(root / "exits", thresholds={"softmax_margin": 0.3}),
        plain=plain_folder(root / "plain"),
        classifier=tiny_model(root / "classifier", tiny_backbone(root / "backbone")),
        rows=root / "rows.jsonl",
        prompts=root / "prompts.jsonl",
        classified=write_csv(root / "classified.csv", tiny_dataset(20, seed=1)),
    )


COLUMNS = ("--prompt-column", "ask", "--input-column", "about", "--response-column", "say")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def one_line(outcome: Outcome) -> str:
    """The single line on standard error."""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("consistentee: ")
    return outcome.err


class TestGenerate:
    def test_a_file_gives_json_lines_in_its_order(self, call: Call, files: Files) -> None:
        outcome = call("generate", files.exits, files.prompts, "--max-new-tokens", 5, "--batch-size", 3)
        assert outcome.code == 0, outcome.err
        lines = [json.loads(line) for line in outcome.out.splitlines()]
        assert [line["prompt"] for line in lines] == [f"number {row}" * (1 + row % 3) for row in range(7)]
        for line in lines:
            assert line.pop("truncated") is False
            assert set(line) == {"prompt", "text", "finish_reason", "exit_layers", "mean_exit_layer"}
            assert len(line["exit_layers"]) == 5
            assert line["mean_exit_layer"] == pytest.approx(sum(line["exit_layers"]) / 5, abs=1e-4)

    def test_columns_and_pieces(self, call: Call, files: Files, tmp_path: Path) -> None:
        output = tmp_path / "out.jsonl"
        arguments = ["--prompt-column", "ask", "--input-column", "about", "--max-new-tokens", 4]
        outcome = call("generate", files.exits, files.rows, *arguments, "--show-exits", "--output", output)
        assert outcome.code == 0, outcome.err
        assert outcome.out == ""
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [line.get("input", "") for line in lines] == tiny_rows(12).inputs
        assert all("".join(line["pieces"]) == line["text"] for line in lines)

    def test_standard_input(self, call: Call, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
        outcome = call("generate", files.exits, "-", "--max-new-tokens", 2)
        assert [json.loads(line)["prompt"] for line in outcome.out.splitlines()] == ["one", "two"]

    def test_a_hyphen_is_standard_input_wherever_it_stands(
        self, call: Call, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for arguments in (
            (files.classifier, "-", "--batch-size", 2),
            (files.classifier, "--batch-size", 2, "-"),
        ):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
            outcome = call("predict", *arguments)
            assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == ["one", "two"]
        outcome = call("generate", files.exits, "--prompt", "-", "--json", "--max-new-tokens", 2)
        assert json.loads(outcome.out)["prompt"] == "-"

    def test_a_prompt_gives_its_text(self, call: Call, files: Files) -> None:
        options = ["--prompt", "go", "--max-new-tokens", 8]
        outcome = call("generate", files.exits, *options)
        assert outcome.code == 0, outcome.err
        line = json.loads(call("generate", files.exits, *options, "--json").out)
        assert outcome.out == line["text"].lstrip() + "\n"
        assert line["prompt"] == "go"

    def test_exits_are_shown_without_colour(self, call: Call, files: Files) -> None:
        options = ["--prompt", "go", "--max-new-tokens", 8, "--criterion", "static", "--threshold", 2]
        outcome = call("generate", files.exits, *options, "--show-exits")
        assert outcome.code == 0, outcome.err
        assert "mean exit layer 2.25 of 4, layer speed-up 1.78x, 8 tokens" in outcome.out
        assert "\x1b" not in outcome.out

    def test_ways_to_generate(self, call: Call, files: Files) -> None:
        arguments = ["generate", files.exits, "--prompt", "go", "--json", "--max-new-tokens", 6]
        full = call(*arguments, "--mode", "full").out
        assert json.loads(full)["exit_layers"] == [4] * 6
        lossless = json.loads(call(*arguments, "--mode", "lossless").out)
        assert lossless["text"] == json.loads(full)["text"]
        assert json.loads(call(*arguments, "--threshold", 1.0).out)["mean_exit_layer"] == 4
        draws = [
            call(*arguments, "--do-sample", "--temperature", 1.5, "--seed", seed).out for seed in (1, 1, 2)
        ]
        assert draws[0] == draws[1] != draws[2]
        for option in (["--skipped-states", "recompute"], ["--dtype", "bfloat16"], ["--template", "plain"]):
            assert call(*arguments, *option).code == 0

    @pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
    def test_stop_strings_end_texts(self, call: Call, files: Files, mode: str) -> None:
        options = ["--max-new-tokens", 12, "--mode", mode]
        whole = json.loads(call("generate", files.exits, "--prompt", "go", "--json", *options).out)
        assert whole["finish_reason"] == "length"
        stop = whole["text"][5:7]
        stops = ["--stop", "--no such text--", "--stop", stop]
        line = json.loads(call("generate", files.exits, "--prompt", "go", "--json", *options, *stops).out)
        assert line["text"] == whole["text"][: whole["text"].index(stop)]
        assert line["finish_reason"] == "stop"
        assert line["exit_layers"] == whole["exit_layers"][: len(line["exit_layers"])]
        streamed = call("generate", files.exits, "--prompt", "go", *options, *stops)
        assert streamed.out == line["text"].lstrip() + "\n"
        file = call("generate", files.exits, files.prompts, *options, "--stop", "e")
        assert not any("e" in json.loads(line)["text"] for line in file.out.splitlines())

    def test_lossless_text_ran_all_layers(self, call: Call, files: Files) -> None:
        """What was drafted is told beside the layers, and not in their place."""
        options = ["--prompt", "go", "--max-new-tokens", 9, "--mode", "lossless", "--threshold", 0.2]
        line = json.loads(call("generate", files.exits, *options, "--json").out)
        assert line["exit_layers"] == [4] * 9
        assert line["mean_exit_layer"] == 4
        assert len(line["draft_layers"]) == 9
        assert 0 <= line["accepted"] <= line["drafted"]
        shown = call("generate", files.exits, *options, "--show-exits").out
        assert "mean exit layer 4.00 of 4, layer speed-up 1.00x, 9 tokens" in shown
        share = sum(layer < 4 for layer in line["draft_layers"]) / 9
        assert f"all layers verified every token; {100 * share:.0f}% of them were drafted by exits" in shown
        assert "drafted after layers" in shown

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("f --prompt p", "A file and --prompt exclude each other"),
            ("f --input i", "--input goes with --prompt"),
            ("--prompt p --prompt-column c", "go with a file, not with --prompt"),
            ("--prompt p --batch-size 0", "--batch-size must be at least 1, got 0"),
            ("--prompt p --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
            ("--prompt p --temperature 2", "temperature goes with do_sample"),
            ("--prompt p --mode fast", "Choose from"),
            ("--prompt p --batch-size 3", "--batch-size goes with a file, not with --prompt"),
            ("--prompt p --seed 3", "--seed goes with --do-sample"),
            ("--prompt p --do-sample --seed -3", "seed must be from 0 to 4294967295, got -3"),
            ("--prompt p --device tpu", "device must be one that is there"),
            ("--prompt p --mode full --threshold 0.3", 'threshold has no effect in mode "full", got 0.3'),
            ("--prompt p --mode full --criterion policy", 'criterion has no effect in mode "full"'),
            ("--prompt p --mode full --skipped-states copy", 'skipped_states has no effect in mode "full"'),
            (
                "--prompt p --mode lossless --skipped-states copy",
                'skipped_states has no effect in mode "lossless"',
            ),
            (
                "p.txt --input-column c",
                "go with a file of columns (.csv, .tsv, .jsonl, .json, .ndjson, .parquet)",
            ),
            ("--prompt p --stop=", "stop must hold strings with at least one character"),
            ("--promt p", "Did you mean --prompt?"),
            ("--prompt p --threshold 1.5", "threshold must be in [0, 1] for policy, got 1.5"),
            ("--prompt p --criterion state_similarity", "Give one with --threshold"),
        ],
    )
    def test_usage(self, call: Call, files: Files, arguments: str, message: str) -> None:
        outcome = call("generate", files.exits, *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)
        assert outcome.out == ""

    def test_the_other_kind_of_model_names_the_right_command(self, call: Call, files: Files) -> None:
        outcome = call("generate", files.classifier, "--prompt", "p")
        assert outcome.code == 1
        assert "Use it with `consistentee predict`" in one_line(outcome)
        outcome = call("predict", files.exits, files.prompts)
        assert outcome.code == 1
        assert "Use it with `consistentee generate`" in one_line(outcome)

    def test_a_plain_model_has_no_exits(self, call: Call, files: Files) -> None:
        arguments = ["generate", files.plain, "--prompt", "p", "--json", "--max-new-tokens", 2]
        assert json.loads(call(*arguments).out)["exit_layers"] == [4, 4]
        outcome = call(*arguments, "--threshold", 0.5)
        assert outcome.code == 2
        assert "threshold goes with exits" in one_line(outcome)


class TestEvaluate:
    def test_report_and_figures(self, call: Call, files: Files, tmp_path: Path) -> None:
        figures, plot = tmp_path / "f.json", tmp_path / "p.png"
        outcome = call(
            "evaluate", files.exits, "--eval-file", files.rows, *COLUMNS, "--criterion", "policy", "softmax_margin",
            "--reference", files.plain, "--max-samples", 5, "--max-new-tokens", 4, "--batch-size", 4,
            "--json", figures, "--plot", plot,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        for text in ("plain model", "last layer, no exits", "policy > 0.5", "softmax_margin > 0.3"):
            assert text in outcome.out
        values = json.loads(figures.read_text(encoding="utf-8"))
        assert set(values["metrics"]) >= KEYS
        assert values["num_examples"] == 5
        assert values["batch_size"] == 4
        assert plot.stat().st_size > 10_000

    def test_drafts_have_a_threshold_of_their_own(self, call: Call, files: Files, tmp_path: Path) -> None:
        model, figures = generator_folder(tmp_path / "drafts", draft_threshold=0.125), tmp_path / "f.json"
        outcome = call(
            "evaluate", model, "--eval-file", files.rows, *COLUMNS, "--mode", "lossless", "--max-samples", 2,
            "--max-new-tokens", 3, "--json", figures,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert json.loads(figures.read_text(encoding="utf-8"))["threshold"] == 0.125

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--criterion entropy", 'for a text generator, got "entropy"'),
            ("--eval-file f --text-columns a --label-column b", "go with rows to classify"),
            ("", "Give --task with --data-dir, or --eval-file"),
            ("--task sst2", 'Generation task "sst2" is not known'),
            ("--task alpaca --prompt-column a", "a task knows its own"),
            (
                "--mode lossless --text-speedups 2",
                "--text-speedups goes with --mode early-exit, and it is lossless",
            ),
            ("--mode full --text-speedups 2", "--text-speedups goes with --mode early-exit, and it is full"),
            ("--max-new-tokens 9999", "max_new_tokens must be below the 256 tokens"),
            ("--text-speedups 2 0.5", "--text-speedups must be above 1 and at most 4 (layers), got 0.5"),
        ],
    )
    def test_usage(self, call: Call, files: Files, arguments: str, message: str) -> None:
        outcome = call("evaluate", files.exits, *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--criterion softmax_margin", 'for a classifier, got "softmax_margin"'),
            ("--max-new-tokens 4", "--max-new-tokens goes with a text generator"),
            ("--eval-file f --response-column a", "go with text to generate"),
        ],
    )
    def test_usage_with_a_classifier(self, call: Call, files: Files, arguments: str, message: str) -> None:
        outcome = call("evaluate", files.classifier, *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)


@pytest.fixture
def training(files: Files, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace training by something that notes its arguments and leaves a saved model."""
    calls: list[dict[str, Any]] = []

    def fake(**arguments: Any) -> Path:
        calls.append(arguments)
        plain = arguments["method"] == "plain"
        folder = Path(shutil.copytree(files.plain if plain else files.exits, arguments["output_dir"]))
        kind = "full_depth_generation" if plain else "early_exit_generation"
        record = {"kind": kind, "prompt_template": TEMPLATE.to_dict(), "task": arguments["task"]}
        (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
        return folder

    monkeypatch.setattr("consistentee.training.train.train", fake)
    return calls


class TestTrain:
    @pytest.mark.parametrize("command", ["train", "finetune"])
    def test_a_report_that_cannot_be_made_is_told_before_training(
        self,
        command: str,
        call: Call,
        tmp_path: Path,
        training: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("consistentee.evaluation.text_metrics.BLEU_MODULE", "no_such_package")
        (tmp_path / "rows.txt").write_text("one two\n" * 9, encoding="utf-8")
        arguments = ("--backbone", "b", "--output-dir", tmp_path / "o", "--train-file", tmp_path / "rows.txt")
        outcome = call(command, *arguments)
        assert outcome.code == 1
        assert (
            'needs no_such_package, which is not installed. Install it with: pip install "consistentee[gen'
            in (one_line(outcome))
        )
        assert training == []

    def test_recipe_columns_and_figures(
        self, call: Call, files: Files, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text("backbone: b\nlora_rank: 4\nbatch_size: 6\nlearning_rate: 1e-3\n", encoding="utf-8")
        options = ["--batch-size", 4, "--backbone-training", "full", "--hardness", "uniform"]
        folder = tmp_path / "o"
        outcome = call(
            "train",
            "--config",
            recipe,
            "--train-file",
            files.rows,
            *COLUMNS,
            *options,
            "--output-dir",
            folder,
        )
        assert outcome.code == 0, outcome.err
        (arguments,) = training
        assert arguments["config"] == GenerationTrainingConfig(
            lora_rank=4, batch_size=4, learning_rate=1e-3, backbone_training="full", hardness="uniform"
        )
        assert arguments["task"] is None
        assert len(arguments["train_data"]) == 11
        _, held_out = load_generation_files(
            None, folder / "held_out.jsonl",
            prompt_column="ask", input_column="about", response_column="say",
        )  # fmt: skip
        assert held_out is not None
        assert len(held_out) == 1
        assert not set(held_out.references) & set(arguments["train_data"].references)
        assert "On 1 rows that training has not seen" in outcome.out
        assert "policy > 0.5" in outcome.out
        record = json.loads((folder / "training_record.json").read_text(encoding="utf-8"))
        assert set(record["evaluation"]["metrics"]) >= KEYS
        assert "curve" not in record["evaluation"]

    def test_finetune_a_task_by_its_name_in_the_recipe(
        self, call: Call, tmp_path: Path, training: list[dict[str, Any]]
    ) -> None:
        rows = [{"instruction": f"do {row}", "input": "", "output": f"done {row}"} for row in range(300)]
        _write_jsonl(tmp_path / "alpaca" / "train.jsonl", rows[:180])
        _write_jsonl(tmp_path / "alpaca" / "test.jsonl", rows[180:])
        recipe = tmp_path / "r.yaml"
        recipe.write_text("task: alpaca\nbackbone: b\npolicy_tokens: 500\n", encoding="utf-8")
        outcome = call(
            "finetune", "--config", recipe, "--data-dir", tmp_path, "--max-train-samples", 50,
            "--output-dir", tmp_path / "o",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        (arguments,) = training
        assert arguments["config"].policy_tokens == 500
        assert arguments["task"] == "alpaca"
        assert len(arguments["train_data"]) == 50
        assert "On 100 of 120 rows that training has not seen" in outcome.out
        assert "perplexity" in outcome.out

    def test_plain_texts(self, call: Call, tmp_path: Path, training: list[dict[str, Any]]) -> None:
        texts = tmp_path / "texts.txt"
        texts.write_text("".join(f"text number {row}\n" for row in range(10)), encoding="utf-8")
        outcome = call("train", "--backbone", "b", "--train-file", texts, "--output-dir", tmp_path / "o")
        assert outcome.code == 0, outcome.err
        (arguments,) = training
        assert len(arguments["train_data"]) == 9
        _, held_out = load_generation_files(None, tmp_path / "o" / "held_out.txt")
        assert held_out is not None
        assert held_out.references[0] not in arguments["train_data"].references

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--task alpaca --pooling cls", "--pooling is a setting of classifiers, and this trains a text"),
            (
                "--task sst2 --lora-rank 4",
                "--lora-rank is a setting of text generators, and this trains a class",
            ),
            ("--task alpaca --hardness el2n", "hardness must be one of memorized_layer, final_loss, uniform"),
            ("--task alpaca --text-columns a", "go with rows to classify"),
            ("--task alpaca --prompt-column a", "a task knows its own"),
            ("--task sst2 --response-column a", "go with text to generate"),
            ("--train-file f --prompt-column a --label-column b", "exclude each other"),
            ("--train-file f.txt --task alpaca", "--task and --train-file exclude each other"),
            (
                "--task alpaca --backbone-training full --lora-rank 4",
                "--lora-rank goes with --backbone-training lora and has no effect here",
            ),
            ("--train-file f.txt --data-dir d", "--data-dir goes with --task"),
        ],
    )
    def test_usage(self, call: Call, tmp_path: Path, arguments: str, message: str) -> None:
        outcome = call("train", "--backbone", "b", "--output-dir", tmp_path / "o", *arguments.split())
        assert outcome.code == 2
        assert message in one_line(outcome)

    def test_help_names_every_setting_of_both_kinds(self, call: Call) -> None:
        text = call("train", "--help").out
        for config in (ClassificationTrainingConfig, GenerationTrainingConfig):
            for field in dataclasses.fields(config):
                assert f"--{field.name.replace('_', '-')}"[:28] in text
        for title in ("Settings of classifiers only", "Settings of text generators only"):
            assert title in text
        assert "[default to generate text: 0.0001]" in " ".join(text.replace("│", " ").split())


class TestKind:
    @pytest.mark.parametrize(
        "options, recipe_task, kind",
        [
            ({"task": "sst2"}, None, CLASSIFIERS),
            ({"task": "CNN/DailyMail"}, "sst2", GENERATORS),
            ({}, "xsum", GENERATORS),
            ({}, None, CLASSIFIERS),
            ({"train_file": Path("a.txt")}, None, GENERATORS),
            ({"train_file": Path("a.csv"), "response_column": "r"}, None, GENERATORS),
            (
                {"train_file": Path("a.csv"), "text_columns": ["t"], "label_column": "l"},
                "xsum",
                CLASSIFIERS,
            ),
        ],
    )
    def test_of_data(self, options: dict[str, Any], recipe_task: str | None, kind: Kind) -> None:
        assert TrainingDataOptions(**options).kind(recipe_task) is kind

    def test_columns_of_both(self) -> None:
        with pytest.raises(UsageError, match="exclude each other"):
            TrainingDataOptions(text_columns=["a"], prompt_column="b").kind()


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
