"""A result as one self-contained page: tables and plots, no script, nothing fetched from elsewhere."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple, TypeAlias

_INK = "#010203"  # stands for the text colour while matplotlib draws; the page then decides, light or dark
_COLOURS = (
    "#2f7fd6", "#e0662b", "#1f9e77", "#c15fb0", "#c99a06", "#6f7fd9", "#8a8f98", "#d1495b", "#3aa6b9", "#8c6239",
    "#7aa52c",
)  # fmt: skip
_MARKERS = "os^DvP*X<>ph"  # one more than colours, so that a pair of both comes back late

_STYLE = """
:root { color-scheme: light dark;
        --ink: #1c2430; --quiet: #5d6877; --line: #d9dee6; --paper: #ffffff; --stripe: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --quiet: #9aa5b4; --line: #333c48; --paper: #14181e; --stripe: #1b2129; }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0 1rem; max-width: 46rem; white-space: pre-line; }
figure { margin: 1rem 0 1.75rem; overflow-x: auto; }
figcaption { color: var(--quiet); font-size: .875rem; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal; }
.words { text-align: left; }
tbody tr:nth-child(even) { background: var(--stripe); }
svg { display: block; max-width: 100%; height: auto; color: var(--ink); }
"""


Row: TypeAlias = Sequence[str | float | None]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns.

    Attributes
    ----------
    rows : numbers are shortened to four digits; text stays as it is; None is an empty cell.
    left : numbers of the columns that hold words and not figures.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    left: Collection[int] = (0,)


class Point(NamedTuple):
    """A value to draw, with the ends of its interval if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over one pair of axes.

    Attributes
    ----------
    series : points by the name of their line, drawn in this order; a line of one point is a mark.
    log_x, log_y : scale an axis by powers of two (x) or ten (y).
    """

    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False

    def to_svg(self) -> str:
        """An `<svg>` element. Needs matplotlib (the extra `bench`)."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter

        with rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "kvloom",
                "axes.edgecolor": _INK,
                "axes.labelcolor": _INK,
                "text.color": _INK,
                "xtick.color": _INK,
                "ytick.color": _INK,
            }
        ):
            figure = Figure(figsize=(8.4, 4.2), layout="constrained")
            axes = figure.add_subplot()
            for number, (name, points) in enumerate(self.series.items()):
                colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
                x, y = [p.x for p in points], [p.y for p in points]
                axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.8, label=name)
                if points and all(p.low is not None and p.high is not None for p in points):
                    low, high = [p.low or 0.0 for p in points], [p.high or 0.0 for p in points]
                    if len(points) > 1:
                        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                    else:
                        axes.vlines(x, low, high, color=colour, linewidth=1.2)
            if self.log_x:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(ScalarFormatter())
            if self.log_y:
                axes.set_yscale("log")
            axes.set_xlabel(self.x_label)
            axes.set_ylabel(self.y_label)
            axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            if self.series:
                figure.legend(loc="outside right center", frameon=False)
            drawn = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
        svg = drawn.getvalue()
        return svg[svg.index("<svg") :].replace(_INK, "currentColor")


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a paragraph, and what stands under it."""

    title: str
    text: str = ""
    parts: Sequence[Table | Plot] = field(default=())


def html_report(title: str, sections: Sequence[Section]) -> str:
    """The whole page as text: styles and plots inside it, readable in light and in dark, printable.

    Raises
    ------
    ModuleNotFoundError : a section holds a plot and matplotlib is not installed.
    """
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    parts = "\n".join(
        _table(part) if isinstance(part, Table) else _figure(part.to_svg(), part.caption) for part in section.parts
    )
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{text}\n{parts}\n</section>"


def _figure(inner: str, caption: str) -> str:
    return f"<figure>\n{inner}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(table: Table) -> str:
    def cells(tag: str, values: Row) -> str:
        kinds = (' class="words"' if i in table.left else "" for i in range(len(values)))
        shown = (f"<{tag}{kind}>{escape(cell_text(v))}</{tag}>" for kind, v in zip(kinds, values, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    head, rows = cells("th", table.columns), "\n".join(cells("td", row) for row in table.rows)
    return _figure(f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>", table.caption)


def cell_text(value: str | float | None) -> str:
    """Text of a cell of a `Table`, not yet escaped."""
    if value is None:
        return ""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "n/a"
    return value
