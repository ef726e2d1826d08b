"""Linear maps laid out for the processor: the same as torch's own, in every precision."""

from __future__ import annotations

import pytest
import torch

from consistentee.inference.encoder import prepacked_linear as linears
from consistentee.inference.encoder.prepacked_linear import (
    INT8_ENGINES,
    INT8_LEVELS,
    PREPACKED_ROWS,
    has_int8,
    make_linear,
)

CPU = torch.device("cpu")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3, "int8": 3e-2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 7, PREPACKED_ROWS, PREPACKED_ROWS + 1])
@torch.inference_mode()
def test_agrees_with_torch(rows: int, dtype: str, bias: bool) -> None:
    if dtype == "int8" and not has_int8(CPU):
        pytest.skip("no int8 engine")
    weight, inputs = torch.randn(24, 32) / 32**0.5, torch.randn(rows, 32)
    offset = torch.randn(24) if bias else None
    wanted = torch.nn.functional.linear(inputs, weight, offset)
    kind = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    for prepack in (True, False):
        found = make_linear(weight, offset, dtype, CPU, prepack=prepack)(inputs.to(kind))
        assert found.dtype == kind
        error = (found.float() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype]


@torch.inference_mode()
def test_int8_of_a_model_in_another_precision() -> None:
    if not has_int8(CPU):
        pytest.skip("no int8 engine")
    weight, bias, inputs = (torch.randn(shape).bfloat16() for shape in ((24, 32), (24,), (3, 32)))
    wanted = torch.nn.functional.linear(inputs.float(), weight.float(), bias.float())
    found = make_linear(weight, bias, "int8", CPU)(inputs.float())
    assert (found - wanted).abs().max() <= TOLERANCE["int8"] * wanted.abs().max()


@torch.inference_mode()
def test_int8_scales_every_output_by_itself() -> None:
    if not has_int8(CPU):
        pytest.skip("no int8 engine")
    weight = torch.randn(4, 32) * torch.tensor([[1e-3], [1.0], [10.0], [0.0]])
    inputs = torch.randn(16, 32)
    found, wanted = make_linear(weight, None, "int8", CPU)(inputs), inputs @ weight.T
    for output in range(3):
        assert (found - wanted)[:, output].abs().max() < 0.05 * wanted[:, output].abs().max()
    assert found[:, 3].abs().max() == 0


@pytest.mark.parametrize("engine", INT8_ENGINES)
@pytest.mark.parametrize("rows", [1, 5, 16, 64, 300])
@torch.inference_mode()
def test_the_largest_int8_products_do_not_saturate(
    monkeypatch: pytest.MonkeyPatch, rows: int, engine: str
) -> None:
    """Inputs and weights as large as they get, one apart, so that the inputs' bytes go from 0 to 255."""
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"no engine {engine}")
    assert 2 * 255 * INT8_LEVELS < 2**15
    monkeypatch.setattr(linears, "INT8_ENGINES", (engine,))
    for sign in (1, -1):
        weight = torch.full((257, 576), 1.0)
        inputs = torch.full((rows, 576), 1.0 * sign)
        inputs[:, 0] = 0
        found = make_linear(weight, None, "int8", CPU)(inputs)
        assert found == pytest.approx(torch.full_like(found, 575.0 * sign), rel=1e-3)


def test_int8_needs_a_cpu() -> None:
    with pytest.raises(ValueError, match=r'dtype "int8" runs on CPU .* got device "meta"'):
        make_linear(torch.ones(2, 2), None, "int8", torch.device("meta"))
