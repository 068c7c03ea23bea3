"""F32, F16 and BF16 weights on the CPU: float32 arithmetic, any row length."""

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    cvt_f32x16,
    float32,
    fma,
    hsum,
    ld_bf16,
    ld_bf16x16,
    ld_f16,
    ld_f16x16,
    ld_f32,
    ld_f32x16,
    st,
    st_f32,
    zero_f32x16,
)
from runtime.kernels.activations import FLOATS
from runtime.kernels.ahead import ask_ahead
from runtime.kernels.formats import FormatKernels


@kernel("iiiicci")
def matvec_f32(w, row_bytes, first, last, x, y, k):
    for r in range(first, last):
        p = w + r * row_bytes
        even = zero_f32x16()
        odd = zero_f32x16()
        for i in range(0, k - 31, 32):
            ask_ahead(p + i * 4, 128)
            even = fma(ld_f32x16(p + i * 4), ld_f32x16(x + i * 4), even)
            odd = fma(ld_f32x16(p + i * 4 + 64), ld_f32x16(x + i * 4 + 64), odd)
        tail = float32(0.0)
        for i in range(k & ~31, k):
            tail += ld_f32(p + i * 4) * ld_f32(x + i * 4)
        st_f32(y + r * 4, hsum(even + odd) + tail)


@kernel("iiiicci")
def matvec_f16(w, row_bytes, first, last, x, y, k):
    for r in range(first, last):
        p = w + r * row_bytes
        even = zero_f32x16()
        odd = zero_f32x16()
        for i in range(0, k - 31, 32):
            ask_ahead(p + i * 2, 64)
            even = fma(cvt_f32x16(ld_f16x16(p + i * 2)), ld_f32x16(x + i * 4), even)
            odd = fma(cvt_f32x16(ld_f16x16(p + i * 2 + 32)), ld_f32x16(x + i * 4 + 64), odd)
        tail = float32(0.0)
        for i in range(k & ~31, k):
            tail += ld_f16(p + i * 2) * ld_f32(x + i * 4)
        st_f32(y + r * 4, hsum(even + odd) + tail)


@kernel("iiiicci")
def matvec_bf16(w, row_bytes, first, last, x, y, k):
    for r in range(first, last):
        p = w + r * row_bytes
        even = zero_f32x16()
        odd = zero_f32x16()
        for i in range(0, k - 31, 32):
            ask_ahead(p + i * 2, 64)
            even = fma(cvt_f32x16(ld_bf16x16(p + i * 2)), ld_f32x16(x + i * 4), even)
            odd = fma(cvt_f32x16(ld_bf16x16(p + i * 2 + 32)), ld_f32x16(x + i * 4 + 64), odd)
        tail = float32(0.0)
        for i in range(k & ~31, k):
            tail += ld_bf16(p + i * 2) * ld_f32(x + i * 4)
        st_f32(y + r * 4, hsum(even + odd) + tail)


@kernel("iiiii")
def rows_f32(p, values, scales, offsets, k):
    for i in range(0, k - 15, 16):
        st(values + i * 4, ld_f32x16(p + i * 4))
    for i in range(k & ~15, k):
        st_f32(values + i * 4, ld_f32(p + i * 4))


@kernel("iiiii")
def rows_f16(p, values, scales, offsets, k):
    for i in range(0, k - 15, 16):
        st(values + i * 4, cvt_f32x16(ld_f16x16(p + i * 2)))
    for i in range(k & ~15, k):
        st_f32(values + i * 4, ld_f16(p + i * 2))


@kernel("iiiii")
def rows_bf16(p, values, scales, offsets, k):
    for i in range(0, k - 15, 16):
        st(values + i * 4, cvt_f32x16(ld_bf16x16(p + i * 2)))
    for i in range(k & ~15, k):
        st_f32(values + i * 4, ld_bf16(p + i * 2))


F32 = FormatKernels(matvec_f32, FLOATS, rows_f32)
F16 = FormatKernels(matvec_f16, FLOATS, rows_f16)
BF16 = FormatKernels(matvec_bf16, FLOATS, rows_bf16)
