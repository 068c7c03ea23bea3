"""Q5_1 on the CPU: 24 bytes per 32 weights, f16 d | f16 m | 32 high bits | 16 x 2 nibbles;
weight = d * q + m."""

from numba import float32, int8, uint64

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    concat,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    f16_splat8,
    fma,
    hsum,
    ld_f16,
    ld_f32,
    ld_i8x32,
    ld_i8x64,
    ld_u32,
    sel_bits,
    splat_f32x8,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i8x32,
    zero_i8x64,
    zero_i32x8,
    zero_i32x16,
)
from runtime.kernels.activations import BYTES_32
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q5_0 import nibbles_in_order


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127) + n_blocks * 36
    bit = splat_i8x64(int8(16))
    none = zero_i8x64()
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        even = float32(0.0)  # the minima times the sums of the activations
        odd = float32(0.0)
        for b in range(0, n_blocks - 1, 2):
            bits = uint64(ld_u32(p + 4)) | (uint64(ld_u32(p + 28)) << uint64(32))
            q = concat(nibbles_in_order(p + 8), nibbles_in_order(p + 32))
            q = q | sel_bits(bits, bit, none)
            t = dpbusd(zero_i32x16(), q, ld_i8x64(xq + b * 32))
            d0 = f16_splat8(p) * splat_f32x8(ld_f32(pairs + b * 8))
            d1 = f16_splat8(p + 24) * splat_f32x8(ld_f32(pairs + b * 8 + 8))
            total = fma(cvt_f32x16(t), concat(d0, d1), total)
            even += ld_f16(p + 2) * ld_f32(pairs + b * 8 + 4)
            odd += ld_f16(p + 26) * ld_f32(pairs + b * 8 + 12)
            p += 48
        result = hsum(total)
        if n_blocks & 1:
            b = n_blocks - 1
            high = sel_bits(uint64(ld_u32(p + 4)), splat_i8x32(int8(16)), zero_i8x32())
            last_q = nibbles_in_order(p + 8) | high
            u = dpbusd(zero_i32x8(), last_q, ld_i8x32(xq + b * 32))
            d = f16_splat8(p) * splat_f32x8(ld_f32(pairs + b * 8))
            result += hsum(fma(cvt_f32x8(u), d, zero_f32x8()))
            even += ld_f16(p + 2) * ld_f32(pairs + b * 8 + 4)
        st_f32(y + r * 4, result + even + odd)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    bit = splat_i8x32(int8(16))
    none = zero_i8x32()
    for b in range(k // 32):
        st(q + b * 32, nibbles_in_order(p + 8) | sel_bits(uint64(ld_u32(p + 4)), bit, none))
        st_f32(scales + b * 4, ld_f16(p))
        st_f32(offsets + b * 4, ld_f16(p + 2))
        p += 24


KERNELS = FormatKernels(matvec, BYTES_32, rows, group=32, span=32, bias=0, has_offset=True)
