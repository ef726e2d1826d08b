"""The page on a comparison: its figures are compare.json's, and a browser finds nothing amiss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from compared_cells import cell_of
from consistentee.cli.main import main
from consistentee.cli.terminal import show_tables
from consistentee.errors import DataError
from consistentee.evaluation.comparison.page import comparison_page
from consistentee.evaluation.comparison.picture import chosen_point
from consistentee.evaluation.comparison.summary import summarise
from consistentee.evaluation.comparison.tables import Sheet, comparison_sheets, terminal_sheets
from html_pages import Element, read_page

HOSTILE = "</script><b>set"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    cells = [
        cell_of(label, seed, name=name, layers=3 if label == "plain:3" else 6, skill=skill)
        for label, skill in (("plain", 0.8), ("plain:3", 0.7), ("consistent", 0.8), ("deebert", 0.6))
        for seed in (1, 2)
        for name in ("rte", HOSTILE)
    ]
    return summarise(cells, resamples=50, criteria=["policy", "patience"], also=["deebert/patience"])


@pytest.fixture(scope="module")
def file(summary: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compared") / "compare.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(file: Path) -> Element:
    return read_page(comparison_page(file))


def entry_of(
    summary: dict[str, Any], method: str, criterion: str | None, place: str | None
) -> dict[str, Any]:
    (found,) = (
        entry
        for entry in summary["summary"]
        if (entry["method"], entry["criterion"], entry["set"]) == (method, criterion, place)
    )
    return found


def test_the_sentence_names_the_best_and_the_baseline(page: Element, summary: dict[str, Any]) -> None:
    said = page.one("p", class_="lead").text
    shown = [
        entry for entry in summary["summary"] if entry["set"] is None and entry["shown"] and entry["is_curve"]
    ]
    best = max(shown, key=lambda entry: entry["area"]["mean"])
    assert said.startswith(f"Of {len(shown)} ways to exit early, on the average of 2 sets, {best['method']}")
    assert f"{100 * best['area']['mean']:.1f} %" in said
    base = entry_of(summary, "consistent", "policy", None)["at_validation_threshold"]
    assert f"consistent (policy) runs {base['layer_speedup']['mean']:.2f}× fewer layers" in said
    assert f"{100 * base['difference_to_plain']['mean']:+.1f} points".replace("-", "−") in said


def test_methods_with_the_same_seeds_are_ranked_by_area(page: Element, summary: dict[str, Any]) -> None:
    rows = page.one("section", id="ranking").one("table").rows()[1:]
    areas = [float(row[1].split()[0]) for row in rows]
    assert areas == sorted(areas, reverse=True)
    names = {row[0] for row in rows}
    assert {"consistent (policy)", "deebert (policy)", "deebert (patience)", "plain", "static"} >= names
    for row in rows:
        method, _, criterion = row[0].partition(" (")
        entry = entry_of(summary, method, criterion[:-1] or None, None)
        low, high = entry["area"]["interval"]
        assert row[1] == f"{100 * entry['area']['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def test_seeds_that_only_some_methods_have_rank_nobody(tmp_path: Path) -> None:
    cells = [cell_of("plain", seed, skill=0.8) for seed in (1, 2)]
    cells += [cell_of("consistent", 1, skill=0.95), cell_of("consistent", 2, skill=0.6)]
    cells += [
        cell_of("deebert", 1, skill=0.85)
    ]  # above the mean of `consistent`, below it on the seed of both
    summary = summarise(cells, resamples=50, criteria=["patience"])
    ours, other = (entry_of(summary, method, "policy", "rte") for method in ("consistent", "deebert"))
    assert other["area"]["mean"] > ours["area"]["mean"]
    assert other["difference"]["area"]["mean"] < 0
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(summary), encoding="utf-8")
    page = read_page(comparison_page(file))
    said = page.one("p", class_="lead").text
    assert "consistent (policy) has the largest area under the curve on the seeds that each shares" in said
    rows = page.one("section", id="ranking").one("table").rows()
    assert [row[:2] for row in rows] == [
        ["method (criterion)", "seeds"],
        ["consistent (policy)", "1 2"],
        ["deebert (policy)", "1"],
    ]
    [sheet] = [sheet for sheet in comparison_sheets(summary) if "equal exits" in sheet.title]
    assert sheet.columns[:2] == ("exits of", "seeds")
    assert [row[:2] for row in sheet.rows] == [
        ("consistent", "1 2"),
        ("deebert", "1"),
        ("mean - policy's", ""),
    ]


@pytest.mark.parametrize("names", [("rte",), ("rte", "mrpc")])
def test_a_baseline_without_exits_ranks_by_area(tmp_path: Path, names: tuple[str, ...]) -> None:
    cells = [
        cell_of(label, seed, name=name, skill=skill)
        for label, skill in (("plain", 0.8), ("consistent", 0.7), ("deebert", 0.9))
        for seed in (1, 2)
        for name in names
    ]
    summary = summarise(cells, baseline="plain", resamples=20)
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(summary), encoding="utf-8")
    page = read_page(comparison_page(file))
    rows = page.one("section", id="ranking").one("table").rows()
    assert [row[0] for row in rows] == ["method (criterion)", "deebert (policy)", "consistent (policy)"]
    said = page.one("p", class_="lead").text
    assert "deebert (policy) has the largest area under the curve, " in said
    assert "against plain" not in said
    heads = [cell for table in page.all("table") for cell in table.rows()[0]]
    assert not [head for head in heads if head.startswith("area ") and "plain" in head]
    assert "accuracy minus plain’s at the validation threshold, points" in heads


def test_all_tables_are_there(page: Element, summary: dict[str, Any]) -> None:
    sheets = comparison_sheets(summary)
    tables = [table.rows() for table in page.one("section", id="tables").all("table")]
    assert len(tables) == len(sheets) == 15
    for table, sheet in zip(tables, sheets, strict=True):
        assert table[0] == list(sheet.columns)
        assert [[cell.replace("\u2212", "-") for cell in row] for row in table[1:]] == [
            list(row) for row in sheet.rows
        ]


def test_several_sets_are_seen_at_a_glance(page: Element, summary: dict[str, Any]) -> None:
    areas, _, criteria = comparison_sheets(summary)[:3]
    assert areas.columns == ("method", "criterion", "rte", HOSTILE, "ahead / level / behind")
    rows = {row[:2]: row[2:] for row in areas.rows}
    assert next(iter(rows)) == ("consistent", "policy")
    for (method, criterion), values in rows.items():
        for name, value in zip(areas.columns[2:-1], values[:-1], strict=True):
            entry = entry_of(summary, method, None if criterion == "-" else criterion, name)
            if method == "consistent":
                assert value == f"{100 * entry['area']['mean']:.1f}"
                continue
            off = entry["difference"]["area"]
            sure = off["interval"][0] > 0 or off["interval"][1] < 0
            assert value == f"{100 * off['mean']:+.1f}" + "*" * sure
    own = [sheet for sheet in comparison_sheets(summary) if sheet.title.endswith("area on equal exits, %")]
    assert criteria.columns == ("criterion", "rte", HOSTILE)
    assert criteria.rows == [("patience", own[0].rows[-1][2], own[1].rows[-1][2])]
    opened = [one for one in page.one("section", id="tables").all("details") if "open" in one.attributes]
    assert [one.one("summary").text for one in opened] == ["All sets"]


def test_a_star_is_where_zero_is_outside(summary: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(summary))
    for name, interval in (("rte", [-0.03, -0.01]), (HOSTILE, [-0.03, 0.01])):
        off = entry_of(changed, "deebert", "policy", name)["difference"]["area"]
        off["mean"], off["interval"] = -0.02, interval
    row = next(row for row in comparison_sheets(changed)[0].rows if row[:2] == ("deebert", "policy"))
    assert row[2:] == ("-2.0*", "-2.0", "0 / 1 / 1")


def test_all_exits_are_read_by_the_policy_too() -> None:
    cells = [cell_of("consistent", name=name) for name in ("rte", "sst2")]
    cells += [cell_of("deebert", name="rte"), cell_of("nsp", name="rte"), cell_of("nsp", name="sst2")]
    title = "All sets: exits read by the policy, area minus consistent's, points"
    summary = summarise(cells, criteria=("all",), resamples=5)
    areas, sheet = comparison_sheets(summary)[:2]
    assert (sheet.title, sheet.columns) == (title, ("exits of", "rte", "sst2", areas.columns[-1]))
    rows = {method: values for method, *values in sheet.rows}
    assert rows.keys() == {"deebert", "nsp"}
    assert rows["deebert"][1] == "-"
    off = entry_of(summary, "nsp", "policy", "sst2")["difference"]["area"]["mean"]
    assert rows["nsp"][1].rstrip("*") == f"{100 * off:+.1f}"
    for others in ({"criteria": ("patience",)}, {"criteria": ("all",), "baseline": "consistent/patience"}):
        found = summarise(cells, resamples=5, **others)
        assert not any("exits read by" in one.title for one in comparison_sheets(found))


def test_what_a_set_lacks_is_no_figure_at_a_glance() -> None:
    cells = [cell_of("consistent", name=name) for name in ("rte", "sst2")]
    cells += [cell_of("deebert", 2, name="rte"), cell_of("nsp", name="sst2")]  # no seed that `consistent` has
    areas = comparison_sheets(summarise(cells, resamples=5))[0]
    rows = {row[0]: row[2:] for row in areas.rows}
    assert rows["deebert"] == ("-", "-", "0 / 0 / 0")
    assert rows["nsp"][0] == "-" != rows["nsp"][1]
    others = comparison_sheets(summarise(cells[2:], resamples=5))[0]  # nothing that differences are taken to
    assert others.title == "All sets: area, %"
    assert [row[0] for row in others.rows] == ["deebert", "nsp"]
    other = comparison_sheets(summarise(cells, baseline="consistent/patience", resamples=5))[0]
    assert [row[:2] for row in other.rows][:2] == [("consistent", "patience"), ("consistent", "policy")]
    assert other.rows[1][2][0] in "+-"
    one_set = comparison_sheets(summarise(cells[:1], resamples=5))
    assert not any(sheet.title.startswith("All sets") for sheet in one_set)
    cells = [cell_of("consistent"), cell_of("consistent", backbone="large")]
    assert comparison_sheets(summarise(cells, resamples=5))[0].columns[2:-1] == ("rte, small", "rte, large")


def test_chosen_points_are_where_validation_put_them(page: Element, summary: dict[str, Any]) -> None:
    chart = next(page.all("svg", class_="wide", **{"data-chart": "methods"}))
    x, y = (list(map(float, chart.attributes[f"data-{axis}"].split())) for axis in "xy")
    runs = [run for run in summary["runs"] if run["set"] == "rte" and run["method"] == "consistent"]
    point = chosen_point(runs)
    assert point is not None
    saved = [1 - run["at_validation_threshold"]["mean_exit_layer"] / 6 for run in runs]
    assert point[0] == pytest.approx(1 / (1 - sum(saved) / 2), rel=1e-4)
    marks = [mark.attributes for mark in chart.all("circle", class_="s0")]
    at = x[2] + math.log(point[0]) / x[1] * (x[3] - x[2])
    assert at == pytest.approx(float(marks[0]["cx"]), abs=0.06)
    height = y[2] + (point[1] - y[0]) / (y[1] - y[0]) * (y[3] - y[2])
    assert height == pytest.approx(float(marks[0]["cy"]), abs=0.06)


def test_names_are_nothing_but_text(page: Element) -> None:
    assert len(list(page.all("script"))) == 1
    assert not list(page.all("b"))
    assert any(HOSTILE in title.text for title in page.all("h3"))


def test_the_command_writes_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    command = ["report", str(file.parent), "--output", str(output)]
    assert main(command) == 0
    assert output.read_text(encoding="utf-8") == comparison_page(file)
    for option in (["--task", "rte"], ["--threshold", "0.5"], ["--texts", "x"]):
        assert main([*command, *option]) == 2
        assert (
            f"{option[0]} goes with a model, and {file.parent} holds a comparison." in capsys.readouterr().err
        )


def test_no_figure_is_cut_where_there_is_no_terminal(
    summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("exits of", *(f"confident criterion {number}" for number in range(14)))
    rows = [(f"weighted_sum:mean-pooled{row}", *[f"-1{row}.{row}4*"] * 14) for row in range(3)]
    sheets = [*comparison_sheets(summary), Sheet("wide", columns, rows, num_texts=1)]
    show_tables(terminal_sheets(sheets))
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    lines = [line.split() for line in printed.splitlines()]
    for sheet in sheets:
        for row in sheet.rows:  # all of it on one line
            assert [part for cell in row for part in cell.split()] in lines, row


def test_a_comparison_of_nothing_that_exits_is_said(tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(summarise([cell_of("plain"), cell_of("plain:wide")], resamples=5)))
    with pytest.raises(DataError, match=r"must have a method with exits, .* got plain, plain:wide"):
        comparison_page(file)


def test_a_set_without_exits_does_not_stand_first(tmp_path: Path) -> None:
    cells = [cell_of("plain", name="mrpc"), cell_of("plain", name="rte"), cell_of("consistent", name="rte")]
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(summarise(cells, criteria=["all"], resamples=5)))
    page = read_page(comparison_page(file))
    assert "Of 1 ways to exit early, on rte on small, consistent" in page.one("p", class_="lead").text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"summary": [], "runs": []}'])
def test_what_is_no_comparison_is_called_so(tmp_path: Path, text: str) -> None:
    broken = tmp_path / "my comparison" / "compare.json"
    broken.parent.mkdir()
    broken.write_text(text)
    with pytest.raises(
        DataError,
        match=r"no summary of a comparison .* with the --baseline, .* --render --output-dir '.*rison'$",
    ):
        comparison_page(broken)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(browser: Browser, file: Path, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(comparison_page(file), encoding="utf-8")
    browser.open(path, width=width, dark=dark)
    for details in ("true", "false"):
        browser.value(f"document.querySelectorAll('details').forEach(one => one.open = {details})")
        assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.requests == [path.resolve().as_uri()]
    assert not browser.problems
    # A method that is chosen in the legend stands out.
    opacity = "getComputedStyle(document.querySelector('.panels path.curve.s{}')).opacity"
    assert browser.value(opacity.format(0)) == "1"
    browser.value("document.querySelectorAll('#legend button')[1].click()")
    assert float(browser.value(opacity.format(0))) < 0.5
    assert browser.value(opacity.format(1)) == "1"
    assert (
        browser.value("document.querySelectorAll('#legend button')[1].getAttribute('aria-pressed')") == "true"
    )


@pytest.mark.parametrize("width", [1280, 360])
def test_ticks_leave_the_labels_of_axes_alone(
    browser: Browser, summary: dict[str, Any], tmp_path: Path, width: int
) -> None:
    close = json.loads(json.dumps(summary))
    for run in close["runs"]:  # all within a point, so that ticks need decimals
        for figures in (run, *run["criteria"].values()):
            for point in (*figures.get("curve", []), figures["at_validation_threshold"]):
                point["accuracy"] = 0.91 + 0.004 * point["accuracy"]
        run["plain_accuracy"] = 0.91 + 0.004 * run["plain_accuracy"]
    (tmp_path / "compare.json").write_text(json.dumps(close), encoding="utf-8")
    path = tmp_path / "report.html"
    path.write_text(comparison_page(tmp_path / "compare.json"), encoding="utf-8")
    browser.open(path, width=width)
    texts = browser.value("[...document.querySelectorAll('.panels .ytick')].map(one => one.textContent)")
    assert max(map(len, texts)) >= 4, texts
    gaps = browser.value(
        "[...document.querySelectorAll('.panels svg')].filter(one => one.getBoundingClientRect().width)"
        ".flatMap(chart => [...chart.querySelectorAll('.ytick')].map(tick =>"
        " tick.getBoundingClientRect().left"
        " - chart.querySelector('.label.side').getBoundingClientRect().right))"
    )
    assert gaps
    assert min(gaps) >= 0
