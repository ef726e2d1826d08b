"""The head that reads int8 first gives what the whole head gives, also where int8 products saturate."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from consistentee.inference.decoder import screened_argmax
from consistentee.inference.decoder.screened_argmax import (
    CANDIDATES,
    INPUT_LEVELS,
    TRIALS,
    WEIGHT_LEVELS,
    FasterWay,
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
    monkeypatch.setattr(screened_argmax, "FasterWay", lambda: lambda rows, first, _: first(rows))
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
    read: list[int] = []
    inner = screened._whole
    monkeypatch.setattr(screened, "_whole", lambda rows: read.append(len(rows)) or inner(rows))
    for state in states.split(1):
        assert torch.equal(screened(state), head(state).argmax(-1))
    assert len(read) < 8


@torch.no_grad()
def test_where_one_token_is_open_the_whole_head_is_read_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is without a screen: in bfloat16 ties may fall otherwise with another number of rows."""
    head = random_head(torch.bfloat16)
    screened, states = ScreenedArgmax(head), states_of(5, torch.bfloat16)
    inner = screened._screened

    def all_but_one(rows: Tensor) -> tuple[Tensor, Tensor]:
        tokens, certain = inner(rows)
        certain[3] = False
        return tokens, certain

    read: list[Tensor] = []
    monkeypatch.setattr(screened, "_screened", all_but_one)
    monkeypatch.setattr(screened, "_whole", lambda rows: read.append(rows) or head(rows).argmax(-1))
    assert torch.equal(screened(states), head(states).argmax(-1))
    assert [rows is states for rows in read] == [True]


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
    """Pairs of products may be added in 16 bits."""
    assert 2 * (2 * INPUT_LEVELS) * WEIGHT_LEVELS < 2**15
    for outputs, inputs in [(1, 2), (32, 64), (257, 576)]:
        weight = torch.full((outputs, inputs), WEIGHT_LEVELS, dtype=torch.int8)
        packed = prepack(weight)
        rows = torch.full((count, inputs), sign * INPUT_LEVELS + INPUT_LEVELS, dtype=torch.uint8)
        found = int8_product(rows, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64))
        assert bool((found == sign * inputs * INPUT_LEVELS * WEIGHT_LEVELS).all())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what oneDNN has for x86")
@pytest.mark.parametrize("count", [2, 16, 64])
def test_products_have_a_kernel_for_this_processor(capfd: pytest.CaptureFixture[str], count: int) -> None:
    """Without one oneDNN runs a plain loop, a hundred times slower than the whole head in float32."""
    packed = prepack(torch.ones((700, 512), dtype=torch.int8))
    ones = torch.ones(700), torch.zeros(700, dtype=torch.int64)
    rows = torch.ones((count, 512), dtype=torch.uint8)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        int8_product(rows, packed, *ones)
    products = [line for line in capfd.readouterr().out.splitlines() if ",exec,cpu,matmul," in line]
    assert products
    assert not any("ref" in line.split(",exec,cpu,matmul,")[1].split(",")[0] for line in products), products


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
    digits = torch.cat(seen).int() - INPUT_LEVELS
    assert int(digits.abs().max()) == INPUT_LEVELS


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


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What was found out about this processor's products is forgotten, before the test and after it."""
    trials = (screened_argmax._multiplies_int8, screened_argmax._is_faster)
    for trial in trials:
        trial.cache_clear()
    yield
    for trial in trials:
        trial.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_products_that_saturate_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturate(rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return int8_product(rows, packed, scales, zeros).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(screened_argmax, "int8_product", saturate)
    assert not has_int8_operators(torch.device("cpu"))
    assert ScreenedArgmax(random_head())._packed is None


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("slow", ["int8", "float32"])
def test_products_that_are_slower_than_float32_do_not_count(
    monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    def after(seconds: float) -> Callable[..., None]:
        return lambda *_: time.sleep(seconds)

    monkeypatch.setattr(screened_argmax, "int8_product", after(0.02 * (slow == "int8")))
    monkeypatch.setattr(nn.functional, "linear", after(0.02 * (slow == "float32")))
    assert screened_argmax._is_faster() == (slow == "float32")
    monkeypatch.undo()
    assert has_int8_products(torch.device("cpu")) == (slow == "float32")


@pytest.mark.usefixtures("asked_anew")
def test_operators_that_fail_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of torch have them, and they take other inputs."""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("qlinear with mkldnn tensor: data type of input should be int8.")

    monkeypatch.setattr(screened_argmax, "int8_product", refuse)
    head = ScreenedArgmax(random_head())
    assert head._packed is None
    assert head(states_of(3)).shape == (3,)


def test_the_faster_way_is_kept_for_each_number_of_rows() -> None:
    """One is slow with many rows, the other with few."""
    called: list[str] = []

    def few(rows: Tensor) -> Tensor:
        called.append("few")
        time.sleep(0.02 if len(rows) > 4 else 0)
        return rows

    def many(rows: Tensor) -> Tensor:
        called.append("many")
        time.sleep(0 if len(rows) > 4 else 0.02)
        return rows

    ways = FasterWay()
    for count in (1, 3, 8, 9, 16):
        rows = torch.zeros(count, 2)
        for _ in range(2 * TRIALS):
            assert ways(rows, few, many) is rows
        called.clear()
        assert ways(rows, few, many) is rows
        assert called == ["few" if count <= 4 else "many"]


@torch.no_grad()
def test_tokens_are_the_same_whichever_way_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened_argmax, "FasterWay", FasterWay)
    head, states = random_head(), states_of(3)
    screened = ScreenedArgmax(head)
    read: list[int] = []
    inner = screened._whole
    monkeypatch.setattr(screened, "_whole", lambda rows: read.append(len(rows)) or inner(rows))
    for _ in range(2 * TRIALS + 1):
        assert torch.equal(screened(states), head(states).argmax(-1))
    assert read.count(3) >= TRIALS
