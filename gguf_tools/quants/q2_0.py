"""Q2_0: 64 weights in 18 bytes (2.25 bits each).

d      qs
|f16 2||64 x 2 bits 16|             byte j: weights 4 j to 4 j + 3, from the lowest bits on

weight = d * (q - 1)
"""

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    q = blocks["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return (q.reshape(-1, 64).astype(np.float32) - 1) * d


Q2_0 = block_quant("Q2_0", 42, block_size=64, block=BLOCK, dequantize=dequantize)
