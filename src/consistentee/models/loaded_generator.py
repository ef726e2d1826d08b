"""A saved generator folder, opened: model, tokenizer, training record, prompt template, exit rule and lengths."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from consistentee.backbones.decoders import keep_soft_cap
from consistentee.backbones.limits import check_tokenizer
from consistentee.data.tasks import TASKS, GenerationTask
from consistentee.data.templates import PromptTemplate, prompt_template
from consistentee.errors import SettingError
from consistentee.functional.token_criteria import GENERATION_CRITERIA, check_generation_threshold
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.causal_lm_configuration import EarlyExitCausalLMConfig
from consistentee.models.loaded_classifier import (
    default_device,
    loading,
    model_source,
    read_record,
    usable_device,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions by the names that the command line takes."""

MAX_NEW_TOKENS = 256
"""Longest text where neither the caller nor the task says how long."""

LONGEST_CONTEXT = 4096
"""Tokens of prompt and text together where the model's configuration names no limit."""


@dataclass(frozen=True)
class SavedGenerator:
    """What a folder holds.

    Args:
        model: in evaluation mode, on its device: an `EarlyExitForCausalLM`, or a causal language model without exits.
        tokenizer: its Hugging Face tokenizer; pads on the left and has a padding token.
        record: the training record; empty where the folder has none.
        name: the folder or hub name, for messages.

    Raises:
        ValueError: the tokenizer has more entries than the model has embeddings, or no padding token.
    """

    model: PreTrainedModel
    tokenizer: Any
    record: Mapping[str, Any]
    name: str

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer, self.model.get_input_embeddings(), self.name)

    @property
    def has_exits(self) -> bool:
        """Whether tokens can leave before the last layer."""
        return isinstance(self.model, EarlyExitForCausalLM)

    @property
    def early_exit_model(self) -> EarlyExitForCausalLM:
        """The model, known to have exits.

        Raises:
            ValueError: it is another kind of model.
        """
        if not isinstance(self.model, EarlyExitForCausalLM):
            raise ValueError(
                f'Model "{self.name}" has no exits (it is a {type(self.model).__name__}). '
                "Give a folder that `consistentee train` saved; a plain model can be its --reference."
            )
        return self.model

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def task(self) -> str | None:
        """The task it was trained for, or None."""
        value = getattr(self.model.config, "task", None) or self.record.get("task")
        return None if value is None else str(value)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and text together that the model was made for."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else LONGEST_CONTEXT

    @property
    def max_length(self) -> int:
        """Tokens of prompt and response together: what it was trained with, else what it was made for."""
        if isinstance(self.model.config, EarlyExitCausalLMConfig):
            return min(self.model.config.max_sequence_length, self.context_length)
        return self.context_length

    @property
    def max_new_tokens(self) -> int:
        """How long a text gets where nobody says: as long as the texts of its task."""
        task = TASKS.get(self.task or "")
        return task.max_new_tokens if isinstance(task, GenerationTask) else MAX_NEW_TOKENS

    def prompt_template(self, spec: str | os.PathLike[str] | None = None) -> PromptTemplate:
        """How prompts are written.

        Args:
            spec: what `templates.prompt_template` takes; None takes the saved one, and where there is none, the
                tokenizer's chat template or Alpaca's.

        Raises:
            DataError: there is no such template, or it is none.
            ValueError: the saved one cannot be used with this tokenizer.
        """
        if spec is None and self.saved_template is not None:
            try:
                return PromptTemplate.from_dict(self.saved_template, self.tokenizer)
            except ValueError as error:
                raise ValueError(f'Model "{self.name}": {error} Restore it, or name another.') from error
        parse = bool((self.saved_template or {}).get("parse_special_tokens", False))
        return prompt_template(spec, self.tokenizer, parse_special_tokens=parse)

    @property
    def saved_template(self) -> Mapping[str, Any] | None:
        """The template it was trained with, as `PromptTemplate.to_dict` gave it; None where the folder has none."""
        values = getattr(self.model.config, "prompt_template", None) or self.record.get("prompt_template")
        return values if isinstance(values, Mapping) else None

    def known_threshold(self, criterion: str) -> float | None:
        """The threshold that was saved for a criterion, or None."""
        known = self.early_exit_model.known_threshold(criterion)
        if known is None:
            known = (self.record.get("thresholds") or {}).get(criterion)
        return None if known is None else float(known)

    def exit_rule(self, criterion: str | None = None, threshold: float | None = None) -> tuple[str, float]:
        """Criterion and threshold to use: the given ones or the saved ones.

        Args:
            criterion: one of `criteria.GENERATION_CRITERIA`; None takes the saved one.
            threshold: None takes the one that was saved for the criterion.

        Raises:
            ValueError: the model has no exits, an unknown criterion, a threshold that does not fit, or none to be
                found.
        """
        rule = criterion or self.early_exit_model.config.criterion
        if rule not in GENERATION_CRITERIA:
            raise ValueError(f'criterion must be one of {", ".join(GENERATION_CRITERIA)}, got "{rule}".')
        limit = self.known_threshold(rule) if threshold is None else threshold
        if limit is None:
            raise ValueError(
                f'Model "{self.name}" has no threshold for criterion "{rule}". Give one with --threshold.'
            )
        return rule, check_generation_threshold(limit, rule)


def open_generator(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> SavedGenerator:
    """Open a folder with an early-exit causal language model, or with a plain one.

    Weights are read from safetensors files only, and code that comes with a model is not run.

    Args:
        name_or_path: folder, or name on the hub.
        device: where the model goes; None takes a GPU if there is one.
        dtype: precision, `float32`, `bfloat16` or `float16`; None takes float32.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config or weights.
        OSError: the hub has no such model, or a file cannot be read.
        ValueError: it is no causal language model, its weights are pickled or incomplete, or there is no such dtype.
    """
    name = str(name_or_path)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SettingError(f'dtype must be one of {", ".join(DTYPES)}, got "{dtype}".')
        dtype = DTYPES[dtype]
    place = default_device() if device is None else usable_device(device)
    source = model_source(name_or_path)
    with loading(name_or_path):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if _is_classifier(config):
            raise ValueError("It is a text classifier. Use `consistentee predict` with it.")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if report["missing_keys"]:
        raise ValueError(
            f'Model "{name}" lacks weights that its config asks for, such as "{min(report["missing_keys"])}". '
            "Give the folder of a whole causal language model."
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f'The tokenizer of model "{name}" has neither a padding nor an end-of-text token. Set eos_token in '
                "its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    keep_soft_cap(model)
    return SavedGenerator(model.to(place).eval(), tokenizer, read_record(source), name)


def is_generation_folder(name_or_path: str | Path) -> bool:
    """Whether a folder, or a name on the hub, holds an `EarlyExitForCausalLM`, by its configuration.

    Nothing else is opened, and False is the answer for what is not there or holds no configuration.

    Raises:
        OSError: the hub has no such model, or cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        try:
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
    else:
        try:
            source = model_source(name_or_path)
        except FileNotFoundError:
            return False
        with loading(name_or_path):
            values, _ = PreTrainedConfig.get_config_dict(source)
    return isinstance(values, dict) and values.get("model_type") == EarlyExitCausalLMConfig.model_type


def _is_classifier(config: PreTrainedConfig) -> bool:
    names = config.architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)
