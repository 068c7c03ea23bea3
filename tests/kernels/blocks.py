"""Blocks of every format with random content, judged by the gguf package's own dequantiser."""

import gguf
import numpy as np

HALVES = {  # where the f16 fields of a block are, in bytes
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
LARGEST = {  # about; the scales make up for it
    "Q8_0": 16,
    "Q2_K": 16,
    "Q3_K": 32,
    "Q4_K": 64,
    "Q5_K": 128,
    "Q6_K": 256,
    "IQ3_S": 64,
    "IQ4_NL": 64,
    "IQ4_XS": 512,
}
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def random_rows(
    name: str, n_rows: int, k: int, rng: np.random.Generator, spread: float = 1.0
) -> np.ndarray:
    """(n_rows, row_bytes) uint8: any bits, with scales of ordinary size times `spread`."""
    if name in FLOATS:
        values = (rng.normal(size=(n_rows, k)) * spread).astype(np.float32)
        if name == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(FLOATS[name]).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (n_rows, k // block, size), dtype=np.uint8)
    size = 0.1 * spread / LARGEST.get(name, 2)
    for at in HALVES[name]:
        scale = (rng.normal(size=blocks.shape[:2]) * size).astype(np.float16)
        blocks[:, :, at : at + 2] = scale[:, :, None].view(np.uint8)
    return blocks.reshape(n_rows, -1)


def dequantise(name: str, rows: np.ndarray) -> np.ndarray:
    """float64 weights, by the gguf package."""
    kind = gguf.GGMLQuantizationType[name]
    if name == "F32":
        return rows.view(np.float32).astype(np.float64)
    if name == "F16":
        return rows.view(np.float16).astype(np.float64)
    return gguf.quants.dequantize(rows, kind).astype(np.float64)


def block_size(name: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
