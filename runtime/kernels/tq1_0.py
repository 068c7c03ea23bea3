"""TQ1_0 on the CPU: 54 bytes per 256 weights, 48 bytes of 5 trits | 4 bytes of 4 trits | f16 d;
weight = d * (trit - 1). A byte q holds the fraction 0.abcde in base 3, in 1/256: trit i is the
whole part of 3 * fraction(q * 3^i). Trit i of bytes 0-31 belongs to weight 32 i + j, of bytes 32-47
to 160 + 16 i + j, of the last four to 240 + 4 i + j."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    concat,
    cvt_i8x16,
    cvt_i8x32,
    f16_splat16,
    int16,
    ld_i8x8,
    ld_i8x16,
    ld_i8x32,
    make_constant,
    make_shuffle,
    splat_i16x16,
    splat_i16x32,
    ucvt_i16x8,
    ucvt_i16x16,
    ucvt_i16x32,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import biased_loops
from runtime.kernels.formats import FormatKernels

BYTES = 54

_last_4 = make_shuffle("_last_4", [2 + i % 4 for i in range(16)], "i16x8")
_powers_4 = make_constant("_powers_4", [3 ** (i // 4) for i in range(16)], "i16x16")


@jit
def _scales(p):
    return f16_splat16(p + 52)


@jit
def _thirty_two(p, power):
    q = ucvt_i16x32(ld_i8x32(p)) * splat_i16x32(int16(power)) & splat_i16x32(int16(255))
    return cvt_i8x32(q * splat_i16x32(int16(3)) >> 8)


@jit
def _trits(q):
    q = q & splat_i16x16(int16(255))
    return cvt_i8x16(q * splat_i16x16(int16(3)) >> 8)


@jit
def _sixteen(p, power):
    return _trits(ucvt_i16x16(ld_i8x16(p + 32)) * splat_i16x16(int16(power)))


@jit
def _weights(p, j):
    if j == 0:
        return concat(_thirty_two(p, 1), _thirty_two(p, 3))
    if j == 1:
        return concat(_thirty_two(p, 9), _thirty_two(p, 27))
    if j == 2:
        return concat(_thirty_two(p, 81), concat(_sixteen(p, 1), _sixteen(p, 3)))
    last = _trits(_last_4(ucvt_i16x8(ld_i8x8(p + 46))) * _powers_4())
    return concat(concat(_sixteen(p, 9), _sixteen(p, 27)), concat(_sixteen(p, 81), last))


_matvec, _rows = biased_loops(BYTES, 32, 1, _scales, _weights)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=32, bias=1)
