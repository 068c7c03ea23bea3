"""Rotary positions, and keys and values on their way to the cache.

The cache of a layer keeps float16 bits: [kv head][position][dim, padded to a multiple of 8]. A step
begins at position state[0].
"""

from numba import cuda

from runtime.kernels.cuda.primitives import to_half


@cuda.jit
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


@cuda.jit
def store(x, stride, cache, dim, padded, n_ctx, state):
    """Keys or values of one head of one token, for each block."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    source = token * stride + head * dim
    target = (head * n_ctx + state[0] + token) * padded
    for i in range(cuda.threadIdx.x, dim, cuda.blockDim.x):
        cache[target + i] = to_half(x[source + i])
