"""Q4_1 on the CPU: 20 bytes per 32 weights, f16 d | f16 m | 16 x 2 nibbles; weight = d * q + m."""

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
from runtime.kernels.q4_0 import even, odd


def _lanes(start: int, count: int) -> list[int]:
    """Bytes start to start + count of 4 blocks (80 bytes), in two loads: of bytes 0-63 and of
    16-79."""
    places = [20 * b + start + i for b in range(4) for i in range(count)]
    return [at if at < 64 else 64 + at - 16 for at in places]


_nibbles = make_shuffle("_nibbles", _lanes(4, 16), "i8x64", two=True)
_scales = make_shuffle("_scales", _lanes(0, 4), "i8x64", two=True)


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
        end = row + row_bytes - 80
        total = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 80, end)
            x = xq + g * 128
            ask_ahead(p, 80)
            head = ld_i8x64(p)
            tail = ld_i8x64(p + 16)
            n = _nibbles(head, tail)
            # (d * dx, m * dx * sum) of each block
            dm = cvt_f32x8(bits_f16x8(_scales(head, tail))) * ld_f32x8(pairs + g * 32)
            t = dpbusd7(zero_i32x16(), n & mask, ld_i8x64(x))
            t = dpbusd7(t, bits_i8x64(bits_i16x32(n) >> 4) & mask, ld_i8x64(x + 64))
            total = fma(cvt_f32x16(t), even(dm), total)
            sums = sums + dm
        st_f32(y + r * 4, hsum(total) + hsum(odd(sums)))


@jit
def _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks):
    """Rows of less than 4 blocks."""
    mask = splat_i8x16(int8(15))
    for r in range(first, last):
        result = float32(0.0)
        for b in range(n_blocks):
            p = w + r * row_bytes + b * 20
            n = ld_i8x16(p + 4)
            t = dpbusd7(zero_i32x4(), n & mask, ld_i8x16(xq + b * 16))
            t = dpbusd7(t, bits_i8x16(bits_i16x8(n) >> 4) & mask, ld_i8x16(xq + b * 16 + 64))
            result += ld_f16(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8))
            result += ld_f16(p + 2) * ld_f32(pairs + b * 8 + 4)
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    mask = splat_i8x16(int8(15))
    for b in range(k // 32):
        n = ld_i8x16(p + 4)
        st(q + b * 32, n & mask)
        st(q + b * 32 + 16, bits_i8x16(bits_i16x8(n) >> 4) & mask)
        st_f32(scales + b * 4, ld_f16(p))
        st_f32(offsets + b * 4, ld_f16(p + 2))
        p += 20


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=0, has_offset=True)
