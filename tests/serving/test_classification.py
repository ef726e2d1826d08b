"""The service without HTTP: answers of the engine, early ones first, bounds, deadlines, failures, and the audit."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.serving.audit import AUDIT_CONFIDENCE, Auditor
from consistentee.serving.classification import ClassifierService
from consistentee.serving.pace import AnswerPace
from consistentee.serving.points import ServedPoint, named_point, safer_point, served_points
from consistentee.serving.requests import PredictRequest, RefusedRequest, ServerLimits
from served import HeldPool, failing
from tiny import LABEL_NAMES, tiny_backbone, tiny_dataset, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]


def certificate(allowed: float, **more: Any) -> dict[str, Any]:
    return {"goal": "max_disagreement", "target": allowed, "confidence": 0.95, **more}


POINTS = {
    "fast": {"criterion": "confidence", "threshold": 0.5, "certificate": certificate(0.02)},
    "careful": {"criterion": "confidence", "threshold": 0.6, "certificate": certificate(0.01)},
    "other": {"criterion": "policy", "threshold": 0.4, "certificate": certificate(0.5, reference="x")},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(4)
    backbone = tiny_backbone(root / "backbone", layers=4)
    values = {"initial_exit_bias": 0.0, "operating_points": POINTS}
    return Engine.from_pretrained(tiny_model(root / "model", backbone, **values), device="cpu")


def run(service: ClassifierService, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        service.start()
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            await service.stop()

    return asyncio.run(main())


def ask(*texts: str, **values: Any) -> PredictRequest:
    return PredictRequest([(text,) for text in texts], True, **values)


def test_answers_are_the_engines(engine: Engine) -> None:
    service = ClassifierService(engine)
    asked = [
        {"threshold": 0.45},
        {"operating_point": "fast"},
        {"operating_point": "full-depth"},
        {},
        {"threshold": 0.55, "raw_scores": True},
    ]

    async def work() -> list[Any]:
        requests = [ask(*TEXTS[start : start + 3], **asked[start % 5]) for start in range(20)]
        return await asyncio.gather(*map(service.predict, requests))

    for start, answers in enumerate(run(service, work)):
        values = {name: value for name, value in asked[start % 5].items() if name != "raw_scores"}
        if values.get("operating_point") == "full-depth":
            values = {"threshold": 1.0}
        expected = engine.predict(TEXTS[start : start + 3], **values)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.exit_layer == wanted.exit_layer
            assert LABEL_NAMES[int(answer.scores.argmax())] == wanted.label
            if "raw_scores" not in asked[start % 5]:
                assert float(answer.scores.max()) == pytest.approx(wanted.score, abs=1e-5)
                assert float(answer.scores.sum()) == pytest.approx(1)
    assert service._unanswered == 0
    assert not service._pending
    assert b"consistentee_exit_layer_count 60.0" in service.metrics.text()


def test_whoever_exits_early_is_answered_early(engine: Engine) -> None:
    held = HeldPool(engine.pool())
    service = ClassifierService(engine, pool=lambda: held)

    async def work() -> None:
        hard = asyncio.ensure_future(service.predict(ask(TEXTS[0], threshold=0.999)))
        easy = asyncio.ensure_future(service.predict(ask(TEXTS[1], threshold=0.0)))
        await asyncio.sleep(0.2)
        held.go.release()
        (answer,) = await easy
        assert answer.exit_layer == 1
        assert not hard.done()
        held.let_go()
        assert (await hard)[0].exit_layer == 4

    run(service, work)


def test_the_queue_is_bounded_and_says_when_to_come_again(engine: Engine) -> None:
    held = HeldPool(engine.pool())
    service = ClassifierService(engine, limits=ServerLimits(max_queue=3), pool=lambda: held)

    async def work() -> None:
        waiting = [asyncio.ensure_future(service.predict(ask(text))) for text in TEXTS[:3]]
        await asyncio.sleep(0)
        with pytest.raises(RefusedRequest, match="overloaded: 3 texts wait") as caught:
            await service.predict(ask(TEXTS[3]))
        assert caught.value.status == 429
        assert caught.value.retry_after == 1
        with pytest.raises(RefusedRequest, match="at most 3 texts") as caught:
            await service.predict(ask(*TEXTS[:4]))
        assert caught.value.status == 413
        held.let_go()
        await asyncio.gather(*waiting)
        assert len(await service.predict(ask(*TEXTS[:3]))) == 3

    run(service, work)


def answered(pace: AnswerPace, answers: int, *, seconds: float, load: int = 1) -> None:
    """As if so many texts had been answered, so many seconds apart, while so many waited."""
    pace._answers.extend([(seconds, load)] * answers)
    pace._last = time.perf_counter()


def test_what_would_be_too_late_is_refused_at_once(engine: Engine) -> None:
    held = HeldPool(engine.pool())
    service = ClassifierService(engine, limits=ServerLimits(deadline_ms=5000), pool=lambda: held)

    async def work() -> None:
        waiting = asyncio.ensure_future(service.predict(ask(TEXTS[0])))
        await asyncio.sleep(0)
        answered(service._pace, 64, seconds=2)  # four for two texts, of five
        with pytest.raises(RefusedRequest, match="more than it answers in time"):
            await service.predict(ask(TEXTS[1]))
        service._pace.rest()
        answered(service._pace, 64, seconds=10)
        with pytest.raises(RefusedRequest, match="more than it answers in time") as caught:
            await service.predict(ask(TEXTS[1]))
        assert (caught.value.status, caught.value.retry_after) == (429, 11)
        held.let_go()
        await waiting
        assert len(await service.predict(ask(TEXTS[1]))) == 1  # nobody waits: the pace begins anew

    run(service, work)


def test_a_pace_without_a_queue_says_nothing_about_one(engine: Engine) -> None:
    held = HeldPool(engine.pool())
    service = ClassifierService(engine, limits=ServerLimits(deadline_ms=5000), pool=lambda: held)

    async def work() -> None:
        waiting = asyncio.ensure_future(service.predict(ask(TEXTS[0])))
        await asyncio.sleep(0)
        answered(
            service._pace, 256, seconds=0.5
        )  # one client, that asks twice a second: 20 texts would take 10 s
        held.let_go()
        assert len(await service.predict(ask(*TEXTS[:2] * 10))) == 20
        await waiting

    run(service, work)


def test_the_pace_is_that_of_similar_loads() -> None:
    pace = AnswerPace()
    assert pace.seconds(1) == 0
    answered(pace, 192, seconds=1.0, load=4)
    assert pace.seconds(8) == pytest.approx(8, rel=0.01)
    assert pace.seconds(9) == 0  # of such loads nothing is known
    answered(pace, 63, seconds=0.1, load=100)
    assert pace.seconds(100) == 0  # too few
    answered(pace, 1, seconds=0.1, load=100)
    assert pace.seconds(200) == pytest.approx(20, rel=0.01)
    assert pace.seconds(8) == pytest.approx(8 * (192 + 6.4) / 256, rel=0.01)
    pace._last = time.perf_counter() - 64  # nothing came since: the pace falls
    assert pace.seconds(100) == pytest.approx(100 * (6.4 + 64) / 64, rel=0.01)
    pace.rest()
    assert pace.seconds(1) == 0
    for _ in range(66):
        pace.answered(3)
    assert 0 < pace.seconds(6) < 6


def test_deadlines_and_clients_that_go_away(engine: Engine) -> None:
    held = HeldPool(engine.pool())
    service = ClassifierService(engine, limits=ServerLimits(deadline_ms=150), pool=lambda: held)

    async def work() -> None:
        gone = asyncio.ensure_future(service.predict(ask(TEXTS[0])))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(RefusedRequest, match="No answer within 150 ms") as caught:
            await service.predict(ask(TEXTS[1]))
        assert caught.value.status == 504
        assert service._unanswered == 0
        assert not service._pending
        held.let_go()
        for _ in range(100):
            if not len(held):
                break
            await asyncio.sleep(0.02)
        assert len(held) == 0  # neither was computed to its end
        assert (await service.predict(ask(TEXTS[2])))[0].exit_layer >= 1

    run(service, work)


def test_tokenizing_is_within_the_deadline(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free, tokenize = threading.Event(), engine.tokenize
    waited: list[bool] = []

    def held(texts: Any) -> Any:
        waited.append(free.wait(20))
        return tokenize(texts)

    monkeypatch.setattr(engine, "tokenize", held)
    service = ClassifierService(engine, limits=ServerLimits(deadline_ms=150))

    async def work() -> None:
        with pytest.raises(RefusedRequest, match="No answer within 150 ms") as caught:
            await service.predict(ask("good " * 1_000))
        assert caught.value.status == 504
        assert not waited  # the answer came before
        assert service._unanswered == 0
        free.set()

    run(service, work)


def test_a_text_whose_logits_are_no_numbers_is_told_and_others_beside_it_are_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone", layers=3))
    whole = Engine.from_pretrained(folder, device="cpu")
    saved = load_model(folder, LoadedClassifier)
    weight: Any = saved.early_exit_model.get_input_embeddings().weight
    with torch.no_grad():  # as numbers that are too large for a dtype are
        weight[saved.tokenizer("awful")["input_ids"][1]] = torch.nan
    broken = Engine(saved)
    texts = ["a good film", "awful film", "a fine plot"]
    for batch_size in (None, 1):
        with pytest.raises(FloatingPointError, match=r"got NaN or infinity at layer 3, for 1 of . texts"):
            broken.predict(texts, batch_size=batch_size)
    assert broken.predict(texts[::2]) == whole.predict(texts[::2])
    service = ClassifierService(broken)

    async def work() -> None:
        answers = [service.predict(ask(text)) for text in texts]
        good, refused, fine = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(refused, RefusedRequest)
        assert (refused.status, refused.kind) == (424, "Backend")
        assert not isinstance(good, BaseException)
        assert not isinstance(fine, BaseException)
        assert service._unanswered == 0

    run(service, work)
    assert "no numbers at layer 3" in caplog.text


def test_a_batch_that_fails_is_told_and_the_next_goes_on(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    service = ClassifierService(engine, pool=failing(engine.pool, 1))

    async def work() -> None:
        with pytest.raises(RefusedRequest, match="Computing failed") as caught:
            await service.predict(ask(*TEXTS[:2]))
        assert caught.value.status == 424
        assert len(await service.predict(ask(*TEXTS[:2]))) == 2

    run(service, work)
    assert "a layer broke" in caplog.text
    assert b"consistentee_failures_total 1.0" in service.metrics.text()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"threshold": 7.0}, "threshold must be in"),
        ({"operating_point": "none"}, 'has no operating point "none"; it has: .*fast'),
        ({"operating_point": "fast", "threshold": 0.5}, "exclude each other"),
    ],
)
def test_refused(engine: Engine, values: dict[str, Any], message: str) -> None:
    service = ClassifierService(engine)
    with pytest.raises(RefusedRequest, match=message) as caught:
        run(service, lambda: service.predict(ask(TEXTS[0], **values)))
    assert caught.value.status == 422
    assert "/" not in caught.value.message  # the folder is nobody's business


def test_a_model_in_the_folder_where_one_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine.saved.name)
    service = ClassifierService(Engine.from_pretrained(".", device="cpu"))
    assert service.name == "model"
    with pytest.raises(RefusedRequest, match=r'^Model "model" has no operating point "a\.b"; it has: '):
        run(service, lambda: service.predict(ask(TEXTS[0], operating_point="a.b")))


def test_tokens_and_texts_have_limits(engine: Engine) -> None:
    service = ClassifierService(engine, limits=ServerLimits(max_tokens=20))

    async def work() -> None:
        for request, status, message in (
            (ask("good " * 100, truncate=False), 413, "must have at most 64 tokens"),
            (ask("good " * 100), 413, "at most 20 tokens together, got 64"),
            (ask(" "), 422, "is empty"),
            (ask("\ud800"), 422, "half a surrogate"),
        ):
            with pytest.raises(RefusedRequest, match=message) as caught:
                await service.predict(request)
            assert caught.value.status == status

    run(service, work)


# --- The audit --------------------------------------------------------------------------------------


def test_points_and_which_is_safer(engine: Engine) -> None:
    points = served_points(engine)
    assert set(points) == {"saved", "full-depth", *POINTS}
    assert next(iter(points)) == "saved"
    assert points["other"].max_disagreement is None  # its certificate is about another model
    assert safer_point(points, points["fast"]) == points["careful"]
    assert safer_point(points, points["careful"]) == points["full-depth"]


def test_the_names_of_the_servers_own_points_are_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders of before have them; new points are refused (`test_calibrate`)."""
    entry = {"criterion": "confidence", "threshold": 0.0}
    taken = {**POINTS, "full-depth": entry, "saved": entry}
    monkeypatch.setattr(engine.saved.model.config, "operating_points", taken)
    points = served_points(engine)
    assert set(points) == {"saved", "full-depth", *POINTS}
    assert points["saved"].rule == engine.rule()
    assert points["full-depth"].max_disagreement == 0
    assert 'The operating point "full-depth" of model' in caplog.text
    assert 'The operating point "saved" of model' in caplog.text


def test_the_saved_rule_can_be_named_where_a_point_is_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind every `retrofit` that certifies its threshold."""
    criterion, threshold = engine.saved.exit_rule()
    certified = {"criterion": criterion, "threshold": threshold}
    monkeypatch.setattr(engine.saved.model.config, "operating_points", {**POINTS, "certified": certified})
    points = served_points(engine)
    assert set(points) == {"certified", "full-depth", *POINTS}
    for name in (None, "saved", "certified"):
        assert named_point(points, name, "m").name == "certified"
    service = ClassifierService(engine, operating_point="saved")
    assert service.auditor.point.name == "certified"
    (answer,) = run(service, lambda: service.predict(ask(TEXTS[0], operating_point="saved")))
    assert answer.exit_layer == engine.predict([TEXTS[0]])[0].exit_layer


def test_the_audit_counts_every_text_once_after_its_answer(engine: Engine) -> None:
    service = ClassifierService(engine, operating_point="fast", audit=1.0, seed=0)
    service.auditor._points = {**service.points}

    async def work() -> None:
        for text in TEXTS:
            await service.predict(ask(text))
        await service.predict(ask(TEXTS[0], threshold=0.3))  # asks for something else: not audited
        while service._pending:
            await asyncio.sleep(0.01)

    run(service, work)
    left = [bounds for _, bounds in service.auditor.steps_back]
    at_fast = left[0] if left else service.auditor.bounds
    assert at_fast.rows > 0
    exits, full = (
        engine.predict(TEXTS, **rule) for rule in ({"operating_point": "fast"}, {"threshold": 1.0})
    )
    count = at_fast.rows if left else len(TEXTS)
    different = [a.label != b.label for a, b in zip(exits, full, strict=True)][:count]
    assert (at_fast.rows, at_fast.losses) == (count, sum(different))


def test_shifted_traffic_makes_the_server_step_back(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Texts that agree with full depth leave the point in force; texts that do not drive it back, to full depth."""
    exits, full = (
        engine.predict(TEXTS, **rule) for rule in ({"operating_point": "fast"}, {"threshold": 1.0})
    )
    differs = [text for text, a, b in zip(TEXTS, exits, full, strict=True) if a.label != b.label]
    agrees = [text for text in TEXTS if text not in differs]
    assert differs
    service = ClassifierService(engine, operating_point="fast", audit=0.5, seed=1)

    async def send(texts: list[str], most: int) -> int:
        for number in range(most):
            if service.auditor.point.name == "full-depth":
                return number
            await service.predict(ask(texts[number % len(texts)]))
            while service._pending:
                await asyncio.sleep(0)
        return most

    async def work() -> None:
        await send(agrees, 60)
        assert service.auditor.point.name == "fast"
        assert b'operating_point{operating_point="fast"} 1.0' in service.metrics.text()
        sent = await send(differs, 400)
        assert sent < 400
        answers = await service.predict(ask(differs[0]))  # from here on full depth answers
        assert answers[0].exit_layer == 4

    run(service, work)
    text = service.metrics.text()
    assert b'operating_point{operating_point="full-depth"} 1.0' in text
    assert b'certificate_max_disagreement{operating_point="full-depth"} 0.0' in text
    assert "Operating point fast is left for careful" in caplog.text
    names = [point.name for point, _ in service.auditor.steps_back]
    assert names[0] == "fast"
    assert all(bounds.lower > (point.max_disagreement or 0) for point, bounds in service.auditor.steps_back)


@pytest.mark.parametrize(
    "certificates, in_force",
    [
        ([(0.01, 0.9), (None, None), (0.01, 0.95)], [(0.01, 0.9), (0.01, 0.9), (0.01, 0.95)]),
        ([(0.01, 0.9), (0.5, 0.8), (0.005, 0.95)], [(0.01, 0.9), (0.01, 0.9), (0.005, 0.95)]),
        ([(0.01, 0.9), (None, None), (0.5, 0.8)], [(0.01, 0.9)] * 3),
    ],
)
def test_what_was_promised_holds_at_safer_points(
    certificates: list[tuple[float | None, float | None]], in_force: list[tuple[float, float]]
) -> None:
    """A third of the texts disagree at every point: only full depth keeps the promise."""
    steps = list(enumerate(certificates, start=4))
    known = [ServedPoint(str(step), ExitRule("policy", step / 10), *promise) for step, promise in steps]
    full = ServedPoint("full-depth", ExitRule("confidence", 1.0), 0.0, 1.0)
    points = {point.name: point for point in (*known, full)}
    auditor = Auditor(points, known[0], 1.0, seed=0)
    seen = [(auditor.allowed, auditor.bounds.confidence)]
    seen += [
        (auditor.allowed, auditor.bounds.confidence)
        for row in range(1_000)
        if auditor.draws(auditor.point) and auditor.add(auditor.point, row % 3 == 0)
    ]
    assert seen == [*in_force, (0.0, AUDIT_CONFIDENCE)]
    assert [point for point, _ in auditor.steps_back] == known
    assert (auditor.point, auditor.watches) == (full, False)


def test_without_a_certificate_nothing_is_left(engine: Engine) -> None:
    points = served_points(engine)
    auditor = Auditor(points, points["saved"], 1.0, seed=0)
    assert not any(auditor.add(points["saved"], True) for _ in range(100))
    assert auditor.allowed is None


def test_draws_are_of_the_share(engine: Engine) -> None:
    points = served_points(engine)
    auditor = Auditor(points, points["fast"], 0.1, seed=2)
    drawn = np.mean([auditor.draws(points["fast"]) for _ in range(4000)])
    assert drawn == pytest.approx(0.1, abs=0.015)
    assert not any(auditor.draws(points["careful"]) for _ in range(100))
