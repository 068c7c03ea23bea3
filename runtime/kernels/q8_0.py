"""Q8_0 on the CPU: 34 bytes per 32 weights, f16 d | 32 x i8."""

from numba import int8

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    cvt_f32x8,
    dpbusd,
    f16_splat8,
    fma,
    hsum,
    ld_f16,
    ld_f32,
    ld_i8x32,
    ld_i32x8,
    splat_f32x8,
    splat_i8x32,
    st,
    st_f32,
    zero_f32x8,
)
from runtime.kernels.activations import BYTES_32
from runtime.kernels.formats import FormatKernels


@jit
def _dot(p, b, xq, scales, corrections, total):
    """One block: weights + 128 as unsigned bytes; the correction takes the 128 out again."""
    unsigned = ld_i8x32(p + 2) ^ splat_i8x32(int8(-128))
    t = dpbusd(ld_i32x8(corrections + b * 32), unsigned, ld_i8x32(xq + b * 32))
    return fma(cvt_f32x8(t), f16_splat8(p) * splat_f32x8(ld_f32(scales + b * 4)), total)


@kernel("iiiiiii")
def matvec(w, row_bytes, first, last, xq, y, k):
    n_blocks = k // 32
    scales = xq + ((k + 127) & ~127)
    corrections = scales + n_blocks * 4
    for r in range(first, last):
        p = w + r * row_bytes
        even = zero_f32x8()
        odd = zero_f32x8()
        for b in range(0, n_blocks - 1, 2):
            even = _dot(p, b, xq, scales, corrections, even)
            odd = _dot(p + 34, b + 1, xq, scales, corrections, odd)
            p += 68
        if n_blocks & 1:
            even = _dot(p, n_blocks - 1, xq, scales, corrections, even)
        st_f32(y + r * 4, hsum(even + odd))


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    flip = splat_i8x32(int8(-128))
    for b in range(k // 32):
        st(q + b * 32, ld_i8x32(p + 2) ^ flip)
        st_f32(scales + b * 4, ld_f16(p))
        p += 34


KERNELS = FormatKernels(matvec, BYTES_32, rows, group=32, span=32, bias=128, has_offset=False)
