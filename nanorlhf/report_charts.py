"""Charts of a report: one description, drawn as inline SVG by matplotlib and, always, written as a table.

The SVG holds no colour of its own: every colour is a CSS variable of the page, so that one file serves light and
dark. It refers to nothing outside itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from nanorlhf.report_page import html_table, number, text

INK, RULE = "#010101", "#020202"  # drawn with these, and turned into CSS variables in _inline
SERIES = [f"#03030{k}" for k in range(1, 7)]


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (xs, ys) with y None where nothing was measured."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    points: bool = False  # draw dots instead of a line
    colour: int | None = None  # which of the page's series colours; by default the place in the chart


@dataclass(frozen=True)
class Chart:
    """A line chart. `marks` are horizontal reference lines {label: y}, drawn in the colour of the series they name."""

    name: str  # unique in the page
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: dict[str, float] = field(default_factory=dict)
    small: bool = False  # one of many in a row


@dataclass(frozen=True)
class Intervals:
    """A dot with its 95 % interval a label, in rows from the top down; `centre` is a dashed line to compare with."""

    name: str
    title: str
    x_label: str
    rows: dict[str, tuple[float, float, float]]  # label: (value, low, high)
    centre: float | None = None


def can_draw() -> bool:
    """Whether matplotlib is installed: without it a report has tables only."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def svg(chart: Chart | Intervals) -> str:
    """The chart as an <svg> element for HTML. Raises ImportError without matplotlib."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": RULE, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6,
        "legend.frameon": False, "lines.linewidth": 1.8, "text.parse_math": False,
    }  # fmt: skip
    if isinstance(chart, Intervals):
        size = (4.2, 0.62 + 0.36 * len(chart.rows))
    else:
        size = (3.3, 2.1) if chart.small else (5.4, 3.0)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        (_draw_intervals if isinstance(chart, Intervals) else _draw_lines)(chart, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), chart.title)


def table(chart: Chart | Intervals, most: int = 9) -> str:
    """The chart's numbers as an HTML table: at most `most` points of each line, the first and the last among them."""
    if isinstance(chart, Intervals):
        body = [[label, number(v), f"{number(low)} to {number(high)}"] for label, (v, low, high) in chart.rows.items()]
        return html_table(chart.title, ["", chart.x_label, "95 % interval"], body)
    xs = sorted({x for line in chart.series for x in line.xs})
    if len(xs) > most:
        xs = [xs[round(k * (len(xs) - 1) / (most - 1))] for k in range(most)]
    looked_up = [dict(zip(line.xs, line.ys, strict=True)) for line in chart.series]
    body = [[number(x), *(number(line.get(x)) for line in looked_up)] for x in xs]
    body += [[label, number(y), *[""] * (len(chart.series) - 1)] for label, y in chart.marks.items()]
    return html_table(f"{chart.title}: {chart.y_label}", [chart.x_label, *(s.label for s in chart.series)], body)


def block(chart: Chart | Intervals, caption: str, drawn: bool) -> str:
    """A <figure> with the chart (where `drawn`), its caption and its numbers."""
    numbers = table(chart)
    if drawn:
        numbers = f"<details><summary>The numbers</summary>{numbers}</details>"
    return (
        f'<figure><p class="name">{text(chart.title)}</p>{svg(chart) if drawn else ""}'
        f"<figcaption>{text(caption)}</figcaption>{numbers}</figure>"
    )


def smooth(ys: Sequence[float | None], span: int) -> list[float | None]:
    """Mean of each value and its predecessors, `span` in all: what a noisy loss is doing. Missing values stay missing.

    >>> smooth([4.0, 2.0, None, 6.0], 2)
    [4.0, 3.0, None, 6.0]
    """
    result = []
    for i, y in enumerate(ys):
        window = [v for v in ys[max(0, i - span + 1) : i + 1] if v is not None]
        result.append(None if y is None else sum(window) / len(window))
    return result


def _draw_lines(chart: Chart, axes) -> None:
    nan = float("nan")
    colours = {}
    for k, line in enumerate(chart.series):
        colour = SERIES[(k if line.colour is None else line.colour) % len(SERIES)]
        colours[line.label] = colour
        ys = [nan if y is None else y for y in line.ys]
        shape = {"marker": "o", "markersize": 4} if len(ys) < 12 else {}
        if line.points:
            shape = {"marker": "o", "markersize": 3.5, "linestyle": "none", "alpha": 0.6, "zorder": 1.9}
        axes.plot(line.xs, ys, color=colour, label=line.label, **shape)
    for label, y in chart.marks.items():
        owner = next((name for name in colours if label.endswith(name)), None)
        axes.axhline(y, color=colours.get(owner, INK), linestyle=(0, (4, 3)), linewidth=1.1, label=label)
    axes.set_xlabel(chart.x_label)
    if not chart.small:
        axes.set_ylabel(chart.y_label)
    axes.locator_params(axis="x", nbins=5 if chart.small else 7)
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    if len(chart.series) + len(chart.marks) > 1:
        axes.legend(fontsize=9)


def _draw_intervals(chart: Intervals, axes) -> None:
    for k, (value, low, high) in enumerate(chart.rows.values()):
        axes.plot([low, high], [-k, -k], color=SERIES[0], linewidth=3, alpha=0.45, solid_capstyle="round")
        axes.plot([value], [-k], color=SERIES[0], marker="o", markersize=7)
    if chart.centre is not None:
        axes.axvline(chart.centre, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.set_yticks([-k for k in range(len(chart.rows))], list(chart.rows))
    axes.set_ylim(0.6 - len(chart.rows), 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(chart.x_label)


def _short(x: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _inline(drawing: str, title: str) -> str:
    """matplotlib's SVG document as an element of an HTML page: no prologue, metadata, name spaces or fixed size."""
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.S)  # it would style the whole page
    drawing = re.sub(r"<!--.*?-->", "", drawing, flags=re.S)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # several charts would repeat these ids
    drawing = drawing.replace("xlink:href=", "href=")
    view = re.search(r'viewBox="[^"]*"', drawing)[0]
    drawing = re.sub(r"<svg[^>]*>", f'<svg {view} role="img" aria-label="{escape(title)}">', drawing, count=1)
    drawing = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--text-font)", drawing)
    for colour, name in [(INK, "ink"), (RULE, "rule"), *((c, f"series-{k}") for k, c in enumerate(SERIES, 1))]:
        drawing = drawing.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", drawing)
