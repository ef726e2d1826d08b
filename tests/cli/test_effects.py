"""Settings without effect are refused on the command line, and only those: each that is refused changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from consistentee.cli.effects import check_effects
from consistentee.cli.kinds import MODEL_KINDS, Kind
from consistentee.cli.options import NOT_GIVEN, SettingOptions, training_config
from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig
from consistentee.data.recipes import Recipe
from consistentee.errors import SettingError, UsageError
from consistentee.training.methods import METHODS
from consistentee.training.train import finetune, train
from tiny import tiny_backbone, tiny_dataset

Rows, Tokens = ClassificationTrainingConfig, GenerationTrainingConfig
KIND_OF = {kind.config_class: kind for kind in MODEL_KINDS}
CASES: list[tuple[type[Any], str, dict[str, Any], str, str]] = [
    (Rows, "train", {"head": "shared_pooler", "classifier_hidden_size": 8}, "classifier_hidden_size", "--"),
    (Rows, "train", {"head": "shared_pooler", "num_queries": 2}, "num_queries", "--head attention"),
    (Rows, "train", {"pooling": "cls"}, "pooling", "--head shared_pooler"),
    (Rows, "train", {"num_rollouts": 4}, "num_rollouts", "--estimator sampled"),
    (Rows, "train", {"reward": "uniform", "hardness": "el2n"}, "hardness", "--reward hardness"),
    (Rows, "train", {"rounds": 0, "consistent_epochs": 1.0}, "consistent_epochs", "--rounds above 0"),
    (Rows, "train", {"rounds": 0, "patience": 3}, "patience", "--rounds above 0"),
    (Rows, "train", {"consistent_epochs": 0.0, "rounds": 3}, "rounds", "--consistent-epochs above 0"),
    (Rows, "train", {"policy_input": "log_odds", "policy_dropout": 0.1}, "policy_dropout", "--policy-input"),
    (Rows, "train", {"policy_input": "log_odds", "policy_hidden_size": 8}, "policy_hidden_size", "--policy-input"),
    (Rows, "train", {"passes": 3}, "passes", "--unlabelled-file"),
    (Rows, "train", {"policy_texts": 100}, "policy_texts", "--unlabelled-file"),
    (Rows, "finetune", {"passes": 3}, "passes", "finetune does not train"),
    (Rows, "finetune", {"layer_costs": (0.1,)}, "layer_costs", "finetune does not train"),
    (Rows, "finetune", {"consistent_learning_rate": 1e-5}, "consistent_learning_rate", "finetune does not"),
    (Rows, "finetune", {"ensemble_decay": 0.1}, "ensemble_decay", "finetune does not train"),
    (Tokens, "train", {"backbone_training": "full", "lora_rank": 4}, "lora_rank", "--backbone-training lora"),
    (Tokens, "train", {"backbone_training": "frozen", "learning_rate": 1e-3}, "learning_rate", "full or lora"),
    (Tokens, "train", {"exit_head_rank": 4}, "exit_head_rank", "--exit-head low_rank"),
    (Tokens, "train", {"hardness": "final_loss"}, "hardness", "--reward hardness"),
    (Tokens, "finetune", {"exit_head": "separate"}, "exit_head", "finetune does not train"),
    (Tokens, "finetune", {"head_learning_rate": 1e-2}, "head_learning_rate", "finetune does not"),
    (Tokens, "finetune", {"policy_tokens": 100}, "policy_tokens", "finetune does not train"),
]  # fmt: skip


@pytest.mark.parametrize(
    "config_class, command, values, name, message", CASES, ids=lambda case: str(case)[:40]
)
def test_are_refused(
    config_class: type[Any], command: Any, values: dict[str, Any], name: str, message: str
) -> None:
    known = {field.name: NOT_GIVEN for field in dataclasses.fields(SettingOptions)}
    options = SettingOptions(**{**known, **values})
    with pytest.raises(SettingError) as raised:
        training_config(options, Recipe(), KIND_OF[config_class], command)
    assert str(raised.value).startswith(f"--{name.replace('_', '-')} ")
    assert message in str(raised.value)
    assert str(raised.value).endswith((". Leave it out.", ". Leave it out, or give both."))
    # A recipe is read by both commands, and by one with other options on the command line.
    assert training_config(None, Recipe(settings=values), KIND_OF[config_class], command) == config_class(
        **values
    )


@pytest.mark.parametrize(
    "method, name, message",
    [
        ("sweet", "weighted_sum_share", "goes with --method consistent and has no effect here"),
        ("deebert", "patience", "goes with --method consistent and has no effect here"),
        (
            "sweet",
            "exit_gradient_scale",
            "layers that learn from several exits, which --method sweet has not",
        ),
        ("palbert", "policy_epochs", "fits of the policy, which --method palbert does not make"),
        ("static", "ensemble_decay", "is about exits, which --method static does not train"),
    ],
)
def test_are_refused_where_the_method_leaves_them_out(method: str, name: str, message: str) -> None:
    command = "train" if METHODS[method].exits else "finetune"
    with pytest.raises(SettingError, match=rf"^--{name.replace('_', '-')} .*{message}"):
        check_effects([name], Rows(), command, method)
    check_effects(["rounds", "consistent_epochs", "warmup_epochs"], Rows(), command, method)
    check_effects([name], Rows(), "train", "consistent")


def test_those_that_have_one_are_not() -> None:
    for config, given in (
        (Rows(head="shared_pooler", pooling="cls"), ("head", "pooling")),
        (Rows(estimator="sampled", num_rollouts=3), ("estimator", "num_rollouts")),
        (
            Rows(),
            ("rounds", "consistent_epochs", "patience", "classifier_hidden_size", "hardness"),
        ),
        (GenerationTrainingConfig(), ("lora_rank", "learning_rate", "min_exit_layer")),
        (GenerationTrainingConfig(hardness="uniform"), ("hardness",)),
    ):
        check_effects(given, config, "train")
    check_effects(("passes", "policy_texts"), Rows(), "train", unlabelled=True)
    check_effects(("policy_folds", "policy_weight_decay", "policy_min_steps"), Rows(), "train", "palbert")
    check_effects(("policy_folds",), Rows(policy_data="seen"), "train")
    for config in (Rows(), GenerationTrainingConfig()):
        check_effects(
            ("rounds", "consistent_epochs", "warmup_epochs", "learning_rate", "seed"), config, "finetune"
        )


FINETUNED = (
    "batch_size checkpoint_every consistent_epochs gradient_accumulation_steps group_by_length learning_rate "
    "max_grad_norm max_length mixed_precision parse_special_tokens rounds schedule seed tracker "
    "validation_fraction warmup_epochs warmup_ratio weight_decay"
)
"""Settings of both kinds that fine-tuning reads: how many steps it takes, and how."""


@pytest.mark.parametrize(
    "config_class, more",
    [
        (
            Rows,
            "num_layers head pooling num_queries classifier_hidden_size head_dropout head_learning_rate",
        ),
        (
            GenerationTrainingConfig,
            "backbone_training lora_rank lora_alpha lora_dropout gradient_checkpointing logit_rows max_prompt_length "
            "prompt_template",
        ),
    ],
)
def test_every_setting_is_known_to_have_one_in_finetuning_or_not(config_class: type[Any], more: str) -> None:
    config, taken = config_class(), set[str]()
    for field in dataclasses.fields(config_class):
        try:
            check_effects([field.name], config, "finetune")
        except SettingError as error:
            if "finetune does not train" in str(error):
                continue
        taken.add(field.name)
    assert taken == set(f"{FINETUNED} {more}".split())


QUICK: dict[str, Any] = {
    "warmup_epochs": 0.5, "consistent_epochs": 0.5, "rounds": 1, "policy_epochs": 1, "policy_min_steps": 1,
    "max_length": 16, "mixed_precision": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    "command, values",
    [
        (train, {"head": "shared_pooler", "num_queries": 7, "classifier_hidden_size": 8}),
        (train, {"num_rollouts": 30, "passes": 2, "policy_texts": 7}),
        (train, {"reward": "uniform", "hardness": "el2n"}),
        (finetune, {"layer_costs": (0.5,), "patience": 1, "ensemble_decay": 0.9}),
        (finetune, {"consistent_learning_rate": 1.0, "policy_data": "seen", "policy_input": "state"}),
    ],
    ids=lambda value: "" if callable(value) else "+".join(value),
)
def test_change_nothing_indeed(command: Any, values: dict[str, Any], tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    kept = {name: value for name, value in values.items() if name in ("head", "reward")}
    weights = []
    for number, more in enumerate((kept, values)):
        folder = command(
            backbone=backbone,
            train_data=tiny_dataset(40),
            output_dir=tmp_path / str(number),
            config=Rows(**QUICK, **more),
        )
        weights.append(load_file(folder / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=lambda kind: kind.model)
@pytest.mark.parametrize("seed", [-3, 2**32])
def test_seeds_that_some_generator_would_not_take(kind: Kind, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed must be from 0 to 4294967295, got {seed}\.$"):
        kind.config_class(seed=seed)
    with pytest.raises(UsageError):
        training_config(None, Recipe(settings={"seed": seed}), kind)
