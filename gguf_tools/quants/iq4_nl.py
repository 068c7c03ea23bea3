"""IQ4_NL: 32 weights in 18 bytes (4.5 bits each).

d      qs
|f16 2||32 x 4 bits 16|         byte j: weight j in the low half, weight j + 16 in the high

weight = d * LEVELS[q]                               LEVELS of iq4.py
"""

import numpy as np

from gguf_tools.quants.arithmetic import inverse, join_nibbles, settle_nan, to_half
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

BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    return d * LEVELS[split_nibbles(blocks["qs"])]


def quantize_reference(x: Floats) -> Array:
    return quantize_weighted_reference(x, x * x)


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    scale = settle_nan(fit_scale(x, weights))
    q = nearest_level(inverse(scale)[:, None] * x)
    return _join(to_half(scale), q)


def pack(parts: Parts) -> Array:
    return _join(parts.d.astype(np.float16), indices_of(parts.levels))


def _join(d: Array, q: Array) -> Array:
    blocks = np.zeros(len(q), BLOCK)
    blocks["d"] = d
    blocks["qs"] = join_nibbles(q[:, :16], q[:, 16:])
    return blocks


IQ4_NL = block_quant(
    "IQ4_NL",
    20,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=32, over=16),
    levels=Levels(VALUES[0], VALUES[-1], pack, values=VALUES),
)
