"""Tables on a terminal, all of one look."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ScreenTable

from .page import Table, cell_text


def screen_table(
    title: str, heads: Sequence[str], *, left: Collection[int] = (0,), wrapped: Collection[int] = ()
) -> ScreenTable:
    """An empty table. Columns numbered in `left` hold words, others figures; heads of those in `wrapped` may break."""
    table = ScreenTable(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i in left else "right", no_wrap=i not in wrapped)
    return table


def show(console: Console, tables: Iterable[Table]) -> None:
    """Print tables of a page, each under its caption."""
    for table in tables:
        screen = screen_table(escape(table.caption), [escape(column) for column in table.columns])
        for row in table.rows:
            screen.add_row(*(escape(cell_text(value)) for value in row))
        console.print(screen)
