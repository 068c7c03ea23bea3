"""Norms, rope, sums, factors and caps.

Buffers appear in arguments as base | bytes per thread | bytes per token; the second is 0 for
buffers that all threads share. Shared buffers may be written up to 31 floats past their width.
"""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    first_lane,
    float32,
    fma,
    hsum,
    ld_f32,
    ld_f32x16,
    splat_f32x4,
    splat_f32x16,
    st,
    st_f32,
    vsqrt,
    zero_f32x16,
)
from runtime.kernels.functions import over_exp, tanh16
from runtime.kernels.interpreter import ROWS, arg, float_arg, n_tokens, position


@jit
def _sum(x, n):
    total = zero_f32x16()
    for i in range(0, n - 15, 16):
        total = total + ld_f32x16(x + i * 4)
    rest = hsum(total)
    for i in range(n & ~15, n):
        rest += ld_f32(x + i * 4)
    return rest


@jit
def _square_sum(x, n):
    squares = zero_f32x16()
    for i in range(0, n - 15, 16):
        v = ld_f32x16(x + i * 4)
        squares = fma(v, v, squares)
    total = hsum(squares)
    for i in range(n & ~15, n):
        v1 = ld_f32(x + i * 4)
        total += v1 * v1
    return total


@jit
def _scale_to_one(x, weight, out, n, epsilon):
    """out = x / sqrt(mean of squares + epsilon) * weight"""
    mean = _square_sum(x, n) / float32(n) + epsilon
    s1 = float32(1.0) / first_lane(vsqrt(splat_f32x4(mean)))  # no function of the C library
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
        _scale_to_one(x, arg(op, 6), y, width, float_arg(op, 9))


@jit
def _centre(x, y, n):
    """y = x minus its mean"""
    mean1 = _sum(x, n) / float32(n)
    mean = splat_f32x16(mean1)
    for i in range(0, n - 15, 16):
        st(y + i * 4, ld_f32x16(x + i * 4) - mean)
    for i in range(n & ~15, n):
        st_f32(y + i * 4, ld_f32(x + i * 4) - mean1)


@kernel("iiiii")
def layer_norm(op, state, thread, first, last):
    """source 0-2, target 3-5, weight 6, bias 7 (0: none), bytes of both from group to group 8,
    width 9, groups per token 10, epsilon 11; unit: a group"""
    n = arg(op, 9)
    groups = arg(op, 10)
    for item in range(first, last):
        t = item // groups
        g = item - t * groups
        y = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5) + g * n * 4
        _centre(arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2) + g * n * 4, y, n)
        weight = arg(op, 6) + g * arg(op, 8)
        _scale_to_one(y, weight, y, n, float_arg(op, 11))
        if arg(op, 7):
            bias = arg(op, 7) + g * arg(op, 8)
            for i in range(0, n - 15, 16):
                st(y + i * 4, ld_f32x16(y + i * 4) + ld_f32x16(bias + i * 4))
            for i in range(n & ~15, n):
                st_f32(y + i * 4, ld_f32(y + i * 4) + ld_f32(bias + i * 4))


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
def scale(op, state, thread, first, last):
    """target 0-2 *= factor 3; width 4; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 4))
    factor = splat_f32x16(float_arg(op, 3))
    for t in range(n_tokens(state)):
        y = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for i in range(first * ROWS, end, 16):
            st(y + i * 4, ld_f32x16(y + i * 4) * factor)


@kernel("iiiii")
def softcap(op, state, thread, first, last):
    """target 0-2 = cap 3 * tanh(target / cap); width 4; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 4))
    cap = splat_f32x16(float_arg(op, 3))
    for t in range(n_tokens(state)):
        y = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for i in range(first * ROWS, end, 16):
            st(y + i * 4, cap * tanh16(ld_f32x16(y + i * 4) / cap))


@kernel("iiiii")
def sigmoid_scale(op, state, thread, first, last):
    """target 3-5 *= sigmoid of the one number in gate 0-2; width 6; unit: 32 columns"""
    end = min(last * ROWS, arg(op, 6))
    for t in range(n_tokens(state)):
        gate = splat_f32x16(ld_f32(arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)))
        y = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        for i in range(first * ROWS, end, 16):
            st(y + i * 4, over_exp(ld_f32x16(y + i * 4), gate))


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
