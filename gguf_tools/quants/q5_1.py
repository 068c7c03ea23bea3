"""Q5_1: 32 weights in 24 bytes (6 bits each).

    d      m      qh            qs
    |f16 2||f16 2||32 x 1 bit 4||32 x 4 bits 16|
                                    qs byte j: weight j in the low half, weight j + 16 in the high
                                    qh: one little-endian word, bit j is the fifth bit of weight j

    weight = d * q + m

m is the smallest weight; d spreads 31 steps up to the largest.
"""

import numpy as np

from gguf_tools.quants.arithmetic import inverse, low_byte, range_of, to_half
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.q5_0 import five_bits, store_five_bits
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import fit_scale_and_minimum

BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 24


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    m = blocks["m"].astype(np.float32)[:, None]
    return d * five_bits(blocks).astype(np.float32) + m


def quantize_reference(x: Floats) -> Array:
    low, high = range_of(x)
    d = (high - low) / np.float32(31)
    q = low_byte((x - low[:, None]) * inverse(d)[:, None] + np.float32(0.5))
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(d)
    blocks["m"] = to_half(low)
    store_five_bits(blocks, q)
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    fit = fit_scale_and_minimum(x, weights, top=31, first=-0.9, step=0.05, n_trials=37)
    return _join(to_half(fit.scale), to_half(-fit.minimum), fit.levels)


def pack(parts: Parts) -> Array:
    return _join(parts.d.astype(np.float16), -parts.dmin.astype(np.float16), parts.levels)


def _join(d: Array, m: Array, q: Array) -> Array:
    blocks = np.zeros(len(q), BLOCK)
    blocks["d"], blocks["m"] = d, m
    store_five_bits(blocks, q)
    return blocks


Q5_1 = block_quant(
    "Q5_1",
    7,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(),
    levels=Levels(0, 31, pack, has_minimum=True),
)
