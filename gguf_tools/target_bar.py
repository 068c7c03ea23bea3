"""What measuring for a target draws on standard error: a bar on a terminal, otherwise lines."""

from collections.abc import Sequence
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from gguf_tools.overrides import Overrides
from gguf_tools.plan import Plan
from gguf_tools.target_options import Target
from gguf_tools.target_size import PlanFor, Settled, settle
from gguf_tools.type_trials import TypeTrials


def settle_with_bar(
    target: Target,
    base: Plan,
    overrides: Overrides,
    plan_for: PlanFor,
    trials: TypeTrials,
    *,
    room: int,
    others: Sequence[str],
) -> Settled:
    """What `settle` gives in the end, with the time that is left on the way."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    steps = settle(target, base, overrides, plan_for, trials, room=room, others=others)
    doing = ""
    with (
        Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        closing(steps),
    ):
        task = bar.add_task("", total=None)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                settled: Settled = end.value
                return settled
            if step.what != doing:
                doing = step.what
                bar.reset(task, description=doing, total=None)
                if not console.is_terminal:
                    console.print(doing, markup=False)
            bar.update(task, completed=step.done, total=step.total or None)
