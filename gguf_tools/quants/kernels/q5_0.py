"""Q5_0: see blocks32.py."""

from gguf_tools.jit import kernel
from gguf_tools.quants.kernels.blocks32 import (
    GROUP,
    SCRATCH,
    WEIGHTED_GROUP,
    WEIGHTED_SCRATCH,
    from_largest,
    weighted_from_largest,
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
    from_largest(x, data, n_blocks, scratch, 32, 22)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    weighted_from_largest(x, weights, data, n_blocks, scratch, 32, 22)
