"""Q6_K: 256 weights in 210 bytes (6.5625 bits each).

ql                  qh              scales       d
|256 x 4 bits 128||256 x 2 bits 64||16 x int8 16||f16 2|
                                of each half h = 0, 1 (128 weights), for j = 0 to 31:
                                ql byte 64 h + j:      weights j (low half) and 64 + j (high)
                                ql byte 64 h + 32 + j: weights 32 + j and 96 + j
                                qh byte 32 h + j: two bits each of weights j, 32 + j, 64 + j,
                                96 + j, from the lowest on

weight = d * scale[g] * (q - 32)                     g = one of 16 groups of 16
"""

import numpy as np

from gguf_tools.quants.arithmetic import first_largest, join_nibbles, nearest_int, to_half
from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import TINY, fit_scale

BLOCK = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
assert BLOCK.itemsize == 210


def dequantize(blocks: Array) -> Floats:
    ql = blocks["ql"].reshape(-1, 2, 2, 32)
    low = np.stack([ql & 15, ql >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks["qh"].reshape(-1, 2, 1, 32) >> shifts & 3
    q = (low | high << 4).astype(np.float32) - 32
    weights: Floats = _scales(blocks) * q.reshape(-1, 16, 16)
    return weights.reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    return quantize_weighted_reference(x, x * x)


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    groups = x.reshape(-1, 16, 16)
    fit = fit_scale(x.reshape(-1, 16), weights.reshape(-1, 16), top=32)
    scales = fit.scale.reshape(-1, 16)
    largest = first_largest(scales)
    inverse = np.float32(-128) / largest
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(np.float32(1) / inverse)
    blocks["scales"] = np.minimum(127, nearest_int(inverse[:, None] * scales)).astype(np.int8)
    d = _scales(blocks)
    levels = nearest_int(groups / d).clip(-32, 31)
    levels = np.where(d != 0, levels, fit.levels.reshape(-1, 16, 16)) + 32
    _store_bits(blocks, levels)
    blocks[np.abs(largest) < TINY] = np.zeros((), BLOCK)
    return blocks


def pack(parts: Parts) -> Array:
    blocks = np.zeros(len(parts.d), BLOCK)
    blocks["d"], blocks["scales"] = parts.d, parts.scales
    _store_bits(blocks, parts.levels + 32)
    return blocks


def _store_bits(blocks: Array, levels: Array) -> None:
    q = levels.reshape(-1, 2, 4, 32)
    blocks["ql"] = join_nibbles(q[:, :, :2] & 15, q[:, :, 2:] & 15).reshape(-1, 128)
    high = q >> 4
    joined = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    blocks["qh"] = joined.reshape(-1, 64)


def _scales(blocks: Array) -> Floats:
    """(n_blocks, 16, 1)"""
    d = blocks["d"].astype(np.float32)[:, None] * blocks["scales"].astype(np.float32)
    return d[:, :, None]


Q6_K = block_quant(
    "Q6_K",
    14,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    levels=Levels(-32, 31, pack, 16, 16, False, -128, 127),
)
