"""From functions on blocks to a QuantType, whose functions work on rows.

A format module describes one block: its `dequantize` takes an array of the BLOCK dtype, one entry
per block, and gives (n_blocks, block_size) float32; its `quantize_reference` goes the other way.
The blocks of all rows lie one after another, so a format never sees rows.

With an importance matrix ggml quantises by another routine, `quantize_weighted_reference` here. It
is told how much an error counts at each weight; see `Spread` for how that is made of how much an
error counts in each column.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from math import gcd
from typing import Any

import numpy as np

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.quants.arithmetic import ordered_sum
from gguf_tools.quants.levels import Levels
from gguf_tools.quants.multiples import Multiples
from gguf_tools.quants.quanttype import Array, Bytes, Floats, QuantType

STRETCH = 1 << 16  # weights, of which an importance matrix makes as many numbers again
LANES = 16  # the largest group of blocks that a kernel takes

_LOADING = threading.Lock()


@dataclass(frozen=True)
class Spread:
    """How a format weighs errors: importance * sqrt(sigma^2 + weight^2).

    sigma^2 is times * (the sum of the squares of `span` weights) / over, and their mean over the
    whole row where `span` is 0.
    """

    span: int = 0
    times: int = 1
    over: int = 0

    def of_row(self, k: int) -> "Spread":
        """The same with numbers, for rows of k weights."""
        return self if self.span else Spread(k, 1, k)


def block_quant(
    name: str,
    type_id: int,
    *,
    block_size: int,
    block: np.dtype[Any],
    dequantize: Callable[[Array], Floats],
    quantize_reference: Callable[[Floats], Array] | None = None,
    quantize_weighted_reference: Callable[[Floats, Floats], Array] | None = None,
    spread: Spread | None = None,
    multiples: Multiples | None = None,
    levels: Levels | None = None,
) -> QuantType:
    """The QuantType of a format given by functions on blocks.

    A format that can be quantised has a kernel too, and another for weights that count more and
    less: see `quantize_with_kernel`. Without a `spread` the importance is taken as it is.
    """
    block_bytes = block.itemsize

    def dequantize_rows(rows: Bytes) -> Floats:
        n_blocks = count_blocks(rows, name, block_bytes)
        blocks = np.ascontiguousarray(rows).reshape(-1).view(block)
        with np.errstate(all="ignore"):  # the scales of a damaged file may be anything
            weights = dequantize(blocks)
        return weights.reshape(*rows.shape[:-1], n_blocks * block_size)

    def quantize_rows_reference(weights: Floats, importance: Floats | None = None) -> Bytes:
        assert quantize_reference is not None
        row_bytes = quant.row_bytes(weights.shape[-1])
        x = split_blocks(weights, block_size)
        with np.errstate(all="ignore"):
            if importance is None or quantize_weighted_reference is None:
                blocks = quantize_reference(x)
            else:
                weighed = weigh_reference(weights, check_importance(importance, weights), spread)
                blocks = quantize_weighted_reference(x, weighed.reshape(-1, block_size))
        return blocks.view(np.uint8).reshape(*weights.shape[:-1], row_bytes)

    def quantize_rows(weights: Floats, importance: Floats | None = None) -> Bytes:
        row_bytes = quant.row_bytes(weights.shape[-1])
        x = split_blocks(weights, block_size)
        if importance is None or quantize_weighted_reference is None:
            data = quantize_with_kernel(name, x, block_bytes)
            return data.reshape(*weights.shape[:-1], row_bytes)
        columns = check_importance(importance, weights)
        k = weights.shape[-1]
        rows = x.reshape(-1, k)
        data = np.empty((len(rows), row_bytes), np.uint8)
        for first, last in _stretches(len(rows), k, block_size):
            part = rows[first:last]
            weighed = weigh(part, columns, spread).reshape(-1, block_size)
            blocks = quantize_with_kernel(name, part.reshape(-1, block_size), block_bytes, weighed)
            data[first:last] = blocks.reshape(-1, row_bytes)
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
        multiples,
        levels,
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


def check_importance(importance: Floats, weights: Floats) -> Floats:
    """One float32 for each column, contiguous."""
    if importance.dtype != np.float32 or importance.shape != weights.shape[-1:]:
        raise ValueError(
            f"the importance of rows of {weights.shape[-1]} weights is as many float32, not "
            f"{importance.dtype} {importance.shape}"
        )
    return np.ascontiguousarray(importance)


def weigh_reference(weights: Floats, importance: Floats, spread: Spread | None) -> Floats:
    """How much an error counts at each weight, in the shape of the weights."""
    k = weights.shape[-1]
    if spread is None or weights.size == 0:
        return np.broadcast_to(importance, weights.shape)
    spread = spread.of_row(k)
    spans = weights.reshape(-1, spread.span)
    squares = np.float32(spread.times) * ordered_sum(spans * spans)
    sigma2: Floats = squares / np.float32(spread.over)
    roots: Floats = np.sqrt(sigma2[:, None] + spans * spans)
    return importance * roots.reshape(-1, k)


def weigh(weights: Floats, importance: Floats, spread: Spread | None) -> Floats:
    """The same, fast."""
    if spread is None or weights.size == 0:
        return np.ascontiguousarray(np.broadcast_to(importance, weights.shape))
    weighing = _load("weighing", "weigh")
    k = weights.shape[-1]
    spread = spread.of_row(k)
    x = np.ascontiguousarray(weights)
    weighed = np.empty_like(x)
    scratch, _memory = _scratch(weighing.SCRATCH)
    weighing.weigh(
        *(x.ctypes.data, importance.ctypes.data, weighed.ctypes.data, x.size // k, k),
        *(spread.span, spread.times, spread.over, scratch),
    )
    return weighed


def _stretches(n_rows: int, k: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Rows that are weighed and quantised together: few, so that they stay in the cache.

    All but the last are a multiple of 16 blocks, which every kernel can take as they are.
    """
    unit = LANES // gcd(LANES, k // block_size)
    step = max(unit, STRETCH // max(k, 1) // unit * unit)
    for first in range(0, n_rows, step):
        yield first, min(first + step, n_rows)


def quantize_with_kernel(
    name: str, blocks: Floats, block_bytes: int, weighed: Floats | None = None
) -> Bytes:
    """Run the compiled quantiser of a format: `quantize` of kernels.NAME, or `quantize_weighted`.

    A kernel takes whole groups of blocks; what is left over is padded with zeros.
    """
    module = _load(name.lower(), "quantize" if weighed is None else "quantize_weighted")
    if weighed is None:
        kernel, group, size, inputs = module.quantize, module.GROUP, module.SCRATCH, [blocks]
    else:
        kernel, group = module.quantize_weighted, module.WEIGHTED_GROUP
        size, inputs = module.WEIGHTED_SCRATCH, [blocks, weighed]
    scratch, _memory = _scratch(size)
    data = np.empty((len(blocks), block_bytes), np.uint8)
    whole = len(blocks) - len(blocks) % group
    if whole:
        kernel(*(array.ctypes.data for array in inputs), data.ctypes.data, whole, scratch)
    if whole < len(blocks):
        padded = [np.zeros((group, blocks.shape[1]), np.float32) for _ in inputs]
        for array, part in zip(padded, inputs, strict=True):
            array[: len(blocks) - whole] = part[whole:]
        last = np.empty((group, block_bytes), np.uint8)
        kernel(*(array.ctypes.data for array in padded), last.ctypes.data, group, scratch)
        data[whole:] = last[: len(blocks) - whole]
    return data


def _load(module_name: str, kernel: str) -> Any:
    """A module of kernels, with one of them ready to be called.

    Compilers are imported here, at the first use, and not by those who only ask for a type's size.
    One thread at a time: one that imports kernels waits for numba's locks, and one that compiles
    waits for the import system's.
    """
    with _LOADING:
        module = import_module(f"gguf_tools.quants.kernels.{module_name}")
        getattr(module, kernel).address  # noqa: B018 - compiles
    return module


def _scratch(size: int) -> tuple[int, Bytes]:
    """A 64-byte aligned address of memory of this call (threads share nothing), and its owner."""
    memory = np.empty(size + 64, np.uint8)
    return memory.ctypes.data + -memory.ctypes.data % 64, memory
