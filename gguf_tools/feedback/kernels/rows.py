"""Bundles of 16 rows, panel by panel."""

from gguf_tools.feedback.kernels.bounds import set_bounds, to_half
from gguf_tools.feedback.kernels.fitting import fit_group
from gguf_tools.feedback.kernels.rounding import (
    GROUP,
    HAS_MINIMUM,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    N_FACTORS,
    catch_up,
    number,
)
from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    cvt_i8x16,
    cvt_i32x16,
    float32,
    ld_f32,
    ld_f32x16,
    ld_i64,
    sel_lt,
    splat_f32x16,
    st,
    vfabs,
    zero_f32x16,
)

PANEL = 256  # columns whose errors are fed back at once to all after them
SCRATCH = 1024 * 64


@kernel("iiiiiiiiiiiiiiii")
def round_rows(
    x, levels, scales, minima, d, dmin, n_bundles, n_columns, strips, pivots, ones, ranges, factors,
    facts, errors, scratch,
):  # fmt: skip
    """Round all columns of bundles of 16 rows.

    x               (n_bundles, n_columns) vectors; not as they were afterwards
    levels          (n_bundles, n_columns) of 16 int8, as they come out
    scales, minima  (n_bundles, n_columns / group) vectors, as they come out: what levels are
                    multiplied with and what is taken off, or multiples of d and dmin
    d, dmin         (n_bundles, n_columns / PANEL) vectors, as they come out; not touched where a
                    block is one group
    strips          (n_columns / group, n_columns, group): those of all groups
    factors         float32: of d and dmin
    errors          room for (n_bundles, PANEL) vectors
    scratch         room for SCRATCH bytes
    """
    group = ld_i64(facts + GROUP)
    strip_bytes = n_columns * group * 4
    n_groups, n_blocks = n_columns // group, n_columns // PANEL
    for first in range(0, n_columns, PANEL):
        width = min(PANEL, n_columns - first)
        g, last = first // group, first + width
        square = strips + g * strip_bytes + first * group * 4
        for b in range(n_bundles):
            round_panel(
                x + (b * n_columns + first) * 64,
                errors + b * PANEL * 64,
                levels + (b * n_columns + first) * 16,
                scales + (b * n_groups + g) * 64,
                minima + (b * n_groups + g) * 64,
                d + (b * n_blocks + first // PANEL) * 64,
                dmin + (b * n_blocks + first // PANEL) * 64,
                *(width, square, strip_bytes, pivots + first * 4, ones + first * 4),
                *(ranges, factors, facts, scratch),
            )
        strip = square + width // group * strip_bytes
        for j in range(last, n_columns, group):
            for b in range(n_bundles):
                at = x + (b * n_columns + j) * 64
                catch_up(at, errors + b * PANEL * 64, strip, PANEL, group, at)
            strip += strip_bytes


@jit
def round_panel(
    x, errors, levels, scales, minima, d, dmin, width, strips, strip_bytes, pivots, ones, ranges,
    factors, facts, scratch,
):  # fmt: skip
    """Round a panel: blocks of one group, as many as fill the width, or one block of many."""
    ours, rest = scratch, scratch + PANEL * 64
    one = splat_f32x16(float32(1.0))
    fit_groups(
        *(x, errors, ours, scales, minima, width, strips, strip_bytes, pivots, ones, ranges),
        *(facts, rest, one, one, False),
    )
    if ld_i64(facts + HIGHEST_SCALE) > 1:
        fit_block(
            *(x, errors, ours, scales, minima, d, dmin, strips, strip_bytes, pivots, ones),
            *(ranges, factors, facts, rest),
        )
    for j in range(width):
        st(levels + j * 16, cvt_i8x16(cvt_i32x16(ld_f32x16(ours + j * 64))))


@jit
def fit_block(
    x, errors, levels, scales, minima, d, dmin, strips, strip_bytes, pivots, ones, ranges, factors,
    facts, scratch,
):  # fmt: skip
    """Round a block of many groups, whose scales and minima as free numbers are there."""
    n_groups = PANEL // ld_i64(facts + GROUP)
    largest = magnitude = most = zero_f32x16()
    for g in range(n_groups):
        s, m = ld_f32x16(scales + g * 64), ld_f32x16(minima + g * 64)
        largest = sel_lt(magnitude, vfabs(s), s, largest)
        magnitude = sel_lt(magnitude, vfabs(s), vfabs(s), magnitude)
        most = sel_lt(most, m, m, most)
    end = highest = number(facts + HIGHEST_SCALE)
    if not ld_i64(facts + HAS_MINIMUM):
        end = number(facts + LOWEST_SCALE)
    whole_d, whole_dmin, least = scratch, scratch + 64, scratch + 128
    st(whole_d, largest / end)
    st(whole_dmin, most / highest)
    their_scales = scratch + 192
    their_minima = their_scales + 16 * 64
    their_errors = their_minima + 16 * 64
    their_levels = their_errors + PANEL * 64
    rest = their_levels + PANEL * 64
    for t in range(ld_i64(facts + N_FACTORS)):
        factor = splat_f32x16(ld_f32(factors + t * 4))
        unit = to_half(ld_f32x16(whole_d) * factor)
        min_unit = to_half(ld_f32x16(whole_dmin) * factor)
        if t == 0:
            loss = fit_groups(
                *(x, errors, levels, scales, minima, PANEL, strips, strip_bytes, pivots, ones),
                *(ranges, facts, rest, unit, min_unit, True),
            )
            st(d, unit)
            st(dmin, min_unit)
            st(least, loss)
        else:
            loss = fit_groups(
                *(x, their_errors, their_levels, their_scales, their_minima, PANEL, strips),
                *(strip_bytes, pivots, ones, ranges, facts, rest, unit, min_unit, True),
            )
            best = ld_f32x16(least)
            keep_better(loss, best, their_errors, errors, PANEL)
            keep_better(loss, best, their_levels, levels, PANEL)
            keep_better(loss, best, their_scales, scales, n_groups)
            keep_better(loss, best, their_minima, minima, n_groups)
            st(d, sel_lt(loss, best, unit, ld_f32x16(d)))
            st(dmin, sel_lt(loss, best, min_unit, ld_f32x16(dmin)))
            st(least, sel_lt(loss, best, loss, best))


@jit
def keep_better(loss, best, theirs, ours, n):
    for i in range(0, n * 64, 64):
        st(ours + i, sel_lt(loss, best, ld_f32x16(theirs + i), ld_f32x16(ours + i)))


@jit
def fit_groups(
    x, errors, levels, scales, minima, width, strips, strip_bytes, pivots, ones, ranges, facts,
    scratch, unit, min_unit, in_steps,
):  # fmt: skip
    """Round the groups of a panel one after another; gives the loss."""
    group = ld_i64(facts + GROUP)
    bounds, w, rest = scratch, scratch + 512, scratch + 512 + group * 64
    set_bounds(bounds, facts, unit, min_unit, in_steps)
    total = zero_f32x16()
    for g in range(width // group):
        j = g * group
        strip = strips + g * strip_bytes
        catch_up(x + j * 64, errors, strip, j, group, w)
        total += fit_group(
            *(w, errors + j * 64, levels + j * 64, scales + g * 64, minima + g * 64),
            *(strip + j * group * 4, pivots + j * 4, ones + j * 4, ranges, facts, bounds),
            *(rest, in_steps),
        )
    return total
