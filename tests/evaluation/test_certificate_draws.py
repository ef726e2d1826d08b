"""The script that breaks certificates on a real model's outcomes runs, on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmark_scripts import script
from tiny import tiny_backbone, tiny_dataset, tiny_model, write_csv


def test_draws_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone"), initial_exit_bias=0.0)
    texts = write_csv(tmp_path / "texts.csv", tiny_dataset(300))
    how = [
        "--max-disagreement",
        "0.1",
        "--rows",
        "20",
        "100",
        "--draws",
        "60",
        "--criteria",
        "policy",
        "patience",
    ]
    keep = ["--cache", str(tmp_path / "cache.pt"), "--json", str(tmp_path / "found.json")]
    found = []
    for _ in range(2):  # the second reads the cache
        script("certificates").main([str(model), str(texts), *how, *keep])
        found.append(json.loads((tmp_path / "found.json").read_text(encoding="utf-8")))
    assert found[0]["results"] == found[1]["results"]
    assert found[0]["num_texts"] == 300
    by_name = {(one["criterion"], one["rows"], one["how"]): one for one in found[0]["results"]}
    for criterion in ("policy", "patience"):
        assert by_name[criterion, 20, "drawn from all"]["certified"] == 0  # 29 rows would do
        certified, naive = (by_name[criterion, 100, how] for how in ("drawn from all", "naive"))
        assert certified["certified"] == 1
        assert certified["broken"] <= 0.05 + 2 * 0.03
        assert certified["broken"] <= naive["broken"]
        assert certified["layer_speedup"] <= naive["layer_speedup"]
    assert "certifies nothing" in capsys.readouterr().out
