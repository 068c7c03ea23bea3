"""Formats of blocks of 256 weights: 8 units a block, two lanes' worth of shared bytes in some."""

from numpy import float32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.blocks_32 import IQ4_LEVELS, levels
from runtime.kernels.cuda.primitives import half, load2, load4, load8, load16, signed1
from runtime.kernels.cuda.unpacking import (
    BITS_1,
    BITS_2,
    BITS_4,
    Unpacking,
    joined,
    masked,
    small,
    turned,
)


@helper
def fetch_q2_k(w, base, n, block, part):
    h, pair, m = part >> 2 & 1, part >> 1 & 1, part & 1  # half, two of its four fields, which 16
    steps = load4(w, base + 64 * n + 16 * block + 8 * h + 4 * pair)
    ds = load4(w, base + 80 * n + 4 * block)
    return (ds, steps, *load16(w, base + 64 * block + 32 * h + 16 * m))


@helper
def q2_k(raw, part):
    pair, m = part >> 1 & 1, part & 1
    d, dmin = half(raw[0]), half(raw[0] >> 16)
    steps = turned(raw[1], 8 * m)  # bytes of this run, of the next but one
    q = raw[2:]
    return (
        masked(q, 4 * pair, BITS_2),
        masked(q, 4 * pair + 2, BITS_2),
        (d * small(steps & 15), d * small(steps >> 16 & 15)),
        (-dmin * small(steps >> 4 & 15), -dmin * small(steps >> 20 & 15)),
    )


@helper
def fetch_q3_k(w, base, n, block, part):
    h, pair, m = part >> 2 & 1, part >> 1 & 1, part & 1
    d, steps = load2(w, base + 108 * n + 2 * block), base + 96 * n + 12 * block
    q = load16(w, base + 64 * block + 32 * h + 16 * m)
    high = load16(w, base + 64 * n + 32 * block + 16 * m)  # bit 4 h + field of each byte
    return (d, load4(w, steps + 4 * pair), load4(w, steps + 8), *q, *high)


@helper
def q3_k(raw, part):
    h, pair, m = part >> 2 & 1, part >> 1 & 1, part & 1
    # Steps of this run, and of the next but one: 4 bits, and 2 more of other bytes.
    low = turned(raw[1], 4 * h + 8 * m) & 0x000F000F
    high = turned(raw[2], 4 * h + 2 * pair + 8 * m) & 0x00030003
    steps = low | high << 4
    d = half(raw[0])
    scale, other = d * small((steps & 63) - 32), d * small((steps >> 16) - 32)
    q, thirds = raw[3:7], raw[7:]
    near, third = 4 * pair, 4 * h + 2 * pair
    return (
        joined(masked(q, near, BITS_2), masked(thirds, third, BITS_1), 2),
        joined(masked(q, near + 2, BITS_2), masked(thirds, third + 1, BITS_1), 2),
        (scale, other),
        (float32(-4) * scale, float32(-4) * other),
    )


@helper
def steps_of(first, second, third, pair):
    """Scales and minima of groups 2 pair and 2 pair + 1 in Q4_K and Q5_K, in bytes 0 and 1.

    Of the first four groups they are whole bytes, of the last four 4 bits and 2 more that lie above
    those (gguf_tools/quants/k_scales.py).
    """
    at = 16 * (pair & 1)
    first, second, third = turned(first, at), turned(second, at), turned(third, at)
    if pair < 2:
        return first & 0x3F3F, second & 0x3F3F
    return (
        third & 0x0F0F | first >> 2 & 0x3030,
        third >> 4 & 0x0F0F | second >> 2 & 0x3030,
    )


@helper
def fetch_q4_k(w, base, n, block, part):
    at = base + 144 * block
    return (*load16(w, at), *load16(w, at + 16 + 16 * part))


@helper
def q4_k(raw, part):
    pair = part >> 1 & 3  # two groups of 32, of each 16
    d, dmin = half(raw[0]), half(raw[0] >> 16)
    steps, minima = steps_of(raw[1], raw[2], raw[3], pair)
    return (
        masked(raw[4:], 0, BITS_4),
        masked(raw[4:], 4, BITS_4),
        (d * small(steps & 63), d * small(steps >> 8)),
        (-dmin * small(minima & 63), -dmin * small(minima >> 8)),
    )


@helper
def fetch_q5_k(w, base, n, block, part):
    at = base + 176 * block
    high = load16(w, at + 16 + 16 * (part & 1))  # fifth bits: bit `group` of each byte
    return (*load16(w, at), *high, *load16(w, at + 48 + 16 * part))


@helper
def q5_k(raw, part):
    pair = part >> 1 & 3
    d, dmin = half(raw[0]), half(raw[0] >> 16)
    steps, minima = steps_of(raw[1], raw[2], raw[3], pair)
    fifths, q = raw[4:8], raw[8:]
    return (
        joined(masked(q, 0, BITS_4), masked(fifths, 2 * pair, BITS_1), 4),
        joined(masked(q, 4, BITS_4), masked(fifths, 2 * pair + 1, BITS_1), 4),
        (d * small(steps & 63), d * small(steps >> 8)),
        (-dmin * small(minima & 63), -dmin * small(minima >> 8)),
    )


@helper
def fetch_q6_k(w, base, n, block, part):
    h, m = part >> 2 & 1, part & 3  # half, which 16 of its 64 bytes
    d, steps = load2(w, base + 208 * n + 2 * block), base + 192 * n + 16 * block + 8 * h + m
    q = load16(w, base + 128 * block + 16 * part)
    high = load16(w, base + 128 * n + 64 * block + 32 * h + 16 * (m & 1))  # 2 bits of four runs
    return (d, signed1(w, steps), signed1(w, steps + 4), *q, *high)


@helper
def q6_k(raw, part):
    d, near = half(raw[0]), part & 2
    scale, other = d * small(raw[1]), d * small(raw[2])
    q, high = raw[3:7], raw[7:]
    return (
        joined(masked(q, 0, BITS_4), masked(high, near, BITS_2), 4),
        joined(masked(q, 4, BITS_4), masked(high, near + 4, BITS_2), 4),
        (scale, other),
        (float32(-32) * scale, float32(-32) * other),
    )


@helper
def fetch_iq4_xs(w, base, n, block, part):
    return (*load8(w, base + 128 * n + 8 * block), *load16(w, base + 128 * block + 16 * part))


@helper
def iq4_xs(raw, part):
    step = turned(raw[1], 4 * part) & 15 | (turned(raw[0], 16 + 2 * part) & 3) << 4
    return levels(raw[2:], IQ4_LEVELS, half(raw[0]) * small(step - 32))


UNPACKINGS = {
    "Q2_K": Unpacking(fetch_q2_k, q2_k, ((16, 64), (0, 16), (80, 4)), 256, 2, True, 16),
    "Q3_K": Unpacking(
        *(fetch_q3_k, q3_k, ((32, 64), (0, 32), (96, 12), (108, 2))), 256, 2, True, 16
    ),
    "Q4_K": Unpacking(fetch_q4_k, q4_k, ((0, 144),), 256, 2, True),
    "Q5_K": Unpacking(fetch_q5_k, q5_k, ((0, 176),), 256, 2, True),
    "Q6_K": Unpacking(
        *(fetch_q6_k, q6_k, ((0, 128), (128, 64), (192, 16), (208, 2))), 256, 4, True, 16
    ),
    "IQ4_XS": Unpacking(fetch_iq4_xs, iq4_xs, ((8, 128), (0, 8)), 256, 1, False),
}
