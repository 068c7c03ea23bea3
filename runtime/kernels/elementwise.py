"""Norms, rope, gates and sums.

Buffers appear in arguments as base | bytes per thread | bytes per token; the second is 0 for
buffers that all threads share. Shared buffers may be written up to 31 floats past their width.
"""

import numpy as np
from numba import float32, int32

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f32x16,
    cvt_i32x16,
    fma,
    hsum,
    ld_f32,
    ld_f32x16,
    splat_f32x16,
    splat_i32x16,
    st,
    st_f32,
    vmax,
    vmin,
    vrint,
    zero_f32x16,
)
from runtime.kernels.interpreter import ROWS, arg, float_arg, n_tokens, position


@jit
def exp16(x):
    """exp of 16 floats within 2 units in the last place; clamped to [-87, 88] (Cephes, expf)."""
    x = vmin(vmax(x, splat_f32x16(float32(-87.0))), splat_f32x16(float32(88.0)))
    n = vrint(x * splat_f32x16(float32(1.4426950408889634)))
    r = fma(n, splat_f32x16(float32(-0.693359375)), x)
    r = fma(n, splat_f32x16(float32(2.12194440e-4)), r)
    p = splat_f32x16(float32(1.9875691500e-4))
    p = fma(p, r, splat_f32x16(float32(1.3981999507e-3)))
    p = fma(p, r, splat_f32x16(float32(8.3334519073e-3)))
    p = fma(p, r, splat_f32x16(float32(4.1665795894e-2)))
    p = fma(p, r, splat_f32x16(float32(1.6666665459e-1)))
    p = fma(p, r, splat_f32x16(float32(5.0000001201e-1)))
    p = fma(p, r * r, r) + splat_f32x16(float32(1.0))
    return p * bits_f32x16((cvt_i32x16(n) + splat_i32x16(int32(127))) << 23)


@jit
def _norm(x, weight, out, n, epsilon):
    squares = zero_f32x16()
    for i in range(0, n - 15, 16):
        v = ld_f32x16(x + i * 4)
        squares = fma(v, v, squares)
    total = hsum(squares)
    for i in range(n & ~15, n):
        v1 = ld_f32(x + i * 4)
        total += v1 * v1
    s1 = float32(1.0) / np.sqrt(total / float32(n) + epsilon)
    s = splat_f32x16(s1)
    for i in range(0, n - 15, 16):
        st(out + i * 4, ld_f32x16(x + i * 4) * s * ld_f32x16(weight + i * 4))
    for i in range(n & ~15, n):
        st_f32(out + i * 4, ld_f32(x + i * 4) * s1 * ld_f32(weight + i * 4))


@kernel("iiiii")
def rms_norm(op, state, thread, first, last):
    """source 0-2, target 3-5, weight 6, width 7, groups per token 8, epsilon 9; unit: a group"""
    source = arg(op, 0) + thread * arg(op, 1)
    target = arg(op, 3) + thread * arg(op, 4)
    width = arg(op, 7)
    groups = arg(op, 8)
    for item in range(first, last):
        t = item // groups
        along = (item - t * groups) * width * 4
        x = source + t * arg(op, 2) + along
        y = target + t * arg(op, 5) + along
        _norm(x, arg(op, 6), y, width, float_arg(op, 9))


@kernel("iiiii")
def add(op, state, thread, first, last):
    """target 3-5 += source 0-2; width 6; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 6))
    for t in range(n_tokens(state)):
        x = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        y = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        for i in range(first * ROWS, end, 16):
            st(y + i * 4, ld_f32x16(y + i * 4) + ld_f32x16(x + i * 4))


@kernel("iiiii")
def add_bias(op, state, thread, first, last):
    """target 0-2 += bias 3 (padded to 32); width 4; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 4))
    for t in range(n_tokens(state)):
        y = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for i in range(first * ROWS, end, 16):
            st(y + i * 4, ld_f32x16(y + i * 4) + ld_f32x16(arg(op, 3) + i * 4))


@kernel("iiiii")
def gate_silu(op, state, thread, first, last):
    """target 6-8 = silu(gate 0-2) * up 3-5; width 9; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 9))
    one = splat_f32x16(float32(1.0))
    for t in range(n_tokens(state)):
        g = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        u = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        y = arg(op, 6) + thread * arg(op, 7) + t * arg(op, 8)
        for i in range(first * ROWS, end, 16):
            v = ld_f32x16(g + i * 4)
            silu = v / (one + exp16(zero_f32x16() - v))
            st(y + i * 4, silu * ld_f32x16(u + i * 4))


@kernel("iiiii")
def rope(op, state, thread, first, last):
    """target 0-2, heads 3, head_dim 4, n_dims 5, interleaved 6, cosines 7, sines 8; unit: a head"""
    heads = arg(op, 3)
    half = arg(op, 5) // 2
    for item in range(first, last):
        t = item // heads
        x = arg(op, 0) + t * arg(op, 2) + (item - t * heads) * arg(op, 4) * 4
        angle = (position(state) + t) * half * 4
        cosines = arg(op, 7) + angle
        sines = arg(op, 8) + angle
        a_step, b_place = 4, half * 4
        if arg(op, 6):
            a_step, b_place = 8, 4
        for i in range(half):
            a = ld_f32(x + i * a_step)
            b = ld_f32(x + i * a_step + b_place)
            c = ld_f32(cosines + i * 4)
            s = ld_f32(sines + i * 4)
            st_f32(x + i * a_step, a * c - b * s)
            st_f32(x + i * a_step + b_place, a * s + b * c)
