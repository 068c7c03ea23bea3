"""Q4_K: 256 weights in 144 bytes (4.5 bits each).

    d      dmin   scales             qs
    |f16 2||f16 2||8 x (6+6) bits 12||256 x 4 bits 128|
                                    qs byte 32 i + j: weight 64 i + j in the low half, weight
                                    64 i + 32 + j in the high

    weight = d * scale[g] * q - dmin * minimum[g]        g = one of 8 groups of 32

The packing of the scales is drawn in k_scales.py.
"""

import numpy as np

from gguf_tools.quants.arithmetic import join_nibbles
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.k_scales import (
    group_weights,
    pack_scales,
    scales_and_minima,
    store_levels,
    store_weighted_levels,
)
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import fit_scale_and_minimum

BLOCK = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
assert BLOCK.itemsize == 144


def dequantize(blocks: Array) -> Floats:
    d, dmin = scales_and_minima(blocks)
    qs = blocks["qs"].reshape(-1, 4, 32)
    q = np.stack([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - dmin).reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    groups = x.reshape(-1, 32)
    weights = group_weights(groups)
    fit = fit_scale_and_minimum(groups, weights, top=15, first=-1.0, n_trials=21)
    blocks = np.zeros(len(x), BLOCK)
    _store_bits(blocks, store_levels(blocks, x, fit, top=15))
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    blocks = np.zeros(len(x), BLOCK)
    _store_bits(blocks, store_weighted_levels(blocks, x, weights, top=15))
    return blocks


def pack(parts: Parts) -> Array:
    blocks = np.zeros(len(parts.d), BLOCK)
    blocks["d"], blocks["dmin"] = parts.d, parts.dmin
    blocks["scales"] = pack_scales(parts.scales, parts.minima)
    _store_bits(blocks, parts.levels)
    return blocks


def _store_bits(blocks: Array, levels: Array) -> None:
    q = levels.reshape(-1, 4, 2, 32)
    blocks["qs"] = join_nibbles(q[:, :, 0], q[:, :, 1]).reshape(-1, 128)


Q4_K = block_quant(
    "Q4_K",
    12,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=256, times=2, over=256),
    levels=Levels(0, 15, pack, 32, 8, True, 0, 63),
)
