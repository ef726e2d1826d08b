"""What a server makes before its first request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consistentee.inference.encoder.packing import padded_count
from consistentee.inference.encoder.prepacked_linear import PREPACKED_ROWS
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.classifier import Engine
from consistentee.serving import computing
from tiny import tiny_backbone, tiny_full_depth_model, tiny_model


@pytest.mark.parametrize("kind", ["exits", "plain"])
def test_every_number_of_tokens_is_met_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    make = tiny_model if kind == "exits" else tiny_full_depth_model
    engine = Engine.from_pretrained(make(tmp_path / "model", backbone), device="cpu")
    met, run = list[int](), engine.run

    def followed(rows: Any, **how: Any) -> Any:
        assert max(len(row["input_ids"]) for row in rows) <= engine.saved.max_length
        found = run(rows, **how)
        if how["rule"].exit_layers is not None:
            met.append(sum(len(row["input_ids"]) for row in rows))
            assert set(found.exit_layers) == {engine.backend.num_layers}
        return found

    monkeypatch.setattr(engine, "run", followed)
    monkeypatch.setattr(computing, "KERNEL_SECONDS", 600.0)
    computing.answer_once(engine, [ExitRule("confidence", 0.5)])
    assert met == sorted({padded_count(tokens) for tokens in range(1, PREPACKED_ROWS + 1)})
    met.clear()
    monkeypatch.setattr(computing, "KERNEL_SECONDS", -1.0)
    computing.answer_once(engine, [ExitRule("confidence", 0.5)])
    assert met == []
