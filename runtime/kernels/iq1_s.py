"""IQ1_S on the CPU: 50 bytes per 256 weights, f16 d | 32 low bytes of codes | 8 x (4 x 3 high bits
of codes, a 3-bit scale, a sign); weight = d * (2 * scale + 1) * (grid[code] + 1/8, or - 1/8 where
the sign is set), one scale and sign for 32 weights."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.grids import read_grid
from gguf_tools.simd import (
    bits_i8x8,
    concat,
    cvt_f32x8,
    float32,
    int16,
    int64,
    ld_f16,
    ld_i16x8,
    ld_u16,
    ld_u64,
    make_table,
    splat_f32x8,
    splat_i16x8,
    ucvt_i32x8,
    uint64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import biased_loops, twice
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import ONES, byte

BYTES = 50
BIAS = 64  # of 8 times the weight without its scale

iq1_grid = make_table("iq1_grid", lambda: (8 * read_grid("IQ1_S") + (BIAS + 1)).tobytes())
"""Eighths, more 1/8 each: what is left to do is to take 2/8 away where the sign is set."""


@jit
def octet(code, sign):
    """8 bytes: the entry of a code, moved by its sign (0 or 1)."""
    return bits_i8x8(ld_u64(iq1_grid() + 8 * code) - uint64(sign) * uint64(2 * ONES))


@jit
def _scales(p):
    fields = (ld_i16x8(p + 34) >> 12) & splat_i16x8(int16(7))
    steps = cvt_f32x8(ucvt_i32x8(fields)) + splat_f32x8(float32(0.5))
    return twice(steps * splat_f32x8(ld_f16(p) * float32(0.25)))


@jit
def _code(p, high, i):
    return byte(p + i) | (((high >> (3 * i)) & 7) << 8)


@jit
def _thirty_two(p, g):
    """The weights of group g."""
    high, low = int64(ld_u16(p + 34 + g * 2)), p + 2 + g * 4
    sign = high >> 15
    first = concat(octet(_code(low, high, 0), sign), octet(_code(low, high, 1), sign))
    return concat(first, concat(octet(_code(low, high, 2), sign), octet(_code(low, high, 3), sign)))


@jit
def _weights(p, j):
    return concat(_thirty_two(p, 2 * j), _thirty_two(p, 2 * j + 1))


_matvec, _rows = biased_loops(BYTES, 32, BIAS, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=BIAS)
