"""How formats are kept on a GPU, and how much memory matrices take there. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence

from gguf_tools.quants import QuantType
from runtime.program import Matrix

NATIVE = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
"""Formats whose blocks the kernels read: the bits of the file, fields apart (cuda_memory.py)."""

AS_F16 = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"),
)
"""Formats of few bits times a float16."""


FLOATS = ("F32", "F16", "BF16")
"""Formats whose products take activations as they are; the others' take int8."""

AMPERE, TURING = (8, 0), (7, 5)  # compute capabilities with tensor cores for int8
WHOLE = 8  # columns of 16 bits that are loaded together

TOGETHER = 16  # blocks: a matrix has room for a multiple (runtime/kernels/cuda/unpacking.py)
ALIGNMENT = 256  # what allocators round each array up to


def allocated(n_bytes: int) -> int:
    """Bytes that an array of so many takes."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def kept_as(quant: QuantType) -> str:
    """The format that a GPU keeps these weights in: itself, or the floats that hold them."""
    if quant.name in NATIVE:
        return quant.name
    if quant.name in AS_F16:
        return "F16"
    return "BF16" if quant.name == "NVFP4" else "F32"


def way_of_tiles(capability: tuple[int, int], kept: str, n_columns: int) -> str:
    """How prompts are multiplied with weights kept so: `plain`, or on tensor cores and whose."""
    if kept == "F32" or n_columns % WHOLE or capability < TURING:
        return "plain"
    if capability >= AMPERE:
        return "ampere"
    return "plain" if kept in FLOATS else "turing"


def blocks_held(matrix: Matrix) -> int:
    """Blocks that a matrix has room for on the GPU; numbers, where it is kept as floats."""
    n_weights = matrix.n_rows * matrix.n_columns
    if kept_as(matrix.quant) in FLOATS:
        return n_weights
    return -(-n_weights // (matrix.quant.block_size * TOGETHER)) * TOGETHER


def weight_bytes(matrix: Matrix) -> int:
    """Bytes of a matrix on the GPU."""
    kept = kept_as(matrix.quant)
    if kept in FLOATS:
        return blocks_held(matrix) * (4 if kept == "F32" else 2)
    return blocks_held(matrix) * matrix.quant.block_bytes


def held_bytes(matrices: Sequence[Matrix]) -> int:
    """Bytes of the array that matrices of one format and shape lie in, one after the other."""
    return len(matrices) * weight_bytes(matrices[0])
