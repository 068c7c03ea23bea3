"""Q4_K on the CPU: 144 bytes per 256 weights, f16 d | f16 dmin | 12 bytes of 6-bit scales and
minima | 128 x 2 nibbles; weight = d * scale * q - dmin * minimum."""

from numba import int8, uint64

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    VECTORS,
    bits_i8x8,
    bits_i8x32,
    bits_i8x64,
    bits_i16x16,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    f16_splat8,
    fma,
    hsum,
    ld_f16,
    ld_f32x8,
    ld_i8x32,
    ld_i8x64,
    ld_u32,
    ld_u64,
    make_shuffle,
    splat_f32x8,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    ucvt_i32x8,
    zero_f32x8,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import NIBBLES_256
from runtime.kernels.formats import FormatKernels

# NIBBLES_256 puts groups 0 2, 1 3, 4 6, 5 7 side by side: their scales in 8 lanes each.
pair_0_2 = make_shuffle("pair_0_2", [0] * 8 + [2] * 8, VECTORS["f32x8"])
pair_1_3 = make_shuffle("pair_1_3", [1] * 8 + [3] * 8, VECTORS["f32x8"])
pair_4_6 = make_shuffle("pair_4_6", [4] * 8 + [6] * 8, VECTORS["f32x8"])
pair_5_7 = make_shuffle("pair_5_7", [5] * 8 + [7] * 8, VECTORS["f32x8"])


@jit
def unpack_scales(p):
    """The 8 scales and the 8 minima at p (12 bytes), each as 8 bytes of a uint64.

    Scales and minima 0-3 are the low 6 bits of bytes 0-3 and 4-7; 4-7 have their low nibbles in
    bytes 8-11 and their top bits in the top bits of the first 8 (ggml: get_scale_min_k4).
    """
    first = ld_u64(p)
    last = uint64(ld_u32(p + 8))
    low6 = first & uint64(0x3F3F3F3F3F3F3F3F)
    top2 = (first >> uint64(2)) & uint64(0x3030303030303030)
    low4 = (last & uint64(0x0F0F0F0F)) | ((last & uint64(0xF0F0F0F0)) << uint64(28))
    upper = low4 | top2
    half = uint64(0xFFFFFFFF)
    scales = (low6 & half) | (upper << uint64(32))
    minima = (low6 >> uint64(32)) | (upper & ~half)
    return scales, minima


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 256
    dx = xq + k
    sums = dx + n_blocks * 32
    mask = splat_i8x64(int8(15))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        below = zero_f32x8()
        for b in range(n_blocks):
            d = ld_f32x8(dx + b * 32)
            packed, minima = unpack_scales(p + 4)
            s = cvt_f32x8(ucvt_i32x8(bits_i8x8(packed))) * (f16_splat8(p) * d)
            m = cvt_f32x8(ucvt_i32x8(bits_i8x8(minima))) * (f16_splat8(p + 2) * d)
            below = fma(m, ld_f32x8(sums + b * 32), below)
            x = xq + b * 256
            n0 = ld_i8x64(p + 16)
            n1 = ld_i8x64(p + 80)
            h0 = bits_i8x64(bits_i16x32(n0) >> 4) & mask
            h1 = bits_i8x64(bits_i16x32(n1) >> 4) & mask
            t = dpbusd(zero_i32x16(), n0 & mask, ld_i8x64(x))
            total = fma(cvt_f32x16(t), pair_0_2(s), total)
            t = dpbusd(zero_i32x16(), h0, ld_i8x64(x + 64))
            other = fma(cvt_f32x16(t), pair_1_3(s), other)
            t = dpbusd(zero_i32x16(), n1 & mask, ld_i8x64(x + 128))
            total = fma(cvt_f32x16(t), pair_4_6(s), total)
            t = dpbusd(zero_i32x16(), h1, ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), pair_5_7(s), other)
            p += 144
        st_f32(y + r * 4, hsum(total + other) - hsum(below))


@jit
def store_scales(p, scales, offsets):
    """The float32 scales and offsets of one super-block whose d and dmin are at p."""
    packed, minima = unpack_scales(p + 4)
    st(scales, cvt_f32x8(ucvt_i32x8(bits_i8x8(packed))) * splat_f32x8(ld_f16(p)))
    st(offsets, cvt_f32x8(ucvt_i32x8(bits_i8x8(minima))) * splat_f32x8(-ld_f16(p + 2)))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x32(int8(15))
    for b in range(k // 256):
        store_scales(p, scales + b * 32, offsets + b * 32)
        for j in range(4):
            n = ld_i8x32(p + 16 + j * 32)
            st(q + b * 256 + j * 64, n & mask)
            st(q + b * 256 + j * 64 + 32, bits_i8x32(bits_i16x16(n) >> 4) & mask)
        p += 144


KERNELS = FormatKernels(matvec, NIBBLES_256, rows, group=32, span=32, bias=0, has_offset=True)
