"""IQ2_XS on the CPU: 74 bytes per 256 weights, f16 d | 32 x (code of 9 bits, 7 sign bits) | 16
scales of 4 bits; weight = d * (2 * scale + 1) / 8 * grid[code], one scale for 16 weights."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x16,
    cvt_f32x16,
    float32,
    int16,
    int64,
    ld_f16,
    ld_i8x8,
    ld_u16,
    ld_u64,
    splat_f32x16,
    splat_i16x8,
    ucvt_i16x8,
    ucvt_i32x16,
    uint64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import SIGNED_BIAS, signed_loops
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import eight, iq2_xs_grid, unfold_signs

BYTES = 74


@jit
def nibble_scales(p, d):
    """d * (scale + 1/2) / 4 of the 16 scales at p, low halves first."""
    pairs = ucvt_i16x8(ld_i8x8(p))
    nibbles = bits_i8x16((pairs | (pairs << 4)) & splat_i16x8(int16(0x0F0F)))
    steps = cvt_f32x16(ucvt_i32x16(nibbles)) + splat_f32x16(float32(0.5))
    return steps * splat_f32x16(d * float32(0.25))


@jit
def _scales(p):
    return nibble_scales(p + 66, ld_f16(p))


@jit
def _code(p):
    return int64(ld_u16(p)) & 511


@jit
def _magnitudes(p, j):
    a = p + 2 + j * 16
    return eight(
        iq2_xs_grid(),
        *(_code(a), _code(a + 2), _code(a + 4), _code(a + 6)),
        *(_code(a + 8), _code(a + 10), _code(a + 12), _code(a + 14)),
    )


@jit
def _four_sevens(words):
    """The upper 7 bits of each 16, side by side in the low 28."""
    sevens = (words >> uint64(9)) & uint64(0x007F007F007F007F)
    pairs = (sevens | (sevens >> uint64(9))) & uint64(0x00003FFF00003FFF)
    return (pairs | (pairs >> uint64(18))) & uint64(0x0FFFFFFF)


@jit
def _signs(p, j):
    low, high = _four_sevens(ld_u64(p + 2 + j * 16)), _four_sevens(ld_u64(p + 10 + j * 16))
    return unfold_signs(low | (high << uint64(32)))


_matvec, _rows = signed_loops(BYTES, 16, _scales, _magnitudes, _signs)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=SIGNED_BIAS)
