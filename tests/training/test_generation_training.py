"""Whole trainings of tiny language models: what they leave, resuming in every phase, what is trained, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistentee.backbones.decoders import SUPPORTED_DECODER_TYPES, decoder_architecture, decoder_layers
from consistentee.config import GenerationTrainingConfig
from consistentee.data.rows import InstructionDataset
from consistentee.errors import SettingError
from consistentee.functional.criteria import GENERATION_CRITERIA
from consistentee.models.card import model_card
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training import adapters, policy_phase
from consistentee.training import run as runs
from consistentee.training.adapters import add_adapters
from consistentee.training.methods import consistent
from consistentee.training.steps import OptimizerSteps
from consistentee.training.tasks import generation
from consistentee.training.tasks.token_states import TokenStates
from consistentee.training.train import finetune, train
from quick import read_record, read_weights, weight_bytes
from tiny_decoders import tiny_exit_model
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("backbone"), layers=2)


def run(how: Train, backbone: Path, folder: Path, *, resume: bool = False, **changes: Any) -> list[str]:
    said: list[str] = []
    how(
        backbone=backbone,
        train_data=tiny_instructions(),
        output_dir=folder,
        config=quick_generation_config(**changes),
        task="alpaca",
        resume=resume,
        report=said.append,
    )
    return said


@pytest.fixture(scope="module")
def trained(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return folder, run(train, backbone, folder, checkpoint_every=2)


# --- What it leaves ---


def test_a_training_leaves_a_model_that_generates(trained: tuple[Path, list[str]]) -> None:
    folder, said = trained
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(model, EarlyExitForCausalLM)
    assert model.config.task == "alpaca"
    assert model.config.max_sequence_length == 48
    assert model.config.prompt_template == {
        "kind": "text",
        "name": "plain",
        "with_input": "{instruction}",
        "without_input": None,
    }
    record = read_record(folder)
    assert record["kind"] == "early_exit_generation"
    assert list(record["thresholds"]) == list(GENERATION_CRITERIA)
    assert {"policy": model.config.threshold, **(model.config.thresholds or {})} == record["thresholds"]
    assert len(record["history"]) == 2
    assert record["validation"]["num_examples"] == len(
        [token for text in held_out_texts() for token in text]
    ) + len(held_out_texts())
    assert not (folder / runs.checkpoints.FOLDER).exists()
    assert said[-1] == f"Saved to {folder}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer("say a:", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= 6 + 3


@pytest.mark.parametrize("known, ends", [(None, 1), (2, [2, 1])])
def test_saved_models_end_their_texts(known: int | None, ends: Any, tmp_path: Path) -> None:
    """The backbone's end of text is not the tokenizer's, which training writes behind responses."""
    backbone = tiny_decoder(tmp_path / "backbone", layers=2, eos_token_id=known)
    data = InstructionDataset(["say a:"] * 64, [""] * 64, ["aaa"] * 64, "tiny")
    config = quick_generation_config(warmup_epochs=14.0, rounds=0, validation_fraction=0.25)
    for how in (train, finetune):
        folder = tmp_path / how.__name__
        how(backbone=backbone, train_data=data, output_dir=folder, config=config)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        assert model.generation_config.eos_token_id == ends
        prompt = tokenizer("say a:", return_tensors="pt", return_token_type_ids=False)
        full = {"mode": "full"} if how is train else {}
        (found,) = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=1, **full)
        assert tokenizer.decode(found) == "say a:aaa</s>"


@pytest.mark.parametrize("ends", [1, 2])
def test_a_generation_config_that_is_only_warned_about_is_saved_again(ends: int, tmp_path: Path) -> None:
    """As vicuna's and earlier Llama 2's, with a temperature that has no effect."""
    backbone = tiny_decoder(tmp_path / "backbone", layers=2)
    published = {"eos_token_id": ends, "temperature": 0.9, "top_p": 0.6}
    (backbone / "generation_config.json").write_text(json.dumps(published))
    for how in (train, finetune):
        folder = tmp_path / how.__name__
        run(how, backbone, folder, rounds=0)
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {name: saved[name] for name in published} == {
            **published,
            "eos_token_id": 1 if ends == 1 else [2, 1],
        }
    model = EarlyExitForCausalLM.from_backbone(backbone)
    model.save_pretrained(tmp_path / "untrained")
    assert model.generation_config is not model.backbone.generation_config


def held_out_texts() -> list[str]:
    from consistentee.data.rows import split_rows

    data = tiny_instructions()
    _, held = split_rows(len(data), 0.4, 0)
    return data.select(held).references


def test_the_model_learns(backbone: Path, tmp_path: Path) -> None:
    run(
        train,
        backbone,
        tmp_path / "model",
        warmup_epochs=10,
        consistent_epochs=5,
        last_layer_share=0.5,
    )
    record = read_record(tmp_path / "model")
    # Everything but where a text ends, which nobody can know: 12 of 98 tokens.
    assert record["validation"]["full_depth_accuracy"] > 0.86
    assert (
        record["history"][-1]["per_layer_accuracy"][-1] >= record["warmup"]["per_layer_accuracy"][-1] - 0.05
    )


def test_every_exit_rule_has_its_threshold(trained: tuple[Path, list[str]]) -> None:
    model = EarlyExitForCausalLM.from_pretrained(trained[0])
    for criterion in GENERATION_CRITERIA:
        model.exit_rule(criterion)


def test_the_card(trained: tuple[Path, list[str]]) -> None:
    card = (trained[0] / "README.md").read_text(encoding="utf-8")
    assert "# Early-exit language model for alpaca" in card
    assert "| token accuracy of the last layer |" in card
    record = json.loads((trained[0] / "training_record.json").read_text(encoding="utf-8"))
    evaluation = {
        "metrics": {"rougeL": 0.31},
        "num_examples": 20,
        "num_hidden_layers": 2,
        "mean_exit_layer": 1.5,
        "layer_speedup": 4 / 3,
    }
    card = model_card({**record, "evaluation": evaluation})
    assert "| mean exit layer | 1.50 of 2 |" in card
    assert "| rougeL | 0.31 |" in card


def test_agreement_with_the_last_layer_is_called_so(backbone: Path, tmp_path: Path) -> None:
    said = run(train, backbone, tmp_path / "model", rounds=0, reward_target="last_layer")
    assert not [line for line in said if "accuracy" in line.lower()]
    assert [line for line in said if line.startswith("Token agreement by layer after warm-up: ")]
    record = read_record(tmp_path / "model")
    assert record["validation"]["full_depth_accuracy"] == 1
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| token agreement with the last layer |" in card
    assert "token accuracy" not in card
    assert "of the last layer |" not in card


@pytest.mark.parametrize("how", ["full", "lora"])
def test_fine_tuning_leaves_a_plain_model(how: str, backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    said = run(finetune, backbone, folder, backbone_training=how)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert read_weights(folder).keys() == read_weights(backbone).keys()
    record = read_record(folder)
    assert record["kind"] == "full_depth_generation"
    assert record["validation"]["accuracy"] == max(epoch["accuracy"] for epoch in record["history"])
    assert [line for line in said if line.startswith("Epoch 2 of 2: validation token accuracy")]
    assert "# Plain language model for alpaca" in (folder / "README.md").read_text(encoding="utf-8")


# --- What is trained ---


@pytest.mark.parametrize("how", [train, finetune])
def test_a_model_that_the_last_step_broke_is_not_saved(
    how: Train, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = {"warmup_epochs": 0.01, "rounds": 0}
    with pytest.raises(FloatingPointError, match=r"^weights must be finite, got .* at step 1\. Lower"):
        run(how, backbone, tmp_path / "weights", learning_rate=1e38, head_learning_rate=1e38, **one_step)
    states = generation.run_token_states

    def overflowing(*inputs: Any, **how: Any) -> TokenStates:
        found = states(*inputs, **how)
        found.losses[-1, 0] = float("nan")
        return found

    monkeypatch.setattr(generation, "run_token_states", overflowing)
    with pytest.raises(
        FloatingPointError, match=r"^loss must be finite, got nan after the last step\. Lower"
    ):
        run(how, backbone, tmp_path / "loss", **one_step)
    assert not list(tmp_path.glob("*/*.safetensors"))


def of_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("backbone."): value
        for name, value in weights.items()
        if name.startswith("backbone.")
    }


@pytest.mark.parametrize(
    "changes", [{"reward_target": "last_layer"}, {"policy_tokens": 5}, {"policy_hidden_size": 8}], ids=str
)
def test_fine_tuning_does_not_feel_a_setting_of_the_policy(
    changes: dict[str, Any], backbone: Path, tmp_path: Path
) -> None:
    settings = {"backbone_training": "lora", "warmup_epochs": 2.0}
    said = run(finetune, backbone, tmp_path / "one", **settings)
    assert run(finetune, backbone, tmp_path / "other", **settings, **changes)[:-1] == said[:-1]
    assert read_record(tmp_path / "other") == read_record(tmp_path / "one")
    assert weight_bytes(tmp_path / "other") == weight_bytes(tmp_path / "one")


@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
def test_a_frozen_backbone_stays_as_it_is(exit_head: str, backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    run(train, backbone, folder, backbone_training="frozen", exit_head=exit_head)
    before, after = read_weights(backbone), read_weights(folder)
    kept = of_backbone(after)
    assert all(torch.equal(before[name], value) for name, value in kept.items() if name in before)
    norm = after["exit_heads.norms.0.weight"]
    assert not torch.equal(norm, torch.ones_like(norm))


def test_adapters_end_in_the_weights_of_projections(backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    run(train, backbone, folder, backbone_training="lora", checkpoint_every=1)
    before, after = read_weights(backbone), of_backbone(read_weights(folder))
    changed = {
        name for name, value in after.items() if name in before and not torch.equal(before[name], value)
    }
    assert changed == {name for name in before if "proj" in name}
    assert not [name for name in after if "lora" in name]


def test_checkpoints_leave_out_what_is_frozen(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[str]] = []
    monkeypatch.setattr(
        runs.checkpoints, "save_weights", lambda path, weights: kept.append(set(weights)) or path.touch()
    )
    monkeypatch.setattr(runs.checkpoints, "save_checkpoint", lambda *args, **kwargs: None)
    run(train, backbone, tmp_path / "model", backbone_training="lora", rounds=0)
    assert [name for name in kept[0] if "lora" in name]
    assert not [name for name in kept[0] if name.startswith("backbone.") and "lora" not in name]


@pytest.mark.parametrize("model_type", SUPPORTED_DECODER_TYPES)
def test_every_projection_of_every_type_takes_adapters(model_type: str) -> None:
    model = tiny_exit_model(model_type, "separate")
    add_adapters(model.backbone, rank=2, alpha=4, dropout=0.0)
    adapted = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    parts = decoder_architecture(model_type).parts
    names = ("query", "key", "value", "attention_output", "gate", "up", "down")
    paths = {path for path in (getattr(parts, name) for name in names) if path}
    layers = {name: layer for name, layer in model.named_modules() if layer in decoder_layers(model.backbone)}
    assert len(layers) == model.num_layers
    assert adapted == {f"{layer}.{path}" for layer in layers for path in paths}  # no head, none of the exits


def test_transposed_projections_take_adapters(tmp_path: Path) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=1, bos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    input_ids = torch.randint(0, 50, (1, 5))
    before = model(input_ids).logits
    parts = add_adapters(model, rank=2, alpha=4, dropout=0.0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is ("lora" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = model(input_ids).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    parts.merge()
    parts.merge()  # nothing is left to do
    torch.testing.assert_close(model(input_ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert not [name for name in model.state_dict() if "lora" in name]


# --- Resuming ---


class Interrupted(Exception):
    """What stands for a signal."""


PHASES = {
    "warm-up": (OptimizerSteps, "_step", 3),
    "policy": (policy_phase, "choose_policy", 1),
    "best weights kept, not yet a checkpoint": (consistent, "record_round", 1),
    "consistent phase": (OptimizerSteps, "_step", 6),
    "second policy": (policy_phase, "choose_policy", 2),
    "writing the model": (runs, "write_model_card", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupted_training_ends_where_another_does(
    phase: str,
    backbone: Path,
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, call = PHASES[phase]
    original, calls = getattr(owner, name), 0

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return original(*args, **kwargs)

    folder = tmp_path / "model"
    monkeypatch.setattr(owner, name, interrupting)
    with pytest.raises(Interrupted):
        run(train, backbone, folder, checkpoint_every=2)
    monkeypatch.setattr(owner, name, original)
    said = run(train, backbone, folder, checkpoint_every=2, resume=True)
    assert any(line.startswith("Resumed at step ") for line in said)
    assert weight_bytes(folder) == weight_bytes(trained[0])
    assert read_record(folder) == read_record(trained[0])
    assert (folder / "config.json").read_text() == (trained[0] / "config.json").read_text()


@pytest.mark.parametrize("how", ["lora", "full"])
def test_interrupted_fine_tuning_goes_on(
    how: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"backbone_training": how, "checkpoint_every": 2}
    run(finetune, backbone, tmp_path / "whole", **options)
    step, calls = OptimizerSteps._step, 0

    def interrupting(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interrupted
        step(*args, **kwargs)

    monkeypatch.setattr(OptimizerSteps, "_step", interrupting)
    with pytest.raises(Interrupted):
        run(finetune, backbone, tmp_path / "parts", **options)
    monkeypatch.setattr(OptimizerSteps, "_step", step)
    run(finetune, backbone, tmp_path / "parts", resume=True, **options)
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")
    assert read_record(tmp_path / "parts") == read_record(tmp_path / "whole")


def test_a_finished_model_is_not_trained_again(backbone: Path, trained: tuple[Path, list[str]]) -> None:
    with pytest.raises(FileExistsError, match="holds a finished model"):
        run(train, backbone, trained[0])
    assert run(train, backbone, trained[0], checkpoint_every=2, resume=True) == [
        f"{trained[0]} holds a finished model: nothing to resume."
    ]


@pytest.mark.parametrize("policy_data", ["held_out", "filled"])
def test_what_the_policy_learns_from_and_where_it_may_leave(
    policy_data: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, given = policy_phase.choose_policy, list[tuple[int, int]]()

    def noting(*args: Any, **kwargs: Any) -> Any:
        given.append((len(args[0]), len(args[0].first_groups(kwargs["judged_groups"]))))
        assert args[1].min_exit_layer == 2
        return choose(*args, **kwargs)

    monkeypatch.setattr(policy_phase, "choose_policy", noting)
    changes = {"policy_data": policy_data, "backbone_training": "frozen", "rounds": 0, "min_exit_layer": 2}
    run(train, backbone, tmp_path / "model", **changes)
    ((learnt, judged),) = given
    assert 140 < learnt <= 150 if policy_data == "filled" else learnt == judged
    assert 0 < judged < 100
    record = read_record(tmp_path / "model")
    assert record["validation"]["num_examples"] == judged
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.min_exit_layer == 2
    ids = torch.tensor([[5, 6, 7]])
    output = model.generate(ids, threshold=0.0, max_new_tokens=4, return_dict_in_generate=True)
    assert int(output.exit_layers[:, 1:].max()) == 2
    with pytest.raises(ValueError, match="min_exit_layer must be at most 2, the number of layers, got 9"):
        run(train, backbone, tmp_path / "other", min_exit_layer=9)


def test_other_settings_do_not_resume(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_phase, "choose_policy", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, backbone, tmp_path / "model")
    with pytest.raises(ValueError, match="has exit_head = shared, this one low_rank"):
        run(train, backbone, tmp_path / "model", resume=True, exit_head="low_rank")


# --- The steps ---


def test_parts_of_a_batch_and_chunks_do_not_change_plain_fine_tuning(backbone: Path, tmp_path: Path) -> None:
    run(finetune, backbone, tmp_path / "one")
    run(
        finetune,
        backbone,
        tmp_path / "parts",
        gradient_accumulation_steps=4,
        logit_rows=3,
        gradient_checkpointing=True,
    )
    one, parts = read_weights(tmp_path / "one"), read_weights(tmp_path / "parts")
    assert max(float((one[name] - parts[name]).abs().max()) for name in one) < 2e-4


def test_steps_weigh_rows_by_their_response_tokens(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    step = OptimizerSteps._step

    def noting(self: Any, rows: Any, *args: Any) -> None:
        batch = self.collate([self.rows[row] for row in rows])
        batch.pop("index")
        with torch.no_grad():
            wanted = float(self.model(**batch).loss)  # Hugging Face's mean over response tokens
        self.figures.clear()
        step(self, rows, *args)
        seen.append((wanted, self.figures["loss"]))

    monkeypatch.setattr(OptimizerSteps, "_step", noting)
    run(finetune, backbone, tmp_path / "model")
    for wanted, found in seen:
        assert found == pytest.approx(wanted, rel=1e-5)


# --- Errors ---


def test_a_generator_of_one_layer_gets_no_exits(tmp_path: Path) -> None:
    shallow = tiny_decoder(tmp_path / "shallow", layers=1)
    with pytest.raises(SettingError, match="Layers of a model with exits must be at least 2, got 1"):
        run(train, shallow, tmp_path / "model")
    run(finetune, shallow, tmp_path / "plain")


def test_too_few_rows_are_refused_before_the_first_step(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptimizerSteps, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(
        ValueError, match=r"rows must be at least 2, got 1 of 10 rows\. .*validation_fraction"
    ):
        train(
            backbone=backbone,
            train_data=tiny_instructions(10),
            output_dir=tmp_path / "m",
            config=quick_generation_config(validation_fraction=0.1),
        )


def test_a_frozen_backbone_is_not_fine_tuned(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="backbone_training must be full or lora to fine-tune the plain model"
    ):
        run(finetune, backbone, tmp_path / "model", backbone_training="frozen")


def test_missing_peft_is_named(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(extra: str, module: str) -> None:
        raise ImportError(f"{module} of {extra}")

    monkeypatch.setattr(adapters, "require_extra", missing)
    with pytest.raises(ImportError, match="peft of lora"):
        run(train, backbone, tmp_path / "model", backbone_training="lora")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"exit_head": "own"}, "exit_head must be one of shared, low_rank, separate"),
        ({"backbone_training": "some"}, "backbone_training must be one of full, lora, frozen"),
        ({"layers_per_step": 0}, "layers_per_step must be above 0, got 0"),
        ({"last_layer_share": 1.5}, r"last_layer_share must be in \[0, 1\], got 1.5"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be above 0, got 0"),
        ({"backbone_training": "frozen", "last_layer_share": 1.0}, "last_layer_share must be below 1"),
        (
            {"reward_target": "last_layer", "reward_loss": "cross_entropy"},
            "reward_loss must be regret or error for reward_target last_layer",
        ),
        ({"reward_target": "both"}, 'reward_target must be one of reference, last_layer, got "both"'),
        ({"reward_loss": "hinge"}, "reward_loss must be one of regret, error, cross_entropy"),
        ({"policy_data": "seen"}, "policy_data must be one of held_out, filled"),
        ({"min_exit_layer": 0}, "min_exit_layer must be at least 1, got 0"),
        (
            {"policy_tokens": 1},
            "policy_tokens must be at least 2, got 1",
        ),  # half of them judge the other half's
        ({"num_rollouts": 0}, "num_rollouts must be at least 1, got 0"),
        ({"logit_rows": 0}, "logit_rows must be above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationTrainingConfig(**changes)


def test_settings_as_plain_values() -> None:
    config = GenerationTrainingConfig(max_prompt_length=100, layer_costs=(0.1,))
    assert GenerationTrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        GenerationTrainingConfig.from_dict({"max_prompt_length": None, "learning_rate": "1e-5"}).learning_rate
        == 1e-5
    )
    for values, message in (
        ({"lora_ran": 3}, '"lora_ran" is not a training setting. Did you mean "lora_rank"'),
        ({"max_prompt_length": 0.5}, "max_prompt_length must be a whole number, got 0.5"),
        ({"prompt_template": 3}, "prompt_template must be text, got 3"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be true or false, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationTrainingConfig.from_dict(values)
