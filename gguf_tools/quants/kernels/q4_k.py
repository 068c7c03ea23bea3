"""Q4_K: two blocks at once, or sixteen."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.blocks_k import (
    GROUP,
    LEVELS,
    SCRATCH,
    WEIGHTED_GROUP,
    WEIGHTED_LEVELS,
    WEIGHTED_SCRATCH,
    fit_sixteen,
    fit_two,
)
from gguf_tools.simd import ld_i8x32, st

__all__ = [
    "GROUP",
    "SCRATCH",
    "WEIGHTED_GROUP",
    "WEIGHTED_SCRATCH",
    "quantize",
    "quantize_weighted",
]


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    for first in range(0, n_blocks, 2):
        y = data + first * 144
        fit_two(x + first * 1024, y, 144, scratch, 15, -1.0, 21)
        for block in range(2):
            _pack(scratch + LEVELS + block * 256, y + block * 144 + 16)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    for first in range(0, n_blocks, 16):
        y = data + first * 144
        fit_sixteen(x + first * 1024, weights + first * 1024, y, 144, scratch, 15)
        for block in range(16):
            _pack(scratch + WEIGHTED_LEVELS + block * 256, y + block * 144 + 16)


@jit
def _pack(levels, qs):
    for i in range(4):
        low, high = ld_i8x32(levels + i * 64), ld_i8x32(levels + i * 64 + 32)
        st(qs + i * 32, low | (high << 4))
