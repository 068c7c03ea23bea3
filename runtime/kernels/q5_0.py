"""Q5_0 on the CPU: 22 bytes per 32 weights, f16 d | 32 high bits | 16 x 2 nibbles;
weight = d * (q - 16)."""

from numba import int8, uint64

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x16,
    bits_i16x8,
    concat,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    f16_splat8,
    fma,
    hsum,
    ld_f16,
    ld_f32,
    ld_i8x16,
    ld_i8x32,
    ld_i8x64,
    ld_i32x8,
    ld_i32x16,
    ld_u32,
    sel_bits,
    splat_f32x8,
    splat_i8x16,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i8x32,
    zero_i8x64,
)
from runtime.kernels.activations import BYTES_32
from runtime.kernels.formats import FormatKernels


@jit
def nibbles_in_order(p):
    """The 32 low nibbles of one block, low halves first."""
    mask = splat_i8x16(int8(15))
    n = ld_i8x16(p)
    return concat(n & mask, bits_i8x16(bits_i16x8(n) >> 4) & mask)


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    # q - 16 = (q + 112) - 128: as Q8_0 from there on, so that its corrections serve.
    n_blocks = k // 32
    scales = xq + ((k + 127) & ~127)
    corrections = scales + n_blocks * 4
    bit = splat_i8x64(int8(16))
    none = zero_i8x64()
    up = splat_i8x64(int8(112))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        for b in range(0, n_blocks - 1, 2):
            bits = uint64(ld_u32(p + 2)) | (uint64(ld_u32(p + 24)) << uint64(32))
            q = concat(nibbles_in_order(p + 6), nibbles_in_order(p + 28))
            q = (q | sel_bits(bits, bit, none)) + up
            t = dpbusd(ld_i32x16(corrections + b * 32), q, ld_i8x64(xq + b * 32))
            d0 = f16_splat8(p) * splat_f32x8(ld_f32(scales + b * 4))
            d1 = f16_splat8(p + 22) * splat_f32x8(ld_f32(scales + b * 4 + 4))
            total = fma(cvt_f32x16(t), concat(d0, d1), total)
            p += 44
        result = hsum(total)
        if n_blocks & 1:
            b = n_blocks - 1
            high = sel_bits(uint64(ld_u32(p + 2)), splat_i8x32(int8(16)), zero_i8x32())
            last_q = (nibbles_in_order(p + 6) | high) + splat_i8x32(int8(112))
            u = dpbusd(ld_i32x8(corrections + b * 32), last_q, ld_i8x32(xq + b * 32))
            d = f16_splat8(p) * splat_f32x8(ld_f32(scales + b * 4))
            result += hsum(fma(cvt_f32x8(u), d, zero_f32x8()))
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    bit = splat_i8x32(int8(16))
    none = zero_i8x32()
    for b in range(k // 32):
        st(q + b * 32, nibbles_in_order(p + 6) | sel_bits(uint64(ld_u32(p + 2)), bit, none))
        st_f32(scales + b * 4, ld_f16(p))
        p += 22


KERNELS = FormatKernels(matvec, BYTES_32, rows, group=32, span=32, bias=16, has_offset=False)
