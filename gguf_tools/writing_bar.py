"""What writing a file draws on standard error: a bar on a terminal, and notes on what is kept."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gguf_tools.command import undisturbed_ending
from gguf_tools.conversion import convert
from gguf_tools.errors import printable
from gguf_tools.journal import Journal
from gguf_tools.losses import Losses
from gguf_tools.plan import Plan
from gguf_tools.values import MetadataValue


def write_with_bar(
    plan: Plan,
    target: Path,
    *,
    threads: int,
    force: bool,
    begun: Callable[[Path], None] | None,
    check: Callable[[Path], Mapping[str, MetadataValue]] | None,
    journal: Journal,
) -> Losses:
    """Convert; gives what that cost where it was measured. What is kept of a stopped run is told.

    `begun` and `check` are those of `convert`.
    """

    def note(text: str) -> None:
        if text:
            console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    losses = Losses()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(tensor.nbytes for tensor in plan.tensors)
    steps = convert(
        plan,
        target,
        threads=threads,
        force=force,
        begun=begun,
        check=check,
        journal=journal,
    )
    try:
        with (
            undisturbed_ending(),
            Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            ) as bar,
            closing(steps),
        ):
            task = bar.add_task("", total=total)
            for number, step in enumerate(steps):
                if number == 0:
                    note(journal.remark)
                name = f"{printable(step.tensor.name, 40)} {step.tensor.quant.name}"
                bar.update(task, advance=step.n_bytes, description=f"{name:<32}")
                if step.loss is not None:
                    losses.add(step.tensor.name, step.loss)
                if step.finished and step.index == len(plan.tensors) - 1 and check is not None:
                    bar.update(task, description=f"{'self-check':<32}")
    except (KeyboardInterrupt, SystemExit):
        note(journal.kept)
        raise
    return losses
