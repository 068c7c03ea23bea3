"""Q2_K on the CPU: 84 bytes per 256 weights, 16 x (4-bit scale, 4-bit minimum) | 64 x 4 bit pairs |
f16 d | f16 dmin; weight = d * scale * q - dmin * minimum. Bit pair j of byte 32 h + i belongs to
weight 128 h + 32 j + i."""

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    bits_i8x16,
    bits_i8x32,
    bits_i8x64,
    bits_i16x8,
    bits_i16x16,
    bits_i16x32,
    cvt_f32x16,
    dpbusd7,
    f16_splat16,
    fma,
    hsum,
    int8,
    keep,
    ld_f16,
    ld_f32x16,
    ld_i8x16,
    ld_i8x32,
    ld_i8x64,
    make_shuffle,
    splat_f32x16,
    splat_i8x16,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    ucvt_i32x16,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import PAIRS_16
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels


def _pair(j: int) -> list[int]:
    """Lanes of the scales of groups of 32 j and j + 4, which PAIRS_16 puts side by side."""
    return [group for half in (0, 8) for i in (0, 1) for group in [half + 2 * j + i] * 4]


pair_0 = make_shuffle("pair_0", _pair(0), "f32x16")
pair_1 = make_shuffle("pair_1", _pair(1), "f32x16")
pair_2 = make_shuffle("pair_2", _pair(2), "f32x16")
pair_3 = make_shuffle("pair_3", _pair(3), "f32x16")


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    dx = xq + k
    sums = dx + k // 4
    mask = keep(splat_i8x64(int8(3)))
    mask16 = splat_i8x16(int8(15))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        below = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 84)
            packed = ld_i8x16(p)
            d = ld_f32x16(dx + b * 64)
            s = cvt_f32x16(ucvt_i32x16(packed & mask16)) * (f16_splat16(p + 80) * d)
            m = cvt_f32x16(ucvt_i32x16(bits_i8x16(bits_i16x8(packed) >> 4) & mask16))
            below = fma(m * (f16_splat16(p + 82) * d), ld_f32x16(sums + b * 64), below)
            words = bits_i16x32(ld_i8x64(p + 16))
            t = dpbusd7(zero_i32x16(), bits_i8x64(words) & mask, ld_i8x64(x))
            total = fma(cvt_f32x16(t), pair_0(s), total)
            t = dpbusd7(zero_i32x16(), bits_i8x64(words >> 2) & mask, ld_i8x64(x + 64))
            other = fma(cvt_f32x16(t), pair_1(s), other)
            t = dpbusd7(zero_i32x16(), bits_i8x64(words >> 4) & mask, ld_i8x64(x + 128))
            total = fma(cvt_f32x16(t), pair_2(s), total)
            t = dpbusd7(zero_i32x16(), bits_i8x64(words >> 6) & mask, ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), pair_3(s), other)
            p += 84
        st_f32(y + r * 4, hsum(total + other) - hsum(below))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x32(int8(3))
    mask16 = splat_i8x16(int8(15))
    for b in range(k // 256):
        packed = ld_i8x16(p)
        minima = bits_i8x16(bits_i16x8(packed) >> 4) & mask16
        st(scales + b * 64, cvt_f32x16(ucvt_i32x16(packed & mask16)) * splat_f32x16(ld_f16(p + 80)))
        st(offsets + b * 64, cvt_f32x16(ucvt_i32x16(minima)) * splat_f32x16(-ld_f16(p + 82)))
        for h in range(2):
            words = bits_i16x16(ld_i8x32(p + 16 + h * 32))
            for j in range(4):
                st(q + b * 256 + h * 128 + j * 32, bits_i8x32(words >> (2 * j)) & mask)
        p += 84


KERNELS = FormatKernels(matvec, PAIRS_16, rows, group=16, bias=0, has_offset=True)
