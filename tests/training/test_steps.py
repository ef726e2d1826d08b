"""Learning rates, parameter groups, precision, seeds; and that several processes may rely on every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES
from consistentee.functional.losses import layer_losses, weighted_sum_loss
from consistentee.inference.encoder.torch_backend import torch_dtypes
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.progress import show_progress
from consistentee.training import steps
from consistentee.training.cached_states import ChunkedBatches
from consistentee.training.run import Run
from consistentee.training.steps import (
    attention_in_bfloat16,
    make_accelerator,
    parameter_groups,
    resolve_precision,
    schedule_factor,
    step_seed,
)
from consistentee.training.tasks.classification import ClassificationTraining
from consistentee.training.train import start_run
from quick import quick_config
from tiny import tiny_backbone, tiny_classifier, tiny_dataset


def new_run(backbone: Path, folder: Path, **changes: object) -> Run:
    run = start_run(
        ClassificationTraining(quick_config(**changes), tiny_dataset(50)),
        "consistent",
        backbone=backbone,
        output_dir=folder,
        task_name=None,
        resume=False,
        report=lambda message: None,
    )
    assert run is not None
    return run


def test_the_learning_rate_rises_and_falls_over_the_whole_run() -> None:
    factors = [schedule_factor(step, 10, 0.2, "linear") for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert schedule_factor(10, 10, 0.2, "linear") == 0


def test_a_constant_learning_rate_rises_too() -> None:
    assert [schedule_factor(step, 10, 0.2, "constant") for step in range(10)] == [0.5, *[1.0] * 9]
    assert [schedule_factor(step, 3, 0.0, "constant") for step in range(3)] == [1.0] * 3


def test_parameter_groups(tmp_path: Path) -> None:
    model = EarlyExitForSequenceClassification.from_backbone(tiny_backbone(tmp_path, layers=2), num_labels=2)
    model.policy.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    kinds = {(group["is_backbone"], group["weight_decay"]) for group in groups}
    assert kinds == {(True, 0.1), (True, 0.0), (False, 0.1), (False, 0.0)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(name for name in names.values() if not name.startswith("policy."))
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)].startswith("backbone.") is group["is_backbone"]
            assert (parameter.ndim > 1) is (group["weight_decay"] > 0)


def test_an_original_head_that_is_trained_goes_with_the_backbone(tmp_path: Path) -> None:
    model = EarlyExitForSequenceClassification.from_classifier(tiny_classifier(tmp_path, layers=2))
    model.policy.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of_backbone() -> set[str]:
        groups = [group for group in parameter_groups(model, 0.1) if group["is_backbone"]]
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    assert all(name.startswith("backbone.") for name in of_backbone())  # the head is frozen
    before = of_backbone()
    model.classifiers.layers[-1].requires_grad_(True)
    head = {name for name in names.values() if name.startswith("classifiers.layers.1.")}
    assert len(head) == 4
    assert of_backbone() == before | head


def test_backbone_and_heads_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", layers=2)
    run = new_run(backbone, tmp_path / "m", head_learning_rate=1e-2, warmup_ratio=0.0, schedule="constant")

    def losses(model: Any, batch: Any, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return weighted_sum_loss(layer_losses(model(**batch).classifier_logits, labels)), {}

    run.steps.run(2, losses, phase="any", learning_rate=1e-5)
    rates = {(group["is_backbone"], group["lr"]) for group in run.steps.optimizer.param_groups}
    assert rates == {(True, 1e-5), (False, 1e-2)}
    assert run.steps.step == 2
    assert set(run.steps.figures) == {"loss"}


def test_a_step_may_be_called_before_and_asked_for_again(tmp_path: Path) -> None:
    """OptimizerSteps that are behind already are not taken: that is how a resumed run finds its phase."""
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "m")
    run.steps.step = 3
    run.steps.run(3, lambda *_: pytest.fail("a step was taken"), phase="any", learning_rate=1.0)
    assert run.steps.step == 3


def test_checkpoints_come_every_so_many_steps(tmp_path: Path) -> None:
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "m", checkpoint_every=2)
    at: list[int] = []
    run.steps.checkpoint = lambda: at.append(run.steps.step)
    run.steps.run(
        6,
        lambda model, batch, labels: (model(**batch).logits.sum(1) * 0, {}),
        phase="any",
        learning_rate=1e-5,
    )
    assert at == [2, 4]  # the end of a phase has one of its own


def flat(model: Any, batch: Any, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is a number, with gradients that are."""
    return model(**batch).logits.sum(1), {}


def steep(model: Any, batch: Any, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is a number, with gradients that are none."""
    return (model(**batch).logits.sum(1) * 0).sqrt(), {}


@pytest.mark.parametrize("until", [1, 2])
def test_weights_beyond_all_numbers_are_neither_kept_nor_measured(until: int, tmp_path: Path) -> None:
    """The loss, of before the update, was one; at the end of a phase or before a checkpoint."""
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "m", checkpoint_every=1)
    run.steps.checkpoint = lambda: pytest.fail("they were kept")
    with pytest.raises(
        FloatingPointError,
        match=r"^weights must be finite, got (-?inf|nan) at step 1\. Lower learning_rate or",
    ):
        run.steps.run(until, flat, phase="any", learning_rate=1e38)


def test_gradients_that_are_no_numbers_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "m")
    with pytest.raises(FloatingPointError, match=r"^gradient norm must be finite, got nan at step 1\. Lower"):
        run.steps.run(2, steep, phase="any", learning_rate=1e-5)
    run = new_run(tmp_path / "backbone", tmp_path / "scaled")
    monkeypatch.setattr(run.steps.optimizer, "step", lambda: None)  # what a scaler makes of such a step
    monkeypatch.setattr(run.accelerator, "scaler", SimpleNamespace(scale=lambda loss: loss))
    run.steps.run(2, steep, phase="any", learning_rate=1e-5)
    assert run.steps.step == 2


def test_more_steps_than_there_are_batches_are_refused(tmp_path: Path) -> None:
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "m")
    lengths = np.full(len(run.parts.train_rows), 5)
    run.steps.batches = ChunkedBatches([np.arange(len(lengths))], lengths, 16, passes=1, seed=0)
    with pytest.raises(ValueError, match=r"Steps must be at most 2, .*, got 3\. Plan fewer epochs\."):
        run.steps.run(
            3,
            lambda model, batch, labels: (model(**batch).logits.sum(1) * 0, {}),
            phase="any",
            learning_rate=0.1,
        )


def test_progress_counts_towards_the_end_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int]] = []

    def noted(phase: str, total: int, **how: Any) -> Any:
        shown.append((phase, total))
        return show_progress(phase, total, **how)

    monkeypatch.setattr("consistentee.training.steps.show_progress", noted)
    run = new_run(tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "run")
    run.take_steps(1, run.task.weighted_sum(), phase="first")
    assert run.steps.total_steps > 1
    assert shown == [("first", run.steps.total_steps)]


def test_every_step_and_process_has_a_seed_of_its_own() -> None:
    seeds = {
        step_seed(seed, step, process) for seed in range(4) for step in range(100) for process in range(4)
    }
    assert len(seeds) == 4 * 100 * 4
    assert step_seed(3, 14, 1) == step_seed(3, 14, 1)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
def test_every_parameter_gets_a_gradient(model_type: str, head: str, tmp_path: Path) -> None:
    """Processes wait for the gradient of every parameter of each other: one that gets none would stop them all."""
    backbone = tiny_backbone(tmp_path, model_type, layers=2)
    inputs = {"input_ids": torch.randint(4, 60, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    labels = torch.tensor([0, 1, 1])
    for model_class in (EarlyExitForSequenceClassification, FullDepthForSequenceClassification):
        model = model_class.from_backbone(backbone, num_labels=2, head=head).train()
        output = model(**inputs, labels=labels)
        output.loss.backward()
        without = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.grad is None and not name.startswith("policy.")
        ]
        assert without == []


def test_precision() -> None:
    assert resolve_precision("no") == "no"
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("auto") in ("no", "bf16", "fp16")


@pytest.mark.parametrize(
    "is_native, precision, dtype", [(True, "bf16", "bfloat16"), (False, "fp16", "float16")]
)
def test_a_gpu_that_only_emulates_bf16_takes_fp16(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, precision: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or is_native
    )
    assert resolve_precision("auto") == precision
    model: Any = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda")))
    assert torch_dtypes(model) == ("float32", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_processor_that_is_told_to_do_without_bf16_trains_in_float32() -> None:
    script = "from consistentee.training.steps import resolve_precision; print(resolve_precision('auto'))"
    masks = dict.fromkeys(("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"), "AVX2")
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **masks},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "no"


class DtypesOfSoftmax(TorchDispatchMode):
    """Notes in what precision softmax is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func) and "backward" not in str(func):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "precision, computes, dtype",
    [("bf16", True, torch.bfloat16), ("bf16", False, torch.float32), ("no", True, torch.float32)],
)
def test_attention_with_dropout_is_computed_in_bfloat16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, computes: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(steps, "_computes_in_bfloat16", lambda: computes)
    accelerator = make_accelerator("anywhere", mixed_precision=precision)
    states = torch.randn(2, 2, 8, 4, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with attention_in_bfloat16(accelerator), DtypesOfSoftmax() as noted:
        F.scaled_dot_product_attention(states, states, states, dropout_p=0.5)
    assert noted.seen == {dtype}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_steps_leave_the_precision_of_attention_as_they_found_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    monkeypatch.setattr(steps, "_computes_in_bfloat16", lambda: True)
    run = new_run(tiny_backbone(tmp_path / "backbone"), tmp_path / "run", mixed_precision="bf16")
    weighted, during = run.task.weighted_sum(), []

    def objective(model: torch.nn.Module, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> Any:
        during.append(allowed())
        if len(during) == 2:
            raise RuntimeError("stop")
        return weighted(model, batch, labels)

    before = allowed()
    with pytest.raises(RuntimeError, match="stop"):
        run.take_steps(2, objective, phase="test")
    assert during == [True, True]
    assert allowed() is before is False


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(
        ValueError, match=r"mixed_precision fp16 needs a GPU, and there is none\. Use auto, bf16 or no\."
    ):
        make_accelerator("anywhere", mixed_precision="fp16")


def test_accumulation_settings_of_the_launcher_are_not_applied_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(str(tmp_path)).gradient_accumulation_steps == 1
