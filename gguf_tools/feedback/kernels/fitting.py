"""The search for a group's scale and minimum."""

import numpy as np

from gguf_tools.feedback.kernels.bounds import (
    BY_D,
    BY_DMIN,
    DMIN,
    M_HIGH,
    M_LOW,
    S_HIGH,
    S_LOW,
    D,
    snap_minimum,
    snap_scale,
)
from gguf_tools.feedback.kernels.rounding import (
    GROUP,
    HAS_MINIMUM,
    HIGHEST_SCALE,
    N_MOVES,
    N_RANGES,
    N_REFITS,
    divide,
    nearest,
    round_one,
    round_two,
)
from gguf_tools.jit import jit
from gguf_tools.simd import (
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

MOST_LOSS = np.float32(3.0e38)


@jit
def fit_group(
    w, errors, levels, scale, minimum, tile, pivots, ones, ranges, facts, bounds, scratch, in_steps
):
    """Choose a scale and a minimum, and round; gives the loss."""
    has_minimum = ld_i64(facts + HAS_MINIMUM)
    best, rest = scratch, scratch + 192
    st(best, zero_f32x16())
    st(best + 64, zero_f32x16())
    st(best + 128, splat_f32x16(MOST_LOSS))
    try_ranges(best, w, tile, pivots, ranges, facts, bounds, rest, in_steps)
    refit(best, w, tile, pivots, ones, facts, bounds, errors, levels, rest, in_steps)
    if in_steps:
        unit, min_unit, zero = ld_f32x16(bounds + D), ld_f32x16(bounds + DMIN), zero_f32x16()
        for _ in range(ld_i64(facts + N_MOVES)):
            move(best, w, tile, pivots, facts, bounds, unit, zero, rest)
            if has_minimum:
                move(best, w, tile, pivots, facts, bounds, zero, min_unit, rest)
                move(best, w, tile, pivots, facts, bounds, unit, min_unit, rest)
    s, m = ld_f32x16(best), ld_f32x16(best + 64)
    loss = round_one(w, tile, pivots, facts, s, m, errors, levels)
    if in_steps:
        s, m = s * ld_f32x16(bounds + BY_D), m * ld_f32x16(bounds + BY_DMIN)
        s = nearest(s, ld_f32x16(bounds + S_LOW), ld_f32x16(bounds + S_HIGH))
        m = nearest(m, ld_f32x16(bounds + M_LOW), ld_f32x16(bounds + M_HIGH))
    st(scale, s)
    st(minimum, m)
    return loss


@jit
def try_ranges(best, w, tile, pivots, ranges, facts, bounds, scratch, in_steps):
    """Scale and minimum of each range, two at a time."""
    least, most, middle = range_of(w, ld_i64(facts + GROUP))
    zero = zero_f32x16()
    if not ld_i64(facts + HAS_MINIMUM):
        most = sel_lt(vfabs(most), vfabs(least), least, most)
        least = middle = zero
    elif ld_i64(facts + HIGHEST_SCALE) > 1:
        least = sel_lt(least, zero, least, zero)
    for r in range(ranges, ranges + ld_i64(facts + N_RANGES) * 12, 24):
        low0 = middle + (least - middle) * splat_f32x16(ld_f32(r))
        high0 = middle + (most - middle) * splat_f32x16(ld_f32(r + 4))
        low1 = middle + (least - middle) * splat_f32x16(ld_f32(r + 12))
        high1 = middle + (most - middle) * splat_f32x16(ld_f32(r + 16))
        s0 = snap_scale((high0 - low0) * splat_f32x16(ld_f32(r + 8)), bounds, in_steps)
        s1 = snap_scale((high1 - low1) * splat_f32x16(ld_f32(r + 20)), bounds, in_steps)
        m0 = snap_minimum(zero - low0, bounds, in_steps)
        m1 = snap_minimum(zero - low1, bounds, in_steps)
        judge(best, w, tile, pivots, facts, s0, m0, s1, m1, scratch)


@jit
def refit(best, w, tile, pivots, ones, facts, bounds, errors, levels, scratch, in_steps):
    """Least squares for the levels that came out, and again for those that then come out."""
    group, has_minimum = ld_i64(facts + GROUP), ld_i64(facts + HAS_MINIMUM)
    a, b = scratch, scratch + group * 64
    zero = zero_f32x16()
    divide(w, tile, pivots, group, a)
    round_one(w, tile, pivots, facts, ld_f32x16(best), ld_f32x16(best + 64), errors, levels)
    for _ in range(ld_i64(facts + N_REFITS)):
        divide(levels, tile, pivots, group, b)
        ab = bb = ac = bc = cc = zero
        for j in range(group):
            aj, bj = ld_f32x16(a + j * 64), ld_f32x16(b + j * 64)
            cj = splat_f32x16(ld_f32(ones + j * 4))
            ab += aj * bj
            bb += bj * bj
            ac += aj * cj
            bc += bj * cj
            cc += cj * cj
        s, m = ab / bb, zero
        if has_minimum:
            determinant = bb * cc - bc * bc
            s = (ab * cc - ac * bc) / determinant
            m = (ab * bc - bb * ac) / determinant
        s, m = snap_scale(s, bounds, in_steps), snap_minimum(m, bounds, in_steps)
        loss = round_one(w, tile, pivots, facts, s, m, errors, levels)
        choose(best, loss, s, m)


@jit
def move(best, w, tile, pivots, facts, bounds, ds, dm, scratch):
    """A step up and a step down from the best."""
    s, m = ld_f32x16(best), ld_f32x16(best + 64)
    s0, m0 = snap_scale(s + ds, bounds, True), snap_minimum(m + dm, bounds, True)
    s1, m1 = snap_scale(s - ds, bounds, True), snap_minimum(m - dm, bounds, True)
    judge(best, w, tile, pivots, facts, s0, m0, s1, m1, scratch)


@jit
def judge(best, w, tile, pivots, facts, s0, m0, s1, m1, scratch):
    """Two candidates against the best so far."""
    losses = scratch
    round_two(w, tile, pivots, facts, s0, m0, s1, m1, losses, scratch + 128)
    choose(best, ld_f32x16(losses), s0, m0)
    choose(best, ld_f32x16(losses + 64), s1, m1)


@jit
def choose(best, loss, s, m):
    least = ld_f32x16(best + 128)
    st(best, sel_lt(loss, least, s, ld_f32x16(best)))
    st(best + 64, sel_lt(loss, least, m, ld_f32x16(best + 64)))
    st(best + 128, sel_lt(loss, least, loss, least))


@jit
def range_of(w, n):
    """The smallest, the largest and the mean of n vectors."""
    least = most = total = ld_f32x16(w)
    for j in range(1, n):
        v = ld_f32x16(w + j * 64)
        least = sel_lt(v, least, v, least)
        most = sel_lt(most, v, v, most)
        total += v
    return least, most, total * splat_f32x16(float32(1.0) / float32(n))
