"""A whole model as others run it, without exits: by plain `transformers`, by ONNX Runtime, by ONNX Runtime in int8.

Each takes tokenized rows as one padded batch and gives logits. Any sequence classifier will do for `transformers`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from consistentee.backbones.precision import cast_parameters
from consistentee.errors import require_extra
from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.onnx_sessions import make_session
from consistentee.inference.encoder.torch_backend import token_tensors
from consistentee.inference.timing import environment

WholeModel = Callable[[Sequence[TokenRow]], NDArray[np.float32]]
"""Logits (rows, classes) of rows that go together."""


def transformers_model(model: Any, dtype: torch.dtype | None = None) -> WholeModel:
    """The backbone as Hugging Face runs it and the last classifier, or a classifier of Hugging Face's own.

    Args:
        model: where it is; copied where it has another precision.
        dtype: precision; None takes the model's own.
    """
    if dtype is not None and model.dtype != dtype:
        model = cast_parameters(copy.deepcopy(model), dtype)
    if not hasattr(model, "classifiers"):
        return _own_of_hugging_face(model)
    last, with_types = len(model.classifiers.layers) - 1, has_token_types(model.backbone)

    def predict(rows: Sequence[TokenRow]) -> NDArray[np.float32]:
        ids, mask, types = _tensors(rows, model.backbone, model.device)
        inputs = {"token_type_ids": types} if types is not None and with_types else {}
        states = model.backbone(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
        return model.classifiers(last, states, mask)[1].float().cpu().numpy()

    return predict


def _own_of_hugging_face(model: Any) -> WholeModel:
    with_types = has_token_types(model.base_model)

    def predict(rows: Sequence[TokenRow]) -> NDArray[np.float32]:
        ids, mask, types = _tensors(rows, model.base_model, model.device)
        inputs = {"token_type_ids": types} if types is not None and with_types else {}
        return model(input_ids=ids, attention_mask=mask, **inputs).logits.float().cpu().numpy()

    return predict


def _tensors(rows: Sequence[TokenRow], backbone: Any, device: torch.device) -> tuple[Any, Any, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask, *types = token_tensors(rows, width, backbone, device)
    return ids, mask, types[0] if types else None


def onnxruntime_model(session: Any, model: Any) -> WholeModel:
    """What ONNX Runtime makes of it.

    Args:
        session: of `full_model_graph`, or `int8_session`.
        model: whose graph it is.
    """
    names = [given.name for given in session.get_inputs()]

    def predict(rows: Sequence[TokenRow]) -> NDArray[np.float32]:
        ids, mask, types = _tensors(rows, model.backbone, torch.device("cpu"))
        values = [ids, mask, torch.zeros_like(ids) if types is None else types]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=False)}
        return session.run(None, feed)[0]

    return predict


def int8_session(graph: bytes) -> Any:
    """A session of the whole model, dynamically quantised by ONNX Runtime's own tool as its documentation advises.

    Weights are quantised channel by channel, and to 7 bits where the processor multiplies 8-bit numbers without VNNI,
    which would saturate.

    Args:
        graph: of `full_model_graph`.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    onnx: Any = require_extra("onnx", "onnx")
    quantization: Any = require_extra("onnx", "onnxruntime.quantization")
    pre: Any = require_extra("onnx", "onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (str(Path(folder, f"{name}.onnx")) for name in ("whole", "prepared", "int8"))
        Path(whole).write_bytes(graph)
        pre.quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        optimised = onnx.load(prepared)
        # Its shapes are from before the optimisation, and older versions of onnxruntime take them for those of now.
        optimised.graph.ClearField("value_info")
        onnx.save(optimised, prepared)
        flags = environment(torch.device("cpu"))["cpu_flags"]
        quantization.quantize_dynamic(
            prepared,
            small,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=not any("vnni" in flag or "amx" in flag for flag in flags),
        )
        return make_session(Path(small).read_bytes(), torch.device("cpu"))


def has_token_types(backbone: Any) -> bool:
    """Whether a backbone tells token types apart."""
    table = getattr(backbone.get_submodule("embeddings"), "token_type_embeddings", None)
    return cast(bool, table is not None and table.num_embeddings > 1)
