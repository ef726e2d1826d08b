"""Classifiers in the hands of other libraries: transformers' `Trainer` and pipelines, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.pipelines.classifier import Engine
from consistentee.training.train import train
from quick import quick_config
from tiny import LABEL_NAMES, tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model

BOTH = pytest.mark.parametrize("make", [tiny_model, tiny_full_depth_model])
peft_asks = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def rows_of(tokenizer: Any, count: int = 64) -> list[dict[str, Any]]:
    data = tiny_dataset(count)
    return [
        {**tokenizer(text), "label": label} for (text,), label in zip(data.texts, data.labels, strict=True)
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    assert prediction.predictions.shape == (64, 2)  # class logits, and nothing beside them
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@BOTH
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains_and_evaluates(tmp_path: Path, make: Any, smoothing: float) -> None:
    folder = make(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), head_dropout=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows: Any = rows_of(tokenizer)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=6,
        learning_rate=5e-3,
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
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.75 < 0.9 < after
    output = trainer.predict(rows)
    assert output.metrics["test_accuracy"] == after
    trainer.save_model(str(tmp_path / "saved"))
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = [text for (text,) in tiny_dataset(64).texts]
    labels = [prediction.label for prediction in Engine.from_pretrained(tmp_path / "saved").predict(texts)]
    assert labels == [LABEL_NAMES[index] for index in output.predictions.argmax(-1)]


class TestLora:
    def config(self, **values: Any) -> peft.LoraConfig:
        return peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **values)

    @peft_asks
    @pytest.mark.parametrize(
        "model_class, heads",
        [
            (EarlyExitForSequenceClassification, ["classifiers", "policy"]),
            (FullDepthForSequenceClassification, ["classifiers"]),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
    def test_trains_saves_and_loads(self, tmp_path: Path, model_class: Any, heads: list[str]) -> None:
        backbone = tiny_backbone(tmp_path / "backbone")
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        rows = rows_of(tokenizer)
        batch = dict(DataCollatorWithPadding(tokenizer)(rows))

        def base() -> Any:  # its heads are random, and others every time
            return model_class.from_backbone(backbone, label_names=LABEL_NAMES, head_dropout=0.0)

        adapted: Any = peft.get_peft_model(base(), self.config(modules_to_save=heads))
        trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
        losses: list[float] = []
        for _ in range(15):
            loss = adapted(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.1
        adapted.eval()
        adapted.save_pretrained(tmp_path / "adapter")
        loaded: Any = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
        del batch["labels"]
        with torch.no_grad():
            expected = adapted(**batch).logits
            assert torch.equal(loaded(**batch).logits, expected)
            merged = loaded.merge_and_unload()
            merged.save_pretrained(tmp_path / "merged")
            tokenizer.save_pretrained(tmp_path / "merged")
            torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        texts = [text for (text,) in tiny_dataset(64).texts]
        labels = [
            prediction.label for prediction in Engine.from_pretrained(tmp_path / "merged").predict(texts)
        ]
        assert labels == [LABEL_NAMES[index] for index in expected.argmax(-1)]

    @peft_asks
    def test_an_engine_asks_for_merged_adapters(self, tmp_path: Path) -> None:
        model = EarlyExitForSequenceClassification.from_pretrained(
            tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
        )
        engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
        peft.get_peft_model(model, self.config())
        with pytest.raises(ValueError, match="merge_and_unload"):
            Engine(type(engine.saved)(model, engine.saved.tokenizer, {}, "adapted"))


@peft_asks
def test_prompts_can_be_tuned(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(DataCollatorWithPadding(tokenizer)(rows_of(tokenizer)))
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=32, num_layers=3, num_attention_heads=4
    )
    tuned: Any = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), config)
    tuned(**batch).loss.backward()
    assert float(tuned.prompt_encoder.default.embedding.weight.grad.abs().min()) > 0


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_embeddings_in_place_of_ids(tmp_path: Path, model_type: str) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", model_type)
    ids = torch.tensor([[0, 9, 8, 7, 2], [0, 9, 8, 2, 2]])
    with torch.no_grad():
        for make, model_class in (
            (tiny_model, EarlyExitForSequenceClassification),
            (tiny_full_depth_model, FullDepthForSequenceClassification),
        ):
            model: Any = model_class.from_pretrained(make(tmp_path / make.__name__, backbone)).eval()
            vectors = model.get_input_embeddings()(ids)
            expected = model(ids).logits
            torch.testing.assert_close(model(inputs_embeds=vectors).logits, expected)
            for given in ({}, {"input_ids": ids, "inputs_embeds": vectors}):
                with pytest.raises(
                    ValueError, match="input_ids or inputs_embeds must be given, and not both"
                ):
                    model(**given)
            with pytest.raises(
                ValueError, match=r"inputs_embeds must have the shape \(batch, tokens, embedding"
            ):
                model(inputs_embeds=ids.float())
            with pytest.raises(ValueError, match="output_hidden_states must not be set"):
                model(ids, output_hidden_states=True)


class TestPipeline:
    @BOTH
    @pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet", "deberta-v2", "modernbert"])
    @pytest.mark.parametrize("max_length", [40, 200])
    def test_cuts_as_the_engine(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, model_type: str, max_length: int
    ) -> None:
        backbone = tiny_backbone(tmp_path / "backbone", model_type)
        folder = make(tmp_path / "model", backbone, max_length=max_length)
        classify: Any = pipeline("text-classification", model=str(folder), device="cpu")
        assert "not supported" not in caplog.text
        engine = Engine.from_pretrained(folder, device="cpu")
        texts = ["word " * 2000, "bad " * 45 + "good " * 30, "a film"]
        pairs = [("good " * 9, "bad " * 90), ("good " * 90, "bad " * 9), ("a " * 50, "film " * 60)]
        answers = classify(texts) + classify([{"text": one, "text_pair": two} for one, two in pairs])
        for answer, expected in zip(answers, [*engine.predict(texts), *engine.predict(pairs)], strict=True):
            assert answer["label"] == expected.label
            assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
        assert classify(texts, batch_size=2)[0]["label"] == answers[0]["label"]
        shorter = classify("bad " * 45 + "good " * 30, truncation=True, max_length=9)
        assert shorter[0]["score"] == pytest.approx(engine.predict(["bad " * 7])[0].score, abs=1e-5)

    def test_of_other_models_is_as_ever(self, tmp_path: Path) -> None:
        from transformers import AutoConfig

        backbone = tiny_backbone(tmp_path / "backbone")
        plain = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(backbone))
        classify: Any = pipeline(
            "text-classification",
            model=plain,
            tokenizer=AutoTokenizer.from_pretrained(backbone),
            device="cpu",
        )
        assert classify("a film")[0]["label"] in ("LABEL_0", "LABEL_1")
        with pytest.raises((RuntimeError, IndexError)):
            classify("word " * 2000)

    def test_a_training_saves_its_length_with_the_tokenizer(self, tmp_path: Path) -> None:
        folder = train(
            backbone=tiny_backbone(tmp_path / "backbone"),
            train_data=tiny_dataset(32),
            output_dir=tmp_path / "run",
            config=quick_config(max_length=24, rounds=0),
        )
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 24
