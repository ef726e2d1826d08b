"""The report's page: its figures are the evaluation's, its texts are harmless, and a browser finds nothing amiss."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Browser
from consistentee.data.rows import TextDataset
from consistentee.evaluation.exit_report import ExitReport, report_exits
from consistentee.evaluation.html_page import EMPTY, LONGEST_SHOWN, check_report_file, shown
from consistentee.evaluation.html_report import hardness_sentence, model_page, record_page
from consistentee.evaluation.report_figures import Example, HardnessTable, recorded_point
from consistentee.evaluation.results import AgreementEvaluation
from consistentee.evaluation.svg_charts import exit_chart
from consistentee.functional.curves import CurvePoint
from consistentee.functional.recall import ClassRecall
from consistentee.models.loaded import LoadedClassifier, load_model
from html_pages import read_page, script_data
from tiny import tiny_backbone, tiny_dataset, tiny_model

LABELS = ('neg"ative</script><b>', "<img src=x onerror=alert(1)>")
HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "\"' onmouseover='alert(1)' x=\"",
    "{{ 7 * 7 }} {% raw %} ]]> --> <!-- <style>",
    "\u202eright to left by force",
    "مرحبا بالعالم and then left to right",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family \U0001f1ea\U0001f1fa",
    "w" * 3000,
    "",
    "   \n\t ",
    "tab\tbell\x07null\x00delete\x7fnext\x85",
    "half a pair \ud83d",
    "a\n\n\n\nb",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedClassifier:
    root = tmp_path_factory.mktemp("page")
    torch.manual_seed(3)
    model = tiny_model(
        root / "model <i>", tiny_backbone(root / "backbone"), initial_exit_bias=0.0, label_names=LABELS
    )
    return load_model(model, LoadedClassifier)


@pytest.fixture(scope="module")
def report(saved: LoadedClassifier) -> ExitReport:
    rows = dataclasses.replace(tiny_dataset(80, seed=4), label_names=LABELS, source="rows <&>.csv")
    found = report_exits(saved, rows, criteria=["policy", "confidence", "patience"])
    examples = [
        Example((text, "second <text>"), LABELS[0], LABELS[0], 0.9, LABELS[1], 0.8, 2, [0.1, 0.7, 0.2])
        for text in HOSTILE
    ]
    return dataclasses.replace(found, changed=examples)


@pytest.fixture(scope="module")
def page(saved: LoadedClassifier, report: ExitReport) -> str:
    return model_page(saved, report)


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# --- What it says ---------------------------------------------------------------------------------


def test_the_first_sentence_is_the_reported_point(page: str, report: ExitReport) -> None:
    said, point = read_page(page).one("p", class_="lead").text, report.point
    assert f"{point.mean_exit_layer:.2f} of 3 layers" in said
    assert f"{100 * point.layers_saved:.1f} % of the layers saved" in said
    assert f"right on {100 * point.quality:.1f} % of 80 rows" in said
    low, high = point.interval
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f} %" in said
    assert f"full depth is right on {100 * report.evaluation.full_depth_accuracy:.1f} %" in said


def test_tables_hold_the_figures(page: str, report: ExitReport) -> None:
    tables = {section.attributes.get("id"): section for section in read_page(page).all("section")}
    points = tables["points"].one("table").rows()[1:]
    assert [row[0] for row in points] == ["full depth", "default", *(p.criterion for p in report.points[2:])]
    for row, point in zip(points, report.points, strict=True):
        low, high = point.interval
        assert row[2] == f"{100 * point.quality:.2f}"
        assert row[3] == f"{100 * low:.2f} to {100 * high:.2f}"
        assert row[5:] == [
            f"{100 * (point.agreement or 0):.2f}",
            f"{point.mean_exit_layer:.2f}",
            f"{point.layer_speedup:.2f}×",
            f"{100 * point.layers_saved:.1f}",
        ]
    for row, one in zip(tables["layers"].one("table").rows()[1:], report.layers, strict=True):
        quality = "" if one.quality is None else f"{100 * one.quality:.2f}"
        assert row[:4] == [str(one.layer), str(one.exited), f"{100 * one.share:.1f}", quality]
        assert row[5:] == [f"{100 * (one.if_all or 0):.2f}", f"{100 * (one.alone or 0):.2f}"]
    rows = tables["classes"].one("table").rows()[1:]
    assert [row[0] for row in rows] == list(LABELS)
    assert [row[1] for row in rows] == ["40", "40"]
    for row, one in zip(rows, report.evaluation.class_recall, strict=True):
        assert row[4:] == [f"{100 * (share or 0):.2f}" for share in (one.recall, one.full_depth_recall)]
    cells = tables["hardness"].one("svg", class_="wide").all("title")
    counted = sum(int(title.text.split(" row")[0]) for title in cells if " row" in title.text)
    assert counted == 80


def test_what_a_loss_buys_has_a_table(saved: LoadedClassifier, report: ExitReport, page: str) -> None:
    at = {"threshold": 0.690262, "accuracy": 0.9, "mean_exit_layer": 2.0, "layer_speedup": 1.5}
    faster = {**at, "max_loss": 0.0025, "threshold": 0.5, "layer_speedup": 2.0}
    validation: dict[str, Any] = {"num_examples": 40, "full_depth_accuracy": 0.9, "criteria": {"policy": at}}
    validation["tolerances"] = {"policy": [{**at, "max_loss": 0.0}, faster]}
    record = {**saved.record, "validation": validation}
    made = read_page(model_page(dataclasses.replace(saved, record=record), report))
    named = {"aria-label": "Layer speed-ups by the loss that is allowed on validation"}
    region = made.one("div", **named)
    assert region.one("table").rows() == [
        ["criterion", "0 points", "0.25 points"],
        ["policy", "1.50× at 0.690262", "2.00× at 0.5"],
    ]
    assert "By the loss that is allowed" not in page
    record["config"] = {"threshold_metric": "macro_f1"}
    assert "loses no more of macro_f1 against full depth" in model_page(
        dataclasses.replace(saved, record=record), report
    )


def test_bars_beside_a_text_are_its_exit_scores(page: str, report: ExitReport) -> None:
    items = list(read_page(page).all("li", class_="example"))
    examples = [*report.early, *report.deep, *report.changed]
    assert len(items) == len(examples)
    for item, example in zip(items, examples, strict=True):
        bars = item.one("svg").all("rect")
        heights = [float(bar.attributes["height"]) for bar in bars]
        wanted = [max(1.0, 40 * score) if score > 0 else 0.0 for score in example.scores]
        assert heights == pytest.approx(wanted, abs=0.06)
        assert item.one("svg").one("rect", class_="exit")
        assert item.one("svg").text == str(example.exit_layer)
        assert f"Exit at layer {example.exit_layer} of 3" in item.text


def test_the_script_reads_the_curve(page: str, report: ExitReport) -> None:
    data, curve = script_data(read_page(page)), report.evaluation.curve
    found = sorted((layer, accuracy, tuple(counts)) for _, accuracy, layer, counts in data["points"])
    known = zip(curve, report.histograms, strict=True)
    assert found == sorted(
        (round(point.mean_exit_layer, 5), round(point.accuracy, 6), tuple(counts)) for point, counts in known
    )
    assert data["chosen"]["histogram"] == report.evaluation.exit_histogram


def test_the_slider_rounds_as_the_tables_do(saved: LoadedClassifier, report: ExitReport) -> None:
    """86.25 is 86.2 there, and 86.3 where a script rounds."""
    evaluation, count = report.evaluation, len(report.evaluation.curve)
    curve = [CurvePoint(0.5, 0.8625, 2.125, 3 / 2.125)] * count
    changed = dataclasses.replace(
        report,
        evaluation=dataclasses.replace(evaluation, curve=curve),
        intervals=[(0.76625, 0.93125)] * count,
    )
    page = model_page(saved, changed)
    assert script_data(read_page(page))["said"] == count * [
        {
            "quality": "86.2\u00a0%",
            "interval": "76.6 to 93.1\u00a0%",
            "layer": "2.12",
            "speedup": "1.41\u00d7",
            "saved": "29.2\u00a0%",
        }
    ]
    assert "toFixed(1)" not in page
    assert "toFixed(2)" not in page


def test_bars_are_labelled_as_the_script_labels_them() -> None:
    """Halves up: the script writes 13 for 12.5."""
    bars = exit_chart([1, 7], narrow=False).parts["bars"]
    assert [bar["label"] for bar in bars] == ["13", "88"]


def test_the_curve_is_drawn_where_its_points_are(page: str, report: ExitReport) -> None:
    chart = read_page(page).one("svg", class_="wide", **{"data-chart": "trade_off"})
    x, y = (list(map(float, chart.attributes[f"data-{axis}"].split())) for axis in "xy")

    def pixel(value: float, axis: list[float]) -> float:
        low, high, start, end = axis
        return start + (value - low) / (high - low) * (end - start)

    drawn = {
        tuple(map(float, pair.split()))
        for pair in chart.one("path", class_="s0").attributes["d"][1:].split("L")
    }
    for point in report.evaluation.curve:
        saved = 100 * (1 - point.mean_exit_layer / 3)
        at = (pixel(saved, x), pixel(100 * point.accuracy, y))
        assert any(at == pytest.approx(pair, abs=0.06) for pair in drawn)
    own = chart.one("circle", class_="own").attributes
    assert float(own["cx"]) == pytest.approx(pixel(100 * report.point.layers_saved, x), abs=0.06)
    assert float(own["cy"]) == pytest.approx(pixel(100 * report.point.quality, y), abs=0.06)


def test_points_below_the_picture_are_not_drawn_beside_it(
    saved: LoadedClassifier, report: ExitReport
) -> None:
    full_depth, own = report.points[:2]
    far, here = (dataclasses.replace(own, names=(), quality=at) for at in (0.01, own.quality))
    page = model_page(saved, dataclasses.replace(report, points=[full_depth, own, far, here]))
    chart = read_page(page).one("svg", class_="wide", **{"data-chart": "trade_off"})
    assert len(list(chart.all("circle", class_="mark"))) == 2
    poor = dataclasses.replace(own, quality=0.1, interval=(0.05, 0.2))
    page = model_page(saved, dataclasses.replace(report, point=poor, points=[full_depth, poor, here]))
    chart = read_page(page).one("svg", class_="wide", **{"data-chart": "trade_off"})
    _, _, start, _ = map(float, chart.attributes["data-y"].split())
    assert float(chart.one("circle", class_="own").attributes["cy"]) < start


def test_without_texts_none_are_in_the_page(saved: LoadedClassifier, report: ExitReport, page: str) -> None:
    bare = dataclasses.replace(report, early=[], deep=[], changed=[])
    without = model_page(saved, bare, with_texts=False)
    known = [text for example in report.early for text in example.texts]
    assert known
    assert all(text in page and text not in without for text in known)
    assert "They were left out" in read_page(without).text
    assert not list(read_page(without).all("li", class_="example"))


def test_agreement_is_called_so(saved: LoadedClassifier) -> None:
    report = report_exits(saved, tiny_dataset(40).texts, source="/a/secret/place/texts.txt")
    whole = model_page(saved, report)
    said = read_page(whole)
    assert f"give {100 * report.point.quality:.1f} % of 40 texts the label of full depth" in said.text
    assert said.one("h2", id="h-layers").text == "Agreement by exit layer"
    assert "texts.txt" in said.text
    assert "/a/secret" not in whole


def test_the_record_alone_gives_less_and_says_so(saved: LoadedClassifier, report: ExitReport) -> None:
    record = {
        "evaluation": report.evaluation.summary(),
        "config": {"seed": 7, "rounds": 1},
        "environment": {"torch": "1"},
    }
    page = read_page(record_page(dataclasses.replace(saved, record=record)))
    assert f"{report.point.mean_exit_layer:.2f} of 3 layers" in page.one("p", class_="lead").text
    ids = [section.attributes["id"] for section in page.all("section")]
    assert ids == ["trade-off", "classes", "layers", "settings", "environment"]
    assert "training left in the folder's record" in page.text
    assert not list(page.all("script", id="curve"))
    assert "Other than the defaults: seed, rounds." in page.one("section", id="settings").text


def test_agreement_with_another_model_names_it(saved: LoadedClassifier) -> None:
    found = report_exits(saved, tiny_dataset(40).texts).evaluation
    assert isinstance(found, AgreementEvaluation)
    other = dataclasses.replace(
        found,
        agreement_with="/a/secret/place/original <b>",
        agreement=0.8,
        per_layer_agreement=[0.7, 0.8, 0.9],
    )
    page = record_page(dataclasses.replace(saved, record={"evaluation": other.summary()}))
    said = read_page(page).one("p", class_="lead").text
    assert "give 80.0 % of 40 texts the label of model “original <b>”" in said
    assert "Full depth gives it to 90.0 %." in said
    assert "/a/secret" not in page
    _, point = recorded_point(other.summary())
    assert point.difference == pytest.approx(-0.1)
    assert point.difference_interval is None  # which rows exits won is not recorded
    low, high = recorded_point(found.summary())[1].difference_interval or (0, 0)
    assert low < found.agreement - 1 < high or found.agreement == 1


CERTIFICATE = {"confidence": 0.95, "num_rows": 2000, "rows_source": "rows.csv", "bound": 0.0312}


@pytest.mark.parametrize(
    "proof, said",
    [
        (
            {"goal": "max_disagreement", "target": 0.02},
            "at most 2 points of disagreement with full depth, 95",
        ),
        (
            {"goal": "max_disagreement", "target": 0.1, "reference": "/secret/original"},
            "at most 10 points of disagreement with model “original”, 95",
        ),
        (
            {"goal": "max_accuracy_loss", "target": 0.01, "reference": "original"},
            "at most 1 point of rows lost against model “original”, 95",
        ),
        (
            {"goal": "min_speedup", "target": 1.5},
            "at 1.5× fewer layers at most 3.12 % of disagreement with full depth, 95",
        ),
        (
            {"goal": "min_speedup", "target": 1.3, "clock": {"batch_size": 8, "speedup": 1.31}},
            "at 1.3× faster on the clock at batches of 8 at most 3.12 % of disagreement with full depth, 95",
        ),
        (
            {"goal": "min_speedup", "target": 6.0, "layer_speedup": 3.0, "bound": 0.019642},
            "at 3× fewer layers at most 1.97 % of disagreement with full depth, 95",
        ),
    ],
)
def test_a_certificate_says_what_was_certified(
    saved: LoadedClassifier, report: ExitReport, proof: dict[str, Any], said: str
) -> None:
    point = dataclasses.replace(report.point, names=("safe",), certificates=(("safe", CERTIFICATE | proof),))
    page = read_page(model_page(saved, dataclasses.replace(report, points=[*report.points[:2], point])))
    assert f"safe has a certificate: {said} % confidence" in page.one("p", class_="certificate").text


def test_points_at_one_threshold_have_a_certificate_each(
    saved: LoadedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = {"criterion": "confidence", "threshold": 0.6}
    proof = CERTIFICATE | {"goal": "max_disagreement"}
    points = {
        "strict": point | {"certificate": proof | {"target": 0.02}},
        "loose": point | {"certificate": proof | {"target": 0.05}},
        "bare": point,
    }
    monkeypatch.setattr(saved.early_exit_model.config, "operating_points", points)
    rows = dataclasses.replace(tiny_dataset(30, seed=4), label_names=LABELS)
    page = read_page(model_page(saved, report_exits(saved, rows)))
    said = [line.text.partition(" of ")[0] for line in page.all("p", class_="certificate")]
    assert said == [
        "strict has a certificate: at most 2 points",
        "loose has a certificate: at most 5 points",
    ]


@pytest.mark.parametrize(
    "record", [{}, {"evaluation": {"accuracy": 0.9}}, {"evaluation": {"num_examples": 3}}]
)
def test_a_record_without_figures_is_not_enough(saved: LoadedClassifier, record: dict) -> None:
    with pytest.raises(ValueError, match=r"holds no figures by layer to report on. Give rows: --task"):
        record_page(dataclasses.replace(saved, record=record))


def test_hardness_in_words() -> None:
    table = HardnessTable(counts=[[4, 0, 0], [0, 0, 0], [0, 1, 1]], never=[0, 0, 0], rank_correlation=-0.25)
    said = hardness_sentence(table, "agreement")
    assert said == (
        "Of 6 texts 67\u00a0% need one layer and exit at layer 1.0 on average; 33\u00a0% need more than 2 and exit at "
        "layer 2.5. Rank correlation of the two layers: \u22120.25."
    )
    nothing = HardnessTable(counts=[[0], [0]], never=[1, 1], rank_correlation=None)
    assert hardness_sentence(nothing, "accuracy") == "Full depth gets no row right."


# --- Untrusted texts ------------------------------------------------------------------------------


def test_hostile_texts_are_shown_and_are_nothing_but_text(page: str) -> None:
    root = read_page(page)  # every element is closed in its place
    assert [script.attributes for script in root.all("script")] == [
        {"type": "application/json", "id": "curve"},
        {},
    ]
    assert not list(root.all("img"))
    assert not list(root.all("b"))
    texts = [element.raw for element in root.all("bdi", lang="")]
    for text in HOSTILE:
        assert shown(text) in texts
    assert root.one("h1").text == "model <i>"
    assert LABELS[0] in root.one("section", id="settings").text


def test_names_of_classes_turn_no_sentence_around(saved: LoadedClassifier, report: ExitReport) -> None:
    """Digits that follow Arabic would be written in its order: names stand in isolates of their own."""
    fallen = ClassRecall("\u0633\u0644\u0628\u064a\x00", 40, 0.5, 0.9, 16, 0)
    evaluation = dataclasses.replace(report.evaluation, class_recall=[fallen])
    page = model_page(saved, dataclasses.replace(report, evaluation=evaluation))
    said = read_page(page).one("p", class_="warning").text
    assert 'recall of class "\u2068\u0633\u0644\u0628\u064a\ufffd\u2069" (40 rows) falls' in said
    assert "\x00" not in page


def test_texts_as_they_are_shown() -> None:
    assert shown("") == shown(" \n\t ") == EMPTY
    assert shown("x" * (LONGEST_SHOWN + 1)) == "x" * LONGEST_SHOWN + " …"
    assert shown("a\x00\x07\x7f\x85\ud83d\tb\n") == "a\ufffd\ufffd\ufffd\ufffd\ufffd\tb\n"


def test_nothing_is_loaded_and_no_attribute_is_a_style_or_a_script(page: str) -> None:
    root = read_page(page)
    policy = root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?:|//\w", page)
    links = [a.attributes["href"] for a in root.all("a")] + [a.attributes["href"] for a in root.all("link")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    names = {name for element in root.inside() for name in element.attributes}
    assert not [name for name in names if name in ("style", "src", "xlink:href") or name.startswith("on")]


# --- The file -------------------------------------------------------------------------------------


def test_only_a_report_of_ours_is_replaced(file: Path, tmp_path: Path) -> None:
    check_report_file(file)
    check_report_file(tmp_path / "new.html")
    (tmp_path / "empty.html").touch()
    check_report_file(tmp_path / "empty.html")
    other = tmp_path / "other.html"
    other.write_text("<!doctype html><title>Thesis</title>" + 3000 * " " + file.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"is there and is no report of ours. Give another name"):
        check_report_file(other)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_report_file(tmp_path)


# --- In a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 768, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_finds_nothing_amiss(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width=width, dark=dark)
    assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    for details in ("true", "false"):
        browser.value(f"document.querySelectorAll('details').forEach(one => one.open = {details})")
        assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 60) == dark
    charts = browser.value(
        "[...document.querySelectorAll('svg.chart')].filter(one => one.getBoundingClientRect().width > 0)"
        ".map(one => [one.dataset.chart, one.getBoundingClientRect().width])"
    )
    assert [name for name, _ in charts] == ["trade_off", "exits", "by_layer", "hardness"]
    assert all(0 < across <= width for _, across in charts)
    assert browser.requests == [file.resolve().as_uri()]
    assert not browser.problems


def test_the_policy_stops_scripts_styles_and_images_of_others(
    browser: Browser, page: str, tmp_path: Path
) -> None:
    """What a hole in the escaping would let in is still not run: the watch of the tests above can fail, too."""
    hostile = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png'><p style='color: red'>x</p>"
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("</main>", f"{hostile}</main>"), encoding="utf-8")
    browser.open(broken, width=1280)
    assert browser.value("document.title") != "taken"
    assert len(browser.problems) >= 3
    assert browser.value("document.querySelector('img').naturalWidth") == 0
    assert browser.value("document.getElementById('readout').textContent")


def test_keys_reach_everything_in_order(browser: Browser, file: Path) -> None:
    browser.open(file, width=1280)
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().top") >= 0
    seen = []
    for _ in range(60):
        browser.press("Tab", 9)
        seen.append(browser.value("document.activeElement.id || document.activeElement.tagName"))
        outline = browser.value("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or seen[-1] in ("BODY", "main"), seen
        if seen[-1] == "BODY":
            break
    assert seen[:8] == ["A"] * 8
    assert "explore" in seen
    assert seen.count("SUMMARY") >= 2
    assert seen.count("DIV") >= 3  # tables that scroll


def test_the_slider_moves_the_crosshair_and_the_bars(browser: Browser, file: Path, page: str) -> None:
    points = script_data(read_page(page))["points"]
    browser.open(file, width=1280)
    cells = "[...document.querySelectorAll('[data-figure]')]"
    read = f"Object.fromEntries({cells}.map(cell => [cell.dataset.figure, cell.textContent]))"
    before = browser.value(read)
    browser.value("document.getElementById('explore').focus()")
    browser.press("Home", 36)
    after = browser.value(read)
    assert after["layer"] == "3.00"
    assert after["speedup"] == "1.00×"
    assert after["quality"] == f"{100 * points[0][1]:.1f}\u00a0%"
    assert browser.value("document.querySelector('.cross').getAttribute('visibility')") == "visible"
    bars = (
        "[...document.querySelectorAll('svg.wide.exits rect.bar')].map(x => Number(x.getAttribute('height')))"
    )
    assert [height > 0 for height in browser.value(bars)] == [False, False, True]
    browser.press("End", 35)
    assert [height > 0 for height in browser.value(bars)] == [True, False, False]
    assert browser.value(read)["layer"] == "1.00"
    assert "100.0" not in before["saved"]
    browser.press("Escape", 27)
    assert browser.value(read) == before
    box = browser.value(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('svg.wide.trade_off').getBoundingClientRect())"
    )
    browser.hover(*box)
    assert browser.value(read)["layer"] != before["layer"]
    browser.hover(1, 1)
    assert browser.value(read) == before


def test_without_its_script_the_page_is_complete(browser: Browser, file: Path) -> None:
    said = "document.getElementById('main').innerText.split(/\\s+/).join(' ')"
    browser.open(file, width=360, script=False)
    assert browser.value("document.querySelector('.explore').hidden")
    without = browser.value(said)
    assert "80 rows" in without
    browser.open(file, width=360)
    assert not browser.value("document.querySelector('.explore').hidden")
    assert browser.value(said).replace(" Threshold Default ", " ") == without


def test_headings_and_pictures_are_named(page: str) -> None:
    root = read_page(page)
    levels = [int(tag[1]) for tag in re.findall(r"<(h[1-6])\b", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for chart in root.all("svg", class_="chart"):
        assert chart.attributes["role"] == "img"
        for name in chart.attributes["aria-labelledby"].split():
            assert name in ids
        assert len(chart.one("desc").text) > 20
    assert all(mini.attributes["aria-label"] for mini in root.all("svg", class_="mini"))
    for link in root.one("nav").all("a"):
        assert link.attributes["href"][1:] in ids


def test_two_rows_are_enough(saved: LoadedClassifier) -> None:
    rows = TextDataset([("good",), ("fine",)], [1, 1], LABELS, "two rows")
    found = report_exits(saved, rows)
    assert read_page(model_page(saved, found)).one("p", class_="lead").text.count("2 rows") == 1
