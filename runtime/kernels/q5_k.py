"""Q5_K on the CPU: 176 bytes per 256 weights, as Q4_K with 32 bytes of high bits before the
nibbles: bits 2j and 2j + 1 of byte i belong to weights i and i + 32 of the j-th 64."""

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    bits_i8x32,
    bits_i8x64,
    bits_i16x16,
    bits_i16x32,
    cvt_f32x16,
    dpbusd7,
    fma,
    hsum,
    int8,
    keep,
    ld_i8x16,
    ld_i8x32,
    ld_i8x64,
    make_constant,
    make_shuffle,
    sel_test,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    zero_f32x16,
    zero_i32x16,
)
from runtime.kernels.activations import NIBBLES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_k import (
    even_scales,
    first_halves,
    last_halves,
    minima,
    odd_scales,
    scale_pairs,
    store_scales,
)

_even_bits = make_constant("_even_bits", [1 << 2 * i for i in range(4) for _ in range(16)], "i8x64")
_odd_bits = make_constant(
    "_odd_bits",
    [(2 << 2 * i) - 256 * (i == 3) for i in range(4) for _ in range(16)],
    "i8x64",
)
_four_times = make_shuffle("_four_times", [i % 16 for i in range(64)], "i8x16")


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    pairs = xq + k
    mask = keep(splat_i8x64(int8(15)))
    bit = keep(splat_i8x64(int8(16)))
    even_bits = keep(_even_bits())
    odd_bits = keep(_odd_bits())
    for r in range(first, last):
        p = w + r * row_bytes
        total = zero_f32x16()
        other = zero_f32x16()
        sums = zero_f32x16()
        for b in range(k // 256):
            x = xq + b * 256
            ask_ahead(p, 176)
            s = scale_pairs(p, pairs + b * 64)
            sums = sums + s
            front = ld_i8x64(p + 48)
            back = ld_i8x64(p + 112)
            top = _four_times(ld_i8x16(p + 16))
            n = first_halves(front, back)
            q = n & mask
            q = sel_test(top, even_bits, q + bit, q)
            t = dpbusd7(zero_i32x16(), q, ld_i8x64(x))
            q = bits_i8x64(bits_i16x32(n) >> 4) & mask
            q = sel_test(top, odd_bits, q + bit, q)
            u = dpbusd7(zero_i32x16(), q, ld_i8x64(x + 64))
            top = _four_times(ld_i8x16(p + 32))
            n = last_halves(front, back)
            q = n & mask
            q = sel_test(top, even_bits, q + bit, q)
            t = dpbusd7(t, q, ld_i8x64(x + 128))
            q = bits_i8x64(bits_i16x32(n) >> 4) & mask
            q = sel_test(top, odd_bits, q + bit, q)
            u = dpbusd7(u, q, ld_i8x64(x + 192))
            total = fma(cvt_f32x16(t), even_scales(s), total)
            other = fma(cvt_f32x16(u), odd_scales(s), other)
            p += 176
        st_f32(y + r * 4, hsum(total + other) - hsum(minima(sums)))


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


KERNELS = FormatKernels(matvec, NIBBLES_32, rows, group=32, bias=0, has_offset=True)
