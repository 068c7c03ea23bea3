"""IQ4_NL on the CPU: 18 bytes per 32 weights, f16 d | 16 x 2 nibbles; weight = d * VALUES[q]."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x8,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    float32,
    fma,
    hsum,
    int8,
    keep,
    ld_f16,
    ld_f32,
    ld_f32x8,
    ld_i8x16,
    ld_i8x64,
    lookup16,
    make_constant,
    splat_i8x16,
    splat_i8x64,
    st,
    st_f32,
    to_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i32x4,
    zero_i32x16,
)
from runtime.kernels.activations import HALVES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_0 import even, nibbles_of_4, odd, scales_of_4

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BIAS = 128  # makes them unsigned bytes

unsigned_values = make_constant(
    "unsigned_values", [v + BIAS - 256 * (v >= 0) for v in VALUES], "i8x16"
)


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
        end = row + row_bytes - 72
        total = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 72, end)
            x = xq + g * 128
            ask_ahead(p, 72)
            head = ld_i8x64(p)
            tail = ld_i8x64(p + 8)
            n = nibbles_of_4(head, tail)
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(scales_of_4(head, tail))) * ld_f32x8(pairs + g * 32)
            t = dpbusd(zero_i32x16(), lookup16(values, n & mask), ld_i8x64(x))
            n = bits_i8x64(bits_i16x32(n) >> 4)
            t = dpbusd(t, lookup16(values, n & mask), ld_i8x64(x + 64))
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
            p = w + r * row_bytes + b * 18
            n = ld_i8x16(p + 2)
            t = dpbusd(zero_i32x4(), lookup16(values, n & mask), ld_i8x16(xq + b * 16))
            n = bits_i8x16(bits_i16x8(n) >> 4)
            t = dpbusd(t, lookup16(values, n & mask), ld_i8x16(xq + b * 16 + 64))
            less = float32(BIAS) * ld_f32(pairs + b * 8 + 4)
            result += ld_f16(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8) - less)
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


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=BIAS, has_offset=False)
