"""Weights to blocks with error feedback, on several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.feedback.moments import Feedback, Moments
from gguf_tools.feedback.rounding import Rounded, load, round_rows, to_parts
from gguf_tools.quants import QUANTS
from gguf_tools.quants.levels import Levels
from gguf_tools.quants.quanttype import Bytes, Floats, QuantType

BAND = 64  # rows that a thread takes at once: they share what is read of U

RoundRows = Callable[[Levels, Floats, Feedback], Rounded]


def quantize_with_moments(
    quant: QuantType, weights: Floats, moments: Floats | Moments, *, threads: int
) -> Bytes:
    """Blocks (n_rows, row_bytes) for which `loss` is small.

    weights   (n_rows, n_columns) float32, finite
    moments   of their inputs, (n_columns, n_columns); as Moments where several matrices share them

    Rows do not depend on one another: the bytes are the same whatever the number of threads, and
    for some of the rows alone. Blocks are valid whatever the weights; scales beyond float16 are
    cut off there.

    UnsupportedQuantError for a type without error feedback or rows that are not whole blocks;
    ValueError for weights or moments of a wrong shape, or that are not numbers.
    """
    levels = quant.levels
    if levels is None:
        known = ", ".join(other.name for other in QUANTS if other.levels is not None)
        raise UnsupportedQuantError(
            f"{quant.name} cannot be quantised with error feedback; types that can are {known}"
        )
    if weights.dtype != np.float32 or weights.ndim != 2:
        raise ValueError(
            f"weights to quantise are rows of float32, not {weights.dtype} {weights.shape}"
        )
    row_bytes = quant.row_bytes(weights.shape[1])
    if not isinstance(moments, Moments):
        moments = Moments(moments)
    if moments.n_columns != weights.shape[1]:
        raise ValueError(
            f"rows of {weights.shape[1]} weights need as many moments squared, not "
            f"{moments.n_columns} squared"
        )
    if not np.isfinite(weights).all():
        raise ValueError("weights to quantise must be numbers; found NaN or infinity")
    feedback = moments.feedback(levels)
    data = np.empty((len(weights), row_bytes), np.uint8)

    def quantize_band(first: int) -> None:
        rows = slice(first, first + BAND)
        data[rows] = make_blocks(levels, weights[rows], feedback, round_rows)

    load()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(quantize_band, range(0, len(weights), BAND)):
            pass
    return data


def make_blocks(levels: Levels, rows: Floats, feedback: Feedback, round_rows: RoundRows) -> Bytes:
    """The blocks of rows, (n_rows, row_bytes)."""
    parts = to_parts(levels, round_rows(levels, rows, feedback), feedback.order)
    return levels.pack(parts).view(np.uint8).reshape(len(rows), -1)


def loss(quant: QuantType, weights: Floats, blocks: Bytes, moments: Floats) -> float:
    """tr(E H E^T) of the error E: what it adds to the squares of the outputs, per input."""
    error = quant.dequantize(blocks).reshape(weights.shape) - weights
    return float(np.vdot(error @ moments, error))
