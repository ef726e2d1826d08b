"""Text generators in the hands of other libraries: transformers' `Trainer`, peft, more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from consistentee.models.causal_lm import EarlyExitForCausalLM
from tiny_decoders import VOCABULARY, tiny_exit_model

ROWS = [
    {"input_ids": ids, "attention_mask": [1] * 6, "labels": ids}
    for ids in ([[2 + (start + step) % 5 for step in range(6)] for start in range(16)])
]
"""Counting from 2 to 6, over and over."""

pytestmark = pytest.mark.usefixtures("one_thread")


def token_accuracy(prediction: Any) -> dict[str, float]:
    """Share of next tokens that are right; `predictions` must be the logits, (rows, tokens, vocabulary)."""
    assert prediction.predictions.shape == (len(ROWS), 6, VOCABULARY)
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(np.mean(right))}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains_and_evaluates(tmp_path: Path, smoothing: float) -> None:
    model = tiny_exit_model("llama")
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=8,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        label_smoothing_factor=smoothing,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows: Any = ROWS
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=token_accuracy)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.5 < 0.8 < after  # with labels that were not shifted it would learn to repeat
    assert trainer.predict(rows).metrics["test_accuracy"] == after
    trainer.save_model(str(tmp_path / "saved"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    inputs = torch.tensor([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, model.eval()(inputs).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trainer_checkpoints_layers(tmp_path: Path) -> None:
    rows: Any = ROWS
    weights = []
    for checkpointed in (False, True):
        model: Any = tiny_exit_model("llama")
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=2,
            gradient_checkpointing=checkpointed,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.eval().state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, msg=name)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "mode": "full"}
    prompt = torch.tensor([[3, 4, 5]])
    expected = model.backbone.generate(prompt, max_new_tokens=4, do_sample=False)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_another_lm_head(model_type: str) -> None:
    model: Any = tiny_exit_model(model_type, tie_word_embeddings=False)
    prompt = torch.tensor([[3, 4, 5]])
    model.generate(prompt, max_new_tokens=2)  # lays weights out
    head = torch.nn.Linear(32, VOCABULARY, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    options: Any = {"max_new_tokens": 6, "do_sample": False}
    expected = model.backbone.generate(prompt, **options)
    assert model.generate(prompt, mode="full", **options).tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_pruning_is_seen_by_a_model_that_has_generated(model_type: str) -> None:
    model: Any = tiny_exit_model(model_type)
    prompt = torch.tensor([[3, 4, 5], [5, 9, 60]])
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    texts = [model.generate(prompt, mode="full", **options).tolist()]
    linears = [layer for layer in model.backbone.modules() if isinstance(layer, torch.nn.Linear)]
    for share in (0.3, 0.5, 0.5):
        for layer in linears:
            prune.l1_unstructured(layer, "weight", share)
        texts.append(model.generate(prompt, mode="full", **options).tolist())
        assert texts[-1] == model.backbone.generate(prompt, **options).tolist() != texts[-2]
    with torch.no_grad():
        linears[0].get_parameter("weight_orig").mul_(-3.0)
    texts.append(model.generate(prompt, mode="full", **options).tolist())
    assert texts[-1] == model.backbone.generate(prompt, **options).tolist() != texts[-2]


def test_layers_of_another_make_are_seen() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model: Any = tiny_exit_model("llama")
    prompt = torch.tensor([[5, 9, 60]])
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(prompt, mode="full", **options).tolist()
    for layer in model.backbone.model.layers:
        for name in ("q_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = Doubled
    found = model.generate(prompt, mode="full", **options).tolist()
    assert found == model.backbone.generate(prompt, **options).tolist() != before


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # of older transformers
def test_weights_that_lie_elsewhere_are_refused() -> None:
    model: Any = tiny_exit_model("llama")
    prompt = torch.tensor([[3, 4, 5]])
    options: Any = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, mode="full", **options).tolist()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"in memory on one device .*, got \d+ elsewhere, .*device_map"):
        model.generate(prompt, **options)
    assert model.generate(prompt, mode="full", use_cache=False, **options).tolist() == expected


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
class TestLora:
    def config(self, **values: Any) -> peft.LoraConfig:
        return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **values)

    def test_trains_saves_and_loads(self, tmp_path: Path) -> None:
        tiny_exit_model("llama").save_pretrained(tmp_path / "model")

        def base() -> EarlyExitForCausalLM:
            return EarlyExitForCausalLM.from_pretrained(tmp_path / "model").eval()

        adapted: Any = peft.get_peft_model(base(), self.config(modules_to_save=["exit_heads", "policy"]))
        inputs = torch.tensor([row["input_ids"] for row in ROWS])
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses: list[float] = []
        for _ in range(12):
            loss = adapted(input_ids=inputs, labels=inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.5
        adapted.eval()
        with torch.no_grad():  # what a training of the exits would change
            for name, weight in adapted.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded: Any = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        prompt = inputs[:2, :3]
        with torch.no_grad():
            assert torch.equal(loaded(inputs).logits, adapted(inputs).logits)
        expected = adapted.generate(input_ids=prompt, **options)
        outputs = [loaded.generate(input_ids=prompt, **options)]
        merged: Any = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        outputs.append(merged.generate(prompt, **options))
        opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        outputs.append(opened.generate(prompt, **options))
        for output in outputs:
            assert output.sequences.tolist() == expected.sequences.tolist()
            assert output.exit_layers.tolist() == expected.exit_layers.tolist()

    def test_merging_is_seen_by_a_model_that_has_generated(self) -> None:
        model: Any = tiny_exit_model("llama")
        prompt = torch.tensor([[3, 4, 5]])
        before = model.generate(prompt, max_new_tokens=8, do_sample=False)
        adapted: Any = peft.get_peft_model(model, self.config(init_lora_weights=False))
        with torch.no_grad():
            expected = adapted.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
            assert expected.tolist() != before.tolist()
            merged = adapted.merge_and_unload().generate(prompt, max_new_tokens=8, do_sample=False)
        assert merged.tolist() == expected.tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_embeddings_can_be_resized(tmp_path: Path, model_type: str, exit_head: str, tied: bool) -> None:
    model: Any = tiny_exit_model(model_type, exit_head, tie_word_embeddings=tied)
    prompt = torch.tensor([[3, 4, 5]])
    options: Any = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    model.generate(prompt, **options)  # lays weights out
    with torch.no_grad():
        before = model(prompt).logits
        assert model.resize_token_embeddings(VOCABULARY + 7) is model.get_input_embeddings()
        after = model(prompt).logits
    assert after.shape[-1] == model.config.vocab_size == VOCABULARY + 7
    # A product of another width may add up in another order on some processors.
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=1e-5, atol=1e-5)
    written = model.generate(prompt, **options)
    model.save_pretrained(tmp_path)
    opened: Any = EarlyExitForCausalLM.from_pretrained(tmp_path).eval()
    again = opened.generate(prompt, **options)
    assert again.sequences.tolist() == written.sequences.tolist()
    assert again.exit_layers.tolist() == written.exit_layers.tolist()
    exits = [model.exit_logits(index, torch.zeros(1, 32)).shape[-1] for index in range(model.num_layers)]
    assert exits == [VOCABULARY + 7] * model.num_layers
    model.resize_token_embeddings(VOCABULARY - 9)
    assert int(model.generate(prompt, **options).sequences.max()) < VOCABULARY - 9
