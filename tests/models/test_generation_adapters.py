"""Text generators with peft's adapters: `generate` runs what is switched on, and refuses what it cannot run."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

from consistentee.inference.decoder import screened_argmax
from consistentee.models.causal_lm import EarlyExitForCausalLM
from tiny_decoders import generate, prompt, tiny_exit_model

NEW = 10
PROMPTS = [prompt(5), prompt(3, 1)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers by an old name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def adapter(*targets: str, **values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        target_modules=list(targets),
        init_lora_weights=False,
        **values,
    )


def with_adapters(model: EarlyExitForCausalLM, *configs: Any) -> Any:
    """Adapters "one", "two", ... with random weights, the first switched on."""
    torch.manual_seed(3)
    adapted: Any = peft.get_peft_model(model, configs[0], adapter_name="one")
    for name, config in zip(("two", "three"), configs[1:], strict=False):
        adapted.add_adapter(name, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name or "ln_tuning_layers" in name:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return adapted.eval()


def written(model: Any, mode: str, **options: Any) -> list[Any]:
    output = generate(model, PROMPTS, NEW, mode=mode, **options)
    return [output.sequences.tolist(), output.exit_layers.tolist()]


def full_depth(model: EarlyExitForCausalLM) -> Any:
    """Hugging Face's own loop through all layers."""
    return generate(model.backbone, PROMPTS, NEW).sequences.tolist()


class TestSwitching:
    """What is laid out for decoding follows the adapters."""

    @pytest.mark.parametrize(
        "kept", [["lm_head"], ["exit_heads", "policy"], ["confidence_classifier"], ["input_layernorm"]]
    )
    def test_generate_sees_it(self, kept: list[str]) -> None:
        model = tiny_exit_model("llama")
        base = copy.deepcopy(model)
        configs = [adapter("q_proj", modules_to_save=kept) for _ in range(2)]
        adapted = with_adapters(model, *configs, adapter("q_proj"))
        criterion = "confidence_classifier" if kept == ["confidence_classifier"] else "policy"
        how: list[dict[str, Any]] = [
            {"mode": "early-exit", "criterion": criterion, "threshold": 0.5},
            {"mode": "full"},
            {"mode": "lossless"},
        ]

        def texts() -> list[Any]:
            assert (full := written(model, "full")[0]) == full_depth(model)
            assert written(model, "lossless")[0] == full
            return [written(adapted, **options) for options in how]

        def fresh() -> list[Any]:
            model._weights = None
            return texts()

        seen = {}
        for name in ("one", "two", "three", "one"):  # the third has none of its own
            adapted.set_adapter(name)
            seen[name] = texts()
            assert fresh() == seen[name]
        assert len({str(found) for found in seen.values()}) == 3
        with adapted.disable_adapter():
            off = texts()
        assert off == [written(base, **options) for options in how]
        assert texts() == seen["one"]

    def test_nothing_is_laid_out_twice_while_all_stays(self) -> None:
        model = tiny_exit_model("llama")
        adapted = with_adapters(model, adapter("q_proj", modules_to_save=["lm_head"]))
        first = model.exit_weights()
        adapted.set_adapter("one")
        assert model.exit_weights() is first


class TestHeads:
    """The LM head that runs is the one that is asked."""

    @pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # of older pefts
    def test_an_adapter_on_the_head(self, exit_head: str, tied: bool) -> None:
        model = tiny_exit_model("llama", exit_head, tie_word_embeddings=tied)
        before = full_depth(model)
        adapted = with_adapters(
            model, adapter("q_proj", "lm_head", ensure_weight_tying=False, exclude_modules=r".*exit_heads.*")
        )
        expected = full_depth(model)
        assert expected != before
        assert written(adapted, "full")[0] == expected
        assert written(adapted, "full", output_logits=True)[0] == expected
        assert written(adapted, "lossless", adaptive_drafts=False)[0] == expected
        with_exits = written(adapted, "early-exit")
        assert written(adapted, "early-exit", output_logits=True) == with_exits
        if not tied:  # peft warns of merging an adapter of tied weights
            merged = adapted.merge_and_unload()
            assert written(merged, "full")[0] == expected
            assert written(merged, "early-exit") == with_exits

    def test_a_head_that_is_kept_beside_another_is_screened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(screened_argmax, "LEAST_WEIGHTS", 0)
        model = tiny_exit_model("llama")
        adapted = with_adapters(model, adapter("q_proj", modules_to_save=["lm_head"]))
        weights = model.exit_weights()
        written(adapted, "full")
        own = model.backbone.lm_head.modules_to_save["one"].weight
        screened: Any = weights._screened_argmax
        assert screened._weight.data_ptr() == own.data_ptr()
        with adapted.disable_adapter():
            assert written(adapted, "full")[0] == full_depth(model)

    def test_a_head_in_int8(self) -> None:
        model = tiny_exit_model("llama")
        head = nn.Sequential(model.backbone.lm_head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(head, {nn.Linear}, dtype=torch.qint8)
        model.backbone.lm_head = quantised[0]
        expected = full_depth(model)
        assert written(model, "full")[0] == expected
        assert written(model, "lossless")[0] == expected
        assert written(model, "early-exit") == written(model, "early-exit", output_logits=True)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm", "norm"])
def test_adapters_of_norms_are_refused_until_they_are_merged(norm: str) -> None:
    model = tiny_exit_model("llama")
    adapted = with_adapters(model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=[norm]))
    with pytest.raises(ValueError, match=r"norms must be plain .*, got LNTuningLayer\. .*merge_and_unload"):
        written(adapted, "full")
    expected = full_depth(model)
    assert written(adapted.merge_and_unload(), "full")[0] == expected


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
class TestSoftPrompts:
    """Learned vectors before a prompt, which `generate` has no place for."""

    @pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
    @pytest.mark.parametrize(
        "options", [{}, {"mode": "full"}, {"mode": "lossless"}, {"mode": "full", "use_cache": False}]
    )
    def test_are_refused(self, config: Any, options: dict[str, Any]) -> None:
        model = tiny_exit_model("llama")
        before = written(model, "full")
        shape = {"num_layers": 4, "token_dim": 16, "num_attention_heads": 2}
        adapted: Any = peft.get_peft_model(
            model, config(task_type="CAUSAL_LM", num_virtual_tokens=3, **shape)
        )
        adapted.eval()
        with pytest.raises(
            ValueError, match=r"adapters must not be soft prompts .*, got .*TUNING\. .*disable_adapter"
        ):
            generate(adapted, PROMPTS, NEW, **options)
        with adapted.disable_adapter():
            assert written(adapted, "full") == before
        assert written(model, "full") == before
