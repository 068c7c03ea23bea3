"""The searches for a group's scale, for 16 groups at once, one in each lane.

Line by line the functions of `gguf_tools.quants.search`; the order of every sum and the way every
comparison falls for NaN are the same.
"""

from numba import float32

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.lanes import round_level, round_small
from gguf_tools.simd import ld_f32x16, sel_lt, splat_f32x16, st, vfabs, zero_f32x16

TINY = float32(1e-15)


@jit
def fit_scale_and_minimum(turned, weights, levels, result, n, top, first, n_trials, absolute):
    """Store scale, minimum and, to make the levels again, inverse scale and lowest value.

    turned   16 groups of n weights, turned around; `weights` likewise
    levels   room for as many
    result   4 vectors
    """
    zero = zero_f32x16()
    most = splat_f32x16(float32(top))
    low = high = ld_f32x16(turned)
    sum_w = ld_f32x16(weights)
    sum_x = sum_w * low
    for i in range(1, n):
        v, w = ld_f32x16(turned + i * 64), ld_f32x16(weights + i * 64)
        low = sel_lt(v, low, v, low)
        high = sel_lt(high, v, v, high)
        sum_w += w
        sum_x += w * v
    low = sel_lt(zero, low, zero, low)
    width = high - low  # 0 for a flat group

    inverse = most / width
    scale = splat_f32x16(float32(1.0)) / inverse
    best_error = zero
    for i in range(n):
        v = ld_f32x16(turned + i * 64)
        level = round_level(inverse * (v - low), zero, most)
        error = _distance(scale * level + low - v, absolute)
        best_error += ld_f32x16(weights + i * 64) * error
    best_inverse, best_start = inverse, low
    for trial in range(n_trials):
        stretch = float32(first) + float32(0.1) * float32(trial) + float32(top)
        inverse = splat_f32x16(stretch) / (high - low)
        sum_l = sum_l2 = sum_xl = zero
        for i in range(n):
            v = ld_f32x16(turned + i * 64)
            level = round_level(inverse * (v - low), zero, most)
            st(levels + i * 64, level)
            product = ld_f32x16(weights + i * 64) * level
            sum_l += product
            sum_l2 += product * level
            sum_xl += product * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = sel_lt(zero, new_low, sum_xl / sum_l2, new_scale)
        new_low = sel_lt(zero, new_low, zero, new_low)
        error = zero
        for i in range(n):
            v = ld_f32x16(turned + i * 64)
            distance = _distance(new_scale * ld_f32x16(levels + i * 64) + new_low - v, absolute)
            error += ld_f32x16(weights + i * 64) * distance
        error = sel_lt(zero, determinant, error, best_error)  # not better without a solution
        best_inverse = sel_lt(error, best_error, inverse, best_inverse)
        best_start = sel_lt(error, best_error, low, best_start)
        scale = sel_lt(error, best_error, new_scale, scale)
        low = sel_lt(error, best_error, new_low, low)
        best_error = sel_lt(error, best_error, error, best_error)
    st(result, sel_lt(zero, width, scale, zero))
    st(result + 64, zero - low)
    st(result + 128, sel_lt(zero, width, best_inverse, zero))
    st(result + 192, best_start)


@jit
def _distance(x, absolute):
    return vfabs(x) if absolute else x * x


@jit
def fit_scale(turned, result, n, top):
    """Store scale and, to make the levels again, inverse scale (0 for a group of zeros).

    turned   16 groups of n weights, turned around, and room for twice as many after them
    result   2 vectors
    """
    zero = zero_f32x16()
    largest = magnitude = zero
    for i in range(n):
        v = ld_f32x16(turned + i * 64)
        largest = sel_lt(magnitude, vfabs(v), v, largest)
        magnitude = sel_lt(magnitude, vfabs(v), vfabs(v), magnitude)
        st(turned + (n + i) * 64, v * v)
        st(turned + (2 * n + i) * 64, v * v * v)
    inverse = splat_f32x16(float32(-top)) / largest
    sum_xl, sum_l2 = _sums(turned, inverse, n, top)
    scale = sel_lt(zero, sum_l2, sum_xl / sum_l2, sum_l2)
    best = scale * sum_xl
    best_inverse = inverse
    for step in range(-9, 10):
        if step == 0:
            continue
        stretch = float32(top) + float32(0.1) * float32(step)
        inverse = splat_f32x16(-stretch) / largest
        sum_xl, sum_l2 = _sums(turned, inverse, n, top)
        square = sum_xl * sum_xl
        threshold = sel_lt(zero, sum_l2, best * sum_l2, square)  # not better without weights
        best_inverse = sel_lt(threshold, square, inverse, best_inverse)
        scale = sel_lt(threshold, square, sum_xl / sum_l2, scale)
        best = sel_lt(threshold, square, scale * sum_xl, best)
    tiny = splat_f32x16(TINY)
    st(result, sel_lt(magnitude, tiny, zero, scale))
    st(result + 64, sel_lt(magnitude, tiny, zero, best_inverse))


@jit
def _sums(turned, inverse, n, top):
    sum_xl = sum_l2 = zero_f32x16()
    for i in range(n):
        level = round_small(inverse * ld_f32x16(turned + i * 64), -top, top - 1)
        sum_xl += ld_f32x16(turned + (2 * n + i) * 64) * level
        sum_l2 += ld_f32x16(turned + (n + i) * 64) * level * level
    return sum_xl, sum_l2


@jit
def fit_scale_by_turns(turned, levels, result, n, top):
    """Store the scale at `result` and the levels, -top to top - 1, turned around.

    turned   16 groups of n weights, turned around, and room for twice as many after them
    """
    zero = zero_f32x16()
    least, most = splat_f32x16(float32(-top)), splat_f32x16(float32(top - 1))
    largest = magnitude = zero
    for i in range(n):
        v = ld_f32x16(turned + i * 64)
        largest = sel_lt(magnitude, vfabs(v), v, largest)
        magnitude = sel_lt(magnitude, vfabs(v), vfabs(v), magnitude)
        st(turned + (n + i) * 64, v * v)
        st(turned + (2 * n + i) * 64, v * v * v)
    inverse = splat_f32x16(float32(-top)) / largest
    sum_xl = sum_l2 = zero
    for i in range(n):
        level = round_level(inverse * ld_f32x16(turned + i * 64), least, most)
        st(levels + i * 64, level)
        sum_xl += ld_f32x16(turned + (2 * n + i) * 64) * level
        sum_l2 += ld_f32x16(turned + (n + i) * 64) * level * level
    for _ in range(5):
        for i in range(n):
            v, level = ld_f32x16(turned + i * 64), ld_f32x16(levels + i * 64)
            square, cube = ld_f32x16(turned + (n + i) * 64), ld_f32x16(turned + (2 * n + i) * 64)
            new_xl = sum_xl - cube * level
            new_l2 = sum_l2 - square * level * level
            new = round_level(v * new_l2 / new_xl, least, most)
            new = sel_lt(zero, new_xl, new, level)
            new_xl += cube * new
            new_l2 += square * new * new
            ours, theirs = new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2
            # Better only where the level changes and the new one has a weight.
            ours = sel_lt(zero, new_l2, ours, theirs)
            ours = sel_lt(zero, vfabs(new - level), ours, theirs)
            st(levels + i * 64, sel_lt(theirs, ours, new, level))
            sum_xl = sel_lt(theirs, ours, new_xl, sum_xl)
            sum_l2 = sel_lt(theirs, ours, new_l2, sum_l2)
    tiny = splat_f32x16(TINY)
    scale = sel_lt(zero, sum_l2, sum_xl / sum_l2, zero)
    st(result, sel_lt(magnitude, tiny, zero, scale))
    for i in range(n):
        level = ld_f32x16(levels + i * 64)
        st(levels + i * 64, sel_lt(magnitude, tiny, least, level))
