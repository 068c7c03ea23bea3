"""What calibrating draws on standard error: a bar on a terminal, otherwise one line."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from gguf_tools.calibration import Calibrated, Compiling, Settings, calibrate
from gguf_tools.plan import Plan
from gguf_tools.self_check import Source

COMPILING = "compiling kernels, first run only"


def calibrate_with_bar(
    plan: Plan,
    source: Source,
    output: Path,
    settings: Settings,
    *,
    inputs: Sequence[Path],
    threads: int,
    force: bool,
    resume: bool,
) -> Calibrated:
    """What `calibrate` gives in the end."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    events = calibrate(
        plan,
        source,
        output,
        settings,
        inputs=inputs,
        threads=threads,
        force=force,
        resume=resume,
    )
    if not console.is_terminal:
        console.print("calibrating", markup=False)
    with (
        Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        closing(events),
    ):
        task = bar.add_task("calibrating", total=None)
        for event in events:
            if isinstance(event, Calibrated):
                return event
            if isinstance(event, Compiling):
                if not event.done and not console.is_terminal:
                    console.print(COMPILING, markup=False)
                bar.update(task, completed=event.done, total=event.total, description=COMPILING)
            elif event.remark:
                console.print(f"note: {event.remark}", markup=False, soft_wrap=True)
            else:
                layer = min(int(event.done) + 1, event.total)
                text = f"calibrating layer {layer} of {event.total}"
                bar.update(task, completed=event.done, total=event.total, description=text)
    raise AssertionError("calibrate ends with what it made, or with an error")
