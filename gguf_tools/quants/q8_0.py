"""Q8_0: 32 weights in 34 bytes (8.5 bits each).

    d      qs
    |f16 2||32 x int8 32|

    weight = d * q

d is the largest magnitude over 127. Rounded half away from zero, unlike the K formats.
"""

import numpy as np

from gguf_tools.quants.arithmetic import inverse, low_byte, round_half_away, to_half
from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.multiples import Multiples
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
assert BLOCK.itemsize == 34


def dequantize(blocks: Array) -> Floats:
    return blocks["d"].astype(np.float32)[:, None] * blocks["qs"].astype(np.float32)


def quantize_reference(x: Floats) -> Array:
    d = np.abs(x).max(axis=1) / np.float32(127)
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"] = to_half(d)
    blocks["qs"] = low_byte(round_half_away(x * inverse(d)[:, None])).astype(np.uint8).view(np.int8)
    return blocks


def pack(d: Array, k: Array) -> Array:
    """Blocks of d * k, k from -128 to 127."""
    blocks = np.zeros(len(d), BLOCK)
    blocks["d"], blocks["qs"] = d, k
    return blocks


def pack_parts(parts: Parts) -> Array:
    return pack(parts.d.astype(np.float16), parts.levels)


Q8_0 = block_quant(
    "Q8_0",
    8,
    block_size=32,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    multiples=Multiples(-128, 127, pack),
    levels=Levels(-127, 127, pack_parts),
)
