"""Q1_0 on the CPU: 18 bytes per 128 weights, f16 d | 128 bits; weight = d where the bit is set,
else -d."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import int8, ld_f16, ld_u64, sel_bits, splat_f32x4, splat_i8x64, zero_i8x64
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import short_loops
from runtime.kernels.formats import FormatKernels


@jit
def _scales(row, i):
    return splat_f32x4(ld_f16(row + 18 * (i >> 1)))


@jit
def _weights(row, i):
    bits = ld_u64(row + 18 * (i >> 1) + 2 + 8 * (i & 1))
    return sel_bits(bits, splat_i8x64(int8(2)), zero_i8x64())


_matvec, _rows = short_loops(9, 1, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=1)
