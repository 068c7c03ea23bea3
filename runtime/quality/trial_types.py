"""A model's weights with some tensors as they would be in other types, to try what those cost.

Every matrix that a type can be tried for is float32, whatever it is in the source: it has the
source's weights, or what is left of them after they were quantised. Blocks are made when rows are
first asked for and kept until `forget`, so that many windows read the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gguf_tools.imatrix import ImportanceMatrix
from gguf_tools.quants import by_name
from gguf_tools.reader import TensorInfo
from runtime.program import Floats
from runtime.sources import Source
from runtime.streamed_rows import Bytes

FLOAT = by_name("F32")
KEPT_BYTES = 1 << 30  # of the source's weights, as float32: those that are asked for first


class TrialTypes:
    """A Source; `types` says which tensors are quantised, and may change between runs."""

    def __init__(
        self, source: Source, tried: Collection[str], matrix: ImportanceMatrix | None = None
    ) -> None:
        """`tried` are the tensors that types can be given; the importance is the quantisers'."""
        self.path = source.path
        self.metadata: Mapping[str, Any] = source.metadata
        self.types: Mapping[str, str] = {}
        self._source = source
        self.tried = frozenset(tried)
        self._matrix = matrix
        self._blocks: dict[tuple[str, str, int, int], Bytes] = {}
        self._kept: dict[tuple[str, int, int], Floats] = {}
        self._room = KEPT_BYTES
        self.tensors: Mapping[str, TensorInfo] = {
            name: _as_float(tensor) if name in self.tried else tensor
            for name, tensor in source.tensors.items()
        }

    def forget(self) -> None:
        """Keep no blocks any longer."""
        self._blocks.clear()

    def raw(self, name: str) -> Bytes:
        return self.rows(name, 0, self.tensors[name].n_rows)

    def rows(self, name: str, first: int, last: int) -> Bytes:
        if name not in self.tried:
            return self._source.rows(name, first, last)
        type_ = self.types.get(name)
        if type_ is None:
            weights = self.weights(name, first, last)
        else:
            weights = self._quantised(name, type_, first, last)
        return np.ascontiguousarray(weights, np.float32).view(np.uint8)

    def load(self, name: str) -> Floats:
        tensor = self.tensors[name]
        weights: Floats = tensor.quant.dequantize(self.raw(name))
        return weights.reshape(tensor.shape)

    def weights(self, name: str, first: int, last: int) -> Floats:
        """The source's own, (last - first, row_length)."""
        key = name, first, last
        if key in self._kept:
            return self._kept[key]
        tensor = self._source.tensors[name]
        rows: Floats = tensor.quant.dequantize(self._source.rows(name, first, last))
        rows = rows.reshape(last - first, tensor.row_length)
        if rows.nbytes <= self._room:
            self._room -= rows.nbytes
            self._kept[key] = rows
        return rows

    def quantise(self, name: str, type_: str, weights: Floats, first: int) -> Bytes:
        """The blocks of rows from `first` on, as a conversion would make them."""
        quantize = by_name(type_).quantize
        assert quantize is not None
        tensor = self.tensors[name]
        found = self._matrix.find(name, tensor.shape) if self._matrix is not None else None
        if found is None:
            return quantize(weights)
        height, last = tensor.shape[-2], first + len(weights)
        parts = []
        for matrix in range(first // height, -(-last // height)):
            begin, end = max(first, matrix * height), min(last, (matrix + 1) * height)
            parts.append(quantize(weights[begin - first : end - first], found.of_matrix(matrix)))
        return np.concatenate(parts)

    def _quantised(self, name: str, type_: str, first: int, last: int) -> Floats:
        key = name, type_, first, last
        if key not in self._blocks:
            self._blocks[key] = self.quantise(name, type_, self.weights(name, first, last), first)
        rows: Floats = by_name(type_).dequantize(self._blocks[key])
        return rows.reshape(last - first, self.tensors[name].row_length)


def _as_float(tensor: TensorInfo) -> TensorInfo:
    n_bytes = tensor.n_rows * FLOAT.row_bytes(tensor.row_length)
    return replace(tensor, quant=FLOAT, nbytes=n_bytes)
