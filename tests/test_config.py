"""Settings and recipes: round trips, what each wrong value says, and every shipped recipe."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig, checked_settings
from consistentee.data.recipes import Recipe, config_class_of, load_recipe
from consistentee.data.tasks import TASKS, GenerationTask
from consistentee.functional.tables import CLASSIFICATION
from consistentee.training.methods import METHODS, check_method

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
PUBLISHED = sorted((Path(__file__).resolve().parents[1] / "recipes" / "published").glob("*.yaml"))
PAPER_TASKS = ("rte", "mrpc", "sst2", "qnli", "qqp", "mnli", "m-cid", "stackoverflow")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- ClassificationTrainingConfig ---


def test_to_dict_and_back():
    config = ClassificationTrainingConfig(
        layer_costs=(0.1, 0.2), consistent_learning_rate=3e-5, head="shared_pooler", seed=7
    )
    values = config.to_dict()
    assert values["layer_costs"] == [0.1, 0.2]
    assert ClassificationTrainingConfig.from_dict(values) == config
    assert ClassificationTrainingConfig.from_dict(json.loads(json.dumps(values))) == config
    assert ClassificationTrainingConfig.from_dict(yaml.safe_load(yaml.safe_dump(values))) == config
    assert ClassificationTrainingConfig.from_dict({}) == ClassificationTrainingConfig()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClassificationTrainingConfig().seed = 1


def test_every_setting_is_written_out():
    config = ClassificationTrainingConfig()
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(config)}


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(
        ValueError, match=r'"learning_rat" is not a training setting. Did you mean "learning_rate"?'
    ):
        ClassificationTrainingConfig.from_dict({"learning_rat": 1e-5})
    with pytest.raises(ValueError, match=r'"xyz" is not a training setting.$'):
        ClassificationTrainingConfig.from_dict({"xyz": 1})
    with pytest.raises(ValueError, match=r'"3" is not a training setting.'):
        ClassificationTrainingConfig.from_dict({3: 1})


@pytest.mark.parametrize(
    "value, expected", [("1e-5", 1e-5), ("3E-4", 3e-4), (1, 1.0), ("0.5", 0.5), (2e-5, 2e-5)]
)
def test_numbers_may_be_written_as_text(value: Any, expected: float):
    learning_rate = checked_settings({"learning_rate": value}, ClassificationTrainingConfig)["learning_rate"]
    assert learning_rate == expected
    assert isinstance(learning_rate, float)
    assert (
        checked_settings({"consistent_learning_rate": value}, ClassificationTrainingConfig)[
            "consistent_learning_rate"
        ]
        == expected
    )


def test_consistent_learning_rate_may_be_none():
    assert (
        ClassificationTrainingConfig.from_dict({"consistent_learning_rate": None}).consistent_learning_rate
        is None
    )


@pytest.mark.parametrize(
    "value, expected",
    [
        (0.05, (0.05,)),
        ("0.05", (0.05,)),
        ([0.01, "2e-2"], (0.01, 0.02)),
        ((0.01, 1), (0.01, 1.0)),
        ([0], (0.0,)),
    ],
)
def test_layer_costs_are_one_or_several_prices(value: Any, expected: tuple[float, ...]):
    assert ClassificationTrainingConfig.from_dict({"layer_costs": value}).layer_costs == expected


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate", True, "learning_rate must be a number, got True"),
        ("learning_rate", None, "learning_rate must be a number, got None"),
        ("learning_rate", [1e-5], r"learning_rate must be a number, got \[1e-05\]"),
        ("consistent_learning_rate", "fast", "consistent_learning_rate must be a number, got 'fast'"),
        ("batch_size", 16.5, "batch_size must be a whole number, got 16.5"),
        ("batch_size", "16", "batch_size must be a whole number, got '16'"),
        ("seed", True, "seed must be a whole number, got True"),
        ("group_by_length", "yes", "group_by_length must be true or false, got 'yes'"),
        ("group_by_length", 1, "group_by_length must be true or false, got 1"),
        ("layer_costs", ["a"], "each of layer_costs must be a number, got 'a'"),
        ("layer_costs", None, "each of layer_costs must be a number, got None"),
        ("head", 3, 'head must be one of attention, shared_pooler, got "3"'),
    ],
)
def test_a_wrong_type_is_named(key: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ClassificationTrainingConfig.from_dict({key: value})


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("head", "linear", 'head must be one of attention, shared_pooler, got "linear"'),
    ("pooling", "max", 'pooling must be one of auto, cls, mean, got "max"'),
    ("policy_input", "all", r'policy_input must be one of auto, state, log_odds, state\+log_odds, got "all"'),
    ("policy_data", "new", 'policy_data must be one of held_out, seen, got "new"'),
    ("estimator", "mc", 'estimator must be one of exact, sampled, got "mc"'),
    ("reward", "none", 'reward must be one of hardness, uniform, got "none"'),
    ("layer_cost_mode", "all", 'layer_cost_mode must be one of range, each, got "all"'),
    ("reward_loss", "mse", 'reward_loss must be one of cross_entropy, error, got "mse"'),
    ("hardness", "mood", 'hardness must be one of memorized_layer, .*, got "mood"'),
    ("mixed_precision", "int8", 'mixed_precision must be one of auto, no, bf16, fp16, got "int8"'),
    ("schedule", "cosine", 'schedule must be one of linear, constant, got "cosine"'),
    ("tracker", "paper", 'tracker must be one of none, tensorboard, .*, got "paper"'),
    ("num_rollouts", 0, "num_rollouts must be at least 1, got 0"),
    ("policy_folds", 1, "policy_folds must be at least 2, got 1"),
    ("layer_costs", (), r"layer_costs must hold at least one cost >= 0, got \[\]"),
    ("layer_costs", (0.1, -0.1), r"layer_costs must hold at least one cost >= 0, got \[0.1, -0.1\]"),
    ("layer_costs", (0.0, 0.1), r"layer_costs must be above 0 for a range of costs, got \[0.0, 0.1\]"),
    ("layer_costs", (math.nan,), r"each of layer_costs must be a finite number, got nan"),
    ("layer_costs", (0.01, math.inf), r"each of layer_costs must be a finite number, got inf"),
    *[
        (name, value, f"{name} must be a finite number, got {value}. Give a large one for no bound")
        for name in ("max_grad_norm", "max_cache_mb", "max_disk_mb", "policy_learning_rate", "ensemble_decay")
        for value in (math.inf, math.nan)
    ],
    ("learning_rate", 10**400, "learning_rate must be a number, got 1000"),
    ("rounds", 1.5, "rounds must be a whole number, got 1.5"),
    ("policy_folds", 2.5, "policy_folds must be a whole number, got 2.5"),
    ("group_by_length", "no", "group_by_length must be true or false, got 'no'"),
    ("batch_size", np.float32(2), "batch_size must be a whole number, got 2.0"),
    ("consistent_learning_rate", 0.0, "consistent_learning_rate must be above 0, got 0.0"),
    *[
        ("validation_fraction", v, f"validation_fraction must be between 0 and 1, got {v}")
        for v in (0.0, 1.0, -0.5)
    ],
    *[
        (name, value, rf"{name} must be in \[0, 1\), got {value}")
        for name in ("head_dropout", "ensemble_decay", "policy_dropout", "warmup_ratio", "layer_cost_warmup")
        for value in (-0.1, 1.0)
    ],
    *[
        (name, value, rf"{name} must be in \[0, 1\], got {value}")
        for name in ("weighted_sum_share", "max_accuracy_loss")
        for value in (-0.1, 1.1)
    ],
    *[
        (name, 0, f"{name} must be above 0, got 0")
        for name in (
            "num_queries",
            "policy_hidden_size",
            "max_length",
            "batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "head_learning_rate",
            "max_grad_norm",
            "warmup_epochs",
            "policy_epochs",
            "policy_min_steps",
            "policy_batch_size",
            "policy_learning_rate",
            "patience",
            "checkpoint_every",
            "max_cache_mb",
        )
    ],
    *[
        (name, value, f"{name} must be >= 0, got {value}")
        for name in (
            "weight_decay",
            "rounds",
            "consistent_epochs",
            "policy_weight_decay",
            "entropy_bonus",
            "max_disk_mb",
        )
        for value in (-1, -3)
    ],
]


def test_numbers_of_numpy_become_plain_ones():
    config = ClassificationTrainingConfig(
        seed=np.int64(3),
        learning_rate=np.float32(0.5),
        group_by_length=np.bool_(False),
        layer_costs=np.array([0.25, 0.5]),
        warmup_epochs=2,
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values == {**ClassificationTrainingConfig().to_dict(),
        "seed": 3, "learning_rate": 0.5, "group_by_length": False, "layer_costs": [0.25, 0.5], "warmup_epochs": 2.0
    }  # fmt: skip


@pytest.mark.parametrize("name, value, message", BAD_VALUES)
def test_a_bad_value_is_named(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ClassificationTrainingConfig(**{name: value})


def test_the_batch_is_cut_into_equal_parts():
    with pytest.raises(
        ValueError, match="batch_size must be a multiple of gradient_accumulation_steps, got 32 and 3"
    ):
        ClassificationTrainingConfig(gradient_accumulation_steps=3)
    assert ClassificationTrainingConfig(gradient_accumulation_steps=4).batch_size == 32


# --- Recipe files ---


def test_a_recipe_holds_settings_task_and_backbone(tmp_path: Path):
    path = write(
        tmp_path / "r.yaml", "task: rte\nbackbone: some/encoder\nlearning_rate: 1e-5\nlayer_costs: 0.1\n"
    )
    assert load_recipe(path) == Recipe({"learning_rate": 1e-5, "layer_costs": (0.1,)}, "rte", "some/encoder")
    assert load_recipe(str(write(tmp_path / "s.yaml", "seed: 3\n"))) == Recipe({"seed": 3})


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1e-5\n", r'Recipe .*r.yaml: "learning_rat" is not a training setting. Did you mean'),
        ("head: linear\n", r"Recipe .*r.yaml: head must be one of"),
        ("batch_size: 0\n", r"Recipe .*r.yaml: batch_size must be above 0"),
        ("- seed\n", r"Recipe .*r.yaml must be a mapping of settings, got list"),
        ("", r"Recipe .*r.yaml must be a mapping of settings, got NoneType"),
        ("a: [1\n", r"Recipe .*r.yaml is not valid YAML: "),
        ("!!python/object/apply:os.getcwd []\n", r"Recipe .*r.yaml is not valid YAML: "),
        ("task: 5\n", r"Recipe .*r.yaml: task must be text, got 5\. Write a name, in quotes if"),
        ("backbone: 5\n", r"Recipe .*r.yaml: backbone must be text, got 5"),
        ("method: [consistent]\n", r"Recipe .*r.yaml: method must be text, got \['consistent'\]"),
        ("1: 2\n", r'Recipe .*r.yaml: "1" is not a training setting'),
    ],
)
def test_a_broken_recipe_is_named(text: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(tmp_path / "r.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_text_is_named(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"seed: 1\n\xff\xfe")
    with pytest.raises(ValueError, match=r"Recipe .*r.yaml is not valid YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"Recipe .*gone.yaml does not exist. Give the path of a YAML file"
    ):
        load_recipe(tmp_path / "gone.yaml")


def test_there_is_a_recipe_for_every_data_set_of_the_paper():
    assert {path.stem for path in RECIPES} >= set(PAPER_TASKS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_says_what_it_is_for(path: Path):
    recipe = load_recipe(path)
    assert recipe.task == path.stem
    generates = isinstance(TASKS[recipe.task], GenerationTask)
    assert recipe.backbone == ("huggyllama/llama-7b" if generates else "google-bert/bert-base-uncased")
    config_class = config_class_of(recipe.task)
    assert config_class is (GenerationTrainingConfig if generates else ClassificationTrainingConfig)
    config = config_class(**recipe.settings)
    assert config_class.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_papers_settings_are_the_papers(task: str):
    settings = load_recipe(Path(__file__).resolve().parents[1] / "recipes" / f"{task}.yaml").settings
    stated = {
        "max_length": 128,
        "warmup_epochs": 5.0,
        "batch_size": 16,
        "learning_rate": 1e-5,
        "policy_epochs": 2,
        "policy_batch_size": 32,
        "policy_learning_rate": 3e-4,
        "policy_hidden_size": 32,
        "estimator": "sampled",
        "num_rollouts": 8,
        "consistent_epochs": 2.0,
        "consistent_learning_rate": 3e-5,
        "head": "shared_pooler",
        "pooling": "cls",
        "ensemble_decay": 0.0,
        "policy_input": "state",
        "policy_data": "seen",
        "reward": "hardness",
        "reward_loss": "cross_entropy",
        "hardness": "memorized_layer",
        "weighted_sum_share": 0.0,
    }
    assert {name: settings[name] for name in stated} == stated
    assert min(settings["layer_costs"]) == 0.01
    assert max(settings["layer_costs"]) == 0.09


def test_every_method_has_a_recipe_as_published() -> None:
    named = {load_recipe(path).method for path in PUBLISHED}
    assert named == {name for name, row in METHODS.items() if row.labels and name != "plain"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_recipe_as_published_leaves_the_budget_to_the_comparison(path: Path) -> None:
    recipe = load_recipe(path)
    assert path.stem.startswith(str(recipe.method))
    assert f"--config recipes/published/{path.name} " in path.read_text(encoding="utf-8")
    budget = (
        "batch_size gradient_accumulation_steps learning_rate consistent_learning_rate head_learning_rate "
        "warmup_epochs rounds consistent_epochs seed validation_fraction max_length schedule warmup_ratio weight_decay"
    )
    assert not recipe.settings.keys() & set(budget.split())
    assert recipe.task is recipe.backbone is None
    config = ClassificationTrainingConfig(**recipe.settings)
    if METHODS[str(recipe.method)].exits:
        assert config.ensemble_decay == 0  # every exit speaks for itself
    check_method(str(recipe.method), CLASSIFICATION, config)


def test_a_setting_of_earlier_versions_is_passed_over_where_it_had_no_effect(tmp_path: Path):
    recipe = load_recipe(write(tmp_path / "r.yaml", "distillation: 0.0\nseed: 3\n"))
    assert recipe.settings == {"seed": 3}
    with pytest.raises(ValueError, match='"distillation" is not a training setting'):
        load_recipe(write(tmp_path / "r.yaml", "distillation: 0.5\n"))


def test_settings_that_were_renamed_are_read_by_their_old_names(tmp_path: Path):
    recipe = load_recipe(write(tmp_path / "r.yaml", "prices: each\nprice_warmup: 0.1\n"))
    assert recipe.settings == {"layer_cost_mode": "each", "layer_cost_warmup": 0.1}
    with pytest.raises(ValueError, match='"layer_cost_mode" must be given once'):
        load_recipe(write(tmp_path / "r.yaml", "prices: each\nlayer_cost_mode: each\n"))
