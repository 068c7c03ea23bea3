"""Q4_K on the CPU: 144 bytes per 256 weights, f16 d | f16 dmin | 12 bytes of 6-bit scales and
minima | 128 x 2 nibbles; weight = d * scale * q - dmin * minimum."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x16,
    bits_i8x16,
    bits_i8x32,
    bits_i8x64,
    bits_i16x8,
    bits_i16x16,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd7,
    fma,
    hsum,
    int8,
    keep,
    ld_f16,
    ld_f32x16,
    ld_i8x16,
    ld_i8x32,
    ld_i8x64,
    ld_i32,
    make_constant,
    make_shuffle,
    splat_f32x8,
    splat_i8x32,
    splat_i8x64,
    splat_i32x8,
    st,
    st_f32,
    ucvt_i32x8,
    ucvt_i32x16,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import NIBBLES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels

# Of each 32 bytes in two loads, the first and the last 16: the order of NIBBLES_32.
first_halves = make_shuffle(
    "first_halves", [32 * i + j for i in range(4) for j in range(16)], "i8x64", two=True
)
last_halves = make_shuffle(
    "last_halves", [32 * i + j for i in range(4) for j in range(16, 32)], "i8x64", two=True
)

# Bytes of a block: d and dmin in 0-3, the low 6 bits of scales 0-3 in 4-7 and of minima 0-3 in
# 8-11, with the top 2 bits of scales and minima 4-7 above them, and their low nibbles in 12-15.
_parts = make_shuffle(
    "_parts", [4, 8, 5, 9, 6, 10, 7, 11, *(12 + i // 2 for i in range(8))], "i8x16"
)
_moved_up = make_shuffle("_moved_up", [0] * 8 + list(range(8)), "i8x16")
_low_mask = make_constant("_low_mask", [63] * 8 + [15, 0] * 4, "i8x16")
_nibble_mask = make_constant("_nibble_mask", [0] * 8 + [0, 15] * 4, "i8x16")
_top_mask = make_constant("_top_mask", [0] * 8 + [48] * 8, "i8x16")

_scales_of_8 = make_shuffle("_scales_of_8", range(0, 16, 2), "i8x16")
_minima_of_8 = make_shuffle("_minima_of_8", range(1, 16, 2), "i8x16")
even_scales = make_shuffle("even_scales", [4 * (i // 4) for i in range(16)], "f32x16")
odd_scales = make_shuffle("odd_scales", [4 * (i // 4) + 2 for i in range(16)], "f32x16")
minima = make_shuffle("minima", range(1, 16, 2), "f32x16")


@jit
def unpack_scales(p):
    """The 8 scales and 8 minima of the block at p by turns, as 16 bytes."""
    packed = _parts(ld_i8x16(p))
    words = bits_i16x8(packed)
    low = (packed & _low_mask()) | (bits_i8x16(words >> 4) & _nibble_mask())
    return low | (_moved_up(bits_i8x16(words >> 2)) & _top_mask())


@jit
def scale_pairs(p, pairs):
    """f32x16: d * scale * dx and dmin * minimum * dx * sum by turns, for the 8 groups of 32."""
    d = cvt_f32x16(bits_f16x16(splat_i32x8(ld_i32(p))))
    return cvt_f32x16(ucvt_i32x16(unpack_scales(p))) * (d * ld_f32x16(pairs))


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    pairs = xq + k
    mask = keep(splat_i8x64(int8(15)))
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        sums = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 144)
            s = scale_pairs(p, pairs + b * 64)
            sums = sums + s
            front = ld_i8x64(p + 16)
            back = ld_i8x64(p + 80)
            n = first_halves(front, back)
            t = dpbusd7(zero_i32x16(), n & mask, ld_i8x64(x))
            u = dpbusd7(zero_i32x16(), bits_i8x64(bits_i16x32(n) >> 4) & mask, ld_i8x64(x + 64))
            n = last_halves(front, back)
            t = dpbusd7(t, n & mask, ld_i8x64(x + 128))
            u = dpbusd7(u, bits_i8x64(bits_i16x32(n) >> 4) & mask, ld_i8x64(x + 192))
            total = fma(cvt_f32x16(t), even_scales(s), total)
            other = fma(cvt_f32x16(u), odd_scales(s), other)
            p += 144
        st_f32(y + r * 4, hsum(total + other) - hsum(minima(sums)))


@jit
def store_scales(p, scales, offsets):
    """The float32 scales and offsets of the block at p."""
    packed = unpack_scales(p)
    st(scales, cvt_f32x8(ucvt_i32x8(_scales_of_8(packed))) * splat_f32x8(ld_f16(p)))
    st(offsets, cvt_f32x8(ucvt_i32x8(_minima_of_8(packed))) * splat_f32x8(-ld_f16(p + 2)))


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


KERNELS = FormatKernels(matvec, NIBBLES_32, rows, group=32, bias=0, has_offset=True)
