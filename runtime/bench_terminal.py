"""What `bench` draws: a progress bar on standard error, and the table."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runtime.bench import Note, Step
from runtime.terminal import is_terminal, remark

Result = TypeVar("Result")


def draw_progress(events: Iterable[Step | Note | Result]) -> list[Result]:
    """Follow `events` to their end, with a bar on a terminal; gives the results."""
    results: list[Result] = []
    console = Console(stderr=True)
    hidden = not is_terminal(sys.stderr)
    # No refreshing in the background: that would be measured, too.
    with Progress(console=console, transient=True, auto_refresh=False, disable=hidden) as bar:
        task = bar.add_task("", total=1)
        for event in events:
            if isinstance(event, Step):
                bar.update(task, description=event.text, completed=event.done, total=event.total)
                bar.refresh()
            elif isinstance(event, Note):
                remark(f"note: {event.text}")
            else:
                results.append(event)
    return results


def draw_table(header: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """A table of texts on standard output, with numbers in all columns but the first."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Into a pipe nothing is folded: one line for each row.
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)
