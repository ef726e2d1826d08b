"""`make test-masked`: the extensions of the processor that it masks are not used."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch

from consistentee.inference.decoder.screened_argmax import has_int8_operators, has_int8_products

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
    assert not has_int8_products(CPU)
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
