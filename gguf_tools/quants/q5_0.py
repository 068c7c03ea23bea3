"""Q5_0: 32 weights in 22 bytes (5.5 bits each).

    d      qh              qs
    |f16 2||32 x 1 bit 4||32 x 4 bits 16|
                                    qs byte j: weight j in the low half, weight j + 16 in the high
                                    qh: one little-endian word, bit j is the fifth bit of weight j

    weight = d * (q - 16)

d is the weight of largest magnitude over -16, so that this weight is met exactly by q = 0.
"""

import numpy as np

from gguf_tools.quants.arithmetic import first_largest, inverse, join_nibbles, low_byte, to_half
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.multiples import Multiples
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import fit_scale

BLOCK = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 22


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    return d * (five_bits(blocks).astype(np.float32) - 16)


def quantize_reference(x: Floats) -> Array:
    d = first_largest(x) / np.float32(-16)
    q = np.minimum(31, low_byte(x * inverse(d)[:, None] + np.float32(16.5)))
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(d)
    store_five_bits(blocks, q)
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    fit = fit_scale(x, weights, top=16)
    return pack(to_half(fit.scale), fit.levels)


def pack(d: Array, k: Array) -> Array:
    """Blocks of d * k, k from -16 to 15."""
    q = k + 16
    blocks = np.zeros(len(d), BLOCK)
    blocks["d"] = d
    store_five_bits(blocks, q)
    return blocks


def five_bits(blocks: Array) -> Array:
    """(n_blocks, 32) q of 0 to 31; also of Q5_1, which has the same fields."""
    low = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    q: Array = low | np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4
    return q


def store_five_bits(blocks: Array, q: Array) -> None:
    blocks["qs"] = join_nibbles(q[:, :16] & 15, q[:, 16:] & 15)
    blocks["qh"] = np.packbits(q >> 4 & 1 != 0, axis=1, bitorder="little")


def pack_parts(parts: Parts) -> Array:
    return pack(parts.d.astype(np.float16), parts.levels)


Q5_0 = block_quant(
    "Q5_0",
    6,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(),
    multiples=Multiples(-16, 15, pack),
    levels=Levels(-16, 15, pack_parts),
)
