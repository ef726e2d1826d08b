"""Loading what Hugging Face saved: a folder is looked through before it is read, and errors say which model it was.

Weights are read from safetensors files only, in float32 unless `dtype` says otherwise, and code that comes with a model
is not run unless `trust_remote_code=True` is passed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from consistentee.atomic_files import user_path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
BACKBONE_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
"""What a backbone's folder is read for: weights, configuration and tokenizer."""

VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")
"""Where tokenizers have their words."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
"""Options of opening a model that say where it is found."""


def load_pretrained(
    auto_class: Any,
    name_or_path: str | Path,
    what: str = "Backbone",
    *,
    row_of: Callable[[Any], Any] | None = None,
    remedy: str = "Check that config.json and the weights belong together.",
    **hub_kwargs: Any,
) -> PreTrainedModel:
    """Load a pretrained model through one of transformers' Auto classes.

    Args:
        auto_class: such as `AutoModel`.
        name_or_path: a folder with `config.json` and safetensors weights, or a model name on the hub.
        what: to call it in messages.
        row_of: gives the row of a table by model type or config, and raises ValueError for one that is not supported;
            its `load_options` are handed on, too.
        remedy: what to do where weights are missing.
        **hub_kwargs: handed to `from_pretrained`: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`,
            `dtype`, `attn_implementation`, ...

    Raises:
        FileNotFoundError: there is no such folder, or it lacks its config or its weights.
        OSError: the model can neither be found on the hub nor in the cache, or a file cannot be read.
        ValueError: the type is not supported, the weights are pickled or incomplete.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, **hub_kwargs}
    source = model_source(name_or_path, what, str(options.get("subfolder") or ""))
    with _loading(name_or_path, what):
        if row_of is not None:
            options.update(row_of(str(_config_values(source, options).get("model_type"))).load_options)
        model, report = auto_class.from_pretrained(
            source,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
    if row_of is not None:
        row_of(model.config)
    found = f'{what} "{name_or_path}"'
    if other := [key for key, *_shapes in report["mismatched_keys"]]:
        raise ValueError(
            f'{found} does not fit its config.json: {len(other)} weights have another shape, such as "{min(other)}". '
            "Take both from the same folder."
        )
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{found} lacks {len(missing)} of the weights that its config.json asks for, such as "
            f'"{min(missing)}". {remedy}'
        )
    return model


def load_tokenizer(name_or_path: str | Path, what: str = "Backbone") -> Any:
    """The tokenizer of a model; arguments and errors as in `load_pretrained`, weights are not asked for.

    Raises:
        FileNotFoundError: there are no files of one; transformers makes one without words in their place.
    """
    folder = user_path(name_or_path)
    has_files = not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES)
    try:
        with _loading(name_or_path, what):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ValueError as error:
        if not has_files:
            raise _no_words(name_or_path, what) from error
        raise
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens}:
        raise _no_words(name_or_path, what)
    return tokenizer


def _no_words(name_or_path: str | Path, what: str) -> FileNotFoundError:
    return FileNotFoundError(
        f'{what} "{name_or_path}" has no tokenizer that knows any word: its files (tokenizer.json, or the vocabulary '
        "of an older one) are missing. Save it beside the weights: tokenizer.save_pretrained(FOLDER)."
    )


def load_config(name_or_path: str | Path, what: str = "Backbone") -> PreTrainedConfig:
    """The configuration of a model; arguments and errors as in `load_pretrained`."""
    source = model_source(name_or_path, what)
    with _loading(name_or_path, what):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def read_config(name_or_path: str | Path, what: str = "Backbone") -> dict[str, Any]:
    """What config.json says, by name, before anything else is opened; arguments and errors as in `load_pretrained`."""
    source = model_source(name_or_path, what)
    with _loading(name_or_path, what):
        return _config_values(source, {})


def model_source(name_or_path: str | Path, what: str = "Backbone", subfolder: str = "") -> str:
    """What to open: a folder, checked to hold a model, or else a name for the hub.

    Args:
        name_or_path: a folder wins over the hub's model of that name.
        what: to call it in messages.
        subfolder: of the folder, where the model lies.

    Raises:
        FileNotFoundError: it is neither, or the folder lacks its config or its weights.
        PermissionError: this user may not read the weights.
        ValueError: the weights are pickled.
    """
    path, name = user_path(name_or_path), str(name_or_path)
    if path.is_dir():
        _check_files(path / subfolder, what)
        return str(path)
    if path.exists():
        raise FileNotFoundError(f'{what} "{name}" must be a folder, got a file. Give the folder it lies in.')
    try:
        validate_repo_id(name)  # "gpt2" or "user/name"
        is_path = isinstance(name_or_path, Path)
    except HFValidationError:
        is_path = True
    if is_path:
        raise FileNotFoundError(
            f'{what} folder "{name}" does not exist. Check the path; a hub name reads "name" or "user/name".'
        )
    return name


def backbone_fingerprint(backbone: str | Path) -> str | None:
    """Hash of a local backbone's weights, configuration and tokenizer; None for a name on the hub."""
    folder = user_path(backbone)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in BACKBONE_FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\x1f{path.stat().st_size}\x1e".encode())
        with path.open("rb") as stream:
            while part := stream.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()[:16]


def unsupported_type(what: str, model_type: str, supported: Sequence[str]) -> ValueError:
    """The error for a model type that a table does not have: it names the nearest, and all that it has."""
    known = {name.replace("_", "-"): name for name in supported}
    name = model_type.lower().replace("_", "-")
    close = [other for other in known if other.startswith(name) or name.startswith(other)]
    close = close or difflib.get_close_matches(name, known, n=1)
    hint = f' Did you mean "{known[close[0]]}"?' if close else ""
    return ValueError(
        f'{what} type "{model_type}" is not supported.{hint} Supported model types: {", ".join(supported)}.'
    )


def _config_values(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    values, _ = PreTrainedConfig.get_config_dict(
        source, **{key: value for key, value in options.items() if key != "trust_remote_code"}
    )
    if not isinstance(values, dict):
        raise ValueError(f"config.json must hold a JSON object, got {values!r}.")
    return values


def _check_files(folder: Path, what: str) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f'{what} folder "{folder}" has no config.json. Give a folder written by save_pretrained().'
        )
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        if not os.access(path, os.R_OK):
            raise PermissionError(
                f'{what} file "{path}" must be readable for this user. Let its owner say: chmod a+r {path}'
            )
    if weights:
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f'{what} folder "{folder}" has pickled weights only ({", ".join(pickles)}), and opening a pickle '
            "can run code: weights must be safetensors. If you trust the source, convert it once, with the class that "
            f"wrote it, as another would leave out its head: {_conversion(folder)}"
        )
    raise FileNotFoundError(f'{what} folder "{folder}" has no model.safetensors. Copy the weights there.')


def _conversion(folder: Path) -> str:
    """Python that writes a folder's weights anew, all of them."""
    try:
        written_by = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        written_by = None
    name = written_by if isinstance(written_by, str) and written_by.isidentifier() else "ITS_CLASS"
    place = json.dumps(str(folder), ensure_ascii=False)
    return f"from transformers import {name} as M; M.from_pretrained({place}).save_pretrained({place})"


@contextmanager
def _loading(name_or_path: str | Path, what: str) -> Iterator[None]:
    """Load in here: without the reports and bars of transformers, and errors say on one line which model it was."""
    try:
        with _QUIET:
            yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError | SafetensorError) else ValueError
        is_folder = user_path(name_or_path).is_dir()
        place = "" if is_folder else " (there is no such folder, so the hub was asked)"
        raise kind(f'{what} "{name_or_path}" could not be loaded{place}: {_problem(error)}') from error


class _Quiet:
    """Without the reports and bars of transformers, whose settings are the process's: threads may load side by side."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._verbosity, self._bars = 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._verbosity = transformers_logging.get_verbosity()
                self._bars = transformers_logging.is_progress_bar_enabled()
                transformers_logging.set_verbosity(max(self._verbosity, transformers_logging.ERROR))
                transformers_logging.disable_progress_bar()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                transformers_logging.set_verbosity(self._verbosity)
                if self._bars:
                    transformers_logging.enable_progress_bar()


_QUIET = _Quiet()


def _problem(error: Exception) -> str:
    """What is wrong with a folder or a name, on one line, from what transformers raised about it."""
    reason = " ".join(str(error).split())
    if isinstance(error, SafetensorError):
        return f"model.safetensors is incomplete or damaged ({reason}). Copy it again."
    if isinstance(error, json.JSONDecodeError):
        return f"one of its JSON files is incomplete or damaged ({reason}). Copy the folder again."
    if isinstance(error, OSError | ValueError):
        return reason
    return (
        f"config.json or another of its files holds a value of the wrong kind ({type(error).__name__}: {reason}). "
        "Copy the folder again."
    )
