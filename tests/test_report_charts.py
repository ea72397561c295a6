import re
import sys

import pytest

from nanorlhf.report_charts import Chart, Intervals, Series, block, can_draw, smooth, svg, table

LINES = Chart(
    "a", "Loss & <more>", "step", "nats",
    [Series("one", range(100), [1.0 + x for x in range(100)]), Series("two", [0, 99], [None, 5.0])],
    {"xz -9, one": 7.5},
)  # fmt: skip
DOTS = Intervals("b", "Gold", "score", {"SFT": (1.0, 0.5, 1.5), "PPO <3": (2.0, 1.75, 2.25)}, centre=1.0)


@pytest.mark.parametrize("chart", [LINES, DOTS], ids=["lines", "intervals"])
def test_a_drawing_has_no_reference_outside_the_page_and_no_colour_of_its_own(chart):
    pytest.importorskip("matplotlib")
    drawing = svg(chart)
    assert drawing.startswith("<svg viewBox=") and drawing.rstrip().endswith("</svg>")
    assert "http" not in drawing and "<metadata" not in drawing and "<!" not in drawing
    assert not re.findall(r"#[0-9a-fA-F]{3,6}\b|rgb", drawing) and "<style" not in drawing
    assert "var(--series-1)" in drawing and "var(--ink)" in drawing


def test_the_same_chart_is_drawn_to_the_same_bytes():
    pytest.importorskip("matplotlib")
    assert svg(LINES) == svg(LINES)


def test_labels_are_escaped_in_drawing_and_table():
    pytest.importorskip("matplotlib")
    shown = block(LINES, "a <b> c", drawn=True) + block(DOTS, "d", drawn=True)
    assert "<more>" not in shown and "<b>" not in shown and "PPO <3" not in shown
    assert "Loss &amp; &lt;more&gt;" in shown and "PPO &lt;3" in shown


def test_a_table_keeps_the_first_and_the_last_point_and_shows_what_was_not_measured():
    """Nine of the steps 0 … 99 lie at k · 99/8, rounded to even: 0, 12, 25, 37, 50, 62, 74, 87, 99."""
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table(LINES))
    assert [row[0] for row in cells] == ["0", "12", "25", "37", "50", "62", "74", "87", "99", "xz -9, one"]
    assert cells[0] == ("0", "1", "–") and cells[8] == ("99", "100", "5") and cells[9][1] == "7.5"


def test_intervals_are_in_the_table():
    assert re.findall(r"<td>(.*?)</td>", table(DOTS)) == ["1", "0.5 to 1.5", "2", "1.75 to 2.25"]


def test_smoothing_by_one_changes_nothing_and_a_constant_stays():
    assert smooth([3.0, None, 1.0], 1) == [3.0, None, 1.0]
    assert smooth([2.0] * 5, 3) == [2.0] * 5


def test_without_matplotlib_nothing_can_be_drawn_and_the_numbers_are_unfolded(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not can_draw()
    shown = block(LINES, "caption", drawn=False)
    assert "<svg" not in shown and "<details" not in shown and "<table" in shown
