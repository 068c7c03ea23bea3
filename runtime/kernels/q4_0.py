"""Q4_0 on the CPU: 18 bytes per 32 weights, f16 d | 16 x 2 nibbles; weight = d * (q - 8)."""

from numba import float32, int8

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    VECTORS,
    bits_f16x8,
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
    make_shuffle,
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

# The halves d of 4 blocks (72 bytes), each twice; the last starts at byte 54.
scales_of_4 = make_shuffle(
    "scales_of_4",
    [18 * b + i for b in range(4) for _ in range(2) for i in range(2)],
    VECTORS["i8x64"],
)
even = make_shuffle("even", [2 * (i // 4) for i in range(16)], VECTORS["f32x8"])
odd = make_shuffle("odd", [1, 3, 5, 7], VECTORS["f32x8"])


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    # Four loads of 16 bytes: choosing the nibbles out of two 64-byte loads by a byte shuffle ran
    # 3 times slower on Zen 5 for rows of more than 16 groups.
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    mask = splat_i8x64(int8(15))
    mask16 = splat_i8x16(int8(15))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        sums = zero_f32x8()
        for b in range(0, n_blocks - 3, 4):
            low = concat(ld_i8x16(p + 2), ld_i8x16(p + 20))
            nibbles = concat(low, concat(ld_i8x16(p + 38), ld_i8x16(p + 56)))
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(scales_of_4(ld_i8x64(p)))) * ld_f32x8(pairs + b * 8)
            t = dpbusd(zero_i32x16(), nibbles & mask, ld_i8x64(xq + b * 32))
            high = bits_i8x64(bits_i16x32(nibbles) >> 4) & mask
            t = dpbusd(t, high, ld_i8x64(xq + b * 32 + 64))
            total = fma(cvt_f32x16(t), even(d), total)
            sums = sums + d
            p += 72
        result = hsum(total) - float32(8.0) * hsum(odd(sums))
        for b in range(n_blocks & ~3, n_blocks):
            n = ld_i8x16(p + 2)
            place = xq + (b // 4) * 128 + (b % 4) * 16
            u = dpbusd(zero_i32x4(), n & mask16, ld_i8x16(place))
            u = dpbusd(u, bits_i8x16(bits_i16x8(n) >> 4) & mask16, ld_i8x16(place + 64))
            dot = float32(hsum(u)) * ld_f32(pairs + b * 8)
            result += ld_f16(p) * (dot - float32(8.0) * ld_f32(pairs + b * 8 + 4))
            p += 18
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    for b in range(k // 32):
        n = ld_i8x16(p + 2)
        st(q + b * 32, n & mask)
        st(q + b * 32 + 16, bits_i8x16(bits_i16x8(n) >> 4) & mask)
        st_f32(scales + b * 4, ld_f16(p))
        p += 18


KERNELS = FormatKernels(matvec, NIBBLES_32, rows, group=32, span=32, bias=8, has_offset=False)
