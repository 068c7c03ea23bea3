"""How much an error counts at each weight: importance * sqrt(sigma^2 + weight^2)."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    float32,
    ld_f32,
    ld_f32x16,
    splat_f32x16,
    st,
    st_f32,
    transpose16,
    vsqrt,
    zero_f32x16,
)

SCRATCH = 1024 + 64


@kernel("iiiiiiiii")
def weigh(x, importance, weights, n_rows, k, span, times, over, scratch):
    """sigma^2 is times * (sum of the squares of a span) / over; k is a multiple of span.

    x, weights   (n_rows, k)
    importance   (k,)
    """
    n_spans = n_rows * (k // span)
    sums = scratch + 1024
    for first in range(0, n_spans, 16):
        count = min(16, n_spans - first)
        if count == 16:
            st(sums, _sums_of_squares(x + first * span * 4, span, scratch))
        else:
            for i in range(count):
                st_f32(sums + i * 4, _sum_of_squares(x + (first + i) * span * 4, span))
        for i in range(count):
            at = (first + i) * span * 4
            column = (first + i) * span % k * 4
            sigma2 = splat_f32x16(float32(times) * ld_f32(sums + i * 4) / float32(over))
            for j in range(0, span * 4, 64):
                v = ld_f32x16(x + at + j)
                root = vsqrt(sigma2 + v * v)
                st(weights + at + j, ld_f32x16(importance + column + j) * root)


@jit
def _sums_of_squares(x, span, turned):
    """Of 16 spans, each added from left to right in its lane."""
    total = zero_f32x16()
    for i in range(0, span, 16):
        transpose16(x + i * 4, span * 4, turned, 64)
        for j in range(16):
            v = ld_f32x16(turned + j * 64)
            total += v * v
    return total


@jit
def _sum_of_squares(x, span):
    total = float32(0.0)
    for i in range(span):
        v = ld_f32(x + i * 4)
        total += v * v
    return total
