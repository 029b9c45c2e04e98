"""Tables and progress on a terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as ScreenTable
from rich.text import Text

from .page import Table, cell_text

MOST_KEPT = 24  # characters of a word that is not broken into two lines
FILE_WIDTH = 120  # columns of text where output goes into a file or a pipe
MOST_WIDE = 1000  # columns of a table there
SAID_EVERY_S = 30.0  # how far a task is, where output goes into a file or a pipe


def output() -> Console:
    """Standard output, wide enough for our tables where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=max(FILE_WIDTH, console.width))


def print_table(console: Console, table: Table) -> None:
    """Print a table of a page under its caption; cells break into lines where it is wider than the terminal."""
    if table.caption:
        console.print(escape(table.caption), style="bold", highlight=False)
    screen = ScreenTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = [[cell_text(value) for value in row] for row in table.rows]
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        is_one_word = " " not in column and not any(" " in cell for cell in cells)
        longest_word = max((len(word) for cell in cells for word in cell.split()), default=1)
        screen.add_column(
            escape(column),
            justify="left" if i in table.left else "right",
            overflow="fold",
            no_wrap=is_one_word,
            min_width=min(longest_word, MOST_KEPT) if i in table.left else None,
        )
    for row in rows:
        screen.add_row(*map(escape, row))
    if not console.is_terminal:  # a file has no right edge at which a table would have to be squeezed
        width = console.measure(screen, options=console.options.update(max_width=MOST_WIDE)).maximum
        console = Console(file=console.file, width=max(console.width, width))
    console.print(screen)


class StepProgress(Progress):
    """Bars on a terminal; elsewhere a line for each task that begins, and now and then one that says how far it is."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._said_s: dict[TaskID, float] = {}

    def add_task(self, description: str, *args: Any, logged: bool = True, **options: Any) -> TaskID:
        """As for `Progress`; a task that is not `logged` is shown on terminals only: it ends before wrong arguments are
        known.
        """
        if logged and not self.console.is_terminal:
            self.console.print(f"kvloom: {description}", markup=False, highlight=False)
        task = super().add_task(description, *args, **options)
        if logged:
            self._said_s[task] = time.monotonic()
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As for `Progress`."""
        super().advance(task_id, advance)
        now = time.monotonic()
        if self.console.is_terminal or now - self._said_s.get(task_id, now) < SAID_EVERY_S:
            return
        self._said_s[task_id] = now
        task = next((one for one in self.tasks if one.id == task_id), None)
        if task is not None and task.total:
            done = f"{task.completed:,.0f} of {task.total:,.0f}"
            self.console.print(f"kvloom: {task.description}: {done}, {time_left(task)}", markup=False, highlight=False)


def time_left(task: Task) -> str:
    """How long a task will take at the speed that it had so far; empty before its first step."""
    if not task.completed or not task.total or task.elapsed is None:
        return ""
    seconds = task.elapsed * (task.total - task.completed) / task.completed
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


class TimeLeftColumn(ProgressColumn):
    """See `time_left`. Rich's own column forgets steps that are longer ago than half a minute."""

    def render(self, task: Task) -> Text:
        return Text(time_left(task), style="progress.remaining")


def progress() -> StepProgress:
    """On standard error; gone when the work is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TimeLeftColumn(),
    )
    console = Console(stderr=True)
    return StepProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
