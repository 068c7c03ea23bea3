"""IQ4_NL: 16 blocks at once."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.iq4 import fit_scale, store_levels
from gguf_tools.quants.kernels.lanes import inverse, settle_nan, store_halves, turn
from gguf_tools.quants.kernels.search import square_weights
from gguf_tools.simd import ld_f32, st

GROUP = 16
SCRATCH = 4096 + 2 * 64  # the weights and their squares, then the inverse scales


WEIGHTED_GROUP, WEIGHTED_SCRATCH = GROUP, SCRATCH


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    for first in range(0, n_blocks, 16):
        turn(x + first * 128, 128, 32, scratch)
        square_weights(scratch, 32)
        _quantize_group(x + first * 128, data + first * 18, scratch)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    for first in range(0, n_blocks, 16):
        turn(x + first * 128, 128, 32, scratch)
        turn(weights + first * 128, 128, 32, scratch + 2048)
        _quantize_group(x + first * 128, data + first * 18, scratch)


@jit
def _quantize_group(blocks, y, scratch):
    found = scratch + 4096
    scale = settle_nan(fit_scale(scratch))
    store_halves(scale, y, 18, found)
    st(found, inverse(scale))
    for b in range(16):
        store_levels(blocks + b * 128, ld_f32(found + b * 4), y + b * 18 + 2)
