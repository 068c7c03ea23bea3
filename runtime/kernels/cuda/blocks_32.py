"""Formats of blocks of 32 weights: a unit is a block, and its low halves come first."""

from numpy import float32

from gguf_tools.compiler import helper
from gguf_tools.quants.iq4 import LEVELS
from runtime.kernels.cuda.primitives import as_float, half, load1, load2, load4, load8, load16
from runtime.kernels.cuda.unpacking import (
    BITS_4,
    Unpacking,
    fifth_bits,
    look_up,
    masked,
    table_words,
)

IQ4_LEVELS = table_words(LEVELS)
MXFP4_LEVELS = table_words([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@helper
def nibbles(q, scale, offset):
    """32 weights of 4 bits with one scale and one offset."""
    return masked(q, 0, BITS_4), masked(q, 4, BITS_4), (scale, scale), (offset, offset)


@helper
def five_bits(q, high, scale, offset):
    """32 weights of 4 bits and a fifth in `high`."""
    a, b, c, d = q
    return (
        (
            a & BITS_4 | fifth_bits(high, 0),
            b & BITS_4 | fifth_bits(high, 4),
            c & BITS_4 | fifth_bits(high, 8),
            d & BITS_4 | fifth_bits(high, 12),
        ),
        (
            a >> 4 & BITS_4 | fifth_bits(high, 16),
            b >> 4 & BITS_4 | fifth_bits(high, 20),
            c >> 4 & BITS_4 | fifth_bits(high, 24),
            d >> 4 & BITS_4 | fifth_bits(high, 28),
        ),
        (scale, scale),
        (offset, offset),
    )


@helper
def levels(q, table, scale):
    """32 weights that are numbers of levels."""
    a, e = look_up(q[0], table)
    b, f = look_up(q[1], table)
    c, g = look_up(q[2], table)
    d, h = look_up(q[3], table)
    return (a, b, c, d), (e, f, g, h), (scale, scale), (float32(0), float32(0))


@helper
def fetch_q4_0(w, base, n, block, part):
    d = load2(w, base + 16 * n + 2 * block)
    return (d, *load16(w, base + 16 * block))


@helper
def q4_0(raw, part):
    d = half(raw[0])
    return nibbles(raw[1:], d, float32(-8) * d)


@helper
def fetch_q4_1(w, base, n, block, part):
    dm = load4(w, base + 16 * n + 4 * block)
    return (dm, *load16(w, base + 16 * block))


@helper
def q4_1(raw, part):
    return nibbles(raw[1:], half(raw[0]), half(raw[0] >> 16))


@helper
def fetch_q5_0(w, base, n, block, part):
    d, high = load2(w, base + 20 * n + 2 * block), load4(w, base + 16 * n + 4 * block)
    return (d, high, *load16(w, base + 16 * block))


@helper
def q5_0(raw, part):
    d = half(raw[0])
    return five_bits(raw[2:], raw[1], d, float32(-16) * d)


@helper
def fetch_q5_1(w, base, n, block, part):
    return (*load8(w, base + 16 * n + 8 * block), *load16(w, base + 16 * block))


@helper
def q5_1(raw, part):
    return five_bits(raw[2:], raw[1], half(raw[0]), half(raw[0] >> 16))


@helper
def fetch_q8_0(w, base, n, block, part):
    d, at = load2(w, base + 32 * n + 2 * block), base + 32 * block
    return (d, *load16(w, at), *load16(w, at + 16))


@helper
def q8_0(raw, part):
    d = half(raw[0])
    return raw[1:5], raw[5:], (d, d), (float32(0), float32(0))


@helper
def iq4_nl(raw, part):
    return levels(raw[1:], IQ4_LEVELS, half(raw[0]))


@helper
def fetch_mxfp4(w, base, n, block, part):
    exponent = load1(w, base + 16 * n + block)
    return (exponent, *load16(w, base + 16 * block))


@helper
def mxfp4(raw, part):
    exponent = raw[0]  # the scale is 2^(exponent - 128)
    bits = (exponent - 1) << 23 if exponent > 1 else (exponent + 1) << 21
    return levels(raw[1:], MXFP4_LEVELS, as_float(bits))


UNPACKINGS = {
    "Q4_0": Unpacking(fetch_q4_0, q4_0, ((2, 16), (0, 2)), 32, 1, True),
    "Q4_1": Unpacking(fetch_q4_1, q4_1, ((4, 16), (0, 4)), 32, 1, True),
    "Q5_0": Unpacking(fetch_q5_0, q5_0, ((6, 16), (2, 4), (0, 2)), 32, 1, True),
    "Q5_1": Unpacking(fetch_q5_1, q5_1, ((8, 16), (0, 8)), 32, 1, True),
    "Q8_0": Unpacking(fetch_q8_0, q8_0, ((2, 32), (0, 2)), 32, 1, False),
    "IQ4_NL": Unpacking(fetch_q4_0, iq4_nl, ((2, 16), (0, 2)), 32, 1, False),
    "MXFP4": Unpacking(fetch_mxfp4, mxfp4, ((1, 16), (0, 1)), 32, 1, False),
}
