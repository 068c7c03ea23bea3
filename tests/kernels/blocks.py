"""Blocks of every format with random content, judged by the gguf package's own dequantiser."""

import gguf
import numpy as np

from gguf_tools.quants import by_name

HALVES = {  # where the f16 fields of a block are, in bytes
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q8_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ3_XXS": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
LARGEST = {  # about; the scales make up for it
    "Q8_0": 16,
    "Q8_1": 16,
    "Q2_K": 16,
    "Q3_K": 32,
    "Q4_K": 64,
    "Q5_K": 128,
    "Q6_K": 256,
    "IQ3_S": 64,
    "IQ4_NL": 64,
    "IQ4_XS": 512,
    "IQ3_XXS": 128,
    "IQ2_S": 64,
    "IQ2_XS": 64,
    "IQ2_XXS": 64,
    "IQ1_M": 8,
    "IQ1_S": 8,
    "MXFP4": 8,
    "NVFP4": 8,
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
    quant = by_name(name)
    blocks = rng.integers(0, 256, (n_rows, k // quant.block_size, quant.block_bytes), np.uint8)
    scales = rng.normal(size=blocks.shape[:2]) * (0.1 * spread / LARGEST.get(name, 2))
    halves = scales.astype(np.float16)[:, :, None]
    for at in HALVES.get(name, ()):
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    if name == "IQ1_M":  # 4 bits of the half in each of the last four words
        words = blocks[:, :, 48:].view(np.uint16)
        quarters = (halves.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)) & 15
        words[:] = (words & 0x0FFF) | (quarters << 12)
    if name == "MXFP4":  # 2^(e - 128)
        blocks[:, :, 0] = np.rint(np.log2(np.abs(scales)) + 128).clip(0, 255)
    if name == "NVFP4":  # a byte's upper half is the exponent: 16 is 2^-6
        codes = np.rint(8 * np.log2(np.abs(scales)) + 64).clip(0, 126)
        blocks[:, :, :4] = (codes[:, :, None] + rng.integers(0, 8, 4)).clip(0, 126)
    return blocks.reshape(n_rows, -1)


def dequantise(name: str, rows: np.ndarray) -> np.ndarray:
    """float64 weights, by the gguf package where it knows the format."""
    if name == "F32":
        return rows.view(np.float32).astype(np.float64)
    if name == "F16":
        return rows.view(np.float16).astype(np.float64)
    if name in ("Q1_0", "Q2_0"):
        return by_name(name).dequantize(rows).astype(np.float64)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]).astype(np.float64)


def block_size(name: str) -> int:
    return by_name(name).block_size
