"""Rotary positions, and keys and values on their way to the cache.

The cache of a layer is [kv head][position][dim, padded] of keys, and of values: float16 bits, or
int8 with a float16 scale for each 32 (q8_0: the largest / 127). A step begins at position state[0].
"""

import numpy as np
from numba import cuda
from numpy import float32

from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import half, nearest, to_half
from runtime.kernels.cuda.warps import warp_max

MOST, LARGEST_HALF = np.float32(127), np.float32(65504)


@kernel("rope")
def rope(x, stride, head_dim, n_dims, interleaved, cosines, sines, state):
    """Turn the first n_dims of every head; a block for each head of each token."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    half = n_dims // 2
    angles = (state[0] + token) * half
    base = token * stride + head * head_dim
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        first, second = base + i, base + half + i
        if interleaved:
            first, second = base + 2 * i, base + 2 * i + 1
        cosine, sine = cosines[angles + i], sines[angles + i]
        a, b = x[first], x[second]
        x[first] = a * cosine - b * sine
        x[second] = a * sine + b * cosine


@kernel("store_f16")
def store_f16(x, stride, numbers, scales, dim, padded, n_ctx, state):
    """Keys or values of one head of one token, for each block."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    source = token * stride + head * dim
    target = (head * n_ctx + state[0] + token) * padded
    for i in range(cuda.threadIdx.x, dim, cuda.blockDim.x):
        numbers[target + i] = to_half(x[source + i])


@kernel("store_q8_0")
def store_q8_0(x, stride, numbers, scales, dim, padded, n_ctx, state):
    """The same, a warp for each 32."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    source = token * stride + head * dim
    target = (head * n_ctx + state[0] + token) * padded
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


STORE = {"f16": store_f16, "q8_0": store_q8_0}
