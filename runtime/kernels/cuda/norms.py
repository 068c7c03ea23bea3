"""Norms: a block of threads for each group of a token.

What they make is added to `total` if `adds`; one group of a whole token also becomes int8 if
`quantises` (quantising.py).
"""

import math

from numba import cuda, types
from numpy import float32, int32

from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.quantising import quantise_32
from runtime.kernels.cuda.warps import block_sum


@kernel("rms_norm")
def rms_norm(
    x,
    x_stride,
    y,
    y_stride,
    weight,
    size,
    epsilon,
    total,
    total_stride,
    adds,
    xq,
    xd,
    xs,
    quantises,
):
    """y = x / sqrt(mean of squares + epsilon) * weight, of groups of `size`."""
    shared = cuda.shared.array(32, types.float32)
    group, token = cuda.blockIdx.x, cuda.blockIdx.y
    source, target = token * x_stride + group * size, token * y_stride + group * size
    squares = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        squares += x[source + i] * x[source + i]
    squares = block_sum(squares, shared)
    inverse = float32(1) / math.sqrt(squares / float32(int32(size)) + epsilon)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        value = x[source + i] * inverse * weight[i]
        y[target + i] = value
        if adds:
            total[token * total_stride + group * size + i] += value
        if quantises:
            quantise_32(value, token * size + i, xq, xd, xs)


@kernel("layer_norm")
def layer_norm(
    x,
    x_stride,
    y,
    y_stride,
    weight,
    along,
    bias,
    has_bias,
    size,
    epsilon,
    total,
    total_stride,
    adds,
    xq,
    xd,
    xs,
    quantises,
):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias; row `group * along` of them."""
    shared = cuda.shared.array(32, types.float32)
    group, token = cuda.blockIdx.x, cuda.blockIdx.y
    source, target = token * x_stride + group * size, token * y_stride + group * size
    mean = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        mean += x[source + i]
    mean = block_sum(mean, shared) / float32(int32(size))
    squares = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        centred = x[source + i] - mean
        squares += centred * centred
    squares = block_sum(squares, shared)
    inverse = float32(1) / math.sqrt(squares / float32(int32(size)) + epsilon)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        value = (x[source + i] - mean) * inverse * weight[group * along + i]
        if has_bias:
            value += bias[group * along + i]
        y[target + i] = value
        if adds:
            total[token * total_stride + group * size + i] += value
        if quantises:
            quantise_32(value, token * size + i, xq, xd, xs)
