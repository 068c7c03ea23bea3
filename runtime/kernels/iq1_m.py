"""IQ1_M on the CPU: 56 bytes per 256 weights, 32 low bytes of codes | 32 x (3 high bits of the
code, a sign) | 4 words of 4 x 3-bit scales and a quarter of f16 d; weight = d * (2 * scale + 1) *
(grid[code] + 1/8, or - 1/8 where the sign is set), one scale for 16 weights."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x4,
    bits_i8x16,
    concat,
    cvt_f32x4,
    cvt_f32x16,
    first_lane,
    float32,
    int32,
    ld_i16x4,
    ld_u64,
    splat_f32x16,
    splat_i32x4,
    ucvt_i32x4,
    ucvt_i32x16,
    uint64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import biased_loops
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import byte
from runtime.kernels.iq1_s import BIAS, octet

BYTES = 56


@jit
def _d(p):
    """The upper 4 bits of each word are a quarter of d, the lowest first."""
    words = ld_u64(p + 48)
    d = (words >> uint64(12)) & uint64(0xF)
    d |= (words >> uint64(24)) & uint64(0xF0)
    d |= (words >> uint64(36)) & uint64(0xF00)
    d |= (words >> uint64(48)) & uint64(0xF000)
    return first_lane(cvt_f32x4(bits_f16x4(d)))


@jit
def _scales(p):
    words = ucvt_i32x4(ld_i16x4(p + 48))
    sixes = (words & splat_i32x4(int32(0x3F))) | ((words & splat_i32x4(int32(0xFC0))) << 10)
    threes = splat_i32x4(int32(0x00070007))
    fields = bits_i8x16((sixes & threes) | ((sixes & (threes << 3)) << 5))
    steps = cvt_f32x16(ucvt_i32x16(fields)) + splat_f32x16(float32(0.5))
    return steps * splat_f32x16(_d(p) * float32(0.25))


@jit
def _sixteen(p, i):
    """The weights of the i-th two codes."""
    high = byte(p + 32 + i)
    first = octet(byte(p + 2 * i) | ((high & 7) << 8), (high >> 3) & 1)
    return concat(first, octet(byte(p + 2 * i + 1) | ((high & 0x70) << 4), high >> 7))


@jit
def _weights(p, j):
    low = concat(_sixteen(p, 4 * j), _sixteen(p, 4 * j + 1))
    return concat(low, concat(_sixteen(p, 4 * j + 2), _sixteen(p, 4 * j + 3)))


_matvec, _rows = biased_loops(BYTES, 16, BIAS, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=BIAS)
