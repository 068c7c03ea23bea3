"""The search of IQ4_NL and IQ4_XS for 16 groups of 32, one in each lane."""

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.search import TINY
from gguf_tools.simd import (
    cvt_i8x16,
    cvt_i32x16,
    float32,
    ld_f32x16,
    sel_lt,
    splat_f32x16,
    st,
    vfabs,
    zero_f32x16,
)

N_TRIALS = 7


@jit
def nearest_level(x):
    """The level nearest to each lane, and its index. The first numbers are where levels meet."""
    level, index = splat_f32x16(float32(113.0)), splat_f32x16(float32(15.0))
    level, index = _below(x, 101.0, 89.0, 14.0, level, index)
    level, index = _below(x, 79.0, 69.0, 13.0, level, index)
    level, index = _below(x, 61.0, 53.0, 12.0, level, index)
    level, index = _below(x, 45.5, 38.0, 11.0, level, index)
    level, index = _below(x, 31.5, 25.0, 10.0, level, index)
    level, index = _below(x, 19.0, 13.0, 9.0, level, index)
    level, index = _below(x, 7.0, 1.0, 8.0, level, index)
    level, index = _below(x, -4.5, -10.0, 7.0, level, index)
    level, index = _below(x, -16.0, -22.0, 6.0, level, index)
    level, index = _below(x, -28.5, -35.0, 5.0, level, index)
    level, index = _below(x, -42.0, -49.0, 4.0, level, index)
    level, index = _below(x, -57.0, -65.0, 3.0, level, index)
    level, index = _below(x, -74.0, -83.0, 2.0, level, index)
    level, index = _below(x, -93.5, -104.0, 1.0, level, index)
    return _below(x, -115.5, -127.0, 0.0, level, index)


@jit
def _below(x, limit, new_level, new_index, level, index):
    limit = splat_f32x16(float32(limit))
    level = sel_lt(x, limit, splat_f32x16(float32(new_level)), level)
    index = sel_lt(x, limit, splat_f32x16(float32(new_index)), index)
    return level, index


@jit
def fit_scale(turned):
    """The scales of 16 groups of 32.

    turned   the groups, turned around; how much an error counts at each weight
    """
    zero = zero_f32x16()
    largest = magnitude = zero
    for i in range(32):
        v = ld_f32x16(turned + i * 64)
        largest = sel_lt(magnitude, vfabs(v), v, largest)
        magnitude = sel_lt(magnitude, vfabs(v), vfabs(v), magnitude)
    scale = best = zero
    for trial in range(-N_TRIALS - 1, N_TRIALS + 1):
        if trial < -N_TRIALS:  # first of all, the largest weight at level 127
            inverse = splat_f32x16(float32(1.0)) / (largest / splat_f32x16(float32(127.0)))
        else:
            inverse = splat_f32x16(float32(-127.0) + float32(trial)) / largest
        sum_xl = sum_l2 = zero
        for i in range(32):
            v = ld_f32x16(turned + i * 64)
            level, _ = nearest_level(inverse * v)
            product = ld_f32x16(turned + 2048 + i * 64) * level
            sum_xl += product * v
            sum_l2 += product * level
        ratio = sum_xl / sum_l2
        if trial < -N_TRIALS:
            scale = sel_lt(zero, sum_l2, ratio, zero)
            best = scale * sum_xl
        else:
            square = sum_xl * sum_xl
            threshold = sel_lt(zero, sum_l2, best * sum_l2, square)
            scale = sel_lt(threshold, square, ratio, scale)
            best = sel_lt(threshold, square, scale * sum_xl, best)
    return sel_lt(magnitude, splat_f32x16(TINY), zero, scale)


@jit
def store_levels(x, inverse, y):
    """The 16 bytes of 32 weights, given the inverse of their scale."""
    scale = splat_f32x16(inverse)
    _, low = nearest_level(scale * ld_f32x16(x))
    _, high = nearest_level(scale * ld_f32x16(x + 64))
    st(y, cvt_i8x16(cvt_i32x16(low) | (cvt_i32x16(high) << 4)))
