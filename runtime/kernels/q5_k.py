"""Q5_K on the CPU: 176 bytes per 256 weights, as Q4_K with 32 bytes of high bits before the
nibbles: bit 2j and 2j + 1 of byte i belong to weights i and i + 32 of the j-th 64."""

from numba import int8

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    bits_i8x8,
    bits_i8x32,
    bits_i8x64,
    bits_i16x16,
    bits_i16x32,
    concat,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    f16_splat8,
    fma,
    hsum,
    ld_f32x8,
    ld_i8x32,
    ld_i8x64,
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
from runtime.kernels.q4_k import (
    pair_0_2,
    pair_1_3,
    pair_4_6,
    pair_5_7,
    store_scales,
    unpack_scales,
)


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 256
    dx = xq + k
    sums = dx + n_blocks * 32
    mask = splat_i8x64(int8(15))
    bit = splat_i8x64(int8(16))
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
            n0 = ld_i8x64(p + 48)
            n1 = ld_i8x64(p + 112)
            top = ld_i8x32(p + 16)
            # Byte i: bits 0 1 4 5 are those of groups 0 1 4 5; of its right neighbour 2 3 6 7.
            high = bits_i16x32(concat(top, bits_i8x32(bits_i16x16(top) >> 2)))
            q0 = (n0 & mask) | (bits_i8x64(high << 4) & bit)
            q1 = (bits_i8x64(bits_i16x32(n0) >> 4) & mask) | (bits_i8x64(high << 3) & bit)
            q2 = (n1 & mask) | (bits_i8x64(high) & bit)
            q3 = (bits_i8x64(bits_i16x32(n1) >> 4) & mask) | (bits_i8x64(high >> 1) & bit)
            t = dpbusd(zero_i32x16(), q0, ld_i8x64(x))
            total = fma(cvt_f32x16(t), pair_0_2(s), total)
            t = dpbusd(zero_i32x16(), q1, ld_i8x64(x + 64))
            other = fma(cvt_f32x16(t), pair_1_3(s), other)
            t = dpbusd(zero_i32x16(), q2, ld_i8x64(x + 128))
            total = fma(cvt_f32x16(t), pair_4_6(s), total)
            t = dpbusd(zero_i32x16(), q3, ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), pair_5_7(s), other)
            p += 176
        st_f32(y + r * 4, hsum(total + other) - hsum(below))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x32(int8(15))
    bit = splat_i8x32(int8(16))
    for b in range(k // 256):
        store_scales(p, scales + b * 32, offsets + b * 32)
        top = bits_i16x16(ld_i8x32(p + 16))
        for j in range(4):
            n = ld_i8x32(p + 48 + j * 32)
            pair = top >> (2 * j)
            low = (n & mask) | (bits_i8x32(pair << 4) & bit)
            high = (bits_i8x32(bits_i16x16(n) >> 4) & mask) | (bits_i8x32(pair << 3) & bit)
            st(q + b * 256 + j * 64, low)
            st(q + b * 256 + j * 64 + 32, high)
        p += 176


KERNELS = FormatKernels(matvec, NIBBLES_256, rows, group=32, span=32, bias=0, has_offset=True)
