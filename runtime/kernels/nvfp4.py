"""NVFP4 on the CPU: 36 bytes per 64 weights, 4 scales (unsigned float of 4 and 3 bits) | 4 x 8 x 2
nibbles; weight = scale / 2 * VALUES[nibble]. In each 8 bytes, the low halves come first."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f32x4,
    bits_i8x32,
    bits_i16x16,
    float32,
    int8,
    int32,
    ld_i8x8,
    ld_i8x32,
    lookup16,
    make_shuffle,
    sel_test,
    splat_f32x4,
    splat_i8x32,
    splat_i32x4,
    ucvt_i32x8,
    zero_f32x4,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import short_loops
from runtime.kernels.formats import FormatKernels
from runtime.kernels.mxfp4 import BIAS, unsigned_values

BYTES = 36

_first_4 = make_shuffle("_first_4", range(4), "i32x8")
_weave = make_shuffle(
    "_weave",
    [32 * half + 8 * group + i for group in range(4) for half in range(2) for i in range(8)],
    "i8x32",
    two=True,
)


@jit
def _scales(row, i):
    """Half of each scale. 7 bits in the place of a float's are it, with another exponent."""
    codes = _first_4(ucvt_i32x8(ld_i8x8(row + BYTES * i)))
    values = bits_f32x4((codes & splat_i32x4(int32(127))) << 20)
    values = values * splat_f32x4(float32(2.0**119))
    nan = splat_i32x4(int32(0x7F))  # which ggml takes for 0
    return sel_test(codes ^ nan, splat_i32x4(int32(255)), values, zero_f32x4())


@jit
def _weights(row, i):
    q = ld_i8x32(row + BYTES * i + 4)
    mask = splat_i8x32(int8(15))
    woven = _weave(q & mask, bits_i8x32(bits_i16x16(q) >> 4) & mask)
    return lookup16(unsigned_values(), woven)


_matvec, _rows = short_loops(BYTES, BIAS, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=BIAS)
