"""What `gguf tune` draws: a bar for each setting, or a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_tools.errors import GGUFError
from runtime.tuning import Advice, Line, Timing, Work

WIDTH = 32  # of the longest bar
HEADER = ("gpu-layers", "threads", "prompt tokens/s", "decode tokens/s", "seconds")


def chart(timings: Sequence[Timing], work: Work) -> Iterator[str]:
    """A line for each setting: its speeds, and a bar of the seconds that an answer takes."""
    longest = max(timing.seconds(work) for timing in timings)
    rows = [
        (
            str(timing.gpu_layers),
            str(timing.threads),
            f"{1 / timing.prompt:.1f}",
            f"{1 / timing.decode:.1f}",
            f"{timing.seconds(work):.3g}",
        )
        for timing in timings
    ]
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    bars = ["#" * max(round(WIDTH * t.seconds(work) / longest), 1) for t in timings]
    for row, bar in zip((HEADER, *rows), ("", *bars), strict=True):
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{'  '.join(cells)}  {bar}".rstrip()


def check_plots() -> None:
    """GGUFError when the package that draws pictures is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GGUFError(
            "--plot draws with matplotlib, which is not installed: "
            "pip install 'gguf-tools[plots]', or leave --plot out for a chart of text"
        ) from None


def draw_picture(path: Path, timings: Sequence[Timing], advice: Advice, title: str) -> None:
    """Write a picture of the speeds over the layers on GPUs; without any, over the threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    over_layers = any(timing.gpu_layers for timing in timings)
    shown = [t for t in timings if not over_layers or t.threads == advice.threads]
    shown.sort(key=lambda timing: (timing.gpu_layers, timing.threads))
    xs = [timing.gpu_layers if over_layers else timing.threads for timing in shown]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    phases: tuple[tuple[str, list[float], Line | None], ...] = (
        ("reading a prompt", [timing.prompt for timing in shown], advice.prompt_line),
        ("writing", [timing.decode for timing in shown], advice.decode_line),
    )
    for axes, (name, seconds, line) in zip(figure.subplots(2, 1, sharex=True), phases, strict=True):
        axes.plot(xs, [1 / each for each in seconds], "o", label="measured")
        if line is not None:
            counts = [n for n in range(1, max(xs) + 1) if line.at(n) > 0]
            axes.plot(counts, [1 / line.at(n) for n in counts], "-", label="fitted")
        axes.axvline(advice.gpu_layers if over_layers else advice.threads, ls=":", label="advice")
        axes.set_ylabel(f"{name}, tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.get_axes()[-1].set_xlabel("layers on GPUs" if over_layers else "threads")
    figure.savefig(path, dpi=120, format="png")
