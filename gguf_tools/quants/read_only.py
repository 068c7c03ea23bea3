"""Formats that are read through the gguf package and not made here.

The package is imported when the first such tensor is decoded; most files have none.
"""

import numpy as np

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.quants.blocks import count_blocks
from gguf_tools.quants.quanttype import Bytes, Floats, QuantType


def read_only(name: str, type_id: int, block_size: int, block_bytes: int) -> QuantType:
    """The QuantType of a format that the gguf package decodes."""

    def dequantize(rows: Bytes) -> Floats:
        n_blocks = count_blocks(rows, name, block_bytes)
        shape = (*rows.shape[:-1], n_blocks * block_size)
        if not rows.size:
            return np.zeros(shape, np.float32)
        import gguf

        try:
            with np.errstate(all="ignore"):  # the scales of a damaged file may be anything
                flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
                kind = gguf.GGMLQuantizationType(type_id)
                weights: Floats = gguf.quants.dequantize(flat, kind)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedQuantError(
                f"the installed gguf package cannot decode {name}; update it with "
                "`pip install --upgrade gguf`"
            ) from error
        return weights.reshape(shape)

    return QuantType(name, type_id, block_size, block_bytes, dequantize, None, None)


READ_ONLY = (
    read_only("IQ2_XXS", 16, 256, 66),
    read_only("IQ2_XS", 17, 256, 74),
    read_only("IQ3_XXS", 18, 256, 98),
    read_only("IQ1_S", 19, 256, 50),
    read_only("IQ3_S", 21, 256, 110),
    read_only("IQ2_S", 22, 256, 82),
    read_only("IQ1_M", 29, 256, 56),
    read_only("TQ1_0", 34, 256, 54),
    read_only("TQ2_0", 35, 256, 66),
    read_only("MXFP4", 39, 32, 17),
    read_only("NVFP4", 40, 64, 36),
)
