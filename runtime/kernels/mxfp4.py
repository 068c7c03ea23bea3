"""MXFP4 on the CPU: 17 bytes per 32 weights, exponent e | 16 x 2 nibbles; weight = 2^(e - 128) *
VALUES[q], the first 16 weights in the low halves."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f32x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x4,
    bits_i16x8,
    bits_i16x32,
    concat,
    cvt_f32x16,
    dpbusd7,
    first_lane,
    float32,
    fma,
    hsum,
    int8,
    int32,
    int64,
    keep,
    ld_f32,
    ld_f32x8,
    ld_i8x16,
    ld_i8x64,
    ld_u8,
    lookup16,
    make_constant,
    make_shuffle,
    sel_test,
    splat_i8x16,
    splat_i8x64,
    splat_i32x8,
    st,
    st_f32,
    to_f32,
    ucvt_i32x4,
    uint64,
    zero_f32x8,
    zero_f32x16,
    zero_i32x4,
    zero_i32x16,
)
from runtime.kernels.activations import HALVES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_0 import even, odd

VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
BIAS = 12  # makes them unsigned bytes

unsigned_values = make_constant("unsigned_values", [v + BIAS for v in VALUES], "i8x16")
_twice = make_shuffle("_twice", [i // 2 for i in range(8)], "i32x4")


@jit
def _scales_of(exponents):
    """2^(e - 128) of four exponents (int64, 16 bits each), each twice; exact for 0 and 1, too."""
    e = _twice(ucvt_i32x4(bits_i16x4(exponents)))
    one = splat_i32x8(int32(1))
    return bits_f32x8(sel_test(e, splat_i32x8(int32(0xFE)), (e - one) << 23, (e + one) << 21))


@jit
def _exponent(p):
    return uint64(ld_u8(p))


@jit
def _scale(p):
    return first_lane(_scales_of(int64(_exponent(p))))


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    mask = keep(splat_i8x64(int8(15)))
    values = unsigned_values()
    if n_blocks < 4:
        _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks)
        return
    for r in range(first, last):
        row = w + r * row_bytes
        end = row + row_bytes - 68
        total = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 68, end)
            x = xq + g * 128
            ask_ahead(p, 68)
            low = concat(ld_i8x16(p + 1), ld_i8x16(p + 18))
            n = concat(low, concat(ld_i8x16(p + 35), ld_i8x16(p + 52)))
            e = _exponent(p) | (_exponent(p + 17) << uint64(16))
            e |= (_exponent(p + 34) << uint64(32)) | (_exponent(p + 51) << uint64(48))
            # (d * dx, d * dx * sum) of each block
            d = _scales_of(e) * ld_f32x8(pairs + g * 32)
            t = dpbusd7(zero_i32x16(), lookup16(values, n & mask), ld_i8x64(x))
            n = bits_i8x64(bits_i16x32(n) >> 4)
            t = dpbusd7(t, lookup16(values, n & mask), ld_i8x64(x + 64))
            total = fma(cvt_f32x16(t), even(d), total)
            sums = sums + d
        st_f32(y + r * 4, hsum(total) - float32(BIAS) * hsum(odd(sums)))


@jit
def _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks):
    """Rows of less than 4 blocks."""
    mask = splat_i8x16(int8(15))
    values = unsigned_values()
    for r in range(first, last):
        result = float32(0.0)
        for b in range(n_blocks):
            p = w + r * row_bytes + b * 17
            n = ld_i8x16(p + 1)
            t = dpbusd7(zero_i32x4(), lookup16(values, n & mask), ld_i8x16(xq + b * 16))
            n = bits_i8x16(bits_i16x8(n) >> 4)
            t = dpbusd7(t, lookup16(values, n & mask), ld_i8x16(xq + b * 16 + 64))
            less = float32(BIAS) * ld_f32(pairs + b * 8 + 4)
            result += _scale(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8) - less)
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    values = unsigned_values()
    for b in range(k // 32):
        n = ld_i8x16(p + 1)
        st(q + b * 32, lookup16(values, n & mask))
        st(q + b * 32 + 16, lookup16(values, bits_i8x16(bits_i16x8(n) >> 4) & mask))
        st_f32(scales + b * 4, _scale(p))
        p += 17


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=BIAS)
