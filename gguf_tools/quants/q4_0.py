"""Q4_0: 32 weights in 18 bytes (4.5 bits each).

    d      qs
    |f16 2||32 x 4 bits 16|         byte j: weight j in the low half, weight j + 16 in the high

    weight = d * (q - 8)

d is the weight of largest magnitude over -8, so that this weight is met exactly by q = 0.
"""

import numpy as np

from gguf_tools.quants.arithmetic import first_largest, inverse, join_nibbles, low_byte, to_half
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.multiples import Multiples
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import fit_scale

BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    q = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    return d * (q.astype(np.float32) - 8)


def quantize_reference(x: Floats) -> Array:
    d = first_largest(x) / np.float32(-8)
    q = np.minimum(15, low_byte(x * inverse(d)[:, None] + np.float32(8.5)))
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(d)
    blocks["qs"] = join_nibbles(q[:, :16], q[:, 16:])
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    fit = fit_scale(x, weights, top=8)
    return pack(to_half(fit.scale), fit.levels)


def pack(d: Array, k: Array) -> Array:
    """Blocks of d * k, k from -8 to 7."""
    q = k + 8
    blocks = np.zeros(len(d), BLOCK)
    blocks["d"] = d
    blocks["qs"] = join_nibbles(q[:, :16], q[:, 16:])
    return blocks


def pack_parts(parts: Parts) -> Array:
    return pack(parts.d.astype(np.float16), parts.levels)


Q4_0 = block_quant(
    "Q4_0",
    2,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(),
    multiples=Multiples(-8, 7, pack, trained=True),
    levels=Levels(-8, 7, pack_parts),
)
