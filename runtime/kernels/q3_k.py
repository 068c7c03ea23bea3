"""Q3_K on the CPU: 110 bytes per 256 weights, 32 x 8 high bits | 64 x 4 bit pairs | 12 bytes of
6-bit scales | f16 d; weight = d * (scale - 32) * (q - 4). The bit pairs lie as in Q2_K; bit
4 h + j of high byte i belongs to weight 128 h + 32 j + i."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x8,
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
    ld_i8x32,
    ld_i8x64,
    ld_u32,
    ld_u64,
    splat_f32x16,
    splat_i8x16,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    uint64,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import PAIRS_16
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q2_k import pair_0, pair_1, pair_2, pair_3


@jit
def unpack_scales(p):
    """The 16 scales at p (12 bytes), less 32.

    Scales 0-7 have their low 4 bits in the low halves of bytes 0-7, 8-15 in the high halves; bit
    pair j of bytes 8-11 tops scales 4 j to 4 j + 3.
    """
    low = ld_u64(p)
    top = uint64(ld_u32(p + 8))
    spread = top | (top << uint64(30))  # bit pairs 0 and 1 side by side, 2 and 3 above them
    nibbles = uint64(0x0F0F0F0F0F0F0F0F)
    pairs = uint64(0x3030303030303030)
    first = (low & nibbles) | ((spread << uint64(4)) & pairs)
    second = ((low >> uint64(4)) & nibbles) | (spread & pairs)
    return concat(bits_i8x8(first), bits_i8x8(second)) - splat_i8x16(int8(32))


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    dx = xq + k
    sums = dx + k // 4
    mask = keep(splat_i8x64(int8(3)))
    bit = keep(splat_i8x64(int8(4)))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        below = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 110)
            s = cvt_f32x16(cvt_i32x16(unpack_scales(p + 96)))
            s = s * (f16_splat16(p + 108) * ld_f32x16(dx + b * 64))
            below = fma(s, ld_f32x16(sums + b * 64), below)
            words = bits_i16x32(ld_i8x64(p + 32))
            top = ld_i8x32(p)
            high = bits_i16x32(concat(top, bits_i8x32(bits_i16x16(top) >> 4)))
            q = (bits_i8x64(words) & mask) | (bits_i8x64(high << 2) & bit)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x))
            total = fma(cvt_f32x16(t), pair_0(s), total)
            q = (bits_i8x64(words >> 2) & mask) | (bits_i8x64(high << 1) & bit)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 64))
            other = fma(cvt_f32x16(t), pair_1(s), other)
            q = (bits_i8x64(words >> 4) & mask) | (bits_i8x64(high) & bit)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 128))
            total = fma(cvt_f32x16(t), pair_2(s), total)
            q = (bits_i8x64(words >> 6) & mask) | (bits_i8x64(high >> 1) & bit)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), pair_3(s), other)
            p += 110
        st_f32(y + r * 4, hsum(total + other) - float32(4.0) * hsum(below))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x32(int8(3))
    bit = splat_i8x32(int8(4))
    for b in range(k // 256):
        top = bits_i16x16(ld_i8x32(p))
        for h in range(2):
            words = bits_i16x16(ld_i8x32(p + 32 + h * 32))
            for j in range(4):
                high = bits_i8x32((top >> (4 * h + j)) << 2) & bit
                low = bits_i8x32(words >> (2 * j)) & mask
                st(q + b * 256 + h * 128 + j * 32, low | high)
        d = splat_f32x16(ld_f16(p + 108))
        st(scales + b * 64, cvt_f32x16(cvt_i32x16(unpack_scales(p + 96))) * d)
        p += 110


KERNELS = FormatKernels(matvec, PAIRS_16, rows, group=16, bias=4, has_offset=False)
