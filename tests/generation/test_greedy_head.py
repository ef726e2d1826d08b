"""The head that reads int8 first gives what the whole head gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from consistentee.generation import greedy_head
from consistentee.generation.greedy_head import CANDIDATES, GreedyHead, has_int8_products

pytestmark = pytest.mark.skipif(
    not has_int8_products(torch.device("cpu")), reason="oneDNN's int8 products are not here"
)
WORDS, HIDDEN = 700, 48


@pytest.fixture(autouse=True)
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_head, "LEAST_WEIGHTS", 1)


def random_head(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, WORDS, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(WORDS, HIDDEN, generator=generator))
    return head


def states_of(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_the_token_is_the_whole_heads(count: int) -> None:
    head, states = random_head(), states_of(count)
    assert torch.equal(GreedyHead(head)(states), head(states).argmax(-1))


@torch.no_grad()
def test_most_tokens_are_settled_by_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    head = random_head()
    states = head.weight[:64] + 0.3 * states_of(64)  # each has a word of its own that stands out
    greedy = GreedyHead(head)
    whole: list[int] = []
    inner = greedy._whole
    monkeypatch.setattr(greedy, "_whole", lambda rows: whole.append(len(rows)) or inner(rows))
    assert torch.equal(greedy(states), head(states).argmax(-1))
    assert sum(whole) < 8


@torch.no_grad()
def test_no_certain_token_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_head, "CANDIDATES", 2)
    head, states = random_head(seed=3), states_of(2000, seed=4)
    tokens, certain = GreedyHead(head)._screened(states)
    expected = head(states).argmax(-1)
    assert torch.equal(tokens[certain], expected[certain])
    assert 0 < int(certain.sum()) < len(states)


@torch.no_grad()
def test_words_that_cannot_be_told_apart_are_left_to_the_whole_head() -> None:
    head = random_head()
    head.weight[: CANDIDATES + 5] = head.weight[0]  # more equal words than candidates
    states = head.weight[:1].clone()
    greedy = GreedyHead(head)
    assert not bool(greedy._screened(states)[1].any())
    assert greedy(states).tolist() == head(states).argmax(-1).tolist()


@torch.no_grad()
def test_half_precision_picks_a_largest_logit() -> None:
    head, states = random_head(torch.bfloat16), states_of(64, torch.bfloat16)
    tokens = GreedyHead(head)(states)
    logits = head(states)
    assert torch.equal(logits.gather(1, tokens[:, None]).squeeze(1), logits.max(-1).values)


@torch.no_grad()
def test_states_of_any_size() -> None:
    head, states = random_head(), states_of(5)
    sizes = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    assert torch.equal(GreedyHead(head)(states * sizes), head(states).argmax(-1))
    assert GreedyHead(head)(torch.zeros(1, HIDDEN)).tolist() == [0]


@torch.no_grad()
def test_small_and_biased_heads_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = nn.Linear(HIDDEN, WORDS)
    assert GreedyHead(biased)._packed is None
    assert torch.equal(GreedyHead(biased)(states_of(3)), biased(states_of(3)).argmax(-1))
    monkeypatch.setattr(greedy_head, "LEAST_WEIGHTS", WORDS * HIDDEN + 1)
    assert GreedyHead(random_head())._packed is None
