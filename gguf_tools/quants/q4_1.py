"""Q4_1: 32 weights in 20 bytes (5 bits each).

    d      m      qs
    |f16 2||f16 2||32 x 4 bits 16|  byte j: weight j in the low half, weight j + 16 in the high

    weight = d * q + m

m is the smallest weight; d spreads 15 steps up to the largest.
"""

import numpy as np

from gguf_tools.quants.arithmetic import inverse, join_nibbles, low_byte, range_of, to_half
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import fit_scale_and_minimum

BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 20


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    m = blocks["m"].astype(np.float32)[:, None]
    q = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    return d * q.astype(np.float32) + m


def quantize_reference(x: Floats) -> Array:
    low, high = range_of(x)
    d = (high - low) / np.float32(15)
    q = np.minimum(15, low_byte((x - low[:, None]) * inverse(d)[:, None] + np.float32(0.5)))
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(d)
    blocks["m"] = to_half(low)
    blocks["qs"] = join_nibbles(q[:, :16], q[:, 16:])
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    fit = fit_scale_and_minimum(x, weights, top=15, first=-0.9, step=0.05, n_trials=37)
    return _join(to_half(fit.scale), to_half(-fit.minimum), fit.levels)


def pack(parts: Parts) -> Array:
    return _join(parts.d.astype(np.float16), -parts.dmin.astype(np.float16), parts.levels)


def _join(d: Array, m: Array, q: Array) -> Array:
    blocks = np.zeros(len(q), BLOCK)
    blocks["d"], blocks["m"] = d, m
    blocks["qs"] = join_nibbles(q[:, :16], q[:, 16:])
    return blocks


Q4_1 = block_quant(
    "Q4_1",
    3,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(),
    levels=Levels(0, 15, pack, has_minimum=True),
)
