"""A classifier as a folder that runs without this library: an ONNX graph with exits, tokenizer, names, examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from consistentee import __version__
from consistentee.atomic_files import atomic_folder, names_in
from consistentee.data.tokenization import encode_texts
from consistentee.errors import SettingError, require_extra
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.onnx_builder import HIGHEST_OPSET, OPSET, GraphStyle, WeightFile
from consistentee.inference.encoder.onnx_exits import EXIT_LAYER, LOGITS, THRESHOLD, ExitGraph
from consistentee.inference.encoder.onnx_graphs import knows_token_types
from consistentee.inference.encoder.onnx_runner import OPENS_NESTED, graph_feed, opens_nested
from consistentee.inference.encoder.onnx_scores import OnnxExitScores
from consistentee.inference.encoder.onnx_sessions import make_session
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.layouts import require_own_classifier

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
MADE_BY = "consistentee export"
FILES = (GRAPH_FILE, WEIGHTS_FILE, "tokenizer.json", "config.json", "README.md")
WEB_FILES = (
    "index.html",
    "playground.json",
    "onnxruntime-web.js",
    "onnxruntime-web.wasm",
    "onnxruntime-web.LICENSE.txt",
    "onnxruntime-web.ThirdPartyNotices.txt",
    "tokenizers.js",
    "tokenizers.LICENSE.txt",
)
"""What a folder with a page holds beside them, see `serving/web_folder.py`."""

EXPORTED_FILES = frozenset((*FILES, *WEB_FILES))
"""All that an exported folder can hold; what holds anything else is not ours to replace."""

MOST_BYTES = 1_800_000_000
"""Weights that are more go into a file beside the graph: one message may have 2 GB."""

PRECISIONS = ("float32", "int8")
COMPARED_BATCH = 32


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        folder: where.
        criterion, threshold: when rows exit; None for a model without exits.
        megabytes: of graph and weights.
        compared: texts on which the graph was compared with the engine in float32; 0 for none.
        labels_differ, exit_layers_differ: how many of them got another answer.
    """

    folder: Path
    criterion: str | None
    threshold: float | None
    megabytes: float
    compared: int = 0
    labels_differ: int = 0
    exit_layers_differ: int = 0


def export_onnx(
    saved: LoadedClassifier,
    folder: str | Path,
    *,
    criterion: str | None = None,
    threshold: float | None = None,
    operating_point: str | None = None,
    opset: int = OPSET,
    precision: str = "float32",
    portable: bool = False,
    compare_texts: Sequence[tuple[str, ...]] = (),
    shows_layers: bool = False,
    add_files: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> Exported:
    """Write a model as one ONNX graph, with what is needed to use it; the folder appears when it is complete.

    Inputs of the graph are `input_ids`, `attention_mask` and, where rows have them, `token_type_ids`, (rows, width)
    int64, padded on the right with zeros; and, if wanted, `threshold`, a float32 scalar. Outputs are `logits`, (rows,
    classes) float32, and `exit_layer`, (rows,) int64, layers executed.

    Args:
        saved: a model of this library, of a type that runs packed.
        folder: where it is to be; new, empty, or an export that is replaced.
        criterion: one of `criteria.CRITERIA`; None takes the saved one. It is part of the graph.
        threshold: its default in the graph; None takes the known one.
        operating_point: in place of both, one that `consistentee calibrate` saved, by name.
        opset: version of the standard operators.
        precision: `float32`, or `int8`: weights of the layers in 8 bits, their inputs quantised as they come.
        portable: standard operators only; else also ONNX Runtime's fused ones, which are faster.
        compare_texts: on which the graph is compared with the engine.
        shows_layers: the graph also gives `layer_logits`, (rows, layers, classes), `exit_scores` and `exit_probs`,
            (rows, layers), 0 at layers that a row did not reach, and `threshold` must be given; without exits there are
            none of them. Weights stand where they load fastest.
        add_files: writes more of `EXPORTED_FILES` into the folder; takes the folder and what `config.json` says.

    Raises:
        SettingError: what cannot be exported, a setting out of its range, a folder that holds something else, or
            texts to compare on where the installed onnxruntime would not open the graph within minutes.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    if not OPSET <= opset <= HIGHEST_OPSET:
        raise SettingError(f"opset must be in [{OPSET}, {HIGHEST_OPSET}], got {opset}.")
    if precision not in PRECISIONS:
        raise SettingError(f'precision must be one of {", ".join(PRECISIONS)}, got "{precision}".')
    require_own_classifier(saved)
    model = cast(Any, saved.model)
    scores, limit = None, None
    if saved.has_exits:
        criterion, limit = saved.exit_rule(criterion, threshold, operating_point)
        scores = OnnxExitScores.of(model, criterion)
        if compare_texts and not opens_nested(model.num_layers):
            newer = ".".join(map(str, OPENS_NESTED))
            raise SettingError(
                f"compare_texts needs onnxruntime {newer} or newer for a model of {model.num_layers} layers, got "
                f"{require_extra('onnx', 'onnxruntime').__version__}, which takes about twice as long to open its "
                "graph for each layer more. "
                f'Install "onnxruntime>={newer}", or give no texts to compare (--calibration-file).'
            )
    elif any(value is not None for value in (criterion, threshold, operating_point)):
        raise SettingError(
            f'Model "{saved.name}" has no exits: criterion, threshold and operating point must not be given.'
        )
    tokenizer = tokenizer_json(saved)
    # Who shows its layers waits for the page to load.
    style = GraphStyle(opset, portable, precision == "int8", weights_outside=shows_layers)
    config = _config(saved, criterion, limit, style, precision)
    if shows_layers and scores is not None:
        config["shows_layers"] = True
    with atomic_folder(folder, require_replaceable, "config.json") as place:
        _write_graph(saved, scores, limit, style, config, place)
        _write(place / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
        _write(
            place / "config.json", json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        _write(place / "README.md", _readme(saved, {**config, "has_page": add_files is not None}))
        if add_files is not None:
            add_files(place, config)
        differ = _compare(saved, place, criterion, limit, compare_texts) if compare_texts else (0, 0)
        size = sum((place / name).stat().st_size for name in FILES[:2] if (place / name).exists())
    return Exported(Path(folder), criterion, limit, size / 1e6, len(compare_texts), *differ)


def _write_graph(
    saved: LoadedClassifier,
    scores: OnnxExitScores | None,
    threshold: float | None,
    style: GraphStyle,
    config: Mapping[str, Any],
    place: Path,
) -> None:
    """The graph, and its weights beside it where they are too many."""
    model, shows_layers = cast(Any, saved.model), bool(config.get("shows_layers"))
    how: dict[str, Any] = {
        "num_classes": model.config.num_classes,
        "style": style,
        "shows_layers": shows_layers,
        "token_types": _has_types(saved),
    }
    default = None if shows_layers else threshold or 0.0
    is_large = 4 * sum(parameter.numel() for parameter in model.parameters()) > MOST_BYTES
    if is_large:
        with (place / WEIGHTS_FILE).open("wb") as stream:
            weights = WeightFile(stream, WEIGHTS_FILE)
            proto = ExitGraph(model, scores, weights=weights, **how).build(default)
    else:
        proto = ExitGraph(model, scores, **how).build(default)
    for key, value in config.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    with (place / GRAPH_FILE).open("wb") as stream:
        stream.write(proto.SerializeToString())


def _has_types(saved: LoadedClassifier) -> bool:
    """Whether rows have token types: the model tells them apart, and its tokenizer gives them.

    A tokenizer.json counts the second text of a pair as type 1 whether transformers' tokenizer gives types or not.
    """
    return (
        knows_token_types(cast(Any, saved.model).backbone)
        and "token_type_ids" in saved.tokenizer.model_input_names
    )


def _config(
    saved: LoadedClassifier, criterion: str | None, threshold: float | None, style: GraphStyle, precision: str
) -> dict[str, Any]:
    model = cast(Any, saved.model)
    return {
        "made_by": f"{MADE_BY} {__version__}",
        "model_type": model.config.backbone_config.model_type,
        "num_hidden_layers": model.num_layers,
        "exit_layers": getattr(model.config, "exit_layers", None),
        "id2label": {str(index): name for index, name in enumerate(saved.label_names)},
        "criterion": criterion,
        "threshold": _finite(threshold, criterion, model.num_layers),
        "operating_points": {
            name: _finite(point["threshold"], criterion, model.num_layers)
            for name, point in (getattr(model.config, "operating_points", None) or {}).items()
            if point["criterion"] == criterion
        },
        "max_length": saved.max_length,
        "text_pairs": saved.text_pairs,
        "opset": style.opset,
        "portable": style.portable,
        "precision": precision,
    }


def _finite(threshold: float | None, criterion: str | None, num_layers: int) -> float | None:
    """The same rule as a number that JSON has: nobody counts more layers than there are."""
    if threshold is None or criterion is None or not EXIT_CRITERIA[criterion].thresholds.layers:
        return threshold
    return min(threshold, float(num_layers))


# --- Tokenizer ------------------------------------------------------------------------------------


def tokenizer_json(saved: LoadedClassifier) -> dict[str, Any]:
    """A tokenizer's own file, so that it does alone what the engine does: cut, pad, and read text as text.

    Raises:
        SettingError: the tokenizer has no such file.
    """
    backend: Any = getattr(saved.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SettingError(
            f'The tokenizer of "{saved.name}" has no tokenizer.json (it is no fast one), which an export needs.'
        )
    values: dict[str, Any] = json.loads(backend.to_str())
    values["truncation"] = {
        "direction": str(saved.tokenizer.truncation_side).capitalize(),
        "max_length": saved.max_length,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    values["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": str(saved.tokenizer.convert_ids_to_tokens(0)),
    }
    if saved.tokenizer.split_special_tokens:
        # Who runs the graph need not know that special tokens in a text are text: it does not look for them.
        values["added_tokens"] = [
            _hidden(token) if token["special"] else token
            for token in values["added_tokens"]
            if not token["special"] or backend.model.token_to_id(token["content"]) is None
        ]
    _require_ids(values, saved.name)
    return values


def _hidden(token: Mapping[str, Any]) -> dict[str, Any]:
    """A token that keeps its place, as ids are counted by places, under a name that no text has."""
    return {**token, "content": f"{_PRIVATE}{token['id']}{_PRIVATE}", "special": False, "normalized": False}


_PRIVATE = "\U0010fffd"
"""The last character for private use."""


def _require_ids(values: Mapping[str, Any], name: str) -> None:
    """Raise SettingError unless whoever reads the file gives added tokens the ids that it says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(values))
    for token in values["added_tokens"]:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise SettingError(
                f'The tokenizer of "{name}" cannot be exported: its added token "{token["content"]}" must have the id '
                f"{token['id']}, and would be read as {found}. Save the tokenizer anew, with its added tokens in the "
                "order of their ids."
            )


# --- The folder -----------------------------------------------------------------------------------


def require_replaceable(folder: Path) -> None:
    """Raise SettingError unless a folder is not there, empty, or an export with nothing beside it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SettingError(f'"{folder}" is a file. Give the name of a folder.')
    found = names_in(folder)
    if not found:
        return
    if set(found) <= EXPORTED_FILES and "config.json" in found:
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            values = {}
        if isinstance(values, dict) and str(values.get("made_by", "")).startswith(MADE_BY):
            return
    raise SettingError(f'Folder "{folder}" is not empty ({found[0]}, ...), and no export. Give another one.')


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _readme(saved: LoadedClassifier, config: Mapping[str, Any]) -> str:
    """How to run it, with the names of this model."""
    from jinja2 import Template

    text = resources.files("consistentee.pipelines").joinpath("export_readme.md.jinja").read_text("utf-8")
    row = EXIT_CRITERIA.get(str(config["criterion"]))
    names = Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return names.render(
        **{**config, "labels": list(config["id2label"].values())},
        cut_side=saved.tokenizer.truncation_side,
        has_types=_has_types(saved),
        range=""
        if row is None
        else row.thresholds.layers or f"{row.thresholds.low:g} to {row.thresholds.high:g}",
        file=GRAPH_FILE,
        weights=WEIGHTS_FILE,
    )


# --- Comparison -----------------------------------------------------------------------------------


def _compare(
    saved: LoadedClassifier,
    place: Path,
    criterion: str | None,
    threshold: float | None,
    texts: Sequence[tuple[str, ...]],
) -> tuple[int, int]:
    """On how many texts label and exit layer of the written folder, tokenizer and graph, are not the engine's."""
    engine = Engine(saved)
    rows, _ = encode_texts(texts, saved.tokenizer, saved.max_length)
    wanted = engine.run(rows, batch_size=COMPARED_BATCH, rule=engine.rule(criterion, threshold))
    rows = _tokens_of_file(place / "tokenizer.json", texts)  # as whoever runs the folder makes them
    session = make_session(str(place / GRAPH_FILE), torch.device("cpu"))
    names = {given.name for given in session.get_inputs()}
    labels: list[int] = []
    exit_layers: list[int] = []
    for start in range(0, len(rows), COMPARED_BATCH):
        feed: dict[str, Any] = graph_feed(rows[start : start + COMPARED_BATCH], names)
        if THRESHOLD in names:
            feed[THRESHOLD] = np.array(threshold, np.float32)
        logits, layers = session.run([LOGITS, EXIT_LAYER], feed)
        labels += logits.argmax(1).tolist()
        exit_layers += layers.tolist()
    differ = [
        sum(one != other for one, other in zip(found, right, strict=True))
        for found, right in ((labels, wanted.labels), (exit_layers, wanted.exit_layers))
    ]
    return differ[0], differ[1]


def _tokens_of_file(path: Path, texts: Sequence[tuple[str, ...]]) -> list[dict[str, list[int]]]:
    """Rows as of `encode_texts`, by a written tokenizer.json alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([row if len(row) == 2 else row[0] for row in texts])
    return [{"input_ids": row.ids, "token_type_ids": row.type_ids} for row in encoded]
