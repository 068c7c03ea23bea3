"""F16: a weight is an IEEE half, 2 bytes.

    s eeeee mmmmmmmmmm

Rounded half to even. Above 65519 it becomes infinity; below 6e-8 it loses its bits one by one.
"""

import numpy as np

from gguf_tools.quants.arithmetic import to_half
from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype("<f2")
assert BLOCK.itemsize == 2


def dequantize(blocks: Array) -> Floats:
    return blocks.astype(np.float32)


def quantize_reference(x: Floats) -> Array:
    return to_half(x)


F16 = block_quant(
    "F16",
    1,
    block_size=1,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
)
