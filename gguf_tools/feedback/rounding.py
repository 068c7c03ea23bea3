"""Bands of rows through the compiled kernel, and what comes out as parts of blocks."""

import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gguf_tools.feedback.moments import Feedback, Order
from gguf_tools.feedback.search import N_MOVES, N_REFITS, search_for
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats

if TYPE_CHECKING:
    from gguf_tools.jit import Kernel

KERNELS = "gguf_tools.feedback.kernels.rows"  # numba is imported with it
LANES = 16  # rows that the kernel takes together

_LOADING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Rounded:
    """Rows with their columns, groups and blocks in the order in which they were rounded."""

    levels: npt.NDArray[np.int8]  # (n_rows, n_columns)
    scales: Floats  # (n_rows, n_groups): numbers, or multiples of d
    minima: Floats  # (n_rows, n_groups)
    d: Floats  # (n_rows, n_blocks); empty where a block is one group
    dmin: Floats


def round_rows(levels: Levels, rows: Floats, feedback: Feedback) -> Rounded:
    """Round weights (n_rows, n_columns) with error feedback; reference.py says how."""
    n_rows, n_columns = rows.shape
    n_bundles = -(-n_rows // LANES)
    n_groups = n_columns // levels.group
    n_blocks = n_columns // levels.block_size if levels.n_groups > 1 else 0
    kernels = load()

    def vectors(n: int, dtype: type) -> Array:
        return np.empty((n_bundles, n, LANES), dtype)

    padded = np.zeros((n_bundles * LANES, n_columns), np.float32)
    padded[:n_rows] = rows[:, feedback.order]
    x = np.ascontiguousarray(padded.reshape(n_bundles, LANES, n_columns).transpose(0, 2, 1))
    out = vectors(n_columns, np.int8)
    scales, minima = vectors(n_groups, np.float32), vectors(n_groups, np.float32)
    d, dmin = vectors(n_blocks, np.float32), vectors(n_blocks, np.float32)
    errors = vectors(kernels.PANEL, np.float32)
    scratch = np.empty(kernels.SCRATCH, np.uint8)
    ranges, factors, facts = _search(levels)
    addresses = [array.ctypes.data for array in (x, out, scales, minima, d, dmin)]
    tables = (feedback.strips, feedback.pivots, feedback.ones, ranges, factors, facts)
    kernels.round_rows(
        *(*addresses, n_bundles, n_columns),
        *(array.ctypes.data for array in (*tables, errors, scratch)),
    )

    def by_rows(array: Array) -> Array:
        return array.transpose(0, 2, 1).reshape(n_bundles * LANES, array.shape[1])[:n_rows]

    return Rounded(*(by_rows(array) for array in (out, scales, minima, d, dmin)))


def to_parts(levels: Levels, rounded: Rounded, order: Order) -> Parts:
    """What blocks are made of, in the order of the columns."""
    groups = order[:: levels.group] // levels.group
    blocks = order[:: levels.block_size] // levels.block_size
    q = _in_place(rounded.levels, order).reshape(-1, levels.block_size)
    scales, minima = _in_place(rounded.scales, groups), _in_place(rounded.minima, groups)
    if levels.n_groups == 1:
        ones = np.ones((scales.size, 1), np.int16)
        return Parts(scales.reshape(-1), minima.reshape(-1), ones, ones, q)
    return Parts(
        _in_place(rounded.d, blocks).reshape(-1),
        _in_place(rounded.dmin, blocks).reshape(-1),
        scales.astype(np.int16).reshape(-1, levels.n_groups),
        minima.astype(np.int16).reshape(-1, levels.n_groups),
        q,
    )


def load() -> Any:
    """The kernels, compiled; one thread at a time, as numba and imports have locks of their own."""
    with _LOADING:
        kernels = import_module(KERNELS)
        kernels.round_rows.address  # noqa: B018 - compiles
    return kernels


def needed_kernels() -> "list[Kernel]":
    """What `load` compiles, for compile_kernels, which tells how far it is."""
    with _LOADING:
        return [import_module(KERNELS).round_rows]


def _in_place(array: Array, order: Order) -> Array:
    placed = np.empty_like(array)
    placed[:, order] = array
    return placed


@cache
def _search(levels: Levels) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Ranges, factors and facts as the kernel reads them."""
    search = search_for(levels)
    facts = [
        *(levels.group, levels.lowest, levels.highest, levels.has_minimum),
        *(levels.lowest_scale, levels.highest_scale),
        *(len(search.ranges), len(search.factors), N_REFITS, N_MOVES),
        *(len(levels.values), *levels.values),
    ]
    return search.ranges, search.factors, np.array(facts, np.int64)
