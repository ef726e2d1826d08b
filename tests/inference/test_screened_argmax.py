"""The head that reads int8 first gives what the whole head gives, also where int8 products saturate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from consistentee.inference.decoder import screened_argmax
from consistentee.inference.decoder.screened_argmax import (
    CANDIDATES,
    INPUT_LEVELS,
    WEIGHT_LEVELS,
    ScreenedArgmax,
    has_int8_operators,
    has_int8_products,
    int8_product,
    prepack,
)

pytestmark = pytest.mark.skipif(
    not has_int8_operators(torch.device("cpu")), reason="oneDNN's int8 products are not here"
)
WORDS, HIDDEN = 700, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def every_head_is_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small heads, too, and on processors where it does not pay: it must be right there as well."""
    monkeypatch.setattr(screened_argmax, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(screened_argmax, "has_int8_products", has_int8_operators)


def random_head(dtype: torch.dtype = torch.float32, seed: int = 0, hidden: int = HIDDEN) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden, WORDS, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(WORDS, hidden, generator=generator))
    return head


def states_of(count: int, dtype: torch.dtype = torch.float32, seed: int = 1, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_the_token_is_the_whole_heads(count: int) -> None:
    head, states = random_head(), states_of(count)
    assert torch.equal(ScreenedArgmax(head)(states), head(states).argmax(-1))


@torch.no_grad()
def test_most_tokens_are_settled_by_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    head = random_head()
    states = head.weight[:64] + 0.3 * states_of(64)  # each has a word of its own that stands out
    screened = ScreenedArgmax(head)
    whole: list[int] = []
    inner = screened._whole
    monkeypatch.setattr(screened, "_whole", lambda rows: whole.append(len(rows)) or inner(rows))
    assert torch.equal(screened(states), head(states).argmax(-1))
    assert sum(whole) < 8


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [1, 2])
def test_no_certain_token_is_wrong(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, more: int) -> None:
    monkeypatch.setattr(screened_argmax, "CANDIDATES", 2)
    monkeypatch.setattr(screened_argmax, "MORE", more)
    head, states = random_head(dtype, seed=3), states_of(2000, dtype, seed=4)
    tokens, certain = ScreenedArgmax(head)._screened(states)
    expected = head(states).argmax(-1)
    assert torch.equal(tokens[certain], expected[certain])
    assert 0 < int(certain.sum()) < len(states)


@torch.no_grad()
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 64, 300])
def test_the_largest_integers_do_not_saturate(count: int, sign: int) -> None:
    """One operand may be shifted by 128 to be unsigned, and pairs of products be added in 16 bits."""
    assert 2 * (128 + INPUT_LEVELS) * WEIGHT_LEVELS < 2**15
    assert 2 * (128 + WEIGHT_LEVELS) * INPUT_LEVELS < 2**15
    for outputs, inputs in [(1, 2), (32, 64), (257, 576)]:
        weight = torch.full((outputs, inputs), WEIGHT_LEVELS, dtype=torch.int8)
        packed = prepack(weight)
        rows = torch.full((count, inputs), sign * INPUT_LEVELS, dtype=torch.int8)
        found = int8_product(rows, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64))
        assert bool((found == sign * inputs * INPUT_LEVELS * WEIGHT_LEVELS).all())


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["even", "spiky"])
def test_no_integer_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    seen: list[Tensor] = []

    def product(rows: Tensor, *others: Tensor) -> Tensor:
        seen.append(rows)
        return int8_product(rows, *others)

    def checked(weight: Tensor) -> Tensor:
        assert int(weight.abs().max()) == WEIGHT_LEVELS
        return prepack(weight)

    monkeypatch.setattr(screened_argmax, "int8_product", product)
    monkeypatch.setattr(screened_argmax, "prepack", checked)
    head, states = random_head(), states_of(100)
    states = states if inputs == "even" else states**5
    assert torch.equal(ScreenedArgmax(head)(states), head(states).argmax(-1))
    assert int(torch.cat(seen).abs().max()) == INPUT_LEVELS


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [HIDDEN, 512])
def test_ties_go_to_the_lowest_word(dtype: torch.dtype, hidden: int) -> None:
    """Below float32 every thirtieth state has several largest logits."""
    head, states = random_head(dtype, hidden=hidden), states_of(3000, dtype, hidden=hidden)
    logits = head(states)
    if dtype == torch.bfloat16:
        assert int(((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).sum()) > 50
    assert torch.equal(ScreenedArgmax(head)(states), logits.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_a_soft_cap_makes_equal(dtype: torch.dtype) -> None:
    def soften(logits: Tensor) -> Tensor:
        return torch.tanh(logits / 2) * 2

    head, states = random_head(dtype), states_of(1000, dtype)
    capped = soften(head(states))
    expected = capped.argmax(-1)
    assert not torch.equal(expected, head(states).argmax(-1))
    assert torch.equal(ScreenedArgmax(head, soften)(states), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_words_that_cannot_be_told_apart_are_left_to_the_whole_head(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(screened_argmax, "MORE", 1)
    head = random_head(dtype)
    head.weight[: CANDIDATES + 5] = head.weight[0]  # more equal words than candidates
    states = head.weight[:1].clone()
    screened = ScreenedArgmax(head)
    assert not bool(screened._screened(states)[1].any())
    assert screened(states).tolist() == head(states).argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_equal_words_beyond_the_first_candidates_are_settled(dtype: torch.dtype) -> None:
    head = random_head(dtype)
    head.weight[3 : CANDIDATES + 8] = head.weight[3]
    screened, states = ScreenedArgmax(head), head.weight[3:4].clone()
    tokens, certain = screened._screened(states)
    assert bool(certain.all())
    assert tokens.tolist() == head(states).argmax(-1).tolist() == [3]


@torch.no_grad()
def test_states_of_any_size() -> None:
    head, states = random_head(), states_of(9)
    sizes = torch.tensor([1e-38, 1e-25, 1e-14, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e25])[:, None]
    assert torch.equal(ScreenedArgmax(head)(states * sizes), head(states * sizes).argmax(-1))
    assert ScreenedArgmax(head)(torch.zeros(1, HIDDEN)).tolist() == [0]


@torch.no_grad()
def test_states_that_are_no_numbers() -> None:
    head, states = random_head(), states_of(3)
    states[1, 5] = torch.nan
    assert torch.equal(ScreenedArgmax(head)(states), head(states).argmax(-1))


@torch.no_grad()
def test_coarser_float32_products_are_left_alone() -> None:
    head, states = random_head(), states_of(3)
    screened = ScreenedArgmax(head)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        screened._screened = None  # would fail, if it were asked
        assert torch.equal(screened(states), head(states).argmax(-1))
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def test_small_biased_and_slow_heads_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = nn.Linear(HIDDEN, WORDS)
    assert ScreenedArgmax(biased)._packed is None
    assert torch.equal(ScreenedArgmax(biased)(states_of(3)), biased(states_of(3)).argmax(-1))
    monkeypatch.setattr(screened_argmax, "has_int8_products", lambda device: False)
    assert ScreenedArgmax(random_head())._packed is None
    monkeypatch.undo()
    assert ScreenedArgmax(random_head())._packed is None  # fewer than LEAST_WEIGHTS


def test_products_that_saturate_do_not_count() -> None:
    cpu = torch.device("cpu")
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    packed = prepack(largest)
    found = int8_product(largest[:2], packed, torch.ones(64), torch.zeros(64, dtype=torch.int64))
    assert has_int8_products(cpu) == bool((found == 64 * 127 * 127).all())


def test_operators_that_take_unsigned_inputs_alone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.6, where they are there and fail when they are called."""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("qlinear with mkldnn tensor: data type of input should be uint8 (unsigned char).")

    monkeypatch.setattr(screened_argmax, "int8_product", refuse)
    screened_argmax._multiplies_int8.cache_clear()
    try:
        head = ScreenedArgmax(random_head())
    finally:
        screened_argmax._multiplies_int8.cache_clear()
    assert head._packed is None
    assert head(states_of(3)).shape == (3,)
