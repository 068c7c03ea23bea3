"""What a download draws on standard error: a bar on a terminal, otherwise one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_tools.describe import short_size
from gguf_tools.hub import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def find_with_bar(find: Callable[[Path, Progress], Path], name: Path) -> Path:
    """What `find` finds for a name that the user gave, with a bar while it downloads."""
    with download_bar() as show:
        return find(name, show)


@contextmanager
def download_bar() -> Iterator[Progress]:
    """A function that draws; nothing is drawn, nor even imported, before it is called."""
    bar: Bar | None = None

    def show(text: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _start(text, total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _start(text: str, total: int) -> "Bar":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.add_task(text, total=total)
    if not console.is_terminal:
        console.print(f"{text} {short_size(total)}", markup=False)
    bar.start()
    return bar
