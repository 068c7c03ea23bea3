"""Q5_0 on the CPU: 22 bytes per 32 weights, f16 d | 32 high bits | 16 x 2 nibbles;
weight = d * (q - 16)."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x8,
    bits_i8x16,
    bits_i8x64,
    bits_i16x8,
    bits_i16x32,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
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
    ld_u16,
    make_constant,
    make_shuffle,
    sel_bits,
    sel_test,
    splat_i8x16,
    splat_i8x64,
    st,
    st_f32,
    to_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i8x16,
    zero_i32x4,
    zero_i32x16,
)
from runtime.kernels.activations import HALVES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_0 import even, odd

each_bit = make_constant("each_bit", [1, 2, 4, 8, 16, 32, 64, -128] * 8, "i8x64")


def lanes(start: int, count: int, repeat: int = 1) -> list[int]:
    """Bytes start to start + count of 4 blocks, each `repeat` times, where a block has 22 bytes
    and the 88 are loaded as bytes 0-63 and 24-87."""
    places = [22 * b + start + i for b in range(4) for i in range(count) for _ in range(repeat)]
    return [at if at < 64 else 64 + at - 24 for at in places]


_nibbles = make_shuffle("_nibbles", lanes(6, 16), "i8x64", two=True)
_low_bits = make_shuffle("_low_bits", lanes(2, 2, 8), "i8x64", two=True)
_high_bits = make_shuffle("_high_bits", lanes(4, 2, 8), "i8x64", two=True)
_scales = make_shuffle(
    "_scales",
    [at for b in range(4) for at in 2 * lanes(0, 2)[2 * b : 2 * b + 2]],
    "i8x64",
    two=True,
)


@jit
def halves_of_block(p, bits):
    """The 16 first and the 16 last weights of a block, whose 32 high bits are at `bits`."""
    mask = splat_i8x16(int8(15))
    bit = splat_i8x16(int8(16))
    n = ld_i8x16(p)
    low = (n & mask) | sel_bits(ld_u16(bits), bit, zero_i8x16())
    high = bits_i8x16(bits_i16x8(n) >> 4) & mask
    return low, high | sel_bits(ld_u16(bits + 2), bit, zero_i8x16())


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    mask = keep(splat_i8x64(int8(15)))
    bit = keep(splat_i8x64(int8(16)))
    each = keep(each_bit())
    if n_blocks < 4:
        _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks)
        return
    for r in range(first, last):
        row = w + r * row_bytes
        end = row + row_bytes - 88
        total = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 88, end)
            x = xq + g * 128
            ask_ahead(p, 88)
            head = ld_i8x64(p)
            tail = ld_i8x64(p + 24)
            n = _nibbles(head, tail)
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(_scales(head, tail))) * ld_f32x8(pairs + g * 32)
            q = n & mask
            q = sel_test(_low_bits(head, tail), each, q + bit, q)
            t = dpbusd(zero_i32x16(), q, ld_i8x64(x))
            q = bits_i8x64(bits_i16x32(n) >> 4) & mask
            q = sel_test(_high_bits(head, tail), each, q + bit, q)
            t = dpbusd(t, q, ld_i8x64(x + 64))
            total = fma(cvt_f32x16(t), even(d), total)
            sums = sums + d
        st_f32(y + r * 4, hsum(total) - float32(16.0) * hsum(odd(sums)))


@jit
def _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks):
    """Rows of less than 4 blocks."""
    for r in range(first, last):
        result = float32(0.0)
        for b in range(n_blocks):
            p = w + r * row_bytes + b * 22
            low, high = halves_of_block(p + 6, p + 2)
            t = dpbusd(zero_i32x4(), low, ld_i8x16(xq + b * 16))
            t = dpbusd(t, high, ld_i8x16(xq + b * 16 + 64))
            less = float32(16.0) * ld_f32(pairs + b * 8 + 4)
            result += ld_f16(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8) - less)
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    for b in range(k // 32):
        first_16, last_16 = halves_of_block(p + 6, p + 2)
        st(q + b * 32, first_16)
        st(q + b * 32 + 16, last_16)
        st_f32(scales + b * 4, ld_f16(p))
        p += 22


KERNELS = FormatKernels(matvec, HALVES_32, rows, group=32, bias=16, has_offset=False)
