"""Results of generation as plain values, and as tables; those of classification are in test_evaluation."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace

import pytest
from rich.console import Console

from consistentee.evaluation.reports import evaluation_tables
from consistentee.evaluation.results import (
    GeneratedPoint,
    GenerationEvaluation,
    GenerationExample,
    GenerationPoint,
    OtherGenerationCriterion,
)


def text_point(
    threshold: float, mean_exit_layer: float, rouge: float, *, criterion: str = "policy", mode: str = "copy"
) -> GeneratedPoint:
    metrics = {"rouge1": rouge, "rouge2": rouge / 2, "rougeL": rouge - 0.01, "bleu": rouge / 4}
    return GeneratedPoint(mode, criterion, threshold, metrics, mean_exit_layer, 4 / mean_exit_layer, 50.0, 20)


OWN = text_point(0.5, 2.5, 0.4)
EVALUATION = GenerationEvaluation(
    num_hidden_layers=4,
    num_examples=3,
    mode="copy",
    criterion="policy",
    threshold=0.5,
    batch_size=2,
    max_new_tokens=16,
    metrics=OWN.metrics,
    num_tokens=20,
    mean_exit_layer=2.5,
    layer_speedup=1.6,
    layers_saved=0.375,
    tokens_per_second=61.5,
    exit_histogram=[5, 5, 5, 5],
    exit_by_position=[3.0, 2.0],
    curve=[GenerationPoint(0.5, 0.625, 7.25, 2.4, 4 / 2.4), GenerationPoint(1.0, 0.75, 6.5, 4.0, 1.0)],
    full_depth=text_point(1.0, 4.0, 0.45),
    generated=[text_point(0.2, 1.5, 0.3), text_point(0.5, 2.5, 0.39, mode="recompute")],
    other_criteria={
        "confidence": OtherGenerationCriterion(
            None,
            [],
            [
                text_point(t, layer, 0.1 * layer, criterion="confidence")
                for t, layer in ((0.8, 2.2), (0.9, 3.5))
            ],
        ),
        "patience": OtherGenerationCriterion(1.5, [GenerationPoint(1.5, 0.5, 9.75, 2.0, 2.0)], []),
        "entropy": OtherGenerationCriterion(None, [GenerationPoint(0.3, 0.5, 9.0, 2.0, 2.0)], []),
    },
    reference=text_point(1.0, 4.0, 0.5, criterion="none", mode="plain"),
    examples=[GenerationExample("Say hello:", "hello", "hell", ["he", "ll"], [1, 4])],
    environment={"hardware": "a machine", "torch": "2.6", "seed": 7},
)


def lines_of(evaluation: GenerationEvaluation) -> list[str]:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(evaluation_tables(evaluation))
    return console.file.getvalue().splitlines()


def row_of(evaluation: GenerationEvaluation, title: str) -> str:
    """The figures of a row, one space apart."""
    (line,) = [line for line in lines_of(evaluation) if line.strip().startswith(title)]
    return " ".join(line.split(title, 1)[1].split())


def test_to_dict_is_json_and_whole() -> None:
    values = json.loads(json.dumps(EVALUATION.to_dict(), allow_nan=False))
    assert list(values) == [field.name for field in fields(GenerationEvaluation)]
    assert values["examples"][0] == {
        "prompt": "Say hello:",
        "reference": "hello",
        "text": "hell",
        "pieces": ["he", "ll"],
        "exit_layers": [1, 4],
    }
    assert values["other_criteria"]["patience"]["curve"][0]["perplexity"] == 9.75
    assert values["full_depth"]["metrics"]["rouge1"] == 0.45


def test_summary_leaves_out_curves_and_examples() -> None:
    left_out = set(EVALUATION.to_dict()) - set(EVALUATION.summary())
    assert left_out == {"curve", "generated", "other_criteria", "examples"}
    assert EVALUATION.summary()["reference"]["metrics"]["rouge1"] == 0.5


def test_rows_of_the_report() -> None:
    assert row_of(EVALUATION, "plain model") == "50.00 25.00 49.00 12.50 4.00 / 4 1.00x 0.0 50.0"
    assert row_of(EVALUATION, "last layer, no exits") == (
        "45.00 22.50 44.00 11.25 75.00 6.50 4.00 / 4 1.00x 0.0 50.0"
    )
    assert row_of(EVALUATION, "policy > 0.5 ") == (
        "40.00 20.00 39.00 10.00 62.50 7.25 2.50 / 4 1.60x 37.5 61.5"
    )
    assert row_of(EVALUATION, "policy > 0.5, recompute").startswith("39.00 ")


def test_criterion_without_a_threshold_is_shown_at_the_nearest_depth() -> None:
    assert row_of(EVALUATION, "confidence > 0.8") == "22.00 11.00 21.00 5.50 2.20 / 4 1.82x 45.0 50.0"
    assert not [line for line in lines_of(EVALUATION) if "confidence > 0.9" in line or "entropy" in line]


def test_a_threshold_next_to_1_is_not_shown_as_1() -> None:
    near = replace(EVALUATION, threshold=0.99998)
    assert row_of(near, "policy > 0.99998 ").startswith("40.00 ")
    assert not [line for line in lines_of(near) if "policy > 1 " in line]


def test_criterion_without_text_shows_the_references_only() -> None:
    assert row_of(EVALUATION, "patience > 1.5, no text") == "50.00 9.75 2.00 / 4 2.00x 50.0"


def test_bertscore_gets_a_column_where_it_is_there() -> None:
    assert not [line for line in lines_of(EVALUATION) if "BERT-" in line]
    scored = replace(EVALUATION, metrics={**OWN.metrics, "bertscore": 0.91})
    assert any("BERT-" in line for line in lines_of(scored))
    assert "91.00" in row_of(scored, "policy > 0.5 ")


def test_layers_of_the_report_add_up() -> None:
    rows = [line.split() for line in lines_of(EVALUATION)]
    assert ["1", "5", "25.0", "25.0"] in rows
    assert ["4", "5", "25.0", "100.0"] in rows


def test_what_layers_of_recomputed_states_are() -> None:
    """What runs later, beside a token that goes deeper, is not counted, and that is said."""
    shown = " ".join(" ".join(lines_of(replace(EVALUATION, mode="recompute"))).split())
    assert "layers are counted up to a token's exit" in shown
    assert "layers are counted" not in " ".join(lines_of(EVALUATION))


def test_report_says_where_and_fits() -> None:
    deep = replace(
        EVALUATION, num_hidden_layers=30, metrics={**OWN.metrics, "bertscore": 0.9}, num_tokens=1_234_567
    )
    lines = lines_of(deep)
    assert "a machine, torch 2.6, seed 7." in [line.strip() for line in lines]
    assert not [line for line in lines if "…" in line or len(line) > 120]
    assert any(
        "at most 16 new tokens, batch size 2, mode copy; 1,234,567 tokens generated" in line for line in lines
    )


@pytest.mark.parametrize("num_tokens", [0])
def test_report_of_nothing_generated(num_tokens: int) -> None:
    bare = replace(
        EVALUATION, num_tokens=num_tokens, full_depth=None, reference=None, generated=[], other_criteria={}
    )
    assert not any("exit here" in line for line in lines_of(bare))
