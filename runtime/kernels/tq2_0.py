"""TQ2_0 on the CPU: 66 bytes per 256 weights, 64 x 4 bit pairs | f16 d; weight = d * (q - 1). The
bit pairs lie as in Q2_K: pair i of byte 32 h + j belongs to weight 128 h + 32 i + j."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x64,
    bits_i16x16,
    concat,
    f16_splat16,
    int8,
    ld_i8x32,
    splat_i8x64,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import biased_loops
from runtime.kernels.formats import FormatKernels

BYTES = 66


@jit
def _scales(p):
    return f16_splat16(p + 64)


@jit
def _weights(p, j):
    words = bits_i16x16(ld_i8x32(p + 32 * (j >> 1))) >> (4 * (j & 1))
    return bits_i8x64(concat(words, words >> 2)) & splat_i8x64(int8(3))


_matvec, _rows = biased_loops(BYTES, 32, 1, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=1)
