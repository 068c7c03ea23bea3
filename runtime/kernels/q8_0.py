"""Q8_0 on the CPU: 34 bytes per 32 weights, f16 d | 32 x i8."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f16x8,
    concat,
    cvt_f32x8,
    cvt_f32x16,
    dpbusd,
    float32,
    fma,
    hsum,
    int8,
    ld_f16,
    ld_f32,
    ld_f32x8,
    ld_i8x32,
    ld_i8x64,
    make_shuffle,
    splat_i8x32,
    splat_i8x64,
    st,
    st_f32,
    to_f32,
    zero_f32x8,
    zero_f32x16,
    zero_i32x8,
    zero_i32x16,
)
from runtime.kernels.activations import BYTES_32
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels
from runtime.kernels.q4_0 import odd

# The halves d of 4 blocks (136 bytes), each twice: at 0 and 34 of the first 64 bytes, and at 68
# and 102, which are 28 and 62 of the 64 bytes from 40 on.
_scales = make_shuffle(
    "_scales",
    [at + i for at in (0, 34, 64 + 28, 64 + 62) for _ in range(2) for i in range(2)],
    "i8x64",
    two=True,
)
_first_2 = make_shuffle("_first_2", [0] * 8 + [2] * 8, "f32x8")
_last_2 = make_shuffle("_last_2", [4] * 8 + [6] * 8, "f32x8")


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    # Weights become unsigned by 128 more; the sums of the activations take it out again.
    n_blocks = k // 32
    pairs = xq + ((k + 127) & ~127)
    flip = splat_i8x64(int8(-128))
    if n_blocks < 4:
        _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks)
        return
    for r in range(first, last):
        row = w + r * row_bytes
        end = row + row_bytes - 136
        even = zero_f32x16()
        odds = zero_f32x16()
        sums = zero_f32x8()
        for g in range((n_blocks + 3) // 4):
            p = min(row + g * 136, end)
            x = xq + g * 128
            ask_ahead(p, 128)
            # (d * dx, d * dx * sum) of each block
            d = cvt_f32x8(bits_f16x8(_scales(ld_i8x64(p), ld_i8x64(p + 40))))
            d = d * ld_f32x8(pairs + g * 32)
            t = concat(ld_i8x32(p + 2), ld_i8x32(p + 36)) ^ flip
            u = concat(ld_i8x32(p + 70), ld_i8x32(p + 104)) ^ flip
            even = fma(cvt_f32x16(dpbusd(zero_i32x16(), t, ld_i8x64(x))), _first_2(d), even)
            odds = fma(cvt_f32x16(dpbusd(zero_i32x16(), u, ld_i8x64(x + 64))), _last_2(d), odds)
            sums = sums + d
        st_f32(y + r * 4, hsum(even + odds) - float32(128.0) * hsum(odd(sums)))


@jit
def _short_rows(w, row_bytes, first, last, xq, pairs, y, n_blocks):
    """Rows of less than 4 blocks."""
    flip = splat_i8x32(int8(-128))
    for r in range(first, last):
        result = float32(0.0)
        for b in range(n_blocks):
            p = w + r * row_bytes + b * 34
            t = dpbusd(zero_i32x8(), ld_i8x32(p + 2) ^ flip, ld_i8x32(xq + b * 32))
            less = float32(128.0) * ld_f32(pairs + b * 8 + 4)
            result += ld_f16(p) * (to_f32(hsum(t)) * ld_f32(pairs + b * 8) - less)
        st_f32(y + r * 4, result)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    flip = splat_i8x32(int8(-128))
    for b in range(k // 32):
        st(q + b * 32, ld_i8x32(p + 2) ^ flip)
        st_f32(scales + b * 4, ld_f16(p))
        p += 34


KERNELS = FormatKernels(matvec, BYTES_32, rows, group=32, bias=128, has_offset=False)
