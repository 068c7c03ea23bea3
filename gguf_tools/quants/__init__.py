"""Block formats: one file per format with a quantiser, the rest read through the gguf package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import UnsupportedQuantError, printable
from gguf_tools.quants.quanttype import QuantType

# name: (ggml's number, weights per block, bytes per block); ggml.h and ggml-common.h
_KNOWN = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
}
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4"}
_PLAIN["I64"] = "<i8"


def _decoder(name: str) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    def dequantize(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if name in _PLAIN:
            return rows.view(_PLAIN[name]).astype(np.float32)
        import gguf

        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
        return np.asarray(values, np.float32)

    return dequantize


QUANTS = tuple(QuantType(name, *facts, _decoder(name)) for name, facts in _KNOWN.items())
_BY_ID = {quant.type_id: quant for quant in QUANTS}
_BY_NAME = {quant.name: quant for quant in QUANTS}


def by_id(type_id: int) -> QuantType:
    quant = _BY_ID.get(type_id)
    if quant is None:
        raise UnsupportedQuantError(f"tensor type {printable(type_id)} is not one of ggml's")
    return quant


def by_name(name: str) -> QuantType:
    quant = _BY_NAME.get(name)
    if quant is None:
        known = ", ".join(_BY_NAME)
        raise UnsupportedQuantError(f"tensor type {printable(name)} is unknown; known: {known}")
    return quant
