"""Linear maps for inference: weights laid out once for the processor that runs them.

`torch.nn.functional.linear` takes plain row-major weights, which the CPU library rearranges at every call. For a few
rows that is a large share of the work, so here it happens once, when the map is made; int8 maps quantise their weights
per output and their inputs per call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""(rows, inputs) to (rows, outputs)."""

PREPACKED_ROWS = 128
"""float32 on CPU: with more rows the plain weights are as fast or faster (AVX2, 2 threads, 384 to 1,536 outputs: 20 to
30 % slower than prepacked ones at 32 rows, level at 256, 10 to 15 % faster at 1,024), and need no kernel per shape."""
INT8_LEVELS = 64
"""The largest integer that int8 weights take. Processors without VNNI add two products of a byte (0 to 255) and a
weight in 16 bits: 2 * 255 * 64 still fits, so that nothing saturates, whatever the inputs. Seven bits for weights and
eight for inputs are also nearer to float32 than the other way round (a layer's outputs: 3 % off, not 5 %)."""
INT8_ENGINES = ("x86", "fbgemm", "onednn")


def make_linear(
    weight: Tensor, bias: Tensor | None, dtype: str, device: torch.device, *, prepack: bool = True
) -> Linear:
    """The fastest linear map at hand.

    Args:
        weight: (outputs, inputs), floating point. Where it has the dtype and device already, and the processor needs no
            other layout, it is not copied.
        bias: (outputs,), floating point, or None; likewise.
        dtype: `float32`, `bfloat16`, `float16` or `int8`; int8 takes and gives float32.
        device: where it runs; int8 runs on CPU only.
        prepack: lay the weights out for the processor; not worth it for a few rows at a time.

    Raises:
        ValueError: int8 is asked for where there is none.
    """
    if dtype == "int8":
        return _int8_linear(weight, bias, device)
    kind: torch.dtype = getattr(torch, dtype)
    weight = weight.detach().to(device, kind).contiguous()
    bias = None if bias is None else bias.detach().to(device, kind)
    if prepack and device.type == "cpu" and has_prepacked_weights(kind):
        run: Any = torch.ops.mkldnn._linear_pointwise
        prepacked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 2 * PREPACKED_ROWS)
        if kind != torch.float32:
            return lambda rows: run(rows, prepacked, bias, "none", [], "")

        def by_rows(rows: Tensor) -> Tensor:
            if len(rows) > PREPACKED_ROWS:
                return torch.nn.functional.linear(rows, weight, bias)
            return run(rows, prepacked, bias, "none", [], "")

        return by_rows
    return lambda rows: torch.nn.functional.linear(rows, weight, bias)


def has_prepacked_weights(dtype: torch.dtype) -> bool:
    """Whether torch can lay weights of this dtype out in advance on this processor (oneDNN on CPU)."""
    if dtype == torch.bfloat16:
        return has_fast_bfloat16()
    try:
        return bool(
            dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._linear_pointwise
            and torch.ops.mkldnn._reorder_linear_weight
        )
    except AttributeError:
        return False


def has_fast_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor (AVX512 or AVX-NE-CONVERT)."""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:
        return False


def has_int8(device: torch.device) -> bool:
    """Whether int8 maps run here: on CPU, with one of torch's engines for x86."""
    return device.type == "cpu" and _int8_engine() is not None


def _int8_engine() -> str | None:
    supported = torch.backends.quantized.supported_engines
    return next((engine for engine in INT8_ENGINES if engine in supported), None)


def _int8_linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> Linear:
    engine = _int8_engine()
    if device.type != "cpu" or engine is None:
        raise ValueError(
            f'dtype "int8" runs on CPU with one of the engines {", ".join(INT8_ENGINES)}, got device '
            f'"{device.type}". Take bfloat16 or float16 there.'
        )
    torch.backends.quantized.engine = engine
    weight = weight.detach().to("cpu", torch.float32)
    scales = (weight.abs().amax(1) / INT8_LEVELS).clamp_min(1e-12).double()  # symmetric, one per output
    zero_points = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():  # torch announces another home for these; the operators stay
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        prepacked = torch.ops.quantized.linear_prepack(
            quantised, None if bias is None else bias.detach().to("cpu", torch.float32)
        )
    run: Any = torch.ops.quantized.linear_dynamic
    return lambda rows: run(rows, prepacked, False)
