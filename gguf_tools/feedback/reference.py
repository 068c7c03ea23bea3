"""Rounding with error feedback in NumPy: what the kernel does, to the bit. Read this first.

Arrays have columns first and rows of the matrix last: rows take the same steps side by side.

    for each group of columns, the most important first:
        try ranges of weights: scale and minimum of each, as they can be stored;
            round the group's columns one after another, each error going on to the next ones;
            the best is the one whose errors are least, taken together
        fit scale and minimum to the levels that came out, in the same measure, and round again
        feed the errors back to all later columns

A block of many groups is rounded so first, with scales that are free. The largest scale decides
what d is; then it is rounded again with multiples of it, and again with d a little larger and a
little smaller; the best of these is what it becomes.

`fma` rounds once, as the processor's instruction does, but for one sum in 2^29 that lies halfway
between two numbers of float32 after it was rounded to float64: with luck never seen.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gguf_tools.feedback.moments import Feedback
from gguf_tools.feedback.rounding import Rounded
from gguf_tools.feedback.search import N_MOVES, N_REFITS, Search, search_for
from gguf_tools.quants.levels import Levels
from gguf_tools.quants.quanttype import Floats

MOST = 65504.0  # float16's largest
MOST_LOSS = 3e38


@dataclass(frozen=True, eq=False)
class Grid:
    """What scales and minima can be: multiples of units, or float16 where `d` is None."""

    scales: tuple[float, float]  # bounds; of multiples, where there are units
    minima: tuple[float, float]
    d: Floats | None = None  # (n_rows,)
    dmin: Floats | None = None

    def scale(self, s: Floats) -> Floats:
        """The nearest that can be stored."""
        return _snap(s, self.d, self.scales)

    def minimum(self, m: Floats) -> Floats:
        return _snap(m, self.dmin, self.minima)


@dataclass(frozen=True, eq=False)
class Square:
    """The part of U that belongs to a group, or to a block."""

    upper: Floats  # (n, n)
    pivots: Floats  # (n,)
    ones: Floats  # (n,)

    def part(self, columns: slice) -> "Square":
        return Square(self.upper[columns, columns], self.pivots[columns], self.ones[columns])


@dataclass(frozen=True, eq=False)
class Fit:
    """Columns that are rounded: a group's, or a block's."""

    levels: Floats  # (n, n_rows)
    errors: Floats  # (n, n_rows): (rounded - weight) / U[j, j]
    scales: Floats  # (n_groups, n_rows)
    minima: Floats
    loss: Floats  # (n_rows,)


def round_rows_reference(levels: Levels, rows: Floats, feedback: Feedback) -> Rounded:
    """What `round_rows` gives."""
    n = rows.shape[1]
    upper = feedback.strips.transpose(1, 0, 2).reshape(n, n)
    whole = Square(upper, feedback.pivots, feedback.ones)
    x = rows[:, feedback.order].T.copy()
    search = search_for(levels)
    fits, units = [], []
    with np.errstate(all="ignore"):
        for first in range(0, n, levels.block_size):
            columns = slice(first, first + levels.block_size)
            fit, d, dmin = _fit_block(levels, x[columns], whole.part(columns), search)
            _feed_back(fit.errors, upper[columns, columns.stop :], x[columns.stop :])
            fits.append(fit)
            units.append((d, dmin))
    if levels.n_groups == 1:
        units = []

    def join(parts: list[Floats]) -> Floats:
        return np.concatenate([part.T for part in parts], axis=1)

    d, dmin = np.array(units, np.float32).reshape(-1, 2, len(rows)).transpose(1, 2, 0)
    return Rounded(
        join([fit.levels for fit in fits]).astype(np.int8),
        join([fit.scales for fit in fits]),
        join([fit.minima for fit in fits]),
        *(d, dmin),
    )


def _fit_block(
    levels: Levels, x: Floats, square: Square, search: Search
) -> tuple[Fit, Floats, Floats]:
    """A block rounded, and its d and dmin."""
    if levels.n_groups == 1:
        grid = Grid((-MOST, MOST), (-MOST, MOST))
        fit = _fit_group(levels, x, square, search, grid)
        return fit, fit.scales[0], fit.minima[0]
    free = Grid((0 if levels.has_minimum else -MOST, MOST), (0, MOST))
    first = _fit_groups(levels, x, square, search, free)
    largest = most = np.zeros(x.shape[1], np.float32)
    for s, m in zip(first.scales, first.minima, strict=True):
        largest = np.where(np.abs(largest) < np.abs(s), s, largest)
        most = np.where(most < m, m, most)
    highest = np.float32(levels.highest_scale)
    d_whole = largest / (highest if levels.has_minimum else np.float32(levels.lowest_scale))
    dmin_whole = most / highest
    best: tuple[Fit, Floats, Floats] | None = None
    for factor in search.factors:
        d, dmin = (_to_half(unit * factor, (-MOST, MOST)) for unit in (d_whole, dmin_whole))
        grid = Grid((levels.lowest_scale, levels.highest_scale), (0, levels.highest_scale), d, dmin)
        fit = _fit_groups(levels, x, square, search, grid)
        best = (fit, d, dmin) if best is None else _better((fit, d, dmin), best)
    assert best is not None
    return best


def _better(
    new: tuple[Fit, Floats, Floats], old: tuple[Fit, Floats, Floats]
) -> tuple[Fit, Floats, Floats]:
    """Row by row the one of less loss."""
    better = new[0].loss < old[0].loss
    names = ("levels", "errors", "scales", "minima", "loss")
    fit = Fit(*(np.where(better, getattr(new[0], n), getattr(old[0], n)) for n in names))
    return fit, np.where(better, new[1], old[1]), np.where(better, new[2], old[2])


def _fit_groups(levels: Levels, x: Floats, square: Square, search: Search, grid: Grid) -> Fit:
    """The groups of a block, one after another."""
    x = x.copy()
    loss = np.zeros(x.shape[1], np.float32)
    fits = []
    for first in range(0, len(x), levels.group):
        columns = slice(first, first + levels.group)
        fit = _fit_group(levels, x[columns], square.part(columns), search, grid)
        _feed_back(fit.errors, square.upper[columns, columns.stop :], x[columns.stop :])
        loss = loss + fit.loss
        fits.append(fit)
    scales, minima = (np.concatenate([getattr(f, n) for f in fits]) for n in ("scales", "minima"))
    if grid.d is not None and grid.dmin is not None:
        scales = _nearest(scales * _inverse(grid.d), grid.scales)
        minima = _nearest(minima * _inverse(grid.dmin), grid.minima)
    every_level, errors = (
        np.concatenate([getattr(f, n) for f in fits]) for n in ("levels", "errors")
    )
    return Fit(every_level, errors, scales, minima, loss)


def _fit_group(levels: Levels, w: Floats, square: Square, search: Search, grid: Grid) -> Fit:
    """Choose a scale and a minimum for a group of each row, and round."""
    zeros = np.zeros(w.shape[1], np.float32)
    best = zeros, zeros, np.full_like(zeros, MOST_LOSS)
    low, high = _ranges(levels, w, search)
    steps = search.ranges[:, 2, None]
    scales, minima = grid.scale((high - low) * steps), grid.minimum(0 - low)
    losses = _round(levels, w, square, scales, minima)[2]
    for s, m, loss in zip(scales, minima, losses, strict=True):
        best = _choose(best, s, m, loss)
    best = _refit(levels, w, square, grid, best)
    if grid.d is not None and grid.dmin is not None:
        moves = [(grid.d, zeros), (zeros, grid.dmin), (grid.d, grid.dmin)]
        for ds, dm in N_MOVES * (moves if levels.has_minimum else moves[:1]):
            s, m, _ = best
            for scale, minimum in ((s + ds, m + dm), (s - ds, m - dm)):
                scale, minimum = grid.scale(scale), grid.minimum(minimum)
                loss = _round(levels, w, square, scale, minimum)[2]
                best = _choose(best, scale, minimum, loss)
    s, m, _ = best
    whole, errors, loss = _round(levels, w, square, s, m)
    return Fit(whole, errors, s[None], m[None], loss)


def _ranges(levels: Levels, w: Floats, search: Search) -> tuple[Floats, Floats]:
    """Where each range tried begins and ends, (n_ranges, n_rows) each."""
    least = most = total = w[0]
    for v in w[1:]:
        least = np.where(v < least, v, least)
        most = np.where(most < v, v, most)
        total = total + v
    middle = total * (np.float32(1) / np.float32(len(w)))
    if not levels.has_minimum:
        most = np.where(np.abs(most) < np.abs(least), least, most)
        least = middle = np.zeros_like(most)
    elif levels.n_groups > 1:
        least = np.where(least < 0, least, np.float32(0))
    down, up = search.ranges[:, 0, None], search.ranges[:, 1, None]
    return middle + (least - middle) * down, middle + (most - middle) * up


Choice = tuple[Floats, Floats, Floats]  # scale, minimum, loss; (n_rows,) each


def _choose(best: Choice, s: Floats, m: Floats, loss: Floats) -> Choice:
    better = loss < best[2]
    new = (s, m, loss)
    s, m, loss = (np.where(better, mine, old) for mine, old in zip(new, best, strict=True))
    return s, m, loss


def _refit(levels: Levels, w: Floats, square: Square, grid: Grid, best: Choice) -> Choice:
    """Least squares of w = s * level - m in the measure of the loss, divided by U."""
    a = _divide(w, square)
    whole = _round(levels, w, square, best[0], best[1])[0]
    for _ in range(N_REFITS):
        b = _divide(whole, square)
        sums: Floats = np.zeros((5, w.shape[1]), np.float32)
        for aj, bj, c in zip(a, b, square.ones, strict=True):
            cj: Floats = np.full_like(aj, c)
            sums = sums + np.stack([aj * bj, bj * bj, aj * cj, bj * cj, cj * cj])
        ab, bb, ac, bc, cc = sums
        s, m = ab / bb, np.zeros_like(ab)
        if levels.has_minimum:
            determinant = bb * cc - bc * bc
            s = (ab * cc - ac * bc) / determinant
            m = (ab * bc - bb * ac) / determinant
        s, m = grid.scale(s), grid.minimum(m)
        whole, _, loss = _round(levels, w, square, s, m)
        best = _choose(best, s, m, loss)
    return best


def _round(
    levels: Levels, w: Floats, square: Square, s: Floats, m: Floats
) -> tuple[Floats, Floats, Floats]:
    """Levels, errors and loss of columns (n, n_rows), for scales and minima (..., n_rows)."""
    v = np.empty((len(w), *s.shape), np.float32)
    v[:] = w.reshape(len(w), *(1,) * (s.ndim - 1), -1)
    whole, errors = np.empty_like(v), np.empty_like(v)
    loss = np.zeros(s.shape, np.float32)
    by = _inverse(s)
    for j in range(len(w)):
        whole[j] = _nearest_level((v[j] + m) * by, levels)
        errors[j] = (s * whole[j] - m - v[j]) * square.pivots[j]
        loss = loss + errors[j] * errors[j]
        _feed_back(errors[j : j + 1], square.upper[j : j + 1, j + 1 :], v[j + 1 :])
    return whole, errors, loss


def _divide(w: Floats, square: Square) -> Floats:
    """w U^-1, negative."""
    v = w.copy()
    for j in range(len(w)):
        v[j] = (0 - v[j]) * square.pivots[j]
        _feed_back(v[j : j + 1], square.upper[j : j + 1, j + 1 :], v[j + 1 :])
    return v


def _feed_back(errors: Floats, upper: Floats, later: Floats) -> None:
    """Add the errors of columns times their rows of U to later columns."""
    for error, row in zip(errors, upper, strict=True):
        later[:] = fma(error, row.reshape(-1, *(1,) * error.ndim), later)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)
    return (product + c.astype(np.float64)).astype(np.float32)


def _snap(x: Floats, unit: Floats | None, bounds: tuple[float, float]) -> Floats:
    if unit is None:
        return _to_half(x, bounds)
    return unit * _nearest(x * _inverse(unit), bounds)


def _to_half(x: Floats, bounds: tuple[float, float]) -> Floats:
    return _clamp(x, bounds).astype(np.float16).astype(np.float32)


def _nearest_level(x: Floats, levels: Levels) -> Floats:
    if not levels.values:
        return _nearest(x, (levels.lowest, levels.highest))
    level = np.full_like(x, levels.lowest)
    for below, value in pairwise(levels.values):
        level = np.where((below + value) / 2 < x, np.float32(value), level)
    return level


def _nearest(x: Floats, bounds: tuple[float, float]) -> Floats:
    """The nearest whole number between two."""
    whole: Floats = np.rint(_clamp(x, bounds))
    return whole


def _clamp(x: Floats, bounds: tuple[float, float]) -> Floats:
    """x between bounds; the upper one for what is not a number."""
    low, high = np.float32(bounds[0]), np.float32(bounds[1])
    x = np.where(x < high, x, high)
    return np.where(low < x, x, low)


def _inverse(x: Floats) -> Floats:
    """1 / x, and 0 for 0."""
    return np.where(np.abs(x) > 0, np.float32(1) / x, np.float32(0))
