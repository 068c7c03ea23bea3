"""Small plots as SVG, for a page of its own: no script, no font, no colour but the page's classes.

They are drawn at the width of a phone, so that their text stays readable there, and grow with the
page. Every text is escaped here. Classes for the style sheet: `axis`, `grid`, `front`, `level`,
`error`, `leader`, `point` with the kind of the point, and `type0`, `type1`... of bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 24, 40  # margins of the plotting area
RADIUS = 4.5  # of a point
TEXT_HEIGHT, TEXT_WIDTH = 12.0, 7.2  # of a label's line and letter, about
LONGEST_LABEL = 20
CROWDED = 0.4  # of a label's area covers something, or is outside
TICKS = 5  # on an axis, about

BAR_HEIGHT, BAR_GAP, BAR_LABEL = 20, 10, 15

TAKE, CLIFF = "take", "cliff"  # kinds of points with a shape of their own


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    error: float  # of y
    label: str
    kind: str


@dataclass(frozen=True)
class Level:
    """A horizontal line, as of the reference."""

    y: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Points over two axes; with `front`, a line joins those that no smaller one beats."""

    key: str  # unique on the page
    title: str
    description: str
    x_label: str
    y_label: str
    note: str  # on the bars and the line
    points: Sequence[Point]
    log_y: bool = False
    least_y: float | None = None  # where the axis ends: smaller ones are drawn there
    front: bool = False
    level: Level | None = None


@dataclass(frozen=True)
class Bar:
    """A bar of segments: (name, size)."""

    label: str
    segments: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class _Box:
    """Where something is drawn, in the picture's units."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class _Scale:
    """From numbers to places: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    ticks: Sequence[float] = field(default_factory=tuple)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def draw_plot(plot: Plot) -> Markup:
    """The SVG element of a plot; ValueError without points."""
    if not plot.points:
        raise ValueError("a plot needs points")
    x = linear_scale([point.x for point in plot.points], LEFT, WIDTH - RIGHT)
    y = _y_scale(plot)
    parts = [
        *_grid(plot, x, y),
        *_level(plot.level, y),
        *_front(plot, x, y),
        *(_point(point, x, y) for point in plot.points),
        *_labels(plot, x, y),
    ]
    return _svg(plot.key, plot.title, plot.description, HEIGHT, parts)


def draw_bars(
    key: str, title: str, description: str, bars: Sequence[Bar], names: Sequence[str]
) -> Markup:
    """Bars of segments one below the other, the longest as wide as the picture.

    A segment's class has the number of its name among `names`.
    """
    longest = max(1, *(sum(size for _, size in bar.segments) for bar in bars))
    step = BAR_LABEL + BAR_HEIGHT + BAR_GAP
    parts = []
    for row, bar in enumerate(bars):
        top, left = row * step, 0.0
        parts.append(_text(0, top + BAR_LABEL - 4, shorten(bar.label, 48), "name"))
        total = sum(size for _, size in bar.segments)
        for name, size in bar.segments:
            width = WIDTH * size / longest
            kind = f"type{names.index(name)}"
            tip = f"{bar.label}: {name}, {size / max(1, total):.1%} of the bytes"
            parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}">').format(
                    kind, left, top + BAR_LABEL, max(width, 0.5), BAR_HEIGHT
                )
                + _title(tip)
                + Markup("</rect>")
            )
            if width > TEXT_WIDTH * len(name) + 6:
                middle = top + BAR_LABEL + BAR_HEIGHT / 2 + 4
                parts.append(_text(left + width / 2, middle, name, "inside", "middle"))
            left += width
    return _svg(key, title, description, len(bars) * step, parts)


def shorten(text: str, limit: int = LONGEST_LABEL) -> str:
    """At most `limit` characters: of a longer text how it begins and how it ends."""
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: kept - kept // 2]}\N{HORIZONTAL ELLIPSIS}{text[-(kept // 2) :]}"


def linear_scale(values: Sequence[float], start: float, end: float) -> _Scale:
    """A scale with room for `values` and round numbers for its ticks."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    return _Scale(low, high, start, end, ticks=linear_ticks(low, high))


def log_scale(values: Sequence[float], start: float, end: float) -> _Scale:
    """A logarithmic scale for positive `values`."""
    low, high = min(values) / 1.5, max(values) * 1.5
    return _Scale(low, high, start, end, is_log=True, ticks=log_ticks(low, high))


def linear_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of 10 from low to high, about TICKS."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of 10 from low to high, and 2 and 5 times these where there are few."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**decade for decade in decades for f in factors]
        found = [each for each in found if low <= each <= high]
        if len(found) >= 3:
            break
    return found


def _y_scale(plot: Plot) -> _Scale:
    values = [
        each
        for point in plot.points
        for each in (point.y - point.error, point.y, point.y + point.error)
    ]
    values += [] if plot.level is None else [plot.level.y]
    make: Callable[[Sequence[float], float, float], _Scale] = linear_scale
    if plot.log_y:
        least = plot.least_y or min(value for value in values if value > 0)
        values, make = [max(value, least) for value in values], log_scale
    return make(values, HEIGHT - BOTTOM, TOP)


def _grid(plot: Plot, x: _Scale, y: _Scale) -> Iterator[Markup]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in y.ticks:
        yield _line(LEFT, y(tick), right, y(tick), "grid")
        yield _text(LEFT - 5, y(tick) + 4, f"{tick:.6g}", "tick", "end")
    for tick in x.ticks:
        yield _line(x(tick), bottom, x(tick), bottom + 4, "axis")
        yield _text(x(tick), bottom + 16, f"{tick:.6g}", "tick", "middle")
    yield _line(LEFT, bottom, right, bottom, "axis")
    yield _text((LEFT + right) / 2, HEIGHT - 6, plot.x_label, "label", "middle")
    yield _text(2, 11, plot.y_label, "label")


def _level(level: Level | None, y: _Scale) -> Iterator[Markup]:
    if level is not None:
        yield _line(LEFT, y(level.y), WIDTH - RIGHT, y(level.y), "level")
        yield _text(WIDTH - RIGHT, y(level.y) + 12, shorten(level.label, 40), "label", "end")


def _front(plot: Plot, x: _Scale, y: _Scale) -> Iterator[Markup]:
    joined = _joined(plot, x, y)
    if len(joined) > 1:
        places = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y in joined)
        yield Markup('<polyline class="front" points="{}"/>').format(places)


def _joined(plot: Plot, x: _Scale, y: _Scale) -> list[tuple[float, float]]:
    """Where the points are that no smaller one beats."""
    joined: list[Point] = []
    for point in sorted(plot.points, key=lambda point: (point.x, point.y)):
        if plot.front and (not joined or point.y < joined[-1].y):
            joined.append(point)
    return [(x(point.x), y(point.y)) for point in joined]


def _point(point: Point, x: _Scale, y: _Scale) -> Markup:
    at_x, at_y = x(point.x), y(point.y)
    low, high = y(point.y - point.error), y(point.y + point.error)
    bar = Markup("")
    if low - high > 1:
        bar = _line(at_x, low, at_x, high, "error")
        bar += _line(at_x - 3, low, at_x + 3, low, "error")
        bar += _line(at_x - 3, high, at_x + 3, high, "error")
    tip = _title(
        f"{point.label}: {point.x:.5g}, {point.y:.4g} \N{PLUS-MINUS SIGN} {point.error:.2g}"
    )
    r = RADIUS
    if point.kind == CLIFF:
        places = f"{at_x:.1f},{at_y - 1.3 * r:.1f} {at_x + 1.2 * r:.1f},{at_y + r:.1f} "
        places += f"{at_x - 1.2 * r:.1f},{at_y + r:.1f}"
        shape = Markup('<polygon class="point cliff" points="{}">{}</polygon>').format(places, tip)
    else:
        shape = Markup(
            '<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>'
        ).format(point.kind, at_x, at_y, r, tip)
    ring = Markup("")
    if point.kind == TAKE:
        ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
            at_x, at_y, r + 3
        )
    return bar + ring + shape


def _labels(plot: Plot, x: _Scale, y: _Scale) -> Iterator[Markup]:
    """A label beside each point, where it covers least; one farther off has a line to its point.

    In a crowd a point that is not marked goes without: its tip and the tables have its name.
    """
    taken = list(_drawn(plot, x, y))
    for point in sorted(plot.points, key=lambda point: (point.kind not in (TAKE, CLIFF), -point.y)):
        at_x, at_y, text = x(point.x), y(point.y), shorten(point.label)
        width = TEXT_WIDTH * len(text)
        ring = 4 if point.kind == TAKE else 0
        places = _places(at_x, at_y, width, RADIUS + 4 + ring)
        best = min(places, key=lambda box: _cost(box, taken, at_x, at_y))
        crowded = _cost(best, taken, at_x, at_y) > CROWDED * TEXT_HEIGHT * width
        if crowded and point.kind not in (TAKE, CLIFF):
            continue
        taken.append(best)
        near_x = min(max(at_x, best.left), best.right)
        near_y = min(max(at_y, best.top), best.bottom)
        if math.hypot(near_x - at_x, near_y - at_y) > 3 * RADIUS:
            yield _line(at_x, at_y, near_x, near_y, "leader")
        yield _text(best.left, best.bottom - 3, text, f"name {point.kind}")


def _drawn(plot: Plot, x: _Scale, y: _Scale) -> Iterator[_Box]:
    """What labels should not cover."""
    for point in plot.points:
        at = x(point.x)
        yield _around(at, y(point.y), RADIUS + (4 if point.kind == TAKE else 1))
        yield _Box(at - 3, y(point.y + point.error), at + 3, y(point.y - point.error))
    joined = _joined(plot, x, y)
    for (x1, y1), (x2, y2) in pairwise(joined):
        steps = 1 + int(math.hypot(x2 - x1, y2 - y1) / 6)
        for i in range(steps):
            yield _around(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps, 1.5)
    if plot.level is not None:
        top, width = y(plot.level.y), TEXT_WIDTH * len(shorten(plot.level.label, 40))
        yield _Box(LEFT, top - 2, WIDTH, top + 2)
        yield _Box(WIDTH - RIGHT - width, top, WIDTH - RIGHT, top + TEXT_HEIGHT + 2)


def _places(x: float, y: float, width: float, nearest: float) -> Iterator[_Box]:
    """Boxes for a label of a point at (x, y), the best first."""
    half = TEXT_HEIGHT / 2
    for far in (nearest, nearest + 10, nearest + 24):
        for left, top in (
            (x + far, y - half),
            (x - far - width, y - half),
            (x - width / 2, y - far - TEXT_HEIGHT),
            (x - width / 2, y + far),
            (x + far, y - far - TEXT_HEIGHT),
            (x + far, y + far),
            (x - far - width, y - far - TEXT_HEIGHT),
            (x - far - width, y + far),
        ):
            yield _Box(left, top, left + width, top + TEXT_HEIGHT)


def _cost(box: _Box, taken: Sequence[_Box], x: float, y: float) -> float:
    """What a label covers there, what of it is outside, and a little for how far it is."""
    area = (box.right - box.left) * (box.bottom - box.top)
    inside = box.overlap(_Box(LEFT + 2, TOP, WIDTH - 1, HEIGHT - BOTTOM - 1))
    far = math.hypot((box.left + box.right) / 2 - x, (box.top + box.bottom) / 2 - y)
    return sum(box.overlap(other) for other in taken) + 4 * (area - inside) + far / 10


def _around(x: float, y: float, r: float) -> _Box:
    return _Box(x - r, y - r, x + r, y + r)


def _svg(key: str, title: str, text: str, height: float, parts: Sequence[Markup]) -> Markup:
    named = Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>')
    return (
        Markup(
            '<svg viewBox="0 0 {} {:g}" role="img" aria-labelledby="{}-title" '
            'aria-describedby="{}-desc">'
        ).format(WIDTH, height, key, key)
        + named.format(key, title, text)
        + Markup("").join(parts)
        + Markup("</svg>")
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    place = "" if anchor == "start" else Markup(' text-anchor="{}"').format(anchor)
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}"{}>{}</text>').format(
        kind, x, y, place, text
    )


def _title(text: str) -> Markup:
    return Markup("<title>") + escape(text) + Markup("</title>")
