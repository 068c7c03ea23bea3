"""IQ4_XS on the CPU: 136 bytes per 256 weights, f16 d | 16 high bits of scales | 4 bytes of their
low halves | 128 x 2 nibbles; weight = d * (scale - 32) * VALUES[q]. Each group of 32 weights has a
scale of 6 bits and nibbles as in IQ4_NL: 16 bytes, the first 16 weights in their low halves."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_i8x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x8,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    cvt_i32x8,
    cvt_i32x16,
    dpbusd,
    f16_splat16,
    float32,
    fma,
    hsum,
    int8,
    keep,
    ld_f16,
    ld_f32x16,
    ld_i8x16,
    ld_i8x64,
    ld_u16,
    ld_u32,
    lookup16,
    make_shuffle,
    splat_f32x8,
    splat_i8x8,
    splat_i8x16,
    splat_i8x64,
    st,
    st_f32,
    uint64,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import HALVES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.iq4_nl import BIAS, unsigned_values
from runtime.kernels.q4_k import minima

_twice = make_shuffle("_twice", [i // 2 for i in range(16)], "i8x8")
# Of (scale, scale * sum) of 8 groups, the scales of 4, each in 4 lanes.
_first_4 = make_shuffle("_first_4", [2 * (i // 4) for i in range(16)], "f32x16")
_last_4 = make_shuffle("_last_4", [8 + 2 * (i // 4) for i in range(16)], "f32x16")


@jit
def unpack_scales(p):
    """The 8 scales of the block at p, less 32: nibble g of bytes 4-7 with bit pair g of bytes 2-3
    on top."""
    low = uint64(ld_u32(p + 4))
    low = (low | (low << uint64(16))) & uint64(0x0000FFFF0000FFFF)
    low = (low | (low << uint64(8))) & uint64(0x00FF00FF00FF00FF)
    low = (low | (low << uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)
    top = uint64(ld_u16(p + 2))
    top = (top | (top << uint64(24))) & uint64(0x000000FF000000FF)
    top = (top | (top << uint64(12))) & uint64(0x000F000F000F000F)
    top = (top | (top << uint64(6))) & uint64(0x0303030303030303)
    return bits_i8x8(low | (top << uint64(4))) - splat_i8x8(int8(32))


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    pairs = xq + k
    mask = keep(splat_i8x64(int8(15)))
    values = unsigned_values()
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        sums = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 136)
            s = cvt_f32x16(cvt_i32x16(_twice(unpack_scales(p))))
            s = s * (f16_splat16(p) * ld_f32x16(pairs + b * 64))
            sums = sums + s
            n = ld_i8x64(p + 8)
            t = dpbusd(zero_i32x16(), lookup16(values, n & mask), ld_i8x64(x))
            n = bits_i8x64(bits_i16x32(n) >> 4)
            t = dpbusd(t, lookup16(values, n & mask), ld_i8x64(x + 64))
            total = fma(cvt_f32x16(t), _first_4(s), total)
            n = ld_i8x64(p + 72)
            t = dpbusd(zero_i32x16(), lookup16(values, n & mask), ld_i8x64(x + 128))
            n = bits_i8x64(bits_i16x32(n) >> 4)
            t = dpbusd(t, lookup16(values, n & mask), ld_i8x64(x + 192))
            other = fma(cvt_f32x16(t), _last_4(s), other)
            p += 136
        st_f32(y + r * 4, hsum(total + other) - float32(BIAS) * hsum(minima(sums)))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    values = unsigned_values()
    for b in range(k // 256):
        d = splat_f32x8(ld_f16(p))
        st(scales + b * 32, cvt_f32x8(cvt_i32x8(unpack_scales(p))) * d)
        for j in range(8):
            n = ld_i8x16(p + 8 + j * 16)
            place = q + b * 256 + j * 32
            st(place, lookup16(values, n & mask))
            st(place + 16, lookup16(values, bits_i8x16(bits_i16x8(n) >> 4) & mask))
        p += 136


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=BIAS, has_offset=False)
