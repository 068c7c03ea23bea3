"""The plots of a report: what of a family of files is drawn over what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from runtime.quality.advice import Advice
from runtime.quality.measures import Estimate
from runtime.quality.plots import Bar, Level, Plot, Point
from runtime.quality.table import Result

LEAST_KL = 1e-5  # on the axis
WIDE = 3.0  # a perplexity so many times another is drawn on a logarithmic axis
MOST_TYPES = 10  # that have a colour
OTHERS = "others"
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class _Figure:
    """A figure of each file, drawn over its size, or over its bits per weight."""

    key: str
    title: str
    label: str
    note: str
    find: Callable[[Result], Estimate | None]
    over_bits: bool = False
    is_log: Callable[[Sequence[Point]], bool] = lambda points: False
    front: bool = False


def draw_figures(
    candidates: Sequence[Result], reference: Result | None, advice: Advice
) -> Iterator[Plot]:
    """A plot of each figure that two files or more have."""
    largest = max(result.file_size for result in candidates)
    unit, unit_name = next(pair for pair in UNITS if largest >= pair[0] or pair[0] == 1)
    called = labels([*([] if reference is None else [reference]), *candidates])
    for figure in FIGURES:
        points = []
        for result, label in zip(candidates, called[-len(candidates) :], strict=True):
            found = figure.find(result)
            if found is not None:
                x = result.bits_per_weight if figure.over_bits else result.file_size / unit
                points.append(Point(x, found.value, found.error, label, advice.mark(result)))
        base = None if reference is None else figure.find(reference)
        if len(points) > 1:
            yield Plot(
                key=figure.key,
                title=figure.title,
                description=f"{figure.label}: {'; '.join(map(_describe, points))}",
                x_label="bits per weight" if figure.over_bits else f"size, {unit_name}",
                y_label=figure.label,
                note=figure.note,
                points=points,
                log_y=figure.is_log(points),
                least_y=LEAST_KL,
                front=figure.front,
                level=Level(base.value, f"reference: {base.value:.4g}")
                if base is not None and figure.key == "perplexity"
                else None,
            )


def type_bars(results: Sequence[Result]) -> list[Bar]:
    """The bytes of each type in each file; types beyond MOST_TYPES as one."""
    *own, last = colours(results)
    own += [last] if last != OTHERS else []
    bars = []
    for result, label in zip(results, labels(results), strict=True):
        shares = {} if result.facts is None else result.facts.types
        segments = [(name, shares[name].n_bytes) for name in own if name in shares]
        rest = sum(share.n_bytes for name, share in shares.items() if name not in own)
        segments += [(OTHERS, rest)] if rest else []
        bars.append(Bar(f"{label}, {short_size(sum(size for _, size in segments))}", segments))
    return bars


def colours(results: Sequence[Result]) -> list[str]:
    """The names that bars are made of, each with a colour of its own."""
    names = type_names(results)
    return names if len(names) <= MOST_TYPES else [*names[: MOST_TYPES - 1], OTHERS]


def type_names(results: Sequence[Result]) -> list[str]:
    """The types of all files' tensors, the one with most bytes first."""
    totals: dict[str, int] = {}
    for result in results:
        for name, share in ({} if result.facts is None else result.facts.types).items():
            totals[name] = totals.get(name, 0) + share.n_bytes
    return sorted(totals, key=lambda name: (-totals[name], name))


def labels(results: Sequence[Result]) -> list[str]:
    """What files are called in plots: their names without the words that all begin with."""
    names = [printable(result.name, 60).removesuffix(".gguf") for result in results]
    words = [re.split(r"(?<=[-. /])", name) for name in names]
    common = 0
    while len(names) > 1 and len({tuple(each[: common + 1]) for each in words}) == 1:
        if any(len(each) <= common for each in words):
            break
        common += 1
    return ["".join(each[common:]) or name for each, name in zip(words, names, strict=True)]


def _describe(point: Point) -> str:
    return f"{point.label} {point.y:.4g} \N{PLUS-MINUS SIGN} {point.error:.2g} at {point.x:.4g}"


def _heights(points: Sequence[Point]) -> list[float]:
    return [point.y for point in points]


def _kl(result: Result) -> Estimate | None:
    return None if result.distance is None else result.distance.kl


def _perplexity(result: Result) -> Estimate | None:
    """With the error of the difference from the reference, where there is one."""
    found, apart = result.evaluation, result.distance
    if found is None or apart is None:
        return None if found is None else found.perplexity
    ratio = apart.perplexity_ratio
    return Estimate(found.perplexity.value, found.perplexity.value * ratio.error / ratio.value)


def _accuracy(result: Result) -> Estimate | None:
    if result.accuracy is None:
        return None
    found = result.accuracy.accuracy
    return Estimate(100 * found.value, 100 * found.error)


def _decode(result: Result) -> Estimate | None:
    return None if result.speed is None else result.speed.decode


def _prompt(result: Result) -> Estimate | None:
    return None if result.speed is None else result.speed.prompt


_ROUNDS = "Bars: how far single rounds were from their median."
FIGURES = (
    _Figure(
        "kl",
        "KL divergence by bits per weight",
        "mean KL divergence (log scale)",
        "Lower is better. Bars: one standard error. A line joins what no smaller file beats.",
        _kl,
        over_bits=True,
        is_log=lambda points: True,
        front=True,
    ),
    _Figure(
        "perplexity",
        "Perplexity by size",
        "perplexity",
        "Lower is better. Bars: one standard error; beside a reference, of the difference from it, "
        "as all read the same text.",
        _perplexity,
        is_log=lambda points: max(_heights(points)) > WIDE * min(_heights(points)),
        front=True,
    ),
    _Figure("accuracy", "Accuracy by size", "accuracy, %", "Bars: one standard error.", _accuracy),
    _Figure("decode", "Writing speed by size", "decode tokens/s", _ROUNDS, _decode),
    _Figure("prompt", "Reading speed by size", "prompt tokens/s", _ROUNDS, _prompt),
)
