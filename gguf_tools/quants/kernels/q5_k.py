"""Q5_K: two blocks at once, or sixteen."""

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
from gguf_tools.simd import int8, ld_i8x32, splat_i8x32, st, zero_i8x32

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
        y = data + first * 176
        fit_two(x + first * 1024, y, 176, scratch, 31, -0.5, 16)
        for block in range(2):
            _pack(scratch + LEVELS + block * 256, y + block * 176 + 16)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    for first in range(0, n_blocks, 16):
        y = data + first * 176
        fit_sixteen(x + first * 1024, weights + first * 1024, y, 176, scratch, 31)
        for block in range(16):
            _pack(scratch + WEIGHTED_LEVELS + block * 256, y + block * 176 + 16)


@jit
def _pack(levels, qh):
    """The fifth bits, then the nibbles."""
    nibble = splat_i8x32(int8(15))
    fifth = zero_i8x32()
    for i in range(4):
        low, high = ld_i8x32(levels + i * 64), ld_i8x32(levels + i * 64 + 32)
        fifth |= (low >> 4) << (2 * i)
        fifth |= (high >> 4) << (2 * i + 1)
        st(qh + 32 + i * 32, (low & nibble) | (high << 4))
    st(qh, fifth)
