"""BF16: a weight is the upper half of an IEEE single, 2 bytes.

    s eeeeeeee mmmmmmm

Rounded half to even, denormals too. A NaN stays one: its quiet bit is set.
"""

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype("<u2")
assert BLOCK.itemsize == 2


def dequantize(blocks: Array) -> Floats:
    return (blocks.astype(np.uint32) << 16).view(np.float32)


def quantize_reference(x: Floats) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(BLOCK)


BF16 = block_quant(
    "BF16",
    30,
    block_size=1,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
)
