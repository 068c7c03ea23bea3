"""The searches for a group's scale, for 16 groups at once, one in each lane.

Line by line the functions of `gguf_tools.quants.search`; the order of every sum and the way every
comparison falls for NaN are the same.
"""

import numpy as np

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.lanes import round_level, round_small, round_to_byte
from gguf_tools.simd import (
    cvt_f32x16,
    cvt_i32x16,
    float32,
    int32,
    ld_f32x16,
    sel_lt,
    splat_f32x16,
    splat_i32x16,
    st,
    vfabs,
    zero_f32x16,
)

TINY = np.float32(1e-15)


@jit
def fit_scale_and_minimum(turned, weights, levels, result, n, top, first, step, n_trials, absolute):
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
        stretch = float32(first) + float32(step) * float32(trial) + float32(top)
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
    st(result + 64, low * splat_f32x16(float32(-1.0)))  # keeps the sign of zero
    st(result + 128, sel_lt(zero, width, best_inverse, zero))
    st(result + 192, best_start)


@jit
def _distance(x, absolute):
    return vfabs(x) if absolute else x * x


@jit
def square_weights(turned, n):
    """An error counts as the square of the weight: n vectors after those of the weights."""
    for i in range(n):
        v = ld_f32x16(turned + i * 64)
        st(turned + (n + i) * 64, v * v)


@jit
def fit_scale(turned, result, n, top, wild):
    """Store scale and, to make the levels again, inverse scale (0 for a group of zeros).

    turned   16 groups of n weights, turned around; how much an error counts at each; and room
             for as many
    result   2 vectors
    wild     there may be infinite numbers among them
    """
    zero = zero_f32x16()
    largest = magnitude = zero
    for i in range(n):
        v = ld_f32x16(turned + i * 64)
        largest = sel_lt(magnitude, vfabs(v), v, largest)
        magnitude = sel_lt(magnitude, vfabs(v), vfabs(v), magnitude)
        st(turned + (2 * n + i) * 64, ld_f32x16(turned + (n + i) * 64) * v)
    inverse = splat_f32x16(float32(-top)) / largest
    sum_xl, sum_l2 = _sums(turned, inverse, n, top, wild)
    scale = sel_lt(zero, sum_l2, sum_xl / sum_l2, sum_l2)
    best = scale * sum_xl
    best_inverse = inverse
    for step in range(-9, 10):
        if step == 0:
            continue
        stretch = float32(top) + float32(0.1) * float32(step)
        inverse = splat_f32x16(-stretch) / largest
        sum_xl, sum_l2 = _sums(turned, inverse, n, top, wild)
        square = sum_xl * sum_xl
        threshold = sel_lt(zero, sum_l2, best * sum_l2, square)  # not better without weights
        best_inverse = sel_lt(threshold, square, inverse, best_inverse)
        scale = sel_lt(threshold, square, sum_xl / sum_l2, scale)
        best = sel_lt(threshold, square, scale * sum_xl, best)
    tiny = splat_f32x16(TINY)
    st(result, sel_lt(magnitude, tiny, zero, scale))
    st(result + 64, sel_lt(magnitude, tiny, zero, best_inverse))


@jit
def _sums(turned, inverse, n, top, wild):
    sum_xl = sum_l2 = zero_f32x16()
    least, most = splat_f32x16(float32(-top)), splat_f32x16(float32(top - 1))
    for i in range(n):
        if wild:
            level = round_level(inverse * ld_f32x16(turned + i * 64), least, most)
        else:
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


@jit
def fit_steps(x, weights, steps, n, top):
    """The step for n scales of each of 16 blocks, one in each lane; their numbers at `steps`.

    x         n vectors of scales that are not negative
    weights   n vectors
    steps     n vectors: floats of 0 to 255
    """
    zero, most = zero_f32x16(), splat_f32x16(float32(top))
    largest = zero
    for i in range(n):
        v = ld_f32x16(x + i * 64)
        largest = sel_lt(v, largest, largest, v)
    inverse = most / largest
    scale = splat_f32x16(float32(1.0)) / inverse
    best_error = zero
    for i in range(n):
        v = ld_f32x16(x + i * 64)
        distance = v - scale * cvt_f32x16(round_to_byte(inverse * v))
        best_error += ld_f32x16(weights + i * 64) * distance * distance
    for trial in range(-4, 5):
        if trial == 0:
            continue
        stretch = float32(0.1) * float32(trial) + float32(top)
        tried = splat_f32x16(stretch) / largest
        scale = splat_f32x16(float32(1.0)) / tried
        error = zero
        for i in range(n):
            v = ld_f32x16(x + i * 64)
            distance = v - scale * _steps(tried * v, most)
            error += ld_f32x16(weights + i * 64) * distance * distance
        inverse = sel_lt(error, best_error, tried, inverse)
        best_error = sel_lt(error, best_error, error, best_error)
    sum_xl = sum_l2 = zero
    for i in range(n):
        v, w = ld_f32x16(x + i * 64), ld_f32x16(weights + i * 64)
        level = _steps(inverse * v, most)
        st(steps + i * 64, _low_byte(level))
        sum_xl += w * v * level
        sum_l2 += w * level * level
    for _ in range(5):
        for i in range(n):
            v, w = ld_f32x16(x + i * 64), ld_f32x16(weights + i * 64)
            level = ld_f32x16(steps + i * 64)
            new_xl = sum_xl - w * v * level
            new_l2 = sum_l2 - w * level * level
            new = _steps(v * new_l2 / new_xl, most)
            new = sel_lt(zero, new_xl, new, level)
            new = sel_lt(zero, new_l2, new, level)
            new_xl += w * v * new
            new_l2 += w * new * new
            ours, theirs = new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2
            ours = sel_lt(zero, vfabs(new - level), ours, theirs)  # better only where it changes
            st(steps + i * 64, sel_lt(theirs, ours, _low_byte(new), level))
            sum_xl = sel_lt(theirs, ours, new_xl, sum_xl)
            sum_l2 = sel_lt(theirs, ours, new_l2, sum_l2)
    tiny = splat_f32x16(TINY)
    for i in range(n):
        st(steps + i * 64, sel_lt(largest, tiny, zero, ld_f32x16(steps + i * 64)))
    scale = sel_lt(zero, sum_l2, sum_xl / sum_l2, zero)
    return sel_lt(largest, tiny, zero, scale)


@jit
def _steps(x, most):
    """x rounded to a whole number of at most `most`."""
    return round_level(x, splat_f32x16(float32(-4194304.0)), most)


@jit
def _low_byte(x):
    return cvt_f32x16(cvt_i32x16(x) & splat_i32x16(int32(0xFF)))
