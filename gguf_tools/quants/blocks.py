"""From functions on blocks to a QuantType, whose functions work on rows.

A format module describes one block: its `dequantize` takes an array of the BLOCK dtype, one entry
per block, and gives (n_blocks, block_size) float32; its `quantize_reference` goes the other way.
The blocks of all rows lie one after another, so a format never sees rows.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.quants.quanttype import Array, Bytes, Floats, QuantType


def block_quant(
    name: str,
    type_id: int,
    *,
    block_size: int,
    block: np.dtype[Any],
    dequantize: Callable[[Array], Floats],
    quantize_reference: Callable[[Floats], Array] | None = None,
) -> QuantType:
    """The QuantType of a format given by functions on blocks.

    A format that can be quantised has a kernel too: see `quantize_with_kernel`.
    """
    block_bytes = block.itemsize

    def dequantize_rows(rows: Bytes) -> Floats:
        n_blocks = count_blocks(rows, name, block_bytes)
        blocks = np.ascontiguousarray(rows).reshape(-1).view(block)
        with np.errstate(all="ignore"):  # the scales of a damaged file may be anything
            weights = dequantize(blocks)
        return weights.reshape(*rows.shape[:-1], n_blocks * block_size)

    def quantize_rows_reference(weights: Floats) -> Bytes:
        assert quantize_reference is not None
        row_bytes = quant.row_bytes(weights.shape[-1])
        with np.errstate(all="ignore"):
            blocks = quantize_reference(split_blocks(weights, block_size))
        return blocks.view(np.uint8).reshape(*weights.shape[:-1], row_bytes)

    def quantize_rows(weights: Floats) -> Bytes:
        row_bytes = quant.row_bytes(weights.shape[-1])
        data = quantize_with_kernel(name, split_blocks(weights, block_size), block_bytes)
        return data.reshape(*weights.shape[:-1], row_bytes)

    can_quantize = quantize_reference is not None
    quant = QuantType(
        name,
        type_id,
        block_size,
        block_bytes,
        dequantize_rows,
        quantize_rows_reference if can_quantize else None,
        quantize_rows if can_quantize else None,
    )
    return quant


def count_blocks(rows: Bytes, name: str, block_bytes: int) -> int:
    """Blocks in each row of bytes; an error when the rows are not whole blocks."""
    if rows.dtype != np.uint8:
        raise ValueError(f"rows to dequantise are uint8, not {rows.dtype}")
    n_bytes: int = rows.shape[-1]
    if n_bytes % block_bytes:
        raise UnsupportedQuantError(
            f"a row of {n_bytes} bytes is not {name}: expected a multiple of {block_bytes}"
        )
    return n_bytes // block_bytes


def split_blocks(weights: Floats, block_size: int) -> Floats:
    """(n_blocks, block_size), contiguous, of rows that are whole blocks."""
    if weights.dtype != np.float32:
        raise ValueError(f"weights to quantise are float32, not {weights.dtype}")
    return np.ascontiguousarray(weights).reshape(-1, block_size)


def quantize_with_kernel(name: str, blocks: Floats, block_bytes: int) -> Bytes:
    """Run the compiled quantiser of a format, which is `kernels.NAME.quantize`.

    A kernel takes whole groups of GROUP blocks; what is left over is padded with zeros. Compilers
    are imported here, at the first use, and not by those who only ask for a type's size.
    """
    module = import_module(f"gguf_tools.quants.kernels.{name.lower()}")
    group = module.GROUP
    memory = np.empty(module.SCRATCH + 64, np.uint8)  # of this call: threads share nothing
    scratch = memory.ctypes.data + -memory.ctypes.data % 64
    data = np.empty((len(blocks), block_bytes), np.uint8)
    whole = len(blocks) - len(blocks) % group
    if whole:
        module.quantize(blocks.ctypes.data, data.ctypes.data, whole, scratch)
    if whole < len(blocks):
        padded = np.zeros((group, blocks.shape[1]), np.float32)
        padded[: len(blocks) - whole] = blocks[whole:]
        last = np.empty((group, block_bytes), np.uint8)
        module.quantize(padded.ctypes.data, last.ctypes.data, group, scratch)
        data[whole:] = last[: len(blocks) - whole]
    return data
