"""Activations as int8, by the kernels that make them: what `quantise` (products.py) does later.

Such kernels take xq, xd, xs and whether they are wanted; their threads come in whole warps, and
what they make is a multiple of 32 wide.
"""

from numba import cuda
from numpy import float32, int32

from runtime.kernels.cuda.primitives import nearest
from runtime.kernels.cuda.warps import half_sum, warp_max


@cuda.jit(device=True)
def quantise_32(value, at, xq, xd, xs):
    """The values of a warp, each at its lane's `at`; the first one's is a multiple of 32."""
    scale = warp_max(abs(value)) / float32(127)
    q = 0
    if scale > float32(0):
        q = nearest(value / scale)
    xq[at] = q
    total = half_sum(float32(int32(q)))
    if at % 32 == 0:
        xd[at >> 5] = scale
    if at % 16 == 0:
        xs[at >> 4] = scale * total
