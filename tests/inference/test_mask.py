"""`make test-masked`: the extensions of the processor that it masks are not used."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch

from consistentee.inference.decoder.screened_argmax import (
    INPUT_LEVELS,
    has_int8_operators,
    int8_product,
    prepack,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") != "avx2" or platform.machine() not in ("x86_64", "AMD64"),
    reason="make test-masked runs it, on x86",
)
CPU = torch.device("cpu")
PRODUCTS = """
import torch
a = torch.randn(64, 64)
packed = torch.ops.mkldnn._reorder_linear_weight(a, 4)
torch.ops.mkldnn._linear_pointwise(a[:4], packed, None, "none", [], "")
torch.nn.functional.linear(a.bfloat16(), a.bfloat16())
packed = torch.ops.onednn.qlinear_prepack(a.to(torch.int8), [2, 64])
scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
rows = torch.ones((2, 64), dtype=torch.uint8)
torch.ops.onednn.qlinear_pointwise(rows, 1.0, 1, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
"""


def test_torchs_own_kernels() -> None:
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"


def test_onednns_kernels() -> None:
    if not has_int8_operators(CPU):
        pytest.skip("this torch has no oneDNN")
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", PRODUCTS]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "cpu,isa:Intel AVX2\n" in said
    kernels = [line.lower() for line in said.splitlines() if ",exec,cpu," in line]
    assert any("matmul" in line or "inner_product" in line for line in kernels)
    assert not any(name in line for line in kernels for name in ("avx512", "vnni", "amx", "avx10"))


def test_int8_products_saturate() -> None:
    """With integers larger than ours they do on such a processor, in oneDNN and in FBGEMM."""
    if has_int8_operators(CPU):
        packed = prepack(torch.full((64, 64), 127, dtype=torch.int8))
        rows, zeros = torch.full((2, 64), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
        exact = 64 * 127 * (255 - INPUT_LEVELS)
        assert int8_product(rows, packed, torch.ones(64), zeros).max() < exact / 2
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no FBGEMM")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_tensor(torch.ones(32, 64), 1 / 127, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(weight, None)
            found = torch.ops.quantized.linear_dynamic(torch.ones(4, 64), packed, False)
    finally:
        torch.backends.quantized.engine = before
    assert found.max() < 50  # 64, but for saturation
