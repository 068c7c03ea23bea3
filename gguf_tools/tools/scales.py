"""Weights that are not finite, found by looking at the scales of blocks and not at every weight.

A block's weights are finite when its scales are: levels are small integers. Formats whose scales
are not plain numbers are dequantised.
"""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from gguf_tools.quants.quanttype import Bytes, QuantType

# Formats that the gguf package decodes: where a block's one float16 scale is.
_HALF_AT = {
    "IQ2_XXS": 0,
    "IQ2_XS": 0,
    "IQ3_XXS": 0,
    "IQ1_S": 0,
    "IQ3_S": 0,
    "IQ2_S": 0,
    "TQ1_0": 52,
    "TQ2_0": 64,
}
_INTEGERS = ("I8", "I16", "I32", "I64")


def count_not_finite(quant: QuantType, band: Bytes) -> int:
    """How many blocks of a band have a NaN or an infinity."""
    if quant.name in _INTEGERS:
        return 0
    if quant.name == "BF16":
        return int(np.count_nonzero(band.view("<u2") & 0x7F80 == 0x7F80))
    if quant.name == "MXFP4":  # a scale is a power of two; 255 stands for NaN
        scales = band[:: quant.block_bytes]
        large = band.reshape(-1, quant.block_bytes)[scales >= 250]
        finite = np.isfinite(quant.dequantize(large)).all(axis=1) & (large[:, 0] != 255)
        return int(np.count_nonzero(~finite))
    block = _block(quant)
    if block is None:
        weights = quant.dequantize(band).reshape(-1, quant.block_size)
        return int(np.count_nonzero(~np.isfinite(weights).all(axis=1)))
    blocks = np.ascontiguousarray(band).view(block)
    if block.names is None:
        return int(blocks.size - np.count_nonzero(np.isfinite(blocks)))
    bad = np.zeros(len(blocks), bool)
    for name in (name for name in block.names if block[name].kind == "f"):
        bad |= ~np.isfinite(blocks[name])
    return int(np.count_nonzero(bad))


@cache
def _block(quant: QuantType) -> np.dtype[Any] | None:
    """The layout of a block with its float scales; None if they are not plain floats."""
    if quant.name in _HALF_AT:
        return np.dtype(
            {
                "names": ["d"],
                "formats": ["<f2"],
                "offsets": [_HALF_AT[quant.name]],
                "itemsize": quant.block_bytes,
            }
        )
    if quant.name == "F32":
        return np.dtype("<f4")
    if quant.name == "Q8_K":  # its float32 scale can be too large for its levels
        return None
    try:
        module = import_module(f"gguf_tools.quants.{quant.name.lower()}")
    except ModuleNotFoundError:
        return None
    layout: np.dtype[Any] = module.BLOCK
    floats = layout.kind == "f" or any(layout[name].kind == "f" for name in layout.names or ())
    return layout if floats else None
