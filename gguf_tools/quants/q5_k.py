"""Q5_K: 256 weights in 176 bytes (5.5 bits each).

    d      dmin   scales             qh              qs
    |f16 2||f16 2||8 x (6+6) bits 12||256 x 1 bit 32||256 x 4 bits 128|
                                    qs byte 32 i + j: weight 64 i + j in the low half, weight
                                    64 i + 32 + j in the high
                                    qh byte j, bit g: the fifth bit of weight 32 g + j

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

BLOCK = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
)
assert BLOCK.itemsize == 176


def dequantize(blocks: Array) -> Floats:
    d, dmin = scales_and_minima(blocks)
    qs = blocks["qs"].reshape(-1, 4, 32)
    low = np.stack([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32)
    high = blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q = (low | high << 4).astype(np.float32)
    weights: Floats = d * q - dmin
    return weights.reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    groups = x.reshape(-1, 32)
    weights = group_weights(groups)
    fit = fit_scale_and_minimum(groups, weights, top=31, first=-0.5, n_trials=16)
    blocks = np.zeros(len(x), BLOCK)
    _store_bits(blocks, store_levels(blocks, x, fit, top=31))
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    blocks = np.zeros(len(x), BLOCK)
    _store_bits(blocks, store_weighted_levels(blocks, x, weights, top=31))
    return blocks


def pack(parts: Parts) -> Array:
    blocks = np.zeros(len(parts.d), BLOCK)
    blocks["d"], blocks["dmin"] = parts.d, parts.dmin
    blocks["scales"] = pack_scales(parts.scales, parts.minima)
    _store_bits(blocks, parts.levels)
    return blocks


def _store_bits(blocks: Array, levels: Array) -> None:
    q = levels.reshape(-1, 4, 2, 32)
    blocks["qs"] = join_nibbles(q[:, :, 0] & 15, q[:, :, 1] & 15).reshape(-1, 128)
    high = q.reshape(-1, 8, 32) >> 4
    blocks["qh"] = np.packbits(high.astype(np.uint8), axis=1, bitorder="little")[:, 0]


Q5_K = block_quant(
    "Q5_K",
    13,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=256, times=2, over=256),
    levels=Levels(0, 31, pack, 32, 8, True, 0, 63),
)
