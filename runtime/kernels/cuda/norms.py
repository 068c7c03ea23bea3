"""Norms: a block of threads for each group of a token."""

import math

from numba import cuda, types
from numpy import float32

from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.warps import block_sum


@kernel("rms_norm")
def rms_norm(x, x_stride, y, y_stride, weight, size, epsilon):
    """y = x / sqrt(mean of squares + epsilon) * weight, of groups of `size`."""
    shared = cuda.shared.array(32, types.float32)
    group, token = cuda.blockIdx.x, cuda.blockIdx.y
    source, target = token * x_stride + group * size, token * y_stride + group * size
    total = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        total += x[source + i] * x[source + i]
    total = block_sum(total, shared)
    inverse = float32(1) / math.sqrt(total / float32(size) + epsilon)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        y[target + i] = x[source + i] * inverse * weight[i]


@kernel("layer_norm")
def layer_norm(x, x_stride, y, y_stride, weight, along, bias, has_bias, size, epsilon):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias; row `group * along` of them."""
    shared = cuda.shared.array(32, types.float32)
    group, token = cuda.blockIdx.x, cuda.blockIdx.y
    source, target = token * x_stride + group * size, token * y_stride + group * size
    total = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        total += x[source + i]
    mean = block_sum(total, shared) / float32(size)
    total = float32(0)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        centred = x[source + i] - mean
        total += centred * centred
    total = block_sum(total, shared)
    inverse = float32(1) / math.sqrt(total / float32(size) + epsilon)
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        value = (x[source + i] - mean) * inverse * weight[group * along + i]
        if has_bias:
            value += bias[group * along + i]
        y[target + i] = value
