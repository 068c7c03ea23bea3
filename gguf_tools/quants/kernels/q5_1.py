"""Q5_1: see blocks32.py."""

from gguf_tools.jit import kernel
from gguf_tools.quants.kernels.blocks32 import (
    GROUP,
    SCRATCH,
    WEIGHTED_GROUP,
    WEIGHTED_SCRATCH,
    from_smallest,
    weighted_from_smallest,
)

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
    from_smallest(x, data, n_blocks, scratch, 32, 24)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    weighted_from_smallest(x, weights, data, n_blocks, scratch, 32, 24)
