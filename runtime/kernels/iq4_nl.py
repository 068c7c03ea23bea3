"""IQ4_NL on the CPU: 18 bytes per 32 weights, f16 d | 16 x 2 nibbles; weight = d * VALUES[q]."""

from numba import float32, int8, uint64

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x8,
    bits_i8x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x8,
    bits_i16x32,
    concat,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    fma,
    hsum,
    ld_f16,
    ld_f32,
    ld_f32x8,
    ld_i8x16,
    ld_i8x64,
    lookup16,
    splat_i8x16,
    splat_i8x64,
    st,
    st_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i32x4,
    zero_i32x16,
)
from runtime.kernels.activations import NIBBLES_32
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_0 import even, odd, scales_of_4

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BIAS = 128  # makes them unsigned bytes
_FIRST, _SECOND = (
    int.from_bytes(bytes(v + BIAS for v in half), "little") for half in (VALUES[:8], VALUES[8:])
)


@jit
def unsigned_values():
    """VALUES + BIAS as a table for `lookup16`."""
    return concat(bits_i8x8(uint64(_FIRST)), bits_i8x8(uint64(_SECOND)))


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    mask = splat_i8x64(int8(15))
    mask16 = splat_i8x16(int8(15))
    values = unsigned_values()
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        sums = zero_f32x8()
        for b in range(0, n_blocks - 3, 4):
            low = concat(ld_i8x16(p + 2), ld_i8x16(p + 20))
            nibbles = concat(low, concat(ld_i8x16(p + 38), ld_i8x16(p + 56)))
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(scales_of_4(ld_i8x64(p)))) * ld_f32x8(pairs + b * 8)
            t = dpbusd(zero_i32x16(), lookup16(values, nibbles & mask), ld_i8x64(xq + b * 32))
            high = lookup16(values, bits_i8x64(bits_i16x32(nibbles) >> 4) & mask)
            t = dpbusd(t, high, ld_i8x64(xq + b * 32 + 64))
            total = fma(cvt_f32x16(t), even(d), total)
            sums = sums + d
            p += 72
        result = hsum(total) - float32(BIAS) * hsum(odd(sums))
        for b in range(n_blocks & ~3, n_blocks):
            n = ld_i8x16(p + 2)
            place = xq + (b // 4) * 128 + (b % 4) * 16
            u = dpbusd(zero_i32x4(), lookup16(values, n & mask16), ld_i8x16(place))
            high16 = lookup16(values, bits_i8x16(bits_i16x8(n) >> 4) & mask16)
            dot = float32(hsum(dpbusd(u, high16, ld_i8x16(place + 64))))
            less = float32(BIAS) * ld_f32(pairs + b * 8 + 4)
            result += ld_f16(p) * (dot * ld_f32(pairs + b * 8) - less)
            p += 18
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    values = unsigned_values()
    for b in range(k // 32):
        n = ld_i8x16(p + 2)
        st(q + b * 32, lookup16(values, n & mask))
        st(q + b * 32 + 16, lookup16(values, bits_i8x16(bits_i16x8(n) >> 4) & mask))
        st_f32(scales + b * 4, ld_f16(p))
        p += 18


KERNELS = FormatKernels(matvec, NIBBLES_32, rows, group=32, span=32, bias=BIAS, has_offset=False)
