"""What the pass over texts says of every token and layer, against the model run row by row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consistentee.data.batches import TokenizedPrompts, collate
from consistentee.functional.signals import softmax_margin_scores, state_similarity_scores
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training.tasks.token_states import draw_tokens, run_token_states
from tiny_training import tiny_exit_model

COLLATE = partial(collate, tokenizer=SimpleNamespace(pad_token_id=1, pad_token_type_id=0))


def texts() -> TokenizedPrompts:
    """Rows of different length: with a prompt, without one, and without a response."""
    prompts = [[5, 6, 7], [], [9, 10], [8, 9, 10, 11], [12]]
    responses = [[20, 21, 22, 1], [30, 31, 32], [], [40, 1], [50]]
    return TokenizedPrompts(prompts, responses)


@torch.no_grad()
def reference(model: EarlyExitForCausalLM, row: dict[str, list[int]], position: int) -> dict[str, Tensor]:
    """All layers for one token, the plain way."""
    ids = torch.tensor([row["input_ids"]])
    output = model.backbone(input_ids=ids, output_hidden_states=True)
    before = [states[0, position] for states in output.hidden_states[:-1]]
    hooked: list[Tensor] = []
    handle = model.backbone.model.norm.register_forward_pre_hook(lambda _, args: hooked.append(args[0]))
    model.backbone(input_ids=ids)
    handle.remove()
    after = [*before[1:], hooked[0][0, position]]
    normed = torch.stack([model.exit_norm(index, state) for index, state in enumerate(after)])
    logits = torch.stack([model.exit_logits(index, state) for index, state in enumerate(normed)])
    label = torch.tensor(row["labels"][position + 1])
    return {
        "losses": functional.cross_entropy(logits, label.expand(len(logits)), reduction="none"),
        "right": logits.argmax(-1) == label,
        "agrees": logits.argmax(-1) == logits[-1].argmax(),
        "regret": logits[-1].log_softmax(-1).max() - logits[-1].log_softmax(-1)[logits.argmax(-1)],
        "softmax_margin": softmax_margin_scores(logits),
        "state_similarity": state_similarity_scores(torch.stack(before), torch.stack(after)),
        "pooled": normed.half(),
    }


@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_and_layer(exit_head: str, batch_size: int) -> None:
    model, dataset = tiny_exit_model(exit_head=exit_head), texts()
    states = run_token_states(model, dataset, collate=COLLATE, batch_size=batch_size, logit_rows=2)
    assert states.rows.tolist() == [0, 0, 0, 0, 1, 1, 3, 3, 4]
    assert states.labels.tolist() == [20, 21, 22, 1, 31, 32, 40, 1, 50]
    positions = [2, 3, 4, 5, 0, 1, 3, 4, 0]
    for token, (row, position) in enumerate(zip(states.rows.tolist(), positions, strict=True)):
        for name, value in reference(model, dataset[row], position).items():
            found = states.scores[name] if name in states.scores else getattr(states, name)
            torch.testing.assert_close(found[token], value, atol=2e-3, rtol=1e-4)
    assert states.per_layer_accuracy == states.right.float().mean(0).tolist()


def test_tokens_are_drawn_by_the_seed() -> None:
    dataset = texts()
    rows, positions = draw_tokens(dataset, None, 0)
    everything = set(zip(rows.tolist(), positions.tolist(), strict=True))
    assert len(everything) == 9
    some = [draw_tokens(dataset, 4, seed) for seed in (0, 0, 1)]
    pairs = [list(zip(r.tolist(), p.tolist(), strict=True)) for r, p in some]
    assert pairs[0] == pairs[1] == sorted(pairs[0])
    assert len(pairs[0]) == 4
    assert set(pairs[0]) <= everything
    assert pairs[0] != pairs[2]


def test_drawn_tokens_have_the_outputs_they_have_among_all() -> None:
    model, dataset = tiny_exit_model(), texts()
    everything = run_token_states(model, dataset, collate=COLLATE)
    some = run_token_states(model, dataset, collate=COLLATE, max_tokens=5, seed=3)
    assert len(some) == 5
    for token in range(5):
        same = (everything.rows == some.rows[token]) & (everything.labels == some.labels[token])
        torch.testing.assert_close(everything.losses[same][0], some.losses[token])


def test_the_last_layer_can_be_the_target() -> None:
    states = run_token_states(tiny_exit_model(), texts(), collate=COLLATE, target="last_layer")
    assert torch.equal(states.right, states.agrees)
    assert states.right[:, -1].all()
    by_reference = run_token_states(tiny_exit_model(), texts(), collate=COLLATE)
    assert torch.equal(by_reference.targets, by_reference.labels)
    hits = by_reference.right[:, -1]
    assert torch.equal(states.targets == states.labels, hits)


def test_the_last_layer_alone() -> None:
    model = tiny_exit_model()
    whole = run_token_states(model, texts(), collate=COLLATE)
    last = run_token_states(model, texts(), collate=COLLATE, last_layer_only=True, keep_pooled=False)
    assert last.pooled is None
    torch.testing.assert_close(last.losses, whole.losses[:, -1:])


def test_the_first_texts_are_those_before() -> None:
    states = run_token_states(tiny_exit_model(), texts(), collate=COLLATE)
    first = states.first_texts(2)
    assert first.rows.tolist() == [0, 0, 0, 0, 1, 1]
    for name, value in vars(first).items():
        cut = {key: score[:6] for key, score in states.scores.items()}
        torch.testing.assert_close(value, cut if name == "scores" else getattr(states, name)[:6])
    assert states.first_texts(3).rows.tolist() == first.rows.tolist()  # the third has no response
    assert len(states.first_texts(9)) == len(states)
    kept = run_token_states(tiny_exit_model(), texts(), collate=COLLATE, keep_pooled=False)
    assert kept.first_texts(1).pooled is None


def test_large_states_go_to_a_file(tmp_path: Path) -> None:
    model = tiny_exit_model()
    in_memory = run_token_states(model, texts(), collate=COLLATE)
    mapped = run_token_states(
        model, texts(), collate=COLLATE, memory_limit_mb=1e-4, scratch_dir=tmp_path / "scratch"
    )
    assert torch.equal(torch.as_tensor(mapped.pooled), torch.as_tensor(in_memory.pooled))
    with pytest.raises(ValueError, match=r"exceed .* MB and there is no scratch_dir"):
        run_token_states(model, texts(), collate=COLLATE, memory_limit_mb=1e-4)


def test_texts_without_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="dataset must hold response tokens, got none"):
        run_token_states(tiny_exit_model(), TokenizedPrompts([[3, 4]], [[]]), collate=COLLATE)


def test_the_model_is_left_in_its_mode() -> None:
    model = tiny_exit_model().train()
    run_token_states(model, texts(), collate=COLLATE)
    assert model.training
