"""A saved model, opened: model, tokenizer, training record, and the exit rule that a call is to use.

`load_model` opens either kind, by the table `KINDS`: a text classifier or a text generator, ours or a plain one of
Hugging Face's.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from typing_extensions import TypeVar

from consistentee.atomic_files import user_path
from consistentee.backbones.decoders import keep_soft_cap
from consistentee.backbones.limits import ROTARY, check_tokenizer, longest_input
from consistentee.backbones.loading import load_pretrained, load_tokenizer, read_config
from consistentee.data.literal import read_special_tokens
from consistentee.data.tasks import TASKS, GenerationTask
from consistentee.data.templates import PromptTemplate, prompt_template
from consistentee.errors import SettingError
from consistentee.functional.criteria import CRITERIA, GENERATION_CRITERIA, check_fitted, check_threshold
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.configuration import EarlyExitCausalLMConfig, EncoderClassifierConfig
from consistentee.models.operating_points import point_or_rule
from consistentee.models.record import read_record
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions by the names that the command line takes."""

MAX_NEW_TOKENS = 256
"""Longest text where neither the caller nor the task says how long."""

LONGEST_CONTEXT = 4096
"""Tokens of prompt and text together where the model's configuration names no limit."""

ExitModel = TypeVar("ExitModel", bound=PreTrainedModel, default=Any)


@dataclass(frozen=True)
class LoadedModel(Generic[ExitModel]):
    """What a folder holds.

    Args:
        model: in evaluation mode, on its device: one with exits, or a plain one.
        tokenizer: its Hugging Face tokenizer; None for a shape that is to be timed.
        record: the training record; empty where the folder has none.
        name: the folder or hub name, for messages.

    Raises:
        ValueError: the tokenizer has more entries than the model has embeddings, or no padding token.
    """

    model: PreTrainedModel
    tokenizer: Any
    record: Mapping[str, Any]
    name: str

    # What tells one kind from the other.
    kind: ClassVar[str]
    used_by: ClassVar[str]
    wants: ClassVar[str]
    exits_by: ClassVar[str]
    auto_class: ClassVar[Any]
    architectures: ClassVar[tuple[str, ...]]
    exit_model: ClassVar[type[PreTrainedModel]]
    criteria: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            self._prepare_tokenizer()
            check_tokenizer(self.tokenizer, self.model.get_input_embeddings(), self.name)

    def _prepare_tokenizer(self) -> None:
        """Set the tokenizer as the kind needs it."""

    @property
    def has_exits(self) -> bool:
        """Whether inputs or tokens can exit before the last layer."""
        return isinstance(self.model, self.exit_model)

    @property
    def early_exit_model(self) -> ExitModel:
        """The model, known to have exits.

        Raises:
            ValueError: it is another kind of model.
        """
        if not self.has_exits:
            raise ValueError(
                f'Model "{self.name}" has no exits (it is a {type(self.model).__name__}). '
                f"{self.exits_by} a folder that `consistentee train` saved; a plain model can be its --reference."
            )
        return cast(ExitModel, self.model)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def task(self) -> str | None:
        """The task it was trained for, or None."""
        value = getattr(self.model.config, "task", None) or self.record.get("task")
        return None if value is None else str(value)

    def known_threshold(self, criterion: str) -> float | None:
        """The threshold that was saved for a criterion, or that training chose for it; or None."""
        config: Any = self.early_exit_model.config
        if criterion == config.criterion:
            return config.threshold
        known = {**(self.record.get("thresholds") or {}), **(getattr(config, "thresholds", None) or {})}
        return None if known.get(criterion) is None else float(known[criterion])

    def exit_rule(
        self,
        criterion: str | None = None,
        threshold: float | None = None,
        operating_point: str | None = None,
    ) -> tuple[str, float]:
        """Criterion and threshold to use: the given ones, the saved ones, or those the training record knows.

        Args:
            criterion: one of `criteria`; None takes the saved one.
            threshold: None takes the known one.
            operating_point: in place of both, one that `consistentee calibrate` saved, by name.

        Raises:
            ValueError: the model has no exits, an unknown criterion, a threshold that does not fit, or none to be
                found; an operating point that is not there, or beside a criterion or threshold.
        """
        config: Any = self.early_exit_model.config
        points = getattr(config, "operating_points", None)
        criterion, threshold = point_or_rule(points, operating_point, criterion, threshold, self.name)
        rule: str = config.criterion if criterion is None else criterion
        if rule not in self.criteria:
            raise ValueError(f'criterion must be one of {", ".join(self.criteria)}, got "{rule}".')
        check_fitted(rule, config)
        limit = self.known_threshold(rule) if threshold is None else threshold
        if limit is None:
            raise ValueError(
                f'Model "{self.name}" has no threshold for criterion "{rule}". Give one with --threshold.'
            )
        return rule, check_threshold(limit, rule)


class LoadedClassifier(LoadedModel[EarlyExitForSequenceClassification]):
    """A text classifier: see `LoadedModel`."""

    kind = "a text classifier"
    used_by = "`consistentee predict` or `Engine`"
    wants = "a trained classifier, not of an encoder alone"
    exits_by = "Give it exits with `consistentee retrofit`, or give"
    auto_class = AutoModelForSequenceClassification
    architectures = ("ForSequenceClassification",)
    exit_model = EarlyExitForSequenceClassification
    criteria = CRITERIA

    def _prepare_tokenizer(self) -> None:
        if isinstance(self.model.config, EncoderClassifierConfig):
            read_special_tokens(self.tokenizer, self.model.config.parse_special_tokens)

    @property
    def parse_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are special tokens to it; of a plain model its tokenizer says."""
        return not self.tokenizer.split_special_tokens

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names by index."""
        names: dict[Any, Any] = dict(self.model.config.id2label or {})
        return tuple(str(names[index]) for index in sorted(names))

    @property
    def text_pairs(self) -> bool | None:
        """Whether an input is a pair of texts, or one text; None where the folder does not say."""
        return getattr(self.model.config, "text_pairs", None)

    def check_texts(self, count: int, where: str) -> None:
        """Check that inputs are of as many texts as the model takes.

        Args:
            count: texts of an input, 1 or 2.
            where: which inputs, for the message.

        Raises:
            ValueError: they are pairs for a model of single texts, or the other way round.
        """
        if self.text_pairs is None or self.text_pairs == (count == 2):
            return
        takes, remedy = (
            ("pairs of texts", 'Give two texts: ("first", "second"), or two text columns.')
            if self.text_pairs
            else ("single texts", "Give one text, or one text column.")
        )
        got = "a single text" if self.text_pairs else "a pair"
        raise ValueError(f'Model "{self.name}" takes {takes}, and {where} is {got}. {remedy}')

    @property
    def max_length(self) -> int:
        """Tokens per input: what it was trained with, else as many as it takes, at most 512."""
        if isinstance(self.model.config, EncoderClassifierConfig):
            return self.longest
        return min(self.longest, 512)

    @property
    def longest(self) -> int:
        """Tokens that an input may have: what it was trained with, else what tokenizer and positions allow."""
        config = self.model.config
        if isinstance(config, EncoderClassifierConfig):
            return config.max_input_length
        positions = config.max_position_embeddings if config.model_type in ROTARY else longest_input(config)
        return min(int(self.tokenizer.model_max_length), positions or sys.maxsize)

    def length_beside(self, other: LoadedClassifier) -> int:
        """Tokens per input where it is compared with another model: its own, or the other's that are more."""
        return max(self.max_length, min(self.longest, other.max_length))


class LoadedGenerator(LoadedModel[EarlyExitForCausalLM]):
    """A text generator: see `LoadedModel`. Its tokenizer pads on the left and has a padding token."""

    kind = "a text generator"
    used_by = "`consistentee generate` or `TextGenerator`"
    wants = "a whole causal language model"
    exits_by = "Give"
    auto_class = AutoModelForCausalLM
    architectures = ("ForCausalLM", "LMHeadModel")
    exit_model = EarlyExitForCausalLM
    criteria = GENERATION_CRITERIA

    def _prepare_tokenizer(self) -> None:
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f'The tokenizer of "{self.name}" has neither a padding nor an end-of-text token. Set eos_token '
                    "in its tokenizer_config.json."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def exit_rule_of_mode(
        self, mode: str, criterion: str | None = None, threshold: float | None = None
    ) -> tuple[str, float]:
        """As `exit_rule`; drafts of the policy in mode `lossless` are held to the saved `draft_threshold`, if any."""
        config = self.early_exit_model.config
        by_policy = (config.criterion if criterion is None else criterion) == "policy"
        if mode == "lossless" and by_policy and threshold is None:
            threshold = config.draft_threshold
        return self.exit_rule(criterion, threshold)

    @functools.cached_property
    def continuous_model(self) -> EarlyExitForCausalLM | None:
        """What decodes rows that come and go: the model, or a plain one with exits that nobody takes.

        None for a plain model of a type that exits do not know.
        """
        if self.has_exits:
            return self.early_exit_model
        try:
            model: Any = EarlyExitForCausalLM.from_backbone(self.model).eval()
        except ValueError:
            return None
        return model.to(self.model.device)

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
        saved = self.saved_template
        if spec is None and saved is not None:
            try:
                return PromptTemplate.from_dict(saved, self.tokenizer)
            except ValueError as error:
                raise ValueError(f'Model "{self.name}": {error} Restore it, or name another.') from error
        parse = bool((saved or {}).get("parse_special_tokens", False))
        return prompt_template(spec, self.tokenizer, parse_special_tokens=parse)

    @property
    def saved_template(self) -> Mapping[str, Any] | None:
        """The template it was trained with, as `PromptTemplate.to_dict` gave it; None where the folder has none."""
        values = getattr(self.model.config, "prompt_template", None) or self.record.get("prompt_template")
        return values if isinstance(values, Mapping) else None


KINDS: tuple[type[LoadedModel], ...] = (LoadedClassifier, LoadedGenerator)
Loaded = TypeVar("Loaded", bound=LoadedModel, default=LoadedModel)


def load_model(
    name_or_path: str | Path,
    kind: type[Loaded] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    original: str | Path | None = None,
) -> Loaded:
    """Open a saved model of either kind, ours or a plain Hugging Face one.

    Weights are read from safetensors files only, and code that comes with a model is not run.

    Args:
        name_or_path: folder, or name on the hub.
        kind: `LoadedClassifier` or `LoadedGenerator`, where it must be one; None takes what it is.
        device: where the model goes; None takes a GPU if there is one.
        dtype: precision, `float32`, `bfloat16` or `float16`; None takes float32.
        original: of exits that were saved alone (`retrofit --exits-only`): where the model that they are for lies now;
            None takes where it lay.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config or weights.
        OSError: the hub has no such model, or a file cannot be read.
        ValueError: it is of another kind, its weights are pickled or incomplete, its tokenizer does not fit, there is
            no such device or dtype, or an original that is not what it was or is not asked for.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SettingError(f'dtype must be one of {", ".join(DTYPES)}, got "{dtype}".')
        dtype = DTYPES[dtype]
    device = usable_device(device)
    name, found = str(name_or_path), model_kind(name_or_path)
    if found is None and kind is None:
        raise ValueError(f'Model "{name}" must be {" or ".join(row.kind for row in KINDS)}, and is neither.')
    if found is not None and kind is not None and found is not kind:
        raise ValueError(f'Model "{name}" is {found.kind}, not {kind.kind}. Use it with {found.used_by}.')
    opens: Any = found or kind
    if original is not None and not read_config(name_or_path, "Model").get("exits_only"):
        raise SettingError(
            f'original goes with exits that were saved alone, and model "{name}" has all of its weights, got '
            f'"{original}". Leave it out.'
        )
    place_of_original: dict[str, Any] = {} if original is None else {"original": original}
    model: Any = load_pretrained(
        opens.auto_class,
        name_or_path,
        "Model",
        remedy=f"Give the folder of {opens.wants}.",
        dtype=dtype or torch.float32,
        **place_of_original,
    )
    keep_soft_cap(model)
    tokenizer = load_tokenizer(name_or_path, "Model")
    return opens(model.to(device).eval(), tokenizer, read_record(user_path(name_or_path)), name)


def short_name(name: str) -> str:
    """The last part of a folder, however it is written (`.`), or of a name on the hub: what others may see of it."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return os.path.basename(os.path.abspath(folder)) or name
    return name.replace("\\", "/").rstrip("/").split("/")[-1]


def model_kind(name_or_path: str | Path) -> type[LoadedModel] | None:
    """What `load_model` makes of a folder or a name on the hub, by its configuration alone; None for neither kind.

    Raises:
        FileNotFoundError, OSError, ValueError: as `load_model`.
    """
    names: Any = read_config(name_or_path, "Model").get("architectures")
    for name in names if isinstance(names, list) else ():
        for row in KINDS:
            if str(name).endswith(row.architectures):
                return row
    return None


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device by this name; None for the first GPU if there is one, else the CPU.

    Raises:
        SettingError: torch does not know it, or it is not there.
    """
    has_gpu = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if has_gpu else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        known = "cpu, cuda, cuda:1, ..." if has_gpu else "cpu (torch sees no GPU here)"
        raise SettingError(f'device must be one that is there: {known}, got "{device}".') from error
    return found
