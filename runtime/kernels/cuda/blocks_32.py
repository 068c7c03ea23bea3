"""Formats of blocks of 32 weights: a unit is a block, and its low halves come first."""

from numpy import float32

from gguf_tools.compiler import helper
from gguf_tools.quants.iq4 import LEVELS
from runtime.kernels.cuda.primitives import as_float, half, load1, load2, load4, load8
from runtime.kernels.cuda.unpacking import (
    BITS_4,
    Unpacking,
    fifth_bits,
    look_up,
    table_words,
    words,
)

IQ4_LEVELS = table_words(LEVELS)
MXFP4_LEVELS = table_words([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@helper
def nibbles(a, b, c, d, scale, offset):
    """32 weights of 4 bits with one scale and one offset."""
    return (
        (a & BITS_4, b & BITS_4, c & BITS_4, d & BITS_4),
        (a >> 4 & BITS_4, b >> 4 & BITS_4, c >> 4 & BITS_4, d >> 4 & BITS_4),
        (scale, scale),
        (offset, offset),
    )


@helper
def five_bits(a, b, c, d, high, scale, offset):
    """32 weights of 4 bits and a fifth in `high`."""
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
def levels(a, b, c, d, table, scale):
    """32 weights that are numbers of levels."""
    a, e = look_up(a, table)
    b, f = look_up(b, table)
    c, g = look_up(c, table)
    d, h = look_up(d, table)
    return (a, b, c, d), (e, f, g, h), (scale, scale), (float32(0), float32(0))


@helper
def q4_0(w, row, unit):
    at = row + 18 * unit
    d = half(load2(w, at))
    a, b, c, e = words(w, at + 2)
    return nibbles(a, b, c, e, d, float32(-8) * d)


@helper
def q4_1(w, row, unit):
    at = row + 20 * unit
    dm = load4(w, at)
    a, b, c, e = load4(w, at + 4), load4(w, at + 8), load4(w, at + 12), load4(w, at + 16)
    return nibbles(a, b, c, e, half(dm), half(dm >> 16))


@helper
def q5_0(w, row, unit):
    at = row + 22 * unit
    d = half(load2(w, at))
    high = load2(w, at + 2) | load2(w, at + 4) << 16
    a, b, c, e = words(w, at + 6)
    return five_bits(a, b, c, e, high, d, float32(-16) * d)


@helper
def q5_1(w, row, unit):
    at = row + 24 * unit
    dm, high = load8(w, at)
    a, b = load8(w, at + 8)
    c, e = load8(w, at + 16)
    return five_bits(a, b, c, e, high, half(dm), half(dm >> 16))


@helper
def q8_0(w, row, unit):
    at = row + 34 * unit
    d = half(load2(w, at))
    a, b, c, e = words(w, at + 2)
    f, g, h, i = words(w, at + 18)
    return (a, b, c, e), (f, g, h, i), (d, d), (float32(0), float32(0))


@helper
def iq4_nl(w, row, unit):
    at = row + 18 * unit
    a, b, c, e = words(w, at + 2)
    return levels(a, b, c, e, IQ4_LEVELS, half(load2(w, at)))


@helper
def mxfp4(w, row, unit):
    at = row + 17 * unit
    exponent = load1(w, at)  # the scale is 2^(exponent - 128)
    bits = (exponent - 1) << 23 if exponent > 1 else (exponent + 1) << 21
    a, b, c, e = words(w, at + 1)
    return levels(a, b, c, e, MXFP4_LEVELS, as_float(bits))


UNPACKINGS = {
    "Q4_0": Unpacking(q4_0, 1, True),
    "Q4_1": Unpacking(q4_1, 1, True),
    "Q5_0": Unpacking(q5_0, 1, True),
    "Q5_1": Unpacking(q5_1, 1, True),
    "Q8_0": Unpacking(q8_0, 1, False),
    "IQ4_NL": Unpacking(iq4_nl, 1, False),
    "MXFP4": Unpacking(mxfp4, 1, False),
}
