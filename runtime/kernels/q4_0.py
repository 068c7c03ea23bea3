"""Q4_0 on the CPU: 18 bytes per 32 weights, f16 d | 16 x 2 nibbles; weight = d * (q - 8)."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x8,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd7,
    float32,
    fma,
    hsum,
    int8,
    keep,
    ld_f16,
    ld_f32,
    ld_f32x8,
    ld_i8x16,
    ld_i8x64,
    make_shuffle,
    splat_i8x16,
    splat_i8x64,
    st,
    st_f32,
    to_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i32x4,
    zero_i32x16,
)
from runtime.kernels.activations import HALVES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels


def _lanes(start: int, count: int, repeat: int = 1) -> list[int]:
    """Bytes start to start + count of 4 blocks (72 bytes), `repeat` times for each block, in two
    loads: of bytes 0-63 and of 8-71."""
    places = [18 * b + start + i for b in range(4) for _ in range(repeat) for i in range(count)]
    return [at if at < 64 else 64 + at - 8 for at in places]


nibbles_of_4 = make_shuffle("nibbles_of_4", _lanes(2, 16), "i8x64", two=True)
scales_of_4 = make_shuffle("scales_of_4", _lanes(0, 2, 2), "i8x64", two=True)
even = make_shuffle("even", [2 * (i // 4) for i in range(16)], "f32x8")
odd = make_shuffle("odd", [1, 3, 5, 7], "f32x8")


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    mask = keep(splat_i8x64(int8(15)))
    if n_blocks < 4:
        _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks)
        return
    for r in range(first, last):
        row = w + r * row_bytes
        end = row + row_bytes - 72
        total = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 72, end)
            x = xq + g * 128
            ask_ahead(p, 72)
            head = ld_i8x64(p)
            tail = ld_i8x64(p + 8)
            n = nibbles_of_4(head, tail)
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(scales_of_4(head, tail))) * ld_f32x8(pairs + g * 32)
            t = dpbusd7(zero_i32x16(), n & mask, ld_i8x64(x))
            t = dpbusd7(t, bits_i8x64(bits_i16x32(n) >> 4) & mask, ld_i8x64(x + 64))
            total = fma(cvt_f32x16(t), even(d), total)
            sums = sums + d
        st_f32(y + r * 4, hsum(total) - float32(8.0) * hsum(odd(sums)))


@jit
def _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks):
    """Rows of less than 4 blocks."""
    mask = splat_i8x16(int8(15))
    for r in range(first, last):
        result = float32(0.0)
        for b in range(n_blocks):
            p = w + r * row_bytes + b * 18
            n = ld_i8x16(p + 2)
            t = dpbusd7(zero_i32x4(), n & mask, ld_i8x16(xq + b * 16))
            t = dpbusd7(t, bits_i8x16(bits_i16x8(n) >> 4) & mask, ld_i8x16(xq + b * 16 + 64))
            less = float32(8.0) * ld_f32(pairs + b * 8 + 4)
            result += ld_f16(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8) - less)
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    for b in range(k // 32):
        n = ld_i8x16(p + 2)
        st(q + b * 32, n & mask)
        st(q + b * 32 + 16, bits_i8x16(bits_i16x8(n) >> 4) & mask)
        st_f32(scales + b * 4, ld_f16(p))
        p += 18


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=8, has_offset=False)
