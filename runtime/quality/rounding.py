"""Matrices rounded to the blocks of their types, by what is known of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gguf_tools.errors import CheckpointError, UnsupportedQuantError, printable
from gguf_tools.quants import by_name
from gguf_tools.quants.quanttype import Bytes, QuantType
from runtime.program import Floats
from runtime.quality.moments import Key
from runtime.sources import Source

BAND = 1 << 20  # weights that a thread quantises at a time


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a matrix's inputs."""

    importance: Floats | None  # (n_columns,); None: no token came
    moments: tuple[Floats, ...] = ()  # (n_columns, n_columns), each for as many of the rows


@dataclass(frozen=True, eq=False)
class Rounding:
    """How the tensors of a source are rounded."""

    source: Source
    types: Mapping[str, str]  # of the tensors that are
    method: str
    threads: int

    @property
    def needs_moments(self) -> bool:
        """Whether more than their diagonal is made use of."""
        return self.method != "imatrix"

    def round(self, key: Key, known: Known, blocks: dict[str, Bytes]) -> None:
        """Put the blocks of a matrix where they belong in its tensor's.

        CheckpointError where a weight is no number, UnsupportedQuantError where the type cannot
        hold it.
        """
        name, index = key
        tensor, quant = self.source.tensors[name], by_name(self.types[name])
        if name not in blocks:
            row_bytes = quant.row_bytes(tensor.row_length)
            blocks[name] = np.zeros((tensor.n_rows, row_bytes), np.uint8)
        height = tensor.n_rows if index is None else tensor.shape[-2]
        first = 0 if index is None else index * height
        rows = self.source.rows(name, first, first + height)
        weights: Floats = tensor.quant.dequantize(rows).reshape(height, tensor.row_length)
        _check_finite(name, weights, "is no number: the weights are damaged")
        made = self._rounded(quant, weights, known)
        blocks[name][first : first + height] = made
        if np.abs(weights).max(initial=0.0) > LARGE:
            _check_finite(name, quant.dequantize(made), f"is more than {quant.name} can hold")

    def _rounded(self, quant: QuantType, weights: Floats, known: Known) -> Bytes:
        return self._weighed(quant, weights, known.importance)

    def _weighed(self, quant: QuantType, weights: Floats, importance: Floats | None) -> Bytes:
        """The type's own search, with the importance of each column."""
        quantize = quant.quantize
        assert quantize is not None
        step = max(1, BAND // weights.shape[1])
        bands = [weights[first : first + step] for first in range(0, len(weights), step)]
        with ThreadPoolExecutor(self.threads) as executor:
            parts = list(executor.map(lambda band: quantize(band, importance), bands))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


LARGE = 60_000.0  # from here on a type with 16-bit scales may not hold a weight (65504)


def _check_finite(name: str, weights: Floats, what: str) -> None:
    if not np.isfinite(weights).all():
        row, column = np.argwhere(~np.isfinite(weights.reshape(-1, weights.shape[-1])))[0]
        error = CheckpointError if "number" in what else UnsupportedQuantError
        raise error(f"tensor {printable(name)}: a weight {what} (row {row}, column {column})")
