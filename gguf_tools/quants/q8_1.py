"""Q8_1: 32 weights in 36 bytes. ggml's activations, kept for files that hold one all the same.

d      s      qs
|f16 2||f16 2||32 x int8 32|

weight = d * q                      s = d * sum of q saves work in dot products
"""

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])
assert BLOCK.itemsize == 36


def dequantize(blocks: Array) -> Floats:
    return blocks["d"].astype(np.float32)[:, None] * blocks["qs"].astype(np.float32)


Q8_1 = block_quant("Q8_1", 9, block_size=32, block=BLOCK, dequantize=dequantize)
