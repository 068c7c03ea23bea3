"""Types that models use for tables rather than weights: F64 and the integers, stored plainly.

They can be read (as float32, rounded where float32 has fewer digits) but are not made here.
"""

from typing import Any

import numpy as np

from gguf_tools.quants.blocks import block_quant
from gguf_tools.quants.quanttype import Array, Floats, QuantType


def dequantize(numbers: Array) -> Floats:
    return numbers.astype(np.float32)


def _number_type(name: str, type_id: int, number: np.dtype[Any]) -> QuantType:
    return block_quant(name, type_id, block_size=1, block=number, dequantize=dequantize)


I8 = _number_type("I8", 24, np.dtype("i1"))
I16 = _number_type("I16", 25, np.dtype("<i2"))
I32 = _number_type("I32", 26, np.dtype("<i4"))
I64 = _number_type("I64", 27, np.dtype("<i8"))
F64 = _number_type("F64", 28, np.dtype("<f8"))
