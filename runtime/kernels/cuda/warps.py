"""Sums and maxima over the lanes of a warp and over a block; every lane gets the result.

Arrays in shared memory are handed over: `shared` has room for a float32 of each warp.
"""

from numba import cuda
from numpy import float32

ALL = 0xFFFFFFFF


@cuda.jit(device=True)
def warp_sum(value):
    value += cuda.shfl_xor_sync(ALL, value, 16)
    value += cuda.shfl_xor_sync(ALL, value, 8)
    value += cuda.shfl_xor_sync(ALL, value, 4)
    value += cuda.shfl_xor_sync(ALL, value, 2)
    value += cuda.shfl_xor_sync(ALL, value, 1)
    return value


@cuda.jit(device=True)
def warp_max(value):
    value = max(value, cuda.shfl_xor_sync(ALL, value, 16))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 8))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 4))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 2))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 1))
    return value


@cuda.jit(device=True)
def half_sum(value):
    """Over each half of the warp."""
    value += cuda.shfl_xor_sync(ALL, value, 8)
    value += cuda.shfl_xor_sync(ALL, value, 4)
    value += cuda.shfl_xor_sync(ALL, value, 2)
    value += cuda.shfl_xor_sync(ALL, value, 1)
    return value


@cuda.jit(device=True)
def eighth_sum(value):
    """Over 8 neighbouring lanes."""
    value += cuda.shfl_xor_sync(ALL, value, 4)
    value += cuda.shfl_xor_sync(ALL, value, 2)
    value += cuda.shfl_xor_sync(ALL, value, 1)
    return value


@cuda.jit(device=True)
def block_sum(value, shared):
    """Over the threads of a block of one dimension, whole warps."""
    thread = cuda.threadIdx.x
    value = warp_sum(value)
    if thread % 32 == 0:
        shared[thread // 32] = value
    cuda.syncthreads()
    total = shared[thread % 32] if thread % 32 < cuda.blockDim.x // 32 else float32(0)
    total = warp_sum(total)
    cuda.syncthreads()  # `shared` may be used again
    return total
