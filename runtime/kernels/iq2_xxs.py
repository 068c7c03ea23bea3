"""IQ2_XXS on the CPU: 66 bytes per 256 weights, f16 d | 8 x (4 codes of 8 bits, 4 x 7 sign bits and
a 4-bit scale); weight = d * (2 * scale + 1) / 8 * grid[code], one scale for 32 weights."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    cvt_f32x8,
    cvt_i32x8,
    float32,
    ld_f16,
    ld_i64x8,
    ld_u32,
    splat_f32x8,
    uint64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import SIGNED_BIAS, signed_loops, twice
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import byte, eight, iq2_xxs_grid, unfold_signs

BYTES = 66


@jit
def _scales(p):
    steps = cvt_f32x8(cvt_i32x8(ld_i64x8(p + 2) >> 60)) + splat_f32x8(float32(0.5))
    return twice(steps * splat_f32x8(ld_f16(p) * float32(0.25)))


@jit
def _magnitudes(p, j):
    a, b = p + 2 + j * 16, p + 10 + j * 16
    return eight(
        iq2_xxs_grid(),
        *(byte(a), byte(a + 1), byte(a + 2), byte(a + 3)),
        *(byte(b), byte(b + 1), byte(b + 2), byte(b + 3)),
    )


@jit
def _signs(p, j):
    low, high = ld_u32(p + 6 + j * 16), ld_u32(p + 14 + j * 16)
    return unfold_signs(uint64(low) | (uint64(high) << uint64(32)))


_matvec, _rows = signed_loops(BYTES, 32, _scales, _magnitudes, _signs)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=SIGNED_BIAS)
