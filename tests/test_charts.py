"""A comparison as lines, as a picture, and as a page."""

import json
import re
from pathlib import Path

import pytest

from flexfed.charts import EFFORTS, draw, is_wide, lines
from flexfed.compare import Comparison, Row
from flexfed.outputs import write_comparison
from flexfed.page import to_html
from flexfed.runs import Run, summarise

BYTES, SECONDS = EFFORTS


def run(seed, values, megabytes=1.0):
    rounds = [
        {
            "round": n,
            "bytes-down": 6e5 * megabytes,
            "bytes-up": 4e5 * megabytes,
            "modelled-seconds-training": 2.0 * seed,
        }
        | ({} if value is None else {"accuracy": value})
        for n, value in enumerate(values, 1)
    ]
    return Run(Path("r"), {}, rounds, {}, summarise(rounds, {"seed": seed}))


ROW = Row("one <b>", {1: run(1, [None, 0.5, None, 0.7]), 2: run(2, [0.1, 0.6, None, 0.9])})
CHEAP = Row("cheap", {1: run(1, [0.2, 0.4], 0.5)})
FOUND = Comparison("t", [ROW, CHEAP, Row("none", {})], "cheap", ["accuracy"], ["a note"])


def test_the_picture_names_losses_with_three_digits(tmp_path, monkeypatch):
    told, rounds = [], [{"round": n, "loss": 0.0123, "bytes-up": 1} for n in (1, 2)]
    lossy = Row("a", {1: Run(Path("r"), {}, rounds, {}, summarise(rounds, {"seed": 1}))})
    monkeypatch.setattr("flexfed.charts.legend", lambda axes, lines, title: told.extend(x.get_label() for x in lines))
    draw(Comparison("t", [lossy], None, ["loss"]), tmp_path / "a.png")
    draw(Comparison("t", [CHEAP], None, ["accuracy"]), tmp_path / "a.png")
    assert told == ["a   0.012", "cheap   40.0"]


def test_lines_are_means_over_seeds_where_all_measured():
    line, _ = lines(FOUND, "accuracy", BYTES)
    assert line.label == "one <b>"
    assert line.rounds == (2, 4)
    assert line.spent == pytest.approx((2.0, 4.0)), "rounds without an evaluation count"
    assert line.mean == pytest.approx((0.55, 0.8))
    assert (line.low, line.high) == ((0.5, 0.7), (0.6, 0.9))
    assert lines(FOUND, "accuracy", SECONDS)[0].spent == pytest.approx((6.0, 12.0))
    assert lines(FOUND, "loss", BYTES) == []


def test_the_axis_is_logarithmic_where_totals_are_far_apart():
    assert not is_wide([])
    assert not is_wide(lines(FOUND, "accuracy", BYTES)), "4 MB and 1 MB"
    cheaper = Comparison("t", [ROW, Row("cheap", {1: run(1, [0.2, 0.4], 0.4)})], None, ["accuracy"])
    assert is_wide(lines(cheaper, "accuracy", BYTES)), "4 MB and 0.8 MB"


def test_pictures_are_written_whole_and_alike(tmp_path):
    draw(FOUND, tmp_path / "a.png")
    draw(FOUND, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw(Comparison("t", [Row("none", {})], None, ["accuracy"]), tmp_path / "empty.png")
    assert len([*tmp_path.iterdir()]) == 3


def figure_of(page):
    """What plotly draws: the traces and the layout in the page's last script."""
    data, layout = re.search(
        r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*(\[.*?\]),\s*(\{.*\}),\s*\{\"displaylogo\"", page, re.S
    ).groups()
    return json.loads(data), json.loads(layout)


def test_the_page_needs_nothing_else_and_shows_every_row():
    page = to_html(FOUND, "flexfed compare x.toml")
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page), "it would ask the network"
    assert "flexfed compare x.toml" in page
    assert "a note" in page
    assert "one &lt;b&gt;</td>" in page
    traces, layout = figure_of(page)
    assert [trace["name"] for trace in traces if trace.get("showlegend")] == ["one <b>", "cheap"]
    assert layout["xaxis"]["title"]["text"] == BYTES.label


def test_the_menu_shows_one_metric_at_a_time():
    told = run(1, [0.5])
    told.rounds[0]["accuracy-a"] = 0.4
    more = Comparison("t", [Row("a", {1: told})], None, ["accuracy", "accuracy-a"])
    traces, layout = figure_of(to_html(more, "c"))
    assert [trace["visible"] for trace in traces] == [True] * 4 + [False] * 4
    button = layout["updatemenus"][0]["buttons"][1]
    assert (button["label"], button["args"][0]["visible"]) == ("accuracy-a", [False] * 4 + [True] * 4)


def test_files_of_a_comparison(tmp_path):
    written = write_comparison(FOUND, "c", tmp_path / "x.md")
    other = write_comparison(FOUND, "c", tmp_path / "y.md")
    assert written[2].read_bytes() == other[2].read_bytes()
    assert [path.name for path in written] == ["x.md", "x.png", "x.html"]
    assert "](x.png)" in written[0].read_text()
