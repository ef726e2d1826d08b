"""On a local cluster of two nodes: `predict --ray` while one of them is killed, a pipeline of one's own, Ray Serve."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from consistentee.cli.main import main
from consistentee.pipelines import ray_blocks
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.ray_data import RayPredictor
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from served import running
from tiny import tiny_backbone, tiny_dataset, tiny_model

os.environ.update(  # read when Ray is imported
    RAY_USAGE_STATS_ENABLED="0",
    RAY_BACKEND_LOG_LEVEL="fatal",
    RAY_raylet_start_wait_time_s="120",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_worker_niceness="0",
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",  # these machines are slow at times
    RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
)
ray: Any = pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray warns of itself

TEXTS = [text for (text,) in tiny_dataset(700, seed=3).texts]
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    torch.manual_seed(4)
    return tiny_model(root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; the first is this process's."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    few = {"no_monitor": True, "include_log_monitor": False}
    with (
        tempfile.TemporaryDirectory(
            prefix="ray", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # a short path
        pytest.MonkeyPatch.context() as environment,
    ):
        # Where Ray notes the cluster to connect to: not in the user's own folder, which may not be there either.
        environment.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        made = Cluster(
            initialize_head=True,
            head_node_args={**small, **few, "temp_dir": folder, "_system_config": QUICK_TO_NOTICE},
        )
        made.second = made.add_node(**small)
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def held_predictor(folder: Path, first_node: str) -> type:
    """A predictor that says where it has begun; on the second node its first block never ends."""

    class Held:
        def __init__(self, *args: Any, **how: Any) -> None:
            from consistentee.pipelines.ray_blocks import BlockPredictor

            self.predictor = BlockPredictor(*args, **how)

        def __call__(self, batch: Any) -> Any:
            is_first = ray.get_runtime_context().get_node_id() == first_node
            (folder / ("first" if is_first else "second")).touch()
            for _ in range(1200):
                if is_first and (folder / "second").exists():
                    return self.predictor(batch)
                time.sleep(0.1)
            raise TimeoutError("The other node has not begun.")

    return Held


def test_a_node_is_killed(model: Path, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, blocks = tmp_path / "texts.txt", tmp_path / "blocks"
    file.write_text("".join(text + "\n" for text in TEXTS))
    alone = ["predict", str(model), str(file), "--batch-size", "2", "--device", "cpu", "--threshold", "0.9"]
    assert main([*alone, "--output", str(tmp_path / "alone.jsonl")]) == 0
    expected = (tmp_path / "alone.jsonl").read_text()

    # What an earlier run finished: the third block, here with a mark.
    engine = Engine.from_pretrained(model, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(ray_blocks, "_run", lambda *_: None)
        found = ray_blocks.predict_blocks(
            engine, [(text,) for text in TEXTS], blocks, batch_size=2, threshold=0.9
        )
    assert found.sizes[:4] == [2, 4, 8, 16]
    lines = expected.splitlines(keepends=True)
    finished = "".join(lines[6:14]).replace('"score": 0', '"score": 7')
    found.path(2).write_text(finished)

    def kill() -> None:
        while not (tmp_path / "second").exists():
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    held = held_predictor(tmp_path, ray.get_runtime_context().get_node_id())
    monkeypatch.setattr(ray_blocks, "BlockPredictor", held)
    on_ray = ["--ray", "--ray-workers", "2", "--ray-blocks", str(blocks)]
    assert main([*alone, "--output", str(tmp_path / "ray.jsonl"), *on_ray]) == 0
    killer.join(30)
    assert (tmp_path / "first").exists()
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    assert (tmp_path / "ray.jsonl").read_text() == expected.replace("".join(lines[6:14]), finished)
    assert sorted(path.name for path in blocks.iterdir()) == [
        *(f"{block:08d}.jsonl" for block in range(len(found.sizes))),
        "run.json",
    ]


def test_a_pipeline_of_ones_own(model: Path, cluster: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"id": number, "review": text} for number, text in enumerate(TEXTS)]
    dataset = ray.data.from_items(rows, override_num_blocks=7).map_batches(
        RayPredictor,
        fn_constructor_kwargs={"model": str(model), "text_columns": "review", "threshold": 0.9},
        batch_size=64,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = dataset.take_all()
    expected = Engine.from_pretrained(model, device="cpu").predict(TEXTS, threshold=0.9)
    assert [(row["id"], row["review"]) for row in found] == list(enumerate(TEXTS))
    assert [(row["label"], row["exit_layer"]) for row in found] == [
        (one.label, one.exit_layer) for one in expected
    ]
    assert [row["score"] for row in found] == pytest.approx([one.score for one in expected], abs=1e-5)


def test_ray_serve_answers_as_the_server_does(model: Path, cluster: Any) -> None:
    from ray import serve

    from consistentee.serving.ray_serve import RayServeArgs, app_builder

    body = {"inputs": TEXTS[:5], "threshold": 0.9}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app_builder(RayServeArgs(model=str(model), num_cpus=0.1)))
        on_ray = f"http://127.0.0.1:{port}"
        answers = httpx.post(f"{on_ray}/predict", json=body, timeout=60)
        wrong = httpx.post(f"{on_ray}/predict", json={"input": "a"}, timeout=60)
        states = [httpx.get(f"{on_ray}/{path}", timeout=60).status_code for path in ("health", "ready")]
        described = httpx.get(f"{on_ray}/openapi.json", timeout=60).json()
        metrics = httpx.get(f"{on_ray}/metrics", timeout=60).text
    finally:
        serve.shutdown()
    with running(classifier_app(ClassifierService(Engine.from_pretrained(model, device="cpu")))) as url:
        expected = httpx.post(f"{url}/predict", json=body, timeout=60)
        assert json.loads(answers.content) == expected.json()
        assert described == httpx.get(f"{url}/openapi.json").json()
        refused = httpx.post(f"{url}/predict", json={"input": "a"})
    assert answers.status_code == expected.status_code == 200
    assert (wrong.status_code, wrong.json()) == (refused.status_code, refused.json())
    assert states == [200, 200]
    assert "consistentee" in metrics
