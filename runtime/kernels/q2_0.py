"""Q2_0 on the CPU: 18 bytes per 64 weights, f16 d | 16 x 4 bit pairs, for neighbours; weight =
d * (q - 1)."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x64,
    int8,
    ld_f16,
    ld_i8x16,
    splat_f32x4,
    splat_i8x64,
    ucvt_i32x16,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import short_loops
from runtime.kernels.formats import FormatKernels


@jit
def _scales(row, i):
    return splat_f32x4(ld_f16(row + 18 * i))


@jit
def _weights(row, i):
    four = ucvt_i32x16(ld_i8x16(row + 18 * i + 2))
    spread = four | (four << 6) | (four << 12) | (four << 18)
    return bits_i8x64(spread) & splat_i8x64(int8(3))


_matvec, _rows = short_loops(18, 1, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=1)
