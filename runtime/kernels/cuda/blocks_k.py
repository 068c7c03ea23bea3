"""Formats of blocks of 256 weights: 8 units a block, two lanes' worth of shared bytes in some."""

from numpy import float32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.blocks_32 import IQ4_LEVELS, levels
from runtime.kernels.cuda.primitives import half, load1, load2, load4, load8, load16
from runtime.kernels.cuda.unpacking import (
    BITS_1,
    BITS_2,
    BITS_4,
    Unpacking,
    signed_byte,
    words,
)


@helper
def q2_k(w, row, unit):
    at = row + 84 * (unit >> 3)
    h, pair, m = unit >> 2 & 1, unit >> 1 & 1, unit & 1  # half, two of its four fields, which 16
    qs = at + 16 + 32 * h + 16 * m
    a, b, c, e = load4(w, qs), load4(w, qs + 4), load4(w, qs + 8), load4(w, qs + 12)
    near, far = 4 * pair, 4 * pair + 2
    steps = load4(w, at + 8 * h + 4 * pair) >> 8 * m  # bytes of this run, of the next but one
    ds = load4(w, at + 80)
    d, dmin = half(ds), half(ds >> 16)
    return (
        (a >> near & BITS_2, b >> near & BITS_2, c >> near & BITS_2, e >> near & BITS_2),
        (a >> far & BITS_2, b >> far & BITS_2, c >> far & BITS_2, e >> far & BITS_2),
        (d * float32(steps & 15), d * float32(steps >> 16 & 15)),
        (-dmin * float32(steps >> 4 & 15), -dmin * float32(steps >> 20 & 15)),
    )


@helper
def q3_k(w, row, unit):
    at = row + 110 * (unit >> 3)
    h, pair, m = unit >> 2 & 1, unit >> 1 & 1, unit & 1
    a, b, c, e = words(w, at + 32 + 32 * h + 16 * m)
    i, j, k, n = words(w, at + 16 * m)  # third bits: bit 4 h + field of each byte
    near, far = 4 * pair, 4 * pair + 2
    third = 4 * h + 2 * pair
    run = 8 * h + 4 * pair + m
    d = half(load2(w, at + 108))
    scale, other = d * _q3_k_step(w, at + 96, run), d * _q3_k_step(w, at + 96, run + 2)
    return (
        (
            a >> near & BITS_2 | (i >> third & BITS_1) << 2,
            b >> near & BITS_2 | (j >> third & BITS_1) << 2,
            c >> near & BITS_2 | (k >> third & BITS_1) << 2,
            e >> near & BITS_2 | (n >> third & BITS_1) << 2,
        ),
        (
            a >> far & BITS_2 | (i >> third + 1 & BITS_1) << 2,
            b >> far & BITS_2 | (j >> third + 1 & BITS_1) << 2,
            c >> far & BITS_2 | (k >> third + 1 & BITS_1) << 2,
            e >> far & BITS_2 | (n >> third + 1 & BITS_1) << 2,
        ),
        (scale, other),
        (float32(-4) * scale, float32(-4) * other),
    )


@helper
def _q3_k_step(w, scales, run):
    low = load1(w, scales + (run & 7)) >> (run >> 3) * 4 & 15
    high = load1(w, scales + 8 + (run & 3)) >> (run >> 2) * 2 & 3
    return float32((low | high << 4) - 32)


@helper
def steps_of(first, second, third, group):
    """Scale and minimum of a group of 32, 0 to 63 each, in Q4_K and Q5_K (k_scales.py)."""
    if group < 4:
        at = 8 * group
        return first >> at & 63, second >> at & 63
    at = 8 * (group - 4)
    scale = third >> at & 15 | (first >> at + 6 & 3) << 4
    return scale, third >> at + 4 & 15 | (second >> at + 6 & 3) << 4


@helper
def q4_k(w, row, unit):
    at = row + 144 * (unit >> 3)
    pair, m = unit >> 1 & 3, unit & 1  # two groups of 32, which 16 of each
    a, b, c, e = load16(w, at + 16 + 32 * pair + 16 * m)
    ds, first, second, third = load16(w, at)
    d, dmin = half(ds), half(ds >> 16)
    scale, minimum = steps_of(first, second, third, 2 * pair)
    next_scale, next_minimum = steps_of(first, second, third, 2 * pair + 1)
    return (
        (a & BITS_4, b & BITS_4, c & BITS_4, e & BITS_4),
        (a >> 4 & BITS_4, b >> 4 & BITS_4, c >> 4 & BITS_4, e >> 4 & BITS_4),
        (d * float32(scale), d * float32(next_scale)),
        (-dmin * float32(minimum), -dmin * float32(next_minimum)),
    )


@helper
def q5_k(w, row, unit):
    at = row + 176 * (unit >> 3)
    pair, m = unit >> 1 & 3, unit & 1
    a, b, c, e = load16(w, at + 48 + 32 * pair + 16 * m)
    i, j, k, n = load16(w, at + 16 + 16 * m)  # fifth bits: bit `group` of each byte
    ds, first, second, third = load16(w, at)
    d, dmin = half(ds), half(ds >> 16)
    group = 2 * pair
    scale, minimum = steps_of(first, second, third, group)
    next_scale, next_minimum = steps_of(first, second, third, group + 1)
    return (
        (
            a & BITS_4 | (i >> group & BITS_1) << 4,
            b & BITS_4 | (j >> group & BITS_1) << 4,
            c & BITS_4 | (k >> group & BITS_1) << 4,
            e & BITS_4 | (n >> group & BITS_1) << 4,
        ),
        (
            a >> 4 & BITS_4 | (i >> group + 1 & BITS_1) << 4,
            b >> 4 & BITS_4 | (j >> group + 1 & BITS_1) << 4,
            c >> 4 & BITS_4 | (k >> group + 1 & BITS_1) << 4,
            e >> 4 & BITS_4 | (n >> group + 1 & BITS_1) << 4,
        ),
        (d * float32(scale), d * float32(next_scale)),
        (-dmin * float32(minimum), -dmin * float32(next_minimum)),
    )


@helper
def q6_k(w, row, unit):
    at = row + 210 * (unit >> 3)
    h, m = unit >> 2 & 1, unit & 3  # half, which 16 of its 64 bytes
    a, b, c, e = words(w, at + 64 * h + 16 * m)
    i, j, k, n = words(w, at + 128 + 32 * h + 16 * (m & 1))  # two bits each of four runs
    near, far = m & 2, (m & 2) + 4
    scales = at + 192 + 8 * h + m
    d = half(load2(w, at + 208))
    scale, other = d * float32(signed_byte(w, scales)), d * float32(signed_byte(w, scales + 4))
    return (
        (
            a & BITS_4 | (i >> near & BITS_2) << 4,
            b & BITS_4 | (j >> near & BITS_2) << 4,
            c & BITS_4 | (k >> near & BITS_2) << 4,
            e & BITS_4 | (n >> near & BITS_2) << 4,
        ),
        (
            a >> 4 & BITS_4 | (i >> far & BITS_2) << 4,
            b >> 4 & BITS_4 | (j >> far & BITS_2) << 4,
            c >> 4 & BITS_4 | (k >> far & BITS_2) << 4,
            e >> 4 & BITS_4 | (n >> far & BITS_2) << 4,
        ),
        (scale, other),
        (float32(-32) * scale, float32(-32) * other),
    )


@helper
def iq4_xs(w, row, unit):
    at = row + 136 * (unit >> 3)
    group = unit & 7
    head, low = load8(w, at)
    step = low >> 4 * group & 15 | (head >> 16 + 2 * group & 3) << 4
    a, b = load8(w, at + 8 + 16 * group)
    c, e = load8(w, at + 16 + 16 * group)
    return levels(a, b, c, e, IQ4_LEVELS, half(head) * float32(step - 32))


UNPACKINGS = {
    "Q2_K": Unpacking(q2_k, 2, True, 16),
    "Q3_K": Unpacking(q3_k, 2, True, 16),
    "Q4_K": Unpacking(q4_k, 2, True),
    "Q5_K": Unpacking(q5_k, 2, True),
    "Q6_K": Unpacking(q6_k, 4, True, 16),
    "IQ4_XS": Unpacking(iq4_xs, 1, False),
}
