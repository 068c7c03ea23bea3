"""Q8_K: 256 weights in 292 bytes. ggml's activations, kept for files that hold one all the same.

d      qs              bsums
|f32 4||256 x int8 256||16 x int16 32|

weight = d * q                      bsums[g] = sum of q over 16 saves work in dot products
"""

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
assert BLOCK.itemsize == 292


def dequantize(blocks: Array) -> Floats:
    d: Floats = blocks["d"]
    return d[:, None] * blocks["qs"].astype(np.float32)


Q8_K = block_quant("Q8_K", 15, block_size=256, block=BLOCK, dequantize=dequantize)
