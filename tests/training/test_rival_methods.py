"""The methods that ours is compared with: what defines each, and that each trains, saves and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consistentee import Engine, load_model
from consistentee.errors import SettingError
from consistentee.evaluation.classification import evaluate_model, evaluate_plain
from consistentee.functional.exits import exit_distribution
from consistentee.functional.losses import geometric_prior, layer_losses, weighted_sum_loss
from consistentee.models.loaded import LoadedClassifier
from consistentee.training import policy_phase
from consistentee.training.idle_settings import OF_POLICY_FITS, idle_settings
from consistentee.training.methods import METHODS
from consistentee.training.run import Run
from consistentee.training.steps import Objective, OptimizerSteps
from consistentee.training.tasks.classification import ClassificationTraining
from consistentee.training.train import start_run, train
from quick import quick_config, read_record, read_weights, stop_at, weight_bytes
from tiny import tiny_backbone, tiny_dataset
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions

LAYERS = 3
RIVALS = [name for name, row in METHODS.items() if row.labels and row.exits and name != "consistent"]
CRITERION = {
    "deebert": "entropy",
    "weighted_sum": "patience",
    "right_tool": "calibrated_confidence",
    "fastbert": "entropy",
    "berxit": "learnt_to_exit",
    "palbert": "quantile",
    "sweet": "confidence",
    "cosee": "energy",
    "nsp": "cap",
    "beem": "expert_sum",
}
"""What a model exits by unless it is told otherwise."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=LAYERS)


def settings(method: str, **changes: Any) -> Any:
    needed = {"num_layers": 2} if "num_layers" in METHODS[method].needs else {}
    return quick_config(**needed, **changes)


def run_method(method: str, backbone: Path, folder: Path, *, resume: bool = False, **changes: Any) -> Path:
    return train(
        backbone=backbone,
        train_data=tiny_dataset(50),
        output_dir=folder,
        config=settings(method, **changes),
        method=method,
        resume=resume,
    )


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.labels])
def test_trains_saves_and_answers(method: str, backbone: Path, tmp_path: Path) -> None:
    folder = run_method(method, backbone, tmp_path / "m")
    record = read_record(folder)
    assert record["method"] == method
    rows = tiny_dataset(20, seed=1)
    if METHODS[method].exits:
        criterion = CRITERION.get(method, "policy")
        config = json.loads((folder / "config.json").read_text())
        assert config["criterion"] == criterion
        assert config["threshold"] == record["thresholds"][criterion]
        evaluation = evaluate_model(load_model(folder, LoadedClassifier), rows)
        assert 1 <= evaluation.summary()["mean_exit_layer"] <= LAYERS
        (prediction,) = Engine.from_pretrained(folder).predict(["good"])
        assert 1 <= prediction.exit_layer <= LAYERS
    else:
        figures = evaluate_plain(load_model(folder, LoadedClassifier), rows)
        assert 0 <= figures["metrics"]["accuracy"] <= 1


@pytest.mark.parametrize("method", RIVALS)
def test_recall_is_that_of_the_criterion_that_the_model_exits_by(
    method: str, backbone: Path, tmp_path: Path
) -> None:
    folder = run_method(method, backbone, tmp_path / "m", max_accuracy_loss=0.2, warmup_epochs=4.0)
    validation = read_record(folder)["validation"]
    right = sum(found["num_examples"] * found["recall"] for found in validation["class_recall"])
    assert right / validation["num_examples"] == pytest.approx(validation["accuracy"])


@pytest.mark.parametrize("method", [name for name in RIVALS if name != "deebert"])
def test_runs_on_the_papers_heads_and_resumes_to_the_same_bits(
    method: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "head": "shared_pooler",
        "ensemble_decay": 0.0,
        "policy_input": "state",
        "checkpoint_every": 1,
    }
    run_method(method, backbone, tmp_path / "whole", **changes)
    with monkeypatch.context() as patched:
        stop_at(patched, OptimizerSteps, "_step", 4)
        with pytest.raises(KeyboardInterrupt):
            run_method(method, backbone, tmp_path / "parts", **changes)
    run_method(method, backbone, tmp_path / "parts", resume=True, **changes)
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")


@pytest.mark.parametrize("method", ["weighted_sum", "palbert", "deebert"])
def test_steps_are_not_taken_again_for_the_thresholds(
    method: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_method(method, backbone, tmp_path / "whole", policy_input="auto", policy_dropout=0.3)
    with monkeypatch.context() as patched:
        stop_at(patched, policy_phase, "choose_policy", 1)
        with pytest.raises(KeyboardInterrupt):
            run_method(method, backbone, tmp_path / "parts", policy_input="auto", policy_dropout=0.3)
    with monkeypatch.context() as patched:
        patched.setattr(OptimizerSteps, "_step", lambda *_: pytest.fail("a step was taken again"))
        run_method(method, backbone, tmp_path / "parts", resume=True, policy_input="auto", policy_dropout=0.3)
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")
    assert read_record(tmp_path / "parts") == read_record(tmp_path / "whole")


@pytest.mark.parametrize("method", ["fastbert", "palbert", "sweet", "cosee"])
def test_trains_in_mixed_precision(method: str, backbone: Path, tmp_path: Path) -> None:
    folder = run_method(method, backbone, tmp_path / "m", mixed_precision="bf16")
    weights = read_weights(folder)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32}


# --- What defines each ----------------------------------------------------------------------------


class Watched(Exception):
    """The objective has been seen."""


@pytest.fixture
def objective_of(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Objective, dict[str, Tensor], Tensor]]:
    """A run at its n-th call of `take_steps`, the objective, and a batch with its labels."""

    def stopped(
        method: str, call: int = 1, **changes: Any
    ) -> tuple[Run, Objective, dict[str, Tensor], Tensor]:
        found: list[Objective] = []
        original = Run.take_steps

        def watched(self: Run, until: int, objective: Objective, **options: Any) -> None:
            found.append(objective)
            if len(found) == call:
                raise Watched
            original(self, until, objective, **options)

        config = settings(method, **changes)
        run = start_run(
            ClassificationTraining(config, tiny_dataset(50)),
            method,
            backbone=backbone,
            output_dir=tmp_path / "watched",
            task_name=None,
            resume=False,
            report=lambda line: None,
        )
        assert run is not None
        with monkeypatch.context() as patched:
            patched.setattr(Run, "take_steps", watched)
            with pytest.raises(Watched):
                METHODS[method].load()(run)
        run.model.train()
        run.task.fixed_parts(run.model)
        items = [run.parts.train_rows[index] for index in range(8)]
        batch = {name: value for name, value in run.parts.collate(items).items() if name != "index"}
        return run, found[-1], batch, batch.pop("labels")

    return stopped


def gradients_by_layer(run: Run, loss: Tensor) -> dict[str, list[float]]:
    """Sum of absolute gradients of each layer of the backbone, and of each exit."""
    model = run.model
    model.zero_grad()
    loss.backward()

    def size(module: torch.nn.Module) -> float:
        return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)

    return {
        "backbone": [size(layer) for layer in model.backbone.encoder.layer],
        "exits": [size(exit_) for exit_ in model.classifiers.layers],
        "embeddings": [size(model.backbone.embeddings)],
        "policy": [size(model.policy)],
    }


@pytest.mark.parametrize(
    "method, expected",
    [
        ("weighted_sum", weighted_sum_loss),
        ("beem", weighted_sum_loss),
        ("right_tool", lambda losses: losses.sum(1)),
        ("nsp", lambda losses: losses.mean(1)),
        ("sweet", lambda losses: losses.sum(1)),
    ],
)
def test_sums_are_those_of_the_papers(
    method: str, expected: Callable[[Tensor], Tensor], objective_of: Any
) -> None:
    run, objective, batch, labels = objective_of(method)
    losses, figures = objective(run.model, batch, labels)
    logits = run.model(**batch).classifier_logits
    torch.testing.assert_close(losses, expected(layer_losses(logits, labels)))
    assert figures["accuracy"].tolist() == (logits[:, -1].argmax(-1) == labels).float().tolist()


def test_berxit_trains_the_last_layer_alone_at_every_other_step(objective_of: Any) -> None:
    run, objective, batch, labels = objective_of("berxit")
    logits = run.model(**batch, all_layers=True).classifier_logits
    losses = layer_losses(logits, labels)
    for step, expected in ((0, losses[:, -1]), (1, losses.sum(1)), (2, losses[:, -1])):
        run.steps.step = step
        found, _ = objective(run.model, batch, labels)
        torch.testing.assert_close(found, expected)
        sizes = gradients_by_layer(run, found.sum())
        assert (sum(sizes["exits"][:-1]) == 0) == (step % 2 == 0)
        assert sizes["exits"][-1] > 0
        assert all(size > 0 for size in sizes["backbone"])


@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
def test_sweet_trains_a_layer_by_its_own_exit_alone(head: str, objective_of: Any) -> None:
    run, _, batch, labels = objective_of("sweet", head=head)
    for layer in range(LAYERS):
        losses = layer_losses(run.model(**batch, all_layers=True).classifier_logits, labels)
        sizes = gradients_by_layer(run, losses[:, layer].sum())
        assert [size > 0 for size in sizes["backbone"]] == [index == layer for index in range(LAYERS)]
        assert [size > 0 for size in sizes["exits"]] == [index == layer for index in range(LAYERS)]
        assert (sizes["embeddings"][0] > 0) == (layer == 0)
    run.model.separate_layers = False
    losses = layer_losses(run.model(**batch, all_layers=True).classifier_logits, labels)
    assert all(size > 0 for size in gradients_by_layer(run, losses[:, -1].sum())["backbone"])


@pytest.mark.parametrize("model_type", ["mpnet", "deberta-v2", "modernbert"])
def test_layers_are_apart_where_they_share_positions(model_type: str, tmp_path: Path) -> None:
    from consistentee import EarlyExitForSequenceClassification

    folder = tiny_backbone(tmp_path, model_type, layers=2)
    model = EarlyExitForSequenceClassification.from_backbone(folder, num_labels=2)
    model.separate_layers = True
    ids = torch.randint(4, 20, (2, 6))
    model(ids, all_layers=True).classifier_logits[:, 1].sum().backward()
    first = [name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum())]
    assert first
    assert not [
        name for name in first if name.startswith("backbone") and ".1." not in name and "norm" not in name
    ]
    assert not [name for name in first if ".layer.0." in name or ".layers.0." in name or "embeddings" in name]


def test_fastbert_learns_the_last_layers_distribution_and_needs_no_labels(objective_of: Any) -> None:
    run, objective, batch, labels = objective_of("fastbert", call=2, head_dropout=0.5)
    run.model.train()
    losses, _ = objective(run.model, batch, labels)
    sizes = gradients_by_layer(run, losses.sum())
    assert all(size > 0 for size in sizes["exits"][:-1])
    assert sizes["exits"][-1] == sum(sizes["backbone"]) == 0
    torch.manual_seed(0)
    one, _ = objective(run.model, batch, labels)
    torch.manual_seed(0)
    other, _ = objective(run.model, batch, 1 - labels)
    assert one.equal(other)
    run.model.eval()  # without dropout: the definition, by the model's own logits
    logits = run.model(**batch, all_layers=True).classifier_logits.softmax(-1)
    expected = sum(
        (logits[:, layer] * (logits[:, layer].log() - logits[:, -1].log())).sum(1)
        for layer in range(LAYERS - 1)
    )
    found, _ = objective(lambda **inputs: run.model(**inputs, all_layers=True), batch, labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["deebert", "fastbert"])
def test_two_stages_need_epochs_for_the_second(method: str, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=rf"above 0 for the method {method}, .* got 0 and 1\."):
        run_method(method, backbone, tmp_path / "m", rounds=0)


@pytest.mark.parametrize("method", ["consistent", *RIVALS])
def test_a_model_of_one_layer_gets_no_exits(
    method: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptimizerSteps, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SettingError, match=r"^Layers of a model with exits must be at least 2, got 1\."):
        run_method(method, backbone, tmp_path / "m", num_layers=1)


@pytest.mark.parametrize("exit_head", ["shared", "separate"])
def test_exits_of_a_frozen_generator_are_trained_in_the_second_stage_alone(
    exit_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    values: dict[str, Any] = {
        "backbone": tiny_decoder(tmp_path / "decoder", layers=2),
        "train_data": tiny_instructions(),
        "config": quick_generation_config(
            backbone_training="frozen", exit_head=exit_head, warmup_epochs=2.0, checkpoint_every=1
        ),
        "method": "deebert",
    }
    train(**values, output_dir=tmp_path / "whole", report=said.append)
    assert "The backbone is frozen: stage 1 is left out, stage 2 has 3 steps" in said
    with monkeypatch.context() as patched:
        stop_at(patched, OptimizerSteps, "_step", 3)
        with pytest.raises(KeyboardInterrupt):
            train(**values, output_dir=tmp_path / "parts")
    train(**values, output_dir=tmp_path / "parts", resume=True)
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")


@pytest.mark.parametrize("method", ["deebert", "fastbert"])
def test_the_second_stage_leaves_the_plain_model_alone(
    method: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, set[str]] = {}
    original = OptimizerSteps.run

    def watched(self: OptimizerSteps, *args: Any, **options: Any) -> None:
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        original(self, *args, **options)
        after = self.model.state_dict()
        moved[options["phase"]] = {name for name in before if not before[name].equal(after[name])}

    monkeypatch.setattr(OptimizerSteps, "run", watched)
    run_method(method, backbone, tmp_path / "m")
    below = tuple(f"classifiers.layers.{index}." for index in range(LAYERS - 1))
    assert moved["stage 1"]
    assert moved["stage 2"]
    assert not [name for name in moved["stage 1"] if name.startswith(below)]
    assert all(name.startswith(below) for name in moved["stage 2"])


def test_palbert_trains_exits_and_policy_together(objective_of: Any, backbone: Path) -> None:
    run, objective, batch, labels = objective_of("palbert", policy_input="state", policy_dropout=0.0)
    losses, _ = objective(run.model, batch, labels)
    output = run.model(**batch, all_layers=True)
    posterior = exit_distribution(output.exit_probs)
    prior = geometric_prior(LAYERS, 0.1)
    cross_entropies = layer_losses(output.classifier_logits, labels)
    expected = (posterior * (cross_entropies + 0.5 * (posterior / prior).log())).sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    sizes = gradients_by_layer(run, losses.sum())
    assert sizes["policy"][0] > 0
    assert all(size > 0 for size in (*sizes["exits"], *sizes["backbone"]))
    optimized = {id(p) for group in run.steps.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.model.policy.parameters()} <= optimized


def test_palbert_keeps_the_policy_that_was_trained(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, Tensor]] = []
    original = Run.take_steps

    def watched(self: Run, *args: Any, **options: Any) -> None:
        start = {name: value.clone() for name, value in self.model.policy.state_dict().items()}
        original(self, *args, **options)
        trained.extend(
            [start, {name: value.clone() for name, value in self.model.policy.state_dict().items()}]
        )

    monkeypatch.setattr(Run, "take_steps", watched)
    folder = run_method("palbert", backbone, tmp_path / "m")
    saved = load_model(folder, LoadedClassifier).model.policy.state_dict()
    assert all(saved[name].equal(trained[-1][name]) for name in saved)
    assert not all(saved[name].equal(trained[0][name]) for name in saved)


OTHER_FITS: dict[str, Any] = {
    "policy_data": "seen",
    "policy_epochs": 9,
    "policy_learning_rate": 0.1,
    "entropy_bonus": 1.0,
    "layer_cost_warmup": 0.0,
    "estimator": "sampled",
    "num_rollouts": 3,
    "reward": "uniform",
    "reward_loss": "error",
    "hardness": "el2n",
    "layer_costs": (0.1, 0.2),
    "layer_cost_mode": "each",
}


def test_palbert_leaves_settings_of_policy_fits_alone_and_no_others(backbone: Path, tmp_path: Path) -> None:
    assert OTHER_FITS.keys() == OF_POLICY_FITS
    one = run_method("palbert", backbone, tmp_path / "one")
    idle = run_method("palbert", backbone, tmp_path / "idle", **OTHER_FITS)
    assert weight_bytes(idle) == weight_bytes(one)
    assert read_record(idle)["validation"] == read_record(one)["validation"]
    others = {"policy_min_steps": 60, "policy_batch_size": 4, "policy_weight_decay": 0.9, "policy_folds": 3}
    for name, value in others.items():
        other = run_method("palbert", backbone, tmp_path / name, **{name: value})
        outcomes = [(weight_bytes(folder), read_record(folder)["thresholds"]) for folder in (one, other)]
        assert outcomes[0] != outcomes[1], name
        assert name not in idle_settings("palbert", classifier=True, unlabelled=False)


def test_cosee_weighs_layers_by_where_rows_would_exit(objective_of: Any) -> None:
    run, objective, batch, labels = objective_of("cosee")
    logits = run.model(**batch, all_layers=True).classifier_logits
    losses = layer_losses(logits, labels)

    def at_step(step: int) -> Tensor:
        run.steps.step = step
        found, _ = objective(run.model, batch, labels)
        return found

    # At the first step all layers weigh alike; the margin adds the same to every row.
    difference = at_step(0) - losses.mean(1)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    assert 0 <= float(difference[0].detach()) <= 0.1 * (1 + 0.3)
    # At the last one, nearly the mean over the thresholds of the loss at the simulated exit.
    torch.manual_seed(7)
    found = at_step(run.steps.total_steps)
    torch.manual_seed(7)
    drawn = torch.rand(5)
    total = logits.exp().sum(-1)
    scores = total / (1 + total)  # normalised energy
    low, high = scores[:, :-1].min(), scores[:, :-1].max()
    expected = torch.zeros(len(labels))
    for row in range(len(labels)):
        for share in drawn:
            threshold = low + share * (high - low)
            exits = [layer for layer in range(LAYERS) if scores[row, layer] > threshold]
            at = min([*exits, LAYERS - 1])
            expected[row] += losses[row, at] / 5
    torch.testing.assert_close(
        found - found.mean(), expected - expected.mean(), rtol=0, atol=3e-4
    )  # e^-10 is left to a layer's neighbours


def test_static_is_a_plain_model_of_fewer_layers(backbone: Path, tmp_path: Path) -> None:
    folder = run_method("static", backbone, tmp_path / "m")
    loaded = load_model(folder, LoadedClassifier)
    assert loaded.model.num_layers == len(loaded.model.backbone.encoder.layer) == 2
    record = read_record(folder)
    assert record["kind"] == "full_depth"
    assert record["data"]["backbone_layers"] == LAYERS
    (prediction,) = Engine.from_pretrained(folder).predict(["good"])
    assert prediction.exit_layer == 2


def test_static_must_be_told_how_many_layers(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^num_layers must be given for the method static, got none\.$"):
        train(
            backbone=backbone,
            train_data=tiny_dataset(50),
            output_dir=tmp_path / "m",
            config=quick_config(),
            method="static",
        )
    assert not (tmp_path / "m").exists()
    with pytest.raises(
        SettingError, match=r"^num_layers must be in \[1, 3\], the layers of the backbone, got 4"
    ):
        train(
            backbone=backbone,
            train_data=tiny_dataset(50),
            output_dir=tmp_path / "m",
            config=quick_config(num_layers=4),
            method="static",
        )


def test_exits_on_fewer_layers(backbone: Path, tmp_path: Path) -> None:
    folder = run_method("weighted_sum", backbone, tmp_path / "m", num_layers=2)
    assert load_model(folder, LoadedClassifier).model.num_layers == 2


# --- Text generators ------------------------------------------------------------------------------


def test_methods_of_rows_refuse_text_generators_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError,
        match=r'^method must be one of consistent, deebert, weighted_sum, plain for a text generator, got "sweet"\.$',
    ):
        train(
            backbone=tmp_path,
            train_data=tiny_instructions(),
            output_dir=tmp_path / "m",
            config=quick_generation_config(),
            method="sweet",
        )


def test_the_weighted_sum_trains_tokens(tmp_path: Path) -> None:
    folder = train(
        backbone=tiny_decoder(tmp_path / "b"),
        train_data=tiny_instructions(),
        output_dir=tmp_path / "m",
        config=quick_generation_config(rounds=0),
        method="weighted_sum",
    )
    record = read_record(folder)
    assert record["method"] == "weighted_sum"
    assert json.loads((folder / "config.json").read_text())["criterion"] == "softmax_margin"


@pytest.mark.parametrize("method", [name for name in RIVALS if not METHODS[name].shared_layers])
def test_layers_that_learn_from_one_exit_have_no_gradients_to_scale(
    method: str, backbone: Path, tmp_path: Path
) -> None:
    whole = run_method(method, backbone, tmp_path / "whole")
    none = run_method(method, backbone, tmp_path / "none", exit_gradient_scale=0.0)
    assert weight_bytes(whole) == weight_bytes(none)
