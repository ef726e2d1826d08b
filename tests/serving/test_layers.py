"""`/layers`: every layer of a text as `run all layers, then choose` has it, and the page at `/` beside it."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from consistentee.functional.criteria import EXIT_CRITERIA, exit_scores
from consistentee.pipelines.classifier import Engine
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import RefusedRequest, ServerLimits, read_json
from served import HeldPool, running
from tiny import LABEL_NAMES, tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]
POINTS: dict[str, Any] = {
    "fast": {"criterion": "confidence", "threshold": 0.5},
    "calm": {"criterion": "patience", "threshold": 1.5},
    "state": {"criterion": "energy", "threshold": 0.5},
}
TOKEN = b"a-token-of-some-length"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("layers")
    torch.manual_seed(4)
    backbone = tiny_backbone(root / "backbone", layers=4)
    values = {
        "initial_exit_bias": 0.0,
        "operating_points": POINTS,
        "ensemble_decay": 0.3,
        "text_pairs": False,
    }
    return Engine.from_pretrained(tiny_model(root / "model", backbone, **values), device="cpu")


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    limits = ServerLimits(max_bytes=20_000)
    with (
        running(classifier_app(ClassifierService(engine, limits=limits))) as url,
        httpx.Client(base_url=url, timeout=30) as found,
    ):
        yield found


@torch.no_grad()
def all_layers(engine: Engine, text: str, criterion: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (layers, classes), exit scores (layers,) and exit probabilities (layers,) of the slow model."""
    (row,), _ = engine.tokenize([(text,)])
    model: Any = engine.saved.model
    out = model(**{name: torch.tensor([values]) for name, values in row.items()}, all_layers=True)
    signals = model.exit_signals(EXIT_CRITERIA[criterion].reads)(out.pooled, out.classifier_logits)
    scores = exit_scores(criterion, out.layer_logits, out.exit_probs, **signals)[0]
    return out.layer_logits[0].softmax(-1), scores, out.exit_probs[0]


@pytest.mark.parametrize(
    "name, criterion", [("saved", "policy"), *((n, p["criterion"]) for n, p in POINTS.items())]
)
def test_layers_are_those_of_the_slow_model(
    engine: Engine, client: httpx.Client, name: str, criterion: str
) -> None:
    depths = set()
    for text in TEXTS[:8]:
        got = client.post("/layers", json={"inputs": text, "operating_point": name}).json()
        probs, scores, exit_probs = all_layers(engine, text, criterion)
        assert got["criterion"] == criterion
        assert [layer["layer"] for layer in got["layers"]] == [1, 2, 3, 4]
        for layer, prob, score, exit_prob in zip(got["layers"], probs, scores, exit_probs, strict=True):
            assert layer["scores"] == pytest.approx(prob.tolist(), abs=1e-5)
            assert layer["label"] == LABEL_NAMES[int(prob.argmax())]
            assert layer["exit_score"] == pytest.approx(float(score), abs=1e-4)
            assert layer["exit_prob"] == pytest.approx(float(exit_prob), abs=1e-4)
        times = [layer["elapsed_ms"] for layer in got["layers"]]
        assert times == sorted(times)
        before = [index for index in range(3) if scores[index] > got["threshold"]]
        assert got["exit_layer"] == (before[0] + 1 if before else 4)
        (item, *_) = client.post("/predict", json={"inputs": text, "operating_point": name}).json()
        assert (got["label"], got["exit_layer"]) == (item["label"], item["exit_layer"])
        assert got["score"] == pytest.approx(item["score"], abs=1e-5)
        depths.add(got["exit_layer"])
    assert len(depths) > 1 or name != "saved"


def test_thresholds_and_full_depth(engine: Engine, client: httpx.Client) -> None:
    for threshold in (0.0, 0.47, 0.52, 1.0):
        got = client.post("/layers", json={"inputs": TEXTS[0], "threshold": threshold}).json()
        (wanted,) = engine.predict([TEXTS[0]], threshold=threshold)
        assert (got["label"], got["exit_layer"]) == (wanted.label, wanted.exit_layer)
        assert got["threshold"] == threshold
    full = client.post("/layers", json={"inputs": TEXTS[0], "operating_point": "full-depth"}).json()
    assert (full["exit_layer"], full["criterion"], full["threshold"]) == (4, "policy", 1.0)
    cut = client.post("/layers", json={"inputs": "good " * 100}).json()
    assert cut["truncated"] is True


def test_what_the_model_has(engine: Engine, client: httpx.Client) -> None:
    about = client.get("/layers").json()
    assert (about["labels"], about["num_layers"], about["operating_point"]) == (list(LABEL_NAMES), 4, "saved")
    assert [point["name"] for point in about["operating_points"]] == ["saved", "full-depth", *sorted(POINTS)]
    assert {point["validation"] for point in about["operating_points"]} == {None}
    assert set(about["criteria"]) == {"policy", "confidence", "patience", "energy"}
    for point in about["operating_points"]:
        known = about["criteria"][point["criterion"]]
        assert point["threshold"] in known["thresholds"]
        assert known["thresholds"] == sorted(set(known["thresholds"]))
        assert known["thresholds"][-1] <= known["high"]
    assert about["criteria"]["patience"]["thresholds"] == [0.5, 1.5, 2.5, 3.5]
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/layers"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    got = client.post("/layers", json={"inputs": TEXTS[0]}).json()
    assert set(got) == set(schema["required"])
    assert set(got["layers"][0]) == set(schema["properties"]["layers"]["items"]["required"])


def test_measured_points_come_with_their_figures(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from consistentee.serving.layers_route import layers_description

    measured = {"threshold": engine.rule().threshold, "accuracy": 0.9, "mean_exit_layer": 2.5}
    record = {
        "validation": {"num_examples": 50, "full_depth_accuracy": 0.91, "criteria": {"policy": measured}}
    }
    monkeypatch.setattr(engine, "saved", type(engine.saved)(**{**vars(engine.saved), "record": record}))
    saved, *others = layers_description(ClassifierService(engine))["operating_points"]
    assert saved["validation"] == {
        "num_examples": 50,
        "accuracy": 0.9,
        "full_depth_accuracy": 0.91,
        "mean_exit_layer": 2.5,
    }
    assert {point["validation"] for point in others} == {None}


@pytest.mark.parametrize(
    "body, status",
    [
        ({}, 422),
        ({"inputs": ""}, 422),
        ({"inputs": [["a"], ["b"]]}, 422),
        ({"inputs": ["a", "b"]}, 422),  # no model for pairs
        ({"inputs": "a", "raw_scores": True}, 422),
        ({"inputs": "a", "threshold": 1.5}, 422),
        ({"inputs": "a", "threshold": 0.5, "operating_point": "fast"}, 422),
        ({"inputs": "a", "operating_point": "none"}, 422),
        ({"inputs": "good " * 100, "truncate": False}, 413),
        ({"inputs": "a" * 30_000}, 413),
    ],
)
def test_bad_requests_are_told_why(client: httpx.Client, body: dict[str, Any], status: int) -> None:
    answer = client.post("/layers", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_a_model_for_pairs_without_exits_has_one_layer_to_show(tmp_path: Any) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", layers=2)
    folder = tiny_full_depth_model(tmp_path / "model", backbone, text_pairs=True)
    engine = Engine.from_pretrained(folder, device="cpu")
    with running(classifier_app(ClassifierService(engine), token=TOKEN)) as url:
        guest, bearing = httpx.get(url), {"authorization": f"Bearer {TOKEN.decode()}"}
        assert guest.status_code == 200
        assert engine.saved.name not in guest.text
        assert httpx.get(f"{url}/layers").status_code == 401
        assert httpx.post(f"{url}/layers", json={"inputs": "a"}).status_code == 401
        about = httpx.get(f"{url}/layers", headers=bearing).json()
        got = httpx.post(f"{url}/layers", json={"inputs": TEXTS[:2]}, headers=bearing).json()
        single = httpx.post(f"{url}/layers", json={"inputs": TEXTS[0]}, headers=bearing)
    (wanted,) = engine.predict([(TEXTS[0], TEXTS[1])])
    assert (about["text_pairs"], single.status_code) == (True, 422)
    assert (about["criteria"], [point["name"] for point in about["operating_points"]]) == ({}, ["full-depth"])
    assert (got["label"], got["exit_layer"], got["criterion"]) == (wanted.label, 2, None)
    assert [layer["layer"] for layer in got["layers"]] == [2]
    assert got["score"] == pytest.approx(wanted.score, abs=1e-5)


@pytest.mark.parametrize("inputs, got", [(["a"], "1"), (["a"] * 3, "3"), ([["a", "b"]] * 2, "lists")])
def test_several_texts_are_told_what_is_taken(inputs: Any, got: str) -> None:
    from consistentee.serving.layers_route import read_layers

    message = f"inputs must be one text, or a list of two for a model for pairs, got a list of {got}."
    with pytest.raises(RefusedRequest, match=re.escape(message)) as caught:
        read_layers({"inputs": inputs})
    assert caught.value.status == 422


def test_failures_and_the_queue(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from consistentee.serving.layers_route import read_layers

    held = HeldPool(engine.pool())
    service = ClassifierService(engine, limits=ServerLimits(max_queue=1, deadline_ms=200), pool=lambda: held)
    request = read_layers(read_json(b'{"inputs": "a"}'))

    def broken(*_: Any) -> None:
        raise RuntimeError("a layer broke")

    def seven(*_: Any) -> int:
        return 7

    async def main() -> list[Any]:
        service.start()
        found = [
            *await asyncio.gather(service.look_at(request, broken), return_exceptions=True),
            *await asyncio.gather(service.look_at(request, seven), return_exceptions=True),
            *await asyncio.gather(
                service.look_at(request, seven), service.look_at(request, seven), return_exceptions=True
            ),
        ]
        await service.stop()
        answers: list[Any] = found
        return [value.status if isinstance(value, RefusedRequest) else value[0] for value in answers]

    assert asyncio.run(main()) == [424, 7, 7, 429]
    assert (service._unanswered, service._pending) == (0, {})
    assert b"consistentee_failures_total 1.0" in service.metrics.text()


def test_the_page_runs_nothing_but_its_own(client: httpx.Client) -> None:
    found = client.get("/")
    policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\son\w+=|\sstyle=|https?://", found.text)
    assert "innerHTML" not in found.text


@pytest.mark.parametrize("what, status", [("classifiers", 424), ("policy", 200)])
def test_weights_that_are_no_numbers(engine: Engine, what: str, status: int) -> None:
    broken = copy.deepcopy(engine.saved)
    parts = getattr(broken.model, what).named_parameters()
    weights = [weight for name, weight in parts if what == "policy" or ".3." in f".{name}."]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(torch.nan)
    service = ClassifierService(Engine(broken))
    with running(classifier_app(service)) as url, httpx.Client(base_url=url, timeout=30) as client:
        whole = {"inputs": TEXTS[0], "operating_point": "full-depth"}
        assert client.post("/predict", json=whole).status_code == status
        answer = client.post("/layers", json={"inputs": TEXTS[0]})
    assert answer.status_code == status, answer.text
    if status == 424:
        assert "logits must be numbers" in answer.json()["error"]
        assert b"consistentee_failures_total 2.0" in service.metrics.text()
    else:
        layers = answer.json()["layers"]
        assert [layer["exit_prob"] for layer in layers] == [None] * 4
        assert answer.json()["exit_layer"] == 4
