"""IQ3_S on the CPU: 110 bytes per 256 weights, f16 d | 64 low bytes of codes | 64 ninth bits | 256
sign bits | 8 scales of 4 bits; weight = d * (2 * scale + 1) * grid[code]: a code stands for 4
weights, a scale for 32."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x8,
    concat,
    cvt_f32x8,
    float32,
    ld_f16,
    ld_u32,
    ld_u64,
    splat_f32x8,
    ucvt_i32x8,
    uint64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import SIGNED_BIAS, signed_loops, twice
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import byte, iq3_s_grid, two_fours

BYTES = 110


@jit
def _scales(p):
    words = uint64(ld_u32(p + 106))
    words = (words | (words << uint64(16))) & uint64(0x0000FFFF0000FFFF)
    words = (words | (words << uint64(8))) & uint64(0x00FF00FF00FF00FF)
    words = (words | (words << uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)
    steps = cvt_f32x8(ucvt_i32x8(bits_i8x8(words)))
    steps = steps + steps + splat_f32x8(float32(1.0))
    return twice(steps * splat_f32x8(ld_f16(p)))


@jit
def _eight(p, high, i):
    """Codes i and i + 1 of the 8 at p, with their ninth bits in `high`."""
    first = byte(p + i) | ((high << (8 - i)) & 256)
    second = byte(p + i + 1) | ((high << (7 - i)) & 256)
    return two_fours(iq3_s_grid(), first, second)


@jit
def _thirty_two(p, high):
    low = concat(_eight(p, high, 0), _eight(p, high, 2))
    return concat(low, concat(_eight(p, high, 4), _eight(p, high, 6)))


@jit
def _magnitudes(p, j):
    low = _thirty_two(p + 2 + j * 16, byte(p + 66 + j * 2))
    return concat(low, _thirty_two(p + 10 + j * 16, byte(p + 67 + j * 2)))


@jit
def _signs(p, j):
    return ld_u64(p + 74 + j * 8)


_matvec, _rows = signed_loops(BYTES, 32, _scales, _magnitudes, _signs)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=SIGNED_BIAS)
