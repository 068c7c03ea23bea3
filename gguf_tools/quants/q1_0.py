"""Q1_0: 128 weights in 18 bytes (1.125 bits each).

d      qs
|f16 2||128 x 1 bit 16|             byte j, bit i: weight 8 j + i

weight = d where the bit is set, else -d
"""

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats

BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18


def dequantize(blocks: Array) -> Floats:
    d = blocks["d"].astype(np.float32)[:, None]
    return np.where(np.unpackbits(blocks["qs"], axis=1, bitorder="little"), d, -d)


Q1_0 = block_quant("Q1_0", 41, block_size=128, block=BLOCK, dequantize=dequantize)
