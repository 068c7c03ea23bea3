"""F32: a weight is an IEEE single, 4 bytes.

s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
"""

import numpy as np

from gguf_tools.quants.blocks import count_blocks
from gguf_tools.quants.quanttype import Bytes, Floats, QuantType


def dequantize(rows: Bytes) -> Floats:
    n = count_blocks(rows, "F32", 4)
    return np.array(rows, order="C").reshape(-1).view("<f4").reshape(*rows.shape[:-1], n)


def quantize(weights: Floats, importance: Floats | None = None) -> Bytes:
    if weights.dtype != np.float32:
        raise ValueError(f"weights to quantise are float32, not {weights.dtype}")
    shape = (*weights.shape[:-1], 4 * weights.shape[-1])
    return np.array(weights, "<f4", order="C").reshape(-1).view(np.uint8).reshape(shape)


F32 = QuantType("F32", 0, 1, 4, dequantize, quantize, quantize)
