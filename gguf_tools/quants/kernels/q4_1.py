"""Q4_1: see blocks32.py."""

from gguf_tools.jit import kernel
from gguf_tools.quants.kernels.blocks32 import GROUP, SCRATCH, from_smallest

__all__ = ["GROUP", "SCRATCH", "quantize"]


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    from_smallest(x, data, n_blocks, scratch, 16, 20)
