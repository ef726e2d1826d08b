"""Instances as one table: some behind others."""

from __future__ import annotations

import pytest
import torch

from consistentee.training.instances import Instances, group_folds


def some(count: int, seed: int) -> Instances:
    torch.manual_seed(seed)
    return Instances(
        correct=torch.rand(count, 3) > 0.5,
        exit_cost=torch.rand(count, 3),
        hardness=torch.rand(count),
        group=torch.arange(count),
        features=torch.rand(count, 3, 1),
        scores={"confidence": torch.rand(count, 3)},
    )


def test_others_stand_behind_in_groups_of_their_own() -> None:
    one, other, states = some(4, 0), some(3, 1), torch.rand(7, 3, 2)
    both = one.and_more(other, states)
    assert both.kept_states is states
    assert both.group.tolist() == list(range(7))
    for name in ("correct", "exit_cost", "hardness", "features"):
        assert getattr(both, name).equal(torch.cat([getattr(one, name), getattr(other, name)])), name
    assert both.scores["confidence"][4:].equal(other.scores["confidence"])
    first = both.first_groups(4)
    assert first.correct.equal(one.correct)
    assert first.kept_states.equal(states[:4])
    with pytest.raises(ValueError, match="states must be kept"):
        _ = one.and_more(other, None).kept_states


def test_what_is_behind_is_learnt_from_in_every_fold_and_never_judged() -> None:
    both = some(4, 0).and_more(some(3, 1), None)
    folds = group_folds(both.group, 2, 0, 4)
    assert sorted(torch.cat([judged for _, judged in folds]).tolist()) == [0, 1, 2, 3]
    for learnt, judged in folds:
        assert set(learnt.tolist()) == set(range(7)) - set(judged.tolist())
