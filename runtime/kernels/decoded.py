"""Loops shared by formats whose weights come out of functions, 64 at a time.

A format of blocks of 256 brings `scales(p)`, the 16 scales of the block at p (f32x16, one for 16
weights), and its weights 64 at a time, j = 0 to 3: either `magnitudes(p, j)` and `signs(p, j)`,
bytes below 64 and 64 bits that are set for minus, or `weights(p, j)`, bytes below 128 that are
`bias` more than the weight. A format of smaller blocks brings `scales(row, i)` (f32x4) and
`weights(row, i)` of the i-th 64 weights of a row. All of them read activations as BYTES_16.

The loops are made around a format's functions.
"""

from gguf_tools.jit import jit
from gguf_tools.simd import (
    cvt_f32x16,
    dpbusd7,
    float32,
    fma,
    hsum,
    int8,
    ld_f32x4,
    ld_f32x16,
    ld_i8x64,
    make_shuffle,
    sel_bits,
    splat_i8x64,
    st,
    st_f32,
    zero_f32x4,
    zero_f32x16,
    zero_i8x64,
    zero_i32x16,
)
from runtime.kernels.ahead import ask_ahead

SIGNED_BIAS = 64  # of the bytes that `signed_rows` makes

# The scales of the i-th 64 weights: 4 groups of 16, each in 4 lanes.
_scales_0 = make_shuffle("_scales_0", [0 + i // 4 for i in range(16)], "f32x16")
_scales_1 = make_shuffle("_scales_1", [4 + i // 4 for i in range(16)], "f32x16")
_scales_2 = make_shuffle("_scales_2", [8 + i // 4 for i in range(16)], "f32x16")
_scales_3 = make_shuffle("_scales_3", [12 + i // 4 for i in range(16)], "f32x16")
_scales_of_4 = make_shuffle("_scales_of_4", [i // 4 for i in range(16)], "f32x4")

twice = make_shuffle("twice", [i // 2 for i in range(16)], "f32x8")
"""Scales of 8 groups of 32 as scales of 16 groups of 16."""

_once = make_shuffle("_once", range(0, 16, 2), "f32x16")


def signed_loops(block_bytes, group, scales, magnitudes, signs):
    """matvec and rows (with one scale for `group` weights) of a format of blocks of 256."""

    @jit
    def dot(p, j, x):
        """Sums of 4 products: the activation takes the sign."""
        q = ld_i8x64(x + j * 64)
        q = sel_bits(signs(p, j), zero_i8x64() - q, q)
        return cvt_f32x16(dpbusd7(zero_i32x16(), magnitudes(p, j), q))

    @jit
    def matvec(w, row_bytes, first, last, xq, y, k):
        dx = xq + k
        for r in range(first, last):
            p = w + r * row_bytes
            total = zero_f32x16()
            other = zero_f32x16()
            for b in range(k // 256):
                x = xq + b * 256
                ask_ahead(p, block_bytes)
                s = scales(p) * ld_f32x16(dx + b * 64)
                total = fma(dot(p, 0, x), _scales_0(s), total)
                other = fma(dot(p, 1, x), _scales_1(s), other)
                total = fma(dot(p, 2, x), _scales_2(s), total)
                other = fma(dot(p, 3, x), _scales_3(s), other)
                p += block_bytes
            st_f32(y + r * 4, hsum(total + other))

    @jit
    def rows(p, q, place, k):
        middle = splat_i8x64(int8(SIGNED_BIAS))
        for b in range(k // 256):
            for j in range(4):
                m = magnitudes(p, j)
                st(q + b * 256 + j * 64, sel_bits(signs(p, j), middle - m, middle + m))
            _store_scales(place, b, group, scales(p))
            p += block_bytes

    return matvec, rows


def biased_loops(block_bytes, group, bias, scales, weights):
    """matvec and rows of a format of blocks of 256 whose bytes are `bias` more than the weights."""

    @jit
    def dot(p, j, x):
        return cvt_f32x16(dpbusd7(zero_i32x16(), weights(p, j), ld_i8x64(x + j * 64)))

    @jit
    def matvec(w, row_bytes, first, last, xq, y, k):
        dx = xq + k
        sums = dx + k // 4
        for r in range(first, last):
            p = w + r * row_bytes
            total = zero_f32x16()
            other = zero_f32x16()
            below = zero_f32x16()
            for b in range(k // 256):
                x = xq + b * 256
                ask_ahead(p, block_bytes)
                s = scales(p) * ld_f32x16(dx + b * 64)
                below = fma(s, ld_f32x16(sums + b * 64), below)
                total = fma(dot(p, 0, x), _scales_0(s), total)
                other = fma(dot(p, 1, x), _scales_1(s), other)
                total = fma(dot(p, 2, x), _scales_2(s), total)
                other = fma(dot(p, 3, x), _scales_3(s), other)
                p += block_bytes
            st_f32(y + r * 4, hsum(total + other) - float32(bias) * hsum(below))

    @jit
    def rows(p, q, place, k):
        for b in range(k // 256):
            for j in range(4):
                st(q + b * 256 + j * 64, weights(p, j))
            _store_scales(place, b, group, scales(p))
            p += block_bytes

    return matvec, rows


def short_loops(bytes_per_64, bias, scales, weights):
    """matvec and rows (with one scale for 16 weights) of a format of blocks of 64 or 128."""

    @jit
    def matvec(w, row_bytes, first, last, xq, y, k):
        dx = xq + k
        sums = dx + k // 4
        for r in range(first, last):
            row = w + r * row_bytes
            total = zero_f32x16()
            below = zero_f32x4()
            for i in range(k // 64):
                ask_ahead(row + i * bytes_per_64, bytes_per_64)
                s = scales(row, i) * ld_f32x4(dx + i * 16)
                below = fma(s, ld_f32x4(sums + i * 16), below)
                t = dpbusd7(zero_i32x16(), weights(row, i), ld_i8x64(xq + i * 64))
                total = fma(cvt_f32x16(t), _scales_of_4(s), total)
            st_f32(y + r * 4, hsum(total) - float32(bias) * hsum(below))

    @jit
    def rows(row, q, place, k):
        for i in range(k // 64):
            st(q + i * 64, weights(row, i))
            st(place + i * 16, scales(row, i))

    return matvec, rows


@jit
def _store_scales(place, b, group, scales):
    if group == 32:
        st(place + b * 32, _once(scales))
    else:
        st(place + b * 64, scales)
