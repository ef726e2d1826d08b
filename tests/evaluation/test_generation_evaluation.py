"""Evaluation of generation: teacher-forced exits are those of decoding, figures agree, thresholds match."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from consistentee.data.batches import TokenizedPrompts
from consistentee.data.rows import InstructionDataset
from consistentee.data.templates import PLAIN
from consistentee.evaluation import teacher_forcing
from consistentee.evaluation.generation import evaluate_generation, evaluate_plain_generation, text_prompts
from consistentee.evaluation.reports import evaluation_tables
from consistentee.evaluation.results import GenerationEvaluation
from consistentee.evaluation.teacher_forcing import (
    ReferencePasses,
    full_depth_scores,
    reference_rows,
    teacher_forced_baseline,
    teacher_forced_exits,
)
from consistentee.functional.criteria import GENERATION_CRITERIA
from consistentee.functional.curves import threshold_for_depth
from consistentee.inference.decoder.lossless import DraftClock
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.generator import TextGenerator
from saved_generators import BYTES, TEMPLATE, generator_folder, plain_folder, tiny_rows
from tiny_decoders import tiny_decoder
from tiny_tokenizers import byte_tokenizer

THRESHOLDS = {
    "policy": 0.5,
    "softmax_margin": 0.3,
    "state_similarity": 0.7,
    "confidence_classifier": 0.5,
    "static": 2.0,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def saved(root: Path) -> LoadedGenerator:
    thresholds = {name: value for name, value in THRESHOLDS.items() if name in ("softmax_margin", "static")}
    return load_model(generator_folder(root / "exits", thresholds=thresholds), LoadedGenerator, device="cpu")


@pytest.fixture(scope="module")
def plain(root: Path) -> LoadedGenerator:
    return load_model(plain_folder(root / "plain"), LoadedGenerator, device="cpu")


@pytest.fixture(scope="module")
def evaluation(saved: LoadedGenerator, plain: LoadedGenerator) -> GenerationEvaluation:
    return evaluate_generation(
        saved,
        tiny_rows(9),
        criteria=GENERATION_CRITERIA,
        reference=plain,
        batch_size=4,
        max_new_tokens=6,
        text_speedups=(2.0, 2.0),
        curve_thresholds=3,
    )


class TestTeacherForcedExits:
    @pytest.mark.parametrize("criterion", GENERATION_CRITERIA)
    @pytest.mark.parametrize("first, min_exit_layer", [(True, 1), (False, 1), (False, 3)])
    @pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
    def test_are_those_of_decoding(
        self,
        saved: LoadedGenerator,
        criterion: str,
        first: bool,
        min_exit_layer: int,
        skipped_states: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A text that was generated, run again as a reference, leaves at the same layers with the same tokens."""
        monkeypatch.setattr(saved.model.config, "full_depth_first_token", first)
        monkeypatch.setattr(saved.model.config, "min_exit_layer", min_exit_layer)
        threshold = THRESHOLDS[criterion]
        left: set[int] = set()
        for prompt in ("go", "do it twice"):
            (text,) = TextGenerator(saved).generate_texts(
                [(prompt, "")],
                criterion=criterion,
                threshold=threshold,
                skipped_states=skipped_states,
                max_new_tokens=14,
            )
            prompt_ids = saved.tokenizer(TEMPLATE.render(prompt))["input_ids"]
            rows = TokenizedPrompts([prompt_ids], [text.token_ids])
            tokens = teacher_forced_exits(
                saved, rows, criterion=criterion, threshold=threshold, skipped_states=skipped_states
            )
            assert tokens.exit_layers.tolist() == text.exit_layers
            assert tokens.token_accuracy == 1.0
            left |= set(text.exit_layers)
        assert left == {2} if (criterion, first) == ("static", False) else len(left) > 1 or min_exit_layer > 1
        assert criterion == "static" or min(left) >= min_exit_layer
        scores = full_depth_scores(saved, rows, criterion)
        assert criterion == "static" or scores[:, : min_exit_layer - 1].isneginf().all()

    def test_of_nobody_are_the_full_model(self, saved: LoadedGenerator, plain: LoadedGenerator) -> None:
        rows = reference_rows(saved, tiny_rows(7))
        full = teacher_forced_exits(saved, rows, criterion=None, batch_size=3)
        assert set(full.exit_layers.tolist()) == {4}
        losses = []
        for row in range(len(rows)):
            item = rows[row]
            with torch.no_grad():
                output = saved.model(input_ids=torch.tensor([item["input_ids"]]))
            labels = torch.tensor(item["labels"])[1:]
            losses.append(
                torch.nn.functional.cross_entropy(
                    output.logits[0, :-1], labels, reduction="none", ignore_index=-100
                )[labels != -100]
            )
        expected = torch.cat(losses)
        torch.testing.assert_close(full.losses.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)
        assert full.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-4)
        without = teacher_forced_baseline(plain, rows, batch_size=3)
        torch.testing.assert_close(
            full.losses.sort().values, without.losses.sort().values, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("logit_rows", [1, 5, 10_000])
    def test_do_not_depend_on_how_logits_are_cut(
        self, saved: LoadedGenerator, plain: LoadedGenerator, logit_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = reference_rows(saved, tiny_rows(7))
        expected = teacher_forced_exits(saved, rows, criterion="softmax_margin", threshold=0.3)
        expected_plain = teacher_forced_baseline(plain, rows)
        monkeypatch.setattr(teacher_forcing, "LOGIT_ROWS", logit_rows)
        again = teacher_forced_exits(saved, rows, criterion="softmax_margin", threshold=0.3)
        torch.testing.assert_close(again.losses, expected.losses)
        assert again.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(teacher_forced_baseline(plain, rows).perplexity, expected_plain.perplexity)

    def test_need_a_token_to_predict(self, saved: LoadedGenerator) -> None:
        with pytest.raises(ValueError, match="at least one token that follows another, got none"):
            teacher_forced_exits(saved, TokenizedPrompts([[]], [[5]]), criterion=None)


class TestThresholds:
    def test_at_depth_from_scores(self) -> None:
        scores = torch.tensor([[0.2, 0.6, math.inf], [0.4, 0.9, math.inf], [0.8, 0.1, math.inf]])
        for depth, low, high in ((1.0, 0.0, 0.2), (3.0, 0.9, 1.0)):
            threshold = threshold_for_depth(scores, depth, "policy")
            assert low - 1e-6 <= threshold <= high
        half = threshold_for_depth(scores, 2.0, "policy")
        left = ((scores > half).int().argmax(1) + 1).double().mean()
        assert abs(float(left) - 2.0) <= 1 / 3

    @pytest.mark.parametrize("criterion", ["policy", "softmax_margin", "state_similarity"])
    def test_match_a_depth(self, saved: LoadedGenerator, criterion: str) -> None:
        passes = ReferencePasses(saved, reference_rows(saved, tiny_rows(12)))
        target = 2.9
        tokens = passes.tokens(criterion, passes.threshold_for_depth(criterion, target, refinements=4))
        assert abs(tokens.mean_exit_layer - target) < 0.25

    def test_of_static_depth_are_whole_layers(self, saved: LoadedGenerator) -> None:
        passes = ReferencePasses(saved, reference_rows(saved, tiny_rows(5)))
        assert passes.threshold_for_depth("static", 2.2) == 2.0
        with pytest.raises(ValueError, match="target_mean_exit_layer must be from 1 to 4, got 5"):
            passes.threshold_for_depth("static", 5)

    def test_scores_know_who_cannot_leave(self, saved: LoadedGenerator) -> None:
        rows = reference_rows(saved, tiny_rows(5))
        scores = full_depth_scores(saved, rows, "policy", batch_size=2)
        responses = rows.lengths - rows.prompt_lengths
        assert scores.shape == (int(responses.sum()), 4)
        assert int(scores[:, 0].isinf().sum()) == 5  # the first token of every response
        assert bool((scores[:, -1] == math.inf).all())


class TestEvaluation:
    def test_figures_agree_with_each_other(self, evaluation: GenerationEvaluation) -> None:
        assert evaluation.num_examples == 9
        assert sum(evaluation.exit_histogram) == evaluation.num_tokens == 9 * 6
        layers = np.arange(1, 5)
        mean = float((layers * evaluation.exit_histogram).sum() / evaluation.num_tokens)
        assert evaluation.mean_exit_layer == pytest.approx(mean)
        assert evaluation.layer_speedup == pytest.approx(4 / mean)
        assert evaluation.layers_saved == pytest.approx(1 - mean / 4)
        assert len(evaluation.exit_by_position) == 6
        assert evaluation.exit_by_position[0] == 4  # the prompt went through all layers
        assert float(np.mean(evaluation.exit_by_position)) == pytest.approx(mean)
        assert set(evaluation.metrics) == {
            "rouge1", "rouge2", "rougeL", "bleu", "perplexity", "token_accuracy"
        }  # fmt: skip
        assert evaluation.tokens_per_second > 0

    def test_the_chosen_threshold_and_full_depth_are_on_the_curve(
        self, evaluation: GenerationEvaluation
    ) -> None:
        (own,) = [point for point in evaluation.curve if point.threshold == evaluation.threshold]
        assert own.perplexity == evaluation.metrics["perplexity"]
        assert own.mean_exit_layer < 4
        depths = [point.mean_exit_layer for point in evaluation.curve]
        assert depths == sorted(depths, reverse=True)
        assert evaluation.full_depth is not None
        assert depths[0] == evaluation.full_depth.mean_exit_layer == 4
        assert evaluation.curve[0].perplexity == evaluation.full_depth.metrics["perplexity"]

    def test_rivals_are_measured_at_the_same_depth(self, evaluation: GenerationEvaluation) -> None:
        assert set(evaluation.other_criteria) == set(GENERATION_CRITERIA) - {"policy"}
        depth = next(p.mean_exit_layer for p in evaluation.curve if p.threshold == evaluation.threshold)
        for name, rival in evaluation.other_criteria.items():
            assert rival.threshold == (THRESHOLDS[name] if name in ("softmax_margin", "static") else None)
            on_curve = {point.threshold for point in rival.curve}
            assert {point.threshold for point in rival.generated} <= on_curve
            assert rival.threshold is None or rival.threshold in on_curve
            nearest = min(abs(point.mean_exit_layer - depth) for point in rival.curve)
            assert nearest < (0.6 if name == "static" else 0.3), name

    def test_the_plain_model_is_the_full_depth_one(self, evaluation: GenerationEvaluation) -> None:
        assert evaluation.reference is not None
        assert evaluation.full_depth is not None
        for name, value in evaluation.full_depth.metrics.items():
            assert evaluation.reference.metrics[name] == pytest.approx(value, rel=1e-4)
        assert evaluation.reference.layer_speedup == 1

    def test_text_at_further_thresholds(self, evaluation: GenerationEvaluation) -> None:
        assert len(evaluation.generated) == 1
        assert evaluation.generated[0].threshold != evaluation.threshold
        (static,) = [
            point
            for point in evaluation.other_criteria["static"].generated
            if point.threshold != evaluation.other_criteria["static"].threshold
        ] or evaluation.other_criteria["static"].generated
        assert static.threshold == 2  # of 4 layers

    def test_is_json(self, evaluation: GenerationEvaluation) -> None:
        values = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
        assert values["examples"][0]["prompt"] == "do 0"
        assert len(values["examples"]) == 5
        assert values["environment"]["dtype"] == "float32"

    def test_references_are_run_as_texts_are(self, saved: LoadedGenerator, tmp_path: Path) -> None:
        """Where skipped states are recomputed, perplexity and accuracy are of recomputed ones, a reference's too."""
        rows = tiny_rows(6)
        threshold = THRESHOLDS["policy"]
        how: dict[str, Any] = {"criterion": "policy", "threshold": threshold}
        passes = {
            states: teacher_forced_exits(saved, reference_rows(saved, rows), **how, skipped_states=states)
            for states in ("copy", "recompute")
        }
        assert passes["copy"].perplexity != pytest.approx(passes["recompute"].perplexity, rel=1e-4)
        for states, tokens in passes.items():
            values = {**how, "skipped_states": states}
            other = load_model(generator_folder(tmp_path / states, **values), LoadedGenerator, device="cpu")
            evaluation = evaluate_generation(
                saved,
                rows,
                criteria=["policy"],
                threshold=threshold,
                skipped_states=states,
                reference=other,
                max_new_tokens=4,
                curve_thresholds=1,
            )
            assert evaluation.metrics["perplexity"] == pytest.approx(tokens.perplexity)
            assert evaluation.metrics["token_accuracy"] == tokens.token_accuracy
            (point,) = [point for point in evaluation.curve if point.threshold == threshold]
            assert point.perplexity == pytest.approx(tokens.perplexity)
            assert evaluation.reference is not None
            assert evaluation.reference.metrics["perplexity"] == pytest.approx(tokens.perplexity)

    def test_lossless_text_has_the_figures_of_all_layers(self, saved: LoadedGenerator) -> None:
        evaluation = evaluate_generation(
            saved, tiny_rows(3), mode="lossless", max_new_tokens=4, curve_thresholds=1
        )
        assert evaluation.full_depth is not None
        assert evaluation.metrics == evaluation.full_depth.metrics
        assert evaluation.mode == "lossless"

    def test_lossless_text_is_drafted_at_the_drafts_threshold(
        self, saved: LoadedGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saved.early_exit_model.config, "draft_threshold", 0.125)
        for given, wanted in ((None, 0.125), (0.25, 0.25)):
            evaluation = evaluate_generation(
                saved,
                tiny_rows(2),
                criteria=["policy"],
                mode="lossless",
                threshold=given,
                max_new_tokens=3,
                curve_thresholds=1,
            )
            assert evaluation.threshold == wanted

    def test_a_lossless_reference_drafts_at_its_drafts_threshold(
        self, saved: LoadedGenerator, tmp_path: Path
    ) -> None:
        values = {"criterion": "policy", "threshold": 0.5, "mode": "lossless", "draft_threshold": 0.125}
        other = load_model(generator_folder(tmp_path / "other", **values), LoadedGenerator, device="cpu")
        evaluation = evaluate_generation(
            saved, tiny_rows(2), reference=other, max_new_tokens=3, curve_thresholds=1
        )
        assert evaluation.reference is not None
        assert evaluation.reference.threshold == 0.125
        assert evaluation.reference_name == "early-exit model, policy > 0.125, lossless"

    def test_lossless_tokens_ran_all_layers(
        self, saved: LoadedGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Layers are those that ran; what exits drafted has figures of its own."""
        monkeypatch.setattr(DraftClock, "drafts", True)
        evaluation = evaluate_generation(
            saved,
            tiny_rows(6),
            criteria=("policy", "softmax_margin"),
            mode="lossless",
            threshold=0.2,
            max_new_tokens=12,
            curve_thresholds=1,
        )
        assert evaluation.mean_exit_layer == 4
        assert evaluation.layer_speedup == 1
        assert evaluation.layers_saved == 0
        assert evaluation.exit_histogram == [0, 0, 0, 72]
        assert evaluation.exit_by_position == [4.0] * 12
        assert {layer for example in evaluation.examples for layer in example.exit_layers} == {4}
        assert evaluation.draft_histogram is not None
        assert sum(evaluation.draft_histogram) == 72
        share = 1 - evaluation.draft_histogram[-1] / 72
        assert evaluation.draft_share == pytest.approx(share)
        assert evaluation.draft_acceptance is not None
        assert 0 <= evaluation.draft_acceptance <= 1
        (rival,) = evaluation.other_criteria["softmax_margin"].generated
        assert evaluation.full_depth is not None
        assert rival.metrics == evaluation.full_depth.metrics  # perplexity and accuracy among them
        assert (rival.mean_exit_layer, rival.layer_speedup) == (4, 1)
        assert evaluation.full_depth.draft_share is None
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(evaluation_tables(evaluation))
        shown = console.export_text()
        own = next(line for line in shown.splitlines() if "policy > 0.2" in line)
        for text in ("4.00 / 4", "1.00x", f"{100 * share:.1f}"):
            assert text in own
        assert f"{100 * evaluation.metrics['token_accuracy']:.2f}" in own
        assert "all layers verified every token" in " ".join(shown.split())

    @pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
    def test_an_early_exit_reference_is_called_one(
        self, saved: LoadedGenerator, tmp_path: Path, mode: str
    ) -> None:
        values = {"criterion": "static", "threshold": 2.0, "mode": mode}
        other = load_model(generator_folder(tmp_path / "other", **values), LoadedGenerator, device="cpu")
        evaluation = evaluate_generation(
            saved, tiny_rows(4), reference=other, max_new_tokens=6, curve_thresholds=1
        )
        name, mean = {
            "early-exit": ("early-exit model, static > 2", 14 / 6),
            "full": ("early-exit model, all layers", 4.0),
            "lossless": ("early-exit model, static > 2, lossless", 4.0),
        }[mode]
        assert evaluation.reference is not None
        assert evaluation.reference_name == name
        assert evaluation.reference.mean_exit_layer == pytest.approx(mean)
        expected = evaluate_generation(other, tiny_rows(4), max_new_tokens=6, curve_thresholds=1)
        assert evaluation.reference.metrics == pytest.approx(expected.metrics)
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(evaluation_tables(evaluation))
        (row,) = [line for line in console.export_text().splitlines() if name[:16] in line]
        assert f"{mean:.2f} / 4" in row
        assert f"{4 / mean:.2f}x" in row

    def test_a_reference_is_judged_by_the_same_tokens(self, saved: LoadedGenerator, tmp_path: Path) -> None:
        """Also one that was trained on shorter texts: its perplexity would be of fewer."""
        values = {"criterion": "static", "threshold": 2.0, "max_sequence_length": 20}
        other = load_model(generator_folder(tmp_path / "other", **values), LoadedGenerator, device="cpu")
        assert other.max_length < int(reference_rows(saved, tiny_rows(4)).lengths.max())
        evaluation = evaluate_generation(
            saved,
            tiny_rows(4),
            criteria=["static"],
            threshold=2.0,
            reference=other,
            max_new_tokens=6,
            curve_thresholds=1,
        )
        assert evaluation.reference is not None
        for name in ("perplexity", "token_accuracy"):
            assert evaluation.reference.metrics[name] == pytest.approx(evaluation.metrics[name])

    def test_a_reference_has_its_own_number_of_layers(self, saved: LoadedGenerator, tmp_path: Path) -> None:
        tiny_decoder("llama", **BYTES, num_hidden_layers=2).save_pretrained(tmp_path)
        byte_tokenizer(begin=True).save_pretrained(tmp_path)
        evaluation = evaluate_generation(
            saved,
            tiny_rows(3),
            reference=load_model(tmp_path, LoadedGenerator, device="cpu"),
            max_new_tokens=4,
            curve_thresholds=1,
        )
        assert evaluation.reference_name == "plain model"
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(evaluation_tables(evaluation))
        (row,) = [line for line in console.export_text().splitlines() if "plain model" in line]
        assert "2.00 / 2" in row
        assert "1.00x" in row

    def test_plain_figures(self, plain: LoadedGenerator) -> None:
        figures = evaluate_plain_generation(plain, tiny_rows(3), max_new_tokens=4)
        assert figures["num_examples"] == 3
        assert figures["num_tokens"] == 12
        assert figures["metrics"]["perplexity"] > 1

    def test_options_that_make_no_sense(self, saved: LoadedGenerator, plain: LoadedGenerator) -> None:
        for speedup in (1.0, 4.1):
            with pytest.raises(ValueError, match="text_speedups must be above 1 and at most 4"):
                evaluate_generation(saved, tiny_rows(2), text_speedups=(2.0, speedup))
        with pytest.raises(ValueError, match="at least one prompt, got none"):
            evaluate_generation(saved, tiny_rows(0))
        with pytest.raises(ValueError, match="has no exits"):
            evaluate_generation(plain, tiny_rows(2))


class TestTexts:
    def test_are_continued_from_their_first_half(self) -> None:
        rows = InstructionDataset([""] * 3, [""] * 3, ["a b c d", "word", "one two three"], "texts")
        asked, template = text_prompts(rows, TEMPLATE)
        assert asked.instructions == ["a b", "one"]
        assert asked.references == ["c d", "two three"]
        assert template == PLAIN

    @pytest.mark.parametrize(
        "texts, prompts, rest",
        [
            (["春が来た。", "a b", "word"], ["春が", "a"], ["来た。", "b"]),
            (["emma", "x", " ava"], ["em", "a"], ["ma", "va"]),
            ([" a b c d", " a b", "  "], [" a"], ["b c d"]),
        ],
    )
    def test_without_spaces_between_words(
        self, texts: list[str], prompts: list[str], rest: list[str]
    ) -> None:
        asked, _ = text_prompts(
            InstructionDataset([""] * len(texts), [""] * len(texts), texts, "texts"), TEMPLATE
        )
        assert (asked.instructions, asked.references) == (prompts, rest)

    def test_that_cannot_be_halved(self) -> None:
        with pytest.raises(ValueError, match="at least two characters each to be continued"):
            text_prompts(InstructionDataset([""], [""], ["x"], "texts"), TEMPLATE)

    def test_prompts_stay_as_they_are(self) -> None:
        rows = tiny_rows(3)
        assert text_prompts(rows, TEMPLATE) == (rows, TEMPLATE)

    def test_are_evaluated(self, saved: LoadedGenerator) -> None:
        rows = InstructionDataset([""] * 2, [""] * 2, ["a b c d", "one two three"], "texts")
        evaluation = evaluate_generation(saved, rows, max_new_tokens=3, curve_thresholds=1)
        assert [example.prompt for example in evaluation.examples] == ["a b", "one"]
        assert evaluation.metrics["perplexity"] > 1
