"""Threads follow quota and affinity, and whoever asks for a number of them is given it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from consistentee.cli import main as cli
from consistentee.inference import threads
from consistentee.inference.encoder import onnx_sessions
from consistentee.inference.threads import limit_threads, usable_processors, usable_threads

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1_PERIOD = {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        (  # the tightest of the groups above it
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user/cpu.max": "300000 50000\n",
            },
            6,
        ),
        (  # the host's path, inside a container
            {"proc/self/cgroup": "0::/docker/12ab\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
            2,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "5:memory:/docker/12ab\n4:cpu,cpuacct:/docker/12ab\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                **V1_PERIOD,
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                **V1_PERIOD,
            },
            64,
        ),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert usable_processors(write(tmp_path, files)) == expected


def test_a_quota_above_the_affinity_changes_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"})
    assert usable_processors(root) == HERE


@pytest.mark.parametrize("variable", threads.THREAD_VARIABLES)
def test_a_number_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(threads, "usable_processors", lambda: 1)
    torch.set_num_threads(2)
    monkeypatch.setenv(variable, "2")
    limit_threads()
    assert torch.get_num_threads() == usable_threads() == 2
    monkeypatch.delenv(variable)
    assert usable_threads() == 1
    assert torch.get_num_threads() == 2
    limit_threads()
    assert torch.get_num_threads() == 1


def test_threads_are_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "usable_processors", lambda: 64)
    limit_threads()
    assert torch.get_num_threads() == 1


def test_the_command_line_keeps_to_the_quota(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "usable_processors", lambda: 1)
    torch.set_num_threads(2)
    assert cli.main(["predict", "no-such-model", "-"]) == 1
    assert torch.get_num_threads() == 1


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; torch.set_num_threads(3); import consistentee.cli.main; print(torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "3"


def test_sessions_keep_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    counts: list[int] = []

    class Options(runtime.SessionOptions):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "intra_op_num_threads":
                counts.append(value)
            super().__setattr__(name, value)

    monkeypatch.setattr(runtime, "SessionOptions", Options)
    monkeypatch.setattr(threads, "usable_processors", lambda: 1)
    torch.set_num_threads(2)
    onnx_sessions.make_session(model.SerializeToString(), torch.device("cpu"))
    assert counts == [1]
