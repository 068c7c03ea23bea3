"""IQ3_XXS on the CPU: 98 bytes per 256 weights, f16 d | 64 codes of 8 bits | 8 x (4 x 7 sign bits
and a 4-bit scale); weight = d * (2 * scale + 1) / 4 * grid[code]: a code stands for 4 weights, a
scale for 32."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import concat, cvt_f32x8, float32, ld_f16, ld_i32x8, ld_u64, splat_f32x8
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import SIGNED_BIAS, signed_loops, twice
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import byte, iq3_xxs_grid, two_fours, unfold_signs

BYTES = 98


@jit
def _scales(p):
    steps = cvt_f32x8(ld_i32x8(p + 66) >> 28) + splat_f32x8(float32(0.5))
    return twice(steps * splat_f32x8(ld_f16(p) * float32(0.5)))


@jit
def _sixteen(p):
    table = iq3_xxs_grid()
    low = two_fours(table, byte(p), byte(p + 1))
    return concat(low, two_fours(table, byte(p + 2), byte(p + 3)))


@jit
def _magnitudes(p, j):
    a = p + 2 + j * 16
    low = concat(_sixteen(a), _sixteen(a + 4))
    return concat(low, concat(_sixteen(a + 8), _sixteen(a + 12)))


@jit
def _signs(p, j):
    return unfold_signs(ld_u64(p + 66 + j * 8))


_matvec, _rows = signed_loops(BYTES, 32, _scales, _magnitudes, _signs)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=SIGNED_BIAS)
