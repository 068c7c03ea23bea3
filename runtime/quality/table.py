"""What evaluations look like: a table, JSON objects, and KL divergence against size.

A *cliff* is where a step down in size costs far more than usual: one bit per weight less makes the
errors of weights about 2 times, and KL divergence, which goes with their square, about 4 times as
large. A file whose divergence grew twice as fast, and is not negligible, lies beyond a cliff.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.describe import short_size
from gguf_tools.errors import GGUFError, printable
from runtime.quality.choices import Accuracy
from runtime.quality.evaluation import Evaluation
from runtime.quality.facts import Facts
from runtime.quality.measures import Distance, Estimate
from runtime.quality.speeds import Speed

CLIFF_FACTOR = 8.0  # of KL divergence, for one bit per weight less
LEAST_CLIFF = 0.02  # mean KL divergence below which nothing is called a cliff
LEAST_STEP = 0.5  # bits per weight: files of about one size differ for other reasons
BAR = 40  # characters of the longest bar

HEADER = ("file", "size", "bits/weight", "perplexity", "mean KL", "99% KL", "99.9% KL", "same top")
TASK_HEADER = ("accuracy", "per byte")
SPEED_HEADER = ("prompt tokens/s", "decode tokens/s")


@dataclass(frozen=True)
class Result:
    """What is known of one file."""

    name: str
    file_size: int  # bytes; of a checkpoint, of its weights
    bits_per_weight: float
    evaluation: Evaluation | None  # None where only questions were asked
    accuracy: Accuracy | None = None
    speed: Speed | None = None
    facts: Facts | None = None

    @property
    def distance(self) -> Distance | None:
        """From the reference, where there was one."""
        return None if self.evaluation is None else self.evaluation.distance


def to_json(result: Result, reference: Result | None) -> dict[str, Any]:
    """One object of the list that `gguf eval --json` prints; `result` is a candidate's."""
    made: dict[str, Any] = {"file": result.name}
    found, apart = result.evaluation, result.distance
    if found is not None:
        made |= {"tokens": found.tokens, **_pair("perplexity", found.perplexity)}
    if apart is not None:
        made |= {
            **_pair("mean_kl", apart.kl),
            "median_kl": apart.kl_median,
            "kl_99": apart.kl_99,
            "kl_999": apart.kl_999,
            "max_kl": apart.kl_largest,
            **_pair("same_top", apart.same_top),
            **_pair("mean_probability_change", apart.probability_change),
            **_pair("rms_probability_change", apart.probability_rms),
            **_pair("perplexity_ratio", apart.perplexity_ratio),
        }
    if reference is not None and reference.evaluation is not None:
        made |= _pair("reference_perplexity", reference.evaluation.perplexity)
    if result.accuracy is not None:
        made |= {
            "questions": result.accuracy.questions,
            **_pair("accuracy", result.accuracy.accuracy),
            **_pair("accuracy_per_byte", result.accuracy.normalised),
        }
    if result.speed is not None:
        made |= {
            "prompt_tokens_per_second": result.speed.prompt.value,
            "decode_tokens_per_second": result.speed.decode.value,
        }
    return made | {"file_size": result.file_size, "bits_per_weight": result.bits_per_weight}


def header(results: Sequence[Result]) -> tuple[str, ...]:
    """The columns that `rows` has something for."""
    columns: tuple[str, ...] = HEADER[:3]
    if any(result.evaluation for result in results):
        columns += HEADER[3:4]
    if any(result.distance for result in results):
        columns += HEADER[4:]
    if any(result.accuracy for result in results):
        columns += TASK_HEADER
    if any(result.speed for result in results):
        columns += SPEED_HEADER
    return columns


def rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """One row of texts for each file."""
    columns = header(results)
    for result in results:
        texts = dict.fromkeys(columns, "")
        texts["file"] = printable(result.name, 60)
        texts["size"] = short_size(result.file_size)
        texts["bits/weight"] = f"{result.bits_per_weight:.2f}"
        if result.evaluation is not None:
            texts["perplexity"] = with_error(result.evaluation.perplexity, 3)
        apart, right = result.distance, result.accuracy
        if apart is not None:
            texts["mean KL"] = with_error(apart.kl, 5)
            texts["99% KL"], texts["99.9% KL"] = f"{apart.kl_99:.4f}", f"{apart.kl_999:.4f}"
            texts["same top"] = share(apart.same_top)
        if right is not None:
            texts["accuracy"], texts["per byte"] = share(right.accuracy), share(right.normalised)
        if result.speed is not None:
            speeds = (result.speed.prompt, result.speed.decode)
            texts |= zip(SPEED_HEADER, (f"{each.value:.1f}" for each in speeds), strict=True)
        yield tuple(texts[column] for column in columns)


def more_about(result: Result) -> str | None:
    """The figures that the table has no room for; None without a reference."""
    apart = result.distance
    if apart is None:
        return None
    change, rms, ratio = apart.probability_change, apart.probability_rms, apart.perplexity_ratio
    return (
        f"{printable(result.name, 60)}: median KL {apart.kl_median:.5f}, largest "
        f"{apart.kl_largest:.3f}; the right token's probability changed by "
        f"{with_error(Estimate(100 * change.value, 100 * change.error), 2)} % in the mean, "
        f"{with_error(Estimate(100 * rms.value, 100 * rms.error), 2)} % RMS; "
        f"{with_error(ratio, 4)} times the reference's perplexity"
    )


def cliffs(results: Iterable[Result]) -> set[str]:
    """The names of files that lie beyond a cliff, seen from the next that is clearly larger.

    A file that is smaller than one of these and no nearer lies there, too.
    """
    measured = sorted(_points(results))
    found: set[str] = set()
    least = math.inf  # KL divergence beyond a cliff
    for bits, kl, name in reversed(measured):
        larger = next((point for point in measured if point[0] >= bits + LEAST_STEP), None)
        is_steep = False
        if larger is not None and kl > LEAST_CLIFF and larger[1] > 0:
            growth = math.log(kl / larger[1]) / (larger[0] - bits)
            is_steep = growth > math.log(CLIFF_FACTOR)
        if is_steep or kl >= least:
            found.add(name)
            least = min(least, kl)
    return found


def chart(results: Sequence[Result]) -> Iterator[str]:
    """Mean KL divergence against bits per weight, as bars; nothing for fewer than two points."""
    points = sorted(_points(results), key=lambda point: -point[0])
    if len(points) < 2:
        return
    largest = max(kl for _, kl, _ in points)
    beyond = cliffs(results)
    yield "mean KL divergence by bits per weight"
    for bits, kl, name in points:
        bar = "\N{FULL BLOCK}" * max(1, round(BAR * kl / largest)) if largest else ""
        mark = "  <- beyond a cliff" if name in beyond else ""
        yield f"{bits:6.2f}  {bar} {kl:.4f}  {printable(name, 60)}{mark}"


def draw(results: Sequence[Result], path: Path) -> None:
    """Mean KL divergence against bits per weight as a picture, in the format of the name's end.

    GGUFError without matplotlib, or with nothing to draw.
    """
    points = sorted(_points(results))
    if not points:
        raise GGUFError("there is nothing to draw: --plot needs --reference")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GGUFError(
            "--plot needs matplotlib, which is not installed: pip install 'gguf-tools[plots]'"
        ) from None
    figure = Figure(figsize=(8, 5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bits, kls = [point[0] for point in points], [point[1] for point in points]
    axes.plot(bits, kls, marker="o")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL divergence from the reference")
    beyond = cliffs(results)
    for x, y, name in points:
        color = "tab:red" if name in beyond else "black"
        text = f"{name} (cliff)" if name in beyond else name
        axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=8, color=color)
    axes.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    try:
        canvas.print_figure(path)
    except ValueError as error:
        raise GGUFError(f"{printable(path)}: {printable(error, 200)}") from None


def with_error(estimate: Estimate, digits: int) -> str:
    """A figure and its error: `0.0815 +- 0.0014`."""
    return f"{estimate.value:.{digits}f} \N{PLUS-MINUS SIGN} {estimate.error:.{digits}f}"


def share(estimate: Estimate, digits: int = 2) -> str:
    """A share and its error, in per cent."""
    return f"{estimate.value:.{digits}%} \N{PLUS-MINUS SIGN} {estimate.error:.{digits}%}"


def _points(results: Iterable[Result]) -> list[tuple[float, float, str]]:
    """(bits per weight, mean KL, name) of those that were held against a reference."""
    return [
        (result.bits_per_weight, result.distance.kl.value, result.name)
        for result in results
        if result.distance is not None
    ]


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_error": estimate.error}
