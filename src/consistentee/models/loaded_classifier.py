"""A saved model folder, opened: model, tokenizer, training record, and the exit rule that a call is to use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from consistentee.atomic_files import write_json
from consistentee.backbones.encoders import PICKLE_SUFFIXES, folder_or_hub_name, load_problem
from consistentee.backbones.limits import check_tokenizer, longest_input
from consistentee.data.literal import read_special_tokens
from consistentee.errors import SettingError, require_thresholds
from consistentee.functional.exits import CRITERIA, check_threshold
from consistentee.models.card import write_model_card
from consistentee.models.configuration import EncoderClassifierConfig
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification

RECORD_FILE = "training_record.json"
"""What the training leaves in the folder: settings, rounds, thresholds, figures."""


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its Hugging Face tokenizer.
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
        if self.tokenizer is not None:  # a shape to be timed has none
            check_tokenizer(self.tokenizer, self.model.get_input_embeddings(), self.name)

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
        """Tokens per input: what it was trained with, else what its tokenizer allows, at most 512.

        Never more than the model has positions for.
        """
        config = self.model.config
        if isinstance(config, EncoderClassifierConfig):
            return config.max_input_length
        longest = longest_input(config)
        return min(int(self.tokenizer.model_max_length), 512, *([] if longest is None else [longest]))

    @property
    def early_exit_model(self) -> EarlyExitForSequenceClassification:
        """The model, known to have exits.

        Raises:
            ValueError: it is another kind of model.
        """
        if not isinstance(self.model, EarlyExitForSequenceClassification):
            raise ValueError(
                f'Model "{self.name}" has no exits (it is a {type(self.model).__name__}). '
                "Give a folder that `consistentee train` saved; a plain model can be its --reference."
            )
        return self.model

    def exit_rule(self, criterion: str | None = None, threshold: float | None = None) -> tuple[str, float]:
        """Criterion and threshold to use: the given ones, the saved ones, or those the training record knows.

        Args:
            criterion: one of `exits.CRITERIA`; None takes the saved one.
            threshold: None takes the saved one, for another criterion the one that training chose for it.

        Raises:
            ValueError: an unknown criterion, a threshold that does not fit, or none to be found.
        """
        config = self.early_exit_model.config
        rule = config.criterion if criterion is None else criterion
        if rule not in CRITERIA:
            raise ValueError(f'criterion must be one of {", ".join(CRITERIA)}, got "{rule}".')
        if threshold is None:
            threshold = config.threshold if rule == config.criterion else self.known_threshold(rule)
        if threshold is None:
            raise ValueError(
                f'Model "{self.name}" has no threshold for criterion "{rule}". Give one with --threshold.'
            )
        return rule, check_threshold(threshold, rule)

    def known_threshold(self, criterion: str) -> float | None:
        """The threshold that training chose for a criterion on its validation rows, or None."""
        value = (self.record.get("thresholds") or {}).get(criterion)
        return None if value is None else float(value)


def open_model(name_or_path: str | Path, device: str | torch.device | None = None) -> SavedModel:
    """Open a model folder, ours or a plain Hugging Face classifier.

    Weights are read from safetensors files only, and code that comes with a model is not run.

    Args:
        name_or_path: folder, or name on the hub.
        device: where the model goes; None takes a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config or weights.
        OSError: the hub has no such model, or a file cannot be read.
        ValueError: it is not a text classifier, its weights are pickled or incomplete, or its tokenizer does not fit.
    """
    name = str(name_or_path)
    source = model_source(name_or_path)
    with loading(name_or_path):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if report["missing_keys"]:
        raise ValueError(
            f'Model "{name}" lacks weights that its config asks for, such as "{min(report["missing_keys"])}". '
            "Give the folder of a trained classifier, not of an encoder alone."
        )
    read_special_tokens(tokenizer, bool(getattr(config, "parse_special_tokens", False)))
    place = default_device() if device is None else usable_device(device)
    return SavedModel(model.to(place).eval(), tokenizer, read_record(source), name)


def saved_text_pairs(name_or_path: str | Path) -> bool | None:
    """Whether a saved model takes pairs of texts, by its configuration; nothing else is opened.

    Raises:
        FileNotFoundError, OSError, ValueError: as `open_model`.
    """
    with loading(name_or_path):
        values, _ = PreTrainedConfig.get_config_dict(model_source(name_or_path))
        if not isinstance(values, dict):
            raise ValueError(f"config.json must hold a JSON object, got {values!r}.")
    return values.get("text_pairs")


def model_source(name_or_path: str | Path) -> str:
    """What to open: the folder, checked to hold a model, or a name for the hub.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config or weights.
        ValueError: its weights are pickled.
    """
    source = folder_or_hub_name(name_or_path, "Model")
    if isinstance(source, Path):
        _check_folder(source)
    return str(source)


@contextmanager
def loading(name_or_path: str | Path) -> Iterator[None]:
    """Load a model in here: quietly, and errors say which model it was.

    Raises:
        OSError: the hub has no such model, or a file cannot be read.
        ValueError: whatever else transformers finds wrong.
    """
    try:
        with _quiet_loading():
            yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        is_folder = Path(name_or_path).expanduser().is_dir()
        place = "" if is_folder else " (there is no such folder, so the hub was asked)"
        raise kind(f'Model "{name_or_path}" could not be loaded{place}: {load_problem(error)}') from error


def read_record(folder: str | Path) -> dict[str, Any]:
    """The training record of a folder; empty where there is none.

    Raises:
        ValueError: the file is not the JSON that training wrote.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Restore it, or remove it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object. Restore it, or remove it.")
    if not isinstance(record.get("config", {}), dict):
        raise ValueError(
            f"{path}: config must be settings by name, got {record['config']!r}. Restore the file."
        )
    try:
        require_thresholds("thresholds", record.get("thresholds"))
    except ValueError as error:
        raise ValueError(f"{path}: {error} Restore the file, or remove it.") from error
    return record


def record_evaluation(folder: str | Path, figures: Mapping[str, Any]) -> None:
    """Put the figures of an evaluation into a folder's training record and its model card.

    Args:
        folder: a saved folder.
        figures: an `Evaluation` as a dict, without its curves, or accuracy and metrics of a plain model.
    """
    record = {**read_record(folder), "evaluation": dict(figures)}
    write_json(Path(folder) / RECORD_FILE, record)
    write_model_card(folder, record)


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: str | torch.device) -> torch.device:
    """The device by this name.

    Raises:
        SettingError: torch does not know it, or it is not there.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        known = "cpu, cuda, cuda:1, ..." if torch.cuda.is_available() else "cpu (torch sees no GPU here)"
        raise SettingError(f'device must be one that is there: {known}, got "{device}".') from error
    return place


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f'Model folder "{folder}" has no config.json. Give the folder of a saved model.'
        )
    if any(folder.glob("*.safetensors")):
        return
    if any(file.suffix in PICKLE_SUFFIXES for file in folder.iterdir()):
        raise ValueError(
            f'Model folder "{folder}" has pickled weights only, and opening a pickle can run code. '
            "Convert them to safetensors if you trust their source."
        )
    raise FileNotFoundError(f'Model folder "{folder}" has no model.safetensors. Copy the weights there.')


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep back the loading report and bar of transformers; what matters in them is checked."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(max(verbosity, transformers_logging.ERROR))
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
