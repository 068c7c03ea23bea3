"""Rotary positions, and queries, keys and values on their way to attention.

The cache of a layer is [kv head][position][dim, padded] of keys, and of values: float16 bits, or
int8 with a float16 scale for each 32 (q8_0: the largest / 127). A step begins at position state[0].
"""

import math

import numpy as np
from numba import cuda, types
from numpy import float32, int32

from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import half, nearest, to_half
from runtime.kernels.cuda.warps import block_sum, warp_max

MOST, LARGEST_HALF = np.float32(127), np.float32(65504)


@cuda.jit(device=True)
def turn(x, base, n_dims, interleaved, cosines, sines, position):
    """Turn the first n_dims of the head at x[base]: the work of a block."""
    half = n_dims // 2
    angles = position * half
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        first, second = base + i, base + half + i
        if interleaved:
            first, second = base + 2 * i, base + 2 * i + 1
        cosine, sine = cosines[angles + i], sines[angles + i]
        a, b = x[first], x[second]
        x[first] = a * cosine - b * sine
        x[second] = a * sine + b * cosine


@cuda.jit(device=True)
def norm_head(x, base, dim, weight, epsilon, shared):
    """RMSNorm of the head at x[base], in place: the work of a block."""
    squares = float32(0)
    for i in range(cuda.threadIdx.x, dim, cuda.blockDim.x):
        squares += x[base + i] * x[base + i]
    squares = block_sum(squares, shared)
    inverse = float32(1) / math.sqrt(squares / float32(int32(dim)) + epsilon)
    for i in range(cuda.threadIdx.x, dim, cuda.blockDim.x):
        x[base + i] = x[base + i] * inverse * weight[i]


@cuda.jit(device=True)
def keep_f16(x, source, numbers, scales, target, dim, padded):
    """Put the head at x[source] in the cache: the work of a block."""
    for i in range(cuda.threadIdx.x, dim, cuda.blockDim.x):
        numbers[target + i] = to_half(x[source + i])


@cuda.jit(device=True)
def keep_q8_0(x, source, numbers, scales, target, dim, padded):
    """The same, a warp for each 32."""
    for i in range(cuda.threadIdx.x, padded, cuda.blockDim.x):
        value = x[source + i] if i < dim else float32(0)
        bits = to_half(min(warp_max(abs(value)) / MOST, LARGEST_HALF))
        scale = half(bits)
        q = 0
        if scale > float32(0):
            # The scale is a rounded one: where it is tiny, a value may be more than 127 times it.
            q = nearest(max(min(value / scale, MOST), -MOST))
        numbers[target + i] = q
        if i % 32 == 0:
            scales[(target + i) >> 5] = bits


@kernel("rope")
def rope(x, stride, head_dim, n_dims, interleaved, cosines, sines, state):
    """Turn every head; a block for each head of each token."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    base = token * stride + head * head_dim
    turn(x, base, n_dims, interleaved, cosines, sines, state[0] + token)


def _make_store(name, keep):
    @kernel(f"{name}_store")
    def store(
        q,
        q_stride,
        k,
        k_stride,
        v,
        v_stride,
        n_heads,  # of q that are normed or turned: all, or none
        n_kv_heads,
        has_norms,
        q_weight,
        q_epsilon,
        k_weight,
        k_epsilon,
        n_dims,  # of a head that turn
        interleaved,
        cosines,
        sines,
        keys,
        key_scales,
        key_dim,
        key_padded,
        values,
        value_scales,
        value_dim,
        value_padded,
        n_ctx,
        state,
    ):
        """Norm and turn queries and keys; keys and values to the cache; a block for each head."""
        shared = cuda.shared.array(32, types.float32)
        head, token = cuda.blockIdx.x, cuda.blockIdx.y
        position = state[0] + token
        if head < n_heads:
            base = token * q_stride + head * key_dim
            if has_norms:
                norm_head(q, base, key_dim, q_weight, q_epsilon, shared)
                cuda.syncthreads()
            turn(q, base, n_dims, interleaved, cosines, sines, position)
        elif head < n_heads + n_kv_heads:
            head -= n_heads
            base = token * k_stride + head * key_dim
            if has_norms:
                norm_head(k, base, key_dim, k_weight, k_epsilon, shared)
                cuda.syncthreads()
            turn(k, base, n_dims, interleaved, cosines, sines, position)
            cuda.syncthreads()
            target = (head * n_ctx + position) * key_padded
            keep(k, base, keys, key_scales, target, key_dim, key_padded)
        else:
            head -= n_heads + n_kv_heads
            base = token * v_stride + head * value_dim
            target = (head * n_ctx + position) * value_padded
            keep(v, base, values, value_scales, target, value_dim, value_padded)

    return store


STORE = {"f16": _make_store("f16", keep_f16), "q8_0": _make_store("q8_0", keep_q8_0)}
