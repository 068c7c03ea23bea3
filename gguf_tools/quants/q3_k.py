"""Q3_K: 256 weights in 110 bytes (3.4375 bits each).

hmask            qs              scales         d
|256 x 1 bit 32||256 x 2 bits 64||16 x 6 bits 12||f16 2|
                                qs: the low two bits, as in Q2_K
                                hmask byte j, bit i: the third bit of weight 32 i + j
                                scales bytes 0 to 7: low four bits of scales j and 8 + j
                                scales bytes 8 to 11: two bits each of scales j, 4 + j, 8 + j,
                                12 + j, from the lowest on

weight = d * (scale[g] - 32) * (q - 4)               g = one of 16 groups of 16
"""

import numpy as np

from gguf_tools.quants.arithmetic import (
    first_largest,
    join_nibbles,
    nearest_int,
    ordered_sum,
    to_half,
)
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.q2_k import join_two_bits, split_two_bits
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import Fit, fit_scale, fit_scale_by_turns

BLOCK = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
assert BLOCK.itemsize == 110


def dequantize(blocks: Array) -> Floats:
    high = np.unpackbits(blocks["hmask"][:, None, :], axis=1, bitorder="little")
    q = split_two_bits(blocks["qs"]) | high.reshape(-1, 256) << 2
    levels = q.astype(np.float32) - 4
    weights: Floats = _scales(blocks) * levels.reshape(-1, 16, 16)
    return weights.reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    fit = fit_scale_by_turns(x.reshape(-1, 16), top=4)
    scales = fit.scale.reshape(-1, 16)
    largest = first_largest(scales)
    inverse = np.where(largest != 0, np.float32(-32) / largest, np.float32(0))
    steps = nearest_int(inverse[:, None] * scales).astype(np.int8).clip(-32, 31).astype(int) + 32
    steps = np.where(largest[:, None] != 0, steps, 0)
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(np.where(largest != 0, np.float32(1) / inverse, np.float32(0)))
    _store(blocks, x, steps, fit)
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    groups = weights.reshape(-1, 16)
    fit = fit_scale(x.reshape(-1, 16), groups, top=4)
    totals = ordered_sum(groups).reshape(-1, 16)
    of_scales = fit_scale(fit.scale.reshape(-1, 16), totals, top=32)
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(of_scales.scale)
    _store(blocks, x, of_scales.levels + 32, fit)
    return blocks


def pack(parts: Parts) -> Array:
    blocks = np.zeros(len(parts.d), BLOCK)
    blocks["d"] = parts.d
    _store_scales(blocks, parts.scales + 32)
    _store_bits(blocks, parts.levels + 4)
    return blocks


def _store(blocks: Array, x: Floats, steps: Array, fit: Fit) -> None:
    """Set the scales, and the levels that go with them; a scale of 0 keeps those of the search."""
    _store_scales(blocks, steps)
    d = _scales(blocks)
    levels = nearest_int(x.reshape(-1, 16, 16) / d).clip(-4, 3)
    q = np.where(d != 0, levels, fit.levels.reshape(-1, 16, 16)) + 4
    _store_bits(blocks, q)


def _store_scales(blocks: Array, steps: Array) -> None:
    blocks["scales"][:, :8] = join_nibbles(steps[:, :8] & 15, steps[:, 8:] & 15)
    high = steps >> 4
    blocks["scales"][:, 8:] = (
        high[:, 0:4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:16] << 6
    )


def _store_bits(blocks: Array, q: Array) -> None:
    blocks["qs"] = join_two_bits(q & 3)
    third = q.reshape(-1, 8, 32) >> 2
    blocks["hmask"] = np.packbits(third.astype(np.uint8), axis=1, bitorder="little")[:, 0]


def _scales(blocks: Array) -> Floats:
    """(n_blocks, 16, 1)"""
    packed = blocks["scales"]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (packed[:, None, 8:] >> shifts & 3).reshape(-1, 16)
    steps = (low | high << 4).astype(np.float32) - 32
    d: Floats = blocks["d"].astype(np.float32)[:, None] * steps
    return d[:, :, None]


Q3_K = block_quant(
    "Q3_K",
    11,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=256, times=2, over=256),
    levels=Levels(-4, 3, pack, 16, 16, False, -32, 31),
)
