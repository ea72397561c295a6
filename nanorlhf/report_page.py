"""The parts of a report's page: text made safe for HTML, numbers made readable, tables, sections.

Everything that a model or a data file said passes through `text`.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape

MODELS = {"base": "Base", "base_prompted": "Prompted base", "sft": "SFT", "best_of_n": "Best of n", "dpo": "DPO", "rloo": "RLOO",
          "grpo": "GRPO", "reinforce": "REINFORCE", "ppo": "PPO"}


def text(value: object) -> str:
    """Any text as HTML that shows it: markup escaped, control characters and lone surrogates visible.

    >>> text('<script>"\\x00')
    '&lt;script&gt;&quot;␀'
    """
    shown = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), str(value))
    return escape(re.sub("[\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", shown))


def number(value: object) -> str:
    """A number for reading: thousands grouped, three digits that count; – for what was not measured.

    >>> number(1234567), number(0.012345), number(2.5), number(None), number(1234.5)
    ('1,234,567', '0.0123', '2.5', '–', '1,234')
    """
    if value is None or value != value:
        return "–"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share of one as a percentage.

    >>> percent(0.7345), percent(None)
    ('73.5 %', '–')
    """
    return f"{100 * value:.1f} %" if isinstance(value, (int, float)) else "–"


def interval(row: Mapping | None, show=number) -> str:
    """The ends of row["ci95"], in the words of `show`."""
    ends = (row or {}).get("ci95") or [None, None]
    return f"{show(ends[0])} to {show(ends[1])}"


def duration(seconds: float | None) -> str:
    """Seconds as minutes and seconds.

    >>> duration(754.2), duration(8.44)
    ('12 min 34 s', '8.4 s')
    """
    if not isinstance(seconds, (int, float)):
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"


def at(report: Mapping, path: str, default=None):
    """report["a"]["b"] for the path "a.b", or `default` where a part is missing or null.

    >>> at({"a": {"b": 1}}, "a.b"), at({"a": None}, "a.b", 0)
    (1, 0)
    """
    found = report
    for part in path.split("."):
        if not isinstance(found, Mapping) or found.get(part) is None:
            return default
        found = found[part]
    return found


def html_table(caption: str, head: Sequence[str], body: Sequence[Sequence[object]], words: bool = False) -> str:
    """A table whose every cell is text (escaped here); the first column heads its row. `words`: align left."""
    cells = "".join(f'<th scope="col">{text(h)}</th>' for h in head)
    rows = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in body
    )
    return (
        f'<div class="scroll" tabindex="0"><table{" class=words" if words else ""}><caption>{text(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def section(anchor: str, title: str, lead: str, *parts: str) -> str:
    """A section of the page: heading, a sentence that says what to see (plain text), then HTML."""
    heading = f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{text(title)}</h2>'
    return f"{heading}<p>{text(lead)}</p>{''.join(parts)}</section>"


def missing(what: str) -> str:
    """The note that stands where a part of the run has not been measured."""
    return f'<p class="missing">Not in this run: {text(what)}.</p>'
