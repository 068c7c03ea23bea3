"""Q6_K on the CPU: 210 bytes per 256 weights, 128 x 2 low nibbles | 64 x 4 high bit pairs |
16 i8 scales | f16 d; weight = d * scale * (q - 32)."""

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    bits_i8x32,
    bits_i8x64,
    bits_i16x16,
    bits_i16x32,
    concat,
    cvt_f32x16,
    cvt_i32x16,
    dpbusd7,
    f16_splat16,
    float32,
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
    splat_i8x64,
    st,
    st_f32,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import BYTES_16
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels

# The scales of the i-th 64 weights: 4 groups of 16, each in 4 lanes.
_scales_0 = make_shuffle("_scales_0", [0 + i // 4 for i in range(16)], "f32x16")
_scales_1 = make_shuffle("_scales_1", [4 + i // 4 for i in range(16)], "f32x16")
_scales_2 = make_shuffle("_scales_2", [8 + i // 4 for i in range(16)], "f32x16")
_scales_3 = make_shuffle("_scales_3", [12 + i // 4 for i in range(16)], "f32x16")


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    dx = xq + k
    sums = dx + k // 4
    mask = keep(splat_i8x64(int8(15)))
    bits = keep(splat_i8x64(int8(0x30)))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        below = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 210)
            s = cvt_f32x16(cvt_i32x16(ld_i8x16(p + 192)))
            s = s * (f16_splat16(p + 208) * ld_f32x16(dx + b * 64))
            below = fma(s, ld_f32x16(sums + b * 64), below)
            low = ld_i8x64(p)
            top = ld_i8x32(p + 128)
            high = concat(top, bits_i8x32(bits_i16x16(top) >> 2))
            q = (low & mask) | (bits_i8x64(bits_i16x32(high) << 4) & bits)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x))
            total = fma(cvt_f32x16(t), _scales_0(s), total)
            q = (bits_i8x64(bits_i16x32(low) >> 4) & mask) | (high & bits)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 64))
            other = fma(cvt_f32x16(t), _scales_1(s), other)
            low = ld_i8x64(p + 64)
            top = ld_i8x32(p + 160)
            high = concat(top, bits_i8x32(bits_i16x16(top) >> 2))
            q = (low & mask) | (bits_i8x64(bits_i16x32(high) << 4) & bits)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 128))
            total = fma(cvt_f32x16(t), _scales_2(s), total)
            q = (bits_i8x64(bits_i16x32(low) >> 4) & mask) | (high & bits)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), _scales_3(s), other)
            p += 210
        st_f32(y + r * 4, hsum(total + other) - float32(32.0) * hsum(below))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x64(int8(15))
    bits = splat_i8x64(int8(0x30))
    for b in range(k // 256):
        for h in range(2):
            low = ld_i8x64(p + h * 64)
            top = ld_i8x32(p + 128 + h * 32)
            high = concat(top, bits_i8x32(bits_i16x16(top) >> 2))
            place = q + b * 256 + h * 128
            st(place, (low & mask) | (bits_i8x64(bits_i16x32(high) << 4) & bits))
            st(place + 64, (bits_i8x64(bits_i16x32(low) >> 4) & mask) | (high & bits))
        d = splat_f32x16(ld_f16(p + 208))
        st(scales + b * 64, cvt_f32x16(cvt_i32x16(ld_i8x16(p + 192))) * d)
        p += 210


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=32, has_offset=False)
