"""IQ4_XS: 256 weights in 136 bytes (4.25 bits each).

d      scales_h       scales_l       qs
|f16 2||8 x 2 bits 2||8 x 4 bits 4||256 x 4 bits 128|
                                scales_l byte j: low four bits of scales 2 j and 2 j + 1
                                scales_h: one little-endian word, upper two bits of all scales
                                qs byte 16 g + j: weights 32 g + j (low half), 32 g + 16 + j

weight = d * (scale[g] - 32) * LEVELS[q]             g = one of 8 groups of 32; iq4.py
"""

import numpy as np

from gguf_tools.quants.arithmetic import (
    first_largest,
    inverse,
    join_nibbles,
    nearest_int,
    to_half,
)
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.iq4 import (
    LEVELS,
    VALUES,
    fit_scale,
    indices_of,
    nearest_level,
    split_nibbles,
)
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
assert BLOCK.itemsize == 136

_SHIFTS = np.arange(0, 16, 2, dtype=np.uint16)


def dequantize(blocks: Array) -> Floats:
    low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], axis=2).reshape(-1, 8)
    high = blocks["scales_h"][:, None] >> _SHIFTS & 3
    steps = (low | high << 4).astype(np.float32) - 32
    d = blocks["d"].astype(np.float32)[:, None] * steps
    levels = LEVELS[split_nibbles(blocks["qs"].reshape(-1, 16))]
    weights: Floats = d[:, :, None] * levels.reshape(-1, 8, 32)
    return weights.reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    return quantize_weighted_reference(x, x * x)


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    groups = x.reshape(-1, 8, 32)
    scales = fit_scale(x.reshape(-1, 32), weights.reshape(-1, 32)).reshape(-1, 8)
    d = -first_largest(scales) / np.float32(32)
    steps = nearest_int(inverse(d)[:, None] * scales).clip(-32, 31)
    scales = d[:, None] * steps.astype(np.float32)  # with d as it was before it became a half
    q = nearest_level(inverse(scales)[:, :, None] * groups)
    return _join(to_half(d), steps + 32, q)


def pack(parts: Parts) -> Array:
    q = indices_of(parts.levels).reshape(-1, 8, 32)
    return _join(parts.d.astype(np.float16), parts.scales + 32, q)


def _join(d: Array, steps: Array, q: Array) -> Array:
    blocks = np.zeros(len(d), BLOCK)
    blocks["d"] = d
    blocks["scales_l"] = join_nibbles(steps[:, 0::2] & 15, steps[:, 1::2] & 15)
    blocks["scales_h"] = ((steps >> 4) << _SHIFTS).sum(axis=1)
    blocks["qs"] = join_nibbles(q[:, :, :16], q[:, :, 16:]).reshape(-1, 128)
    return blocks


IQ4_XS = block_quant(
    "IQ4_XS",
    23,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=256, over=128),
    levels=Levels(VALUES[0], VALUES[-1], pack, 32, 8, False, -32, 31, VALUES),
)
