"""Activation-aware scaling: what a group's channels are multiplied with before it is quantised.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023; llm-awq, auto_scale.py): weights that
meet large inputs are rounded more finely if their columns are multiplied by some s > 1 first. What
feeds the columns is divided by s (runtime/quality/foldable.py says what that is), so the model
computes what it did. Here s is a channel's root mean square input to the power of a, times that of
its weights to the power of b. The best of a grid of (a, b) is the one with which the group's
matrices, quantised to their own types, do least harm: the sum of E^2 times the mean squares of the
inputs, E the errors of the weights as they were before scaling. All second moments of the inputs in
place of their diagonal choose hardly better: by less than 0.01 of the loss, where it was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gguf_tools.quants import by_name
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.reader import TensorInfo
from runtime.program import Floats
from runtime.quality.foldable import Group, Rows
from runtime.sources import Source
from runtime.streamed_rows import Bytes

# Exponents of the inputs' and the weights' sizes that are tried. AWQ's own are those with b = 0.
GRID = [
    (a, b)
    for a in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    for b in (0.0, -0.25, -0.5, -0.75, -1.0)
    if (a, b) != (0.0, 0.0)
]
LEAST_GAIN = 0.01  # of the loss, or nothing is scaled
SAMPLE = 1 << 19  # weights of a group that are quantised to judge a scale
LEAST_ROWS = 8  # of each of its matrices
FLOOR = 1e-4  # of the mean of squares: no channel counts as smaller
MOST = 64.0  # what a channel may be multiplied with, or divided by


@dataclass(frozen=True, eq=False)
class Factors:
    """What a tensor's weights are multiplied with: row i, column j by rows[i] * columns[m][j].

    m is the matrix of a stack that row i belongs to. A vector is a row; a table of biases has as
    many stacked matrices as rows.
    """

    rows: Floats  # (n_rows,)
    columns: Floats  # (n_matrices, row_length), each for n_rows / n_matrices rows

    def apply(self, weights: Floats, first: int = 0) -> Floats:
        """The rows from `first` on (n, row_length), scaled."""
        places = np.arange(first, first + len(weights))
        height = len(self.rows) // len(self.columns)
        if len(self.columns) == 1:
            scaled = weights * self.columns
        else:
            scaled = weights * self.columns[places // height]
        result: Floats = scaled * self.rows[places, None]
        return result


def find_factors(
    scales: Iterable[tuple[Group, Floats]], tensors: Mapping[str, TensorInfo]
) -> dict[str, Factors]:
    """The factors of every tensor that the groups change.

    scales: for each group (n_channels,) positive numbers, with which columns are multiplied. No
    part of a tensor may be in two groups in the same role, as foldable_groups sees to.
    """
    found: dict[str, Factors] = {}

    def of(name: str, n_matrices: int) -> Factors:
        tensor = tensors[name]
        if name not in found:
            columns = np.ones((n_matrices, tensor.row_length), np.float32)
            found[name] = Factors(np.ones(tensor.n_rows, np.float32), columns)
        return found[name]

    for group, given in scales:
        scale = np.asarray(given, np.float32)
        inverse = np.float32(1) / scale
        for part in group.divided:
            if isinstance(part, Rows):
                n_matrices = stacked(tensors[part.name])
                of(part.name, n_matrices).rows[part.first : part.first + len(scale)] *= inverse
            else:
                columns = of(part.name, tensors[part.name].n_rows).columns
                columns[part.row, part.first : part.first + len(scale)] *= inverse
        for read in group.multiplied:
            columns = of(read.name, stacked(tensors[read.name])).columns
            columns[read.index or 0] *= scale[group.channels]
    return found


# --- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix whose columns would be multiplied."""

    weights: Floats  # (n_rows, n_columns): some of its rows are enough, see `sampled`
    quant: QuantType
    importance: Floats  # (n_columns,) mean squares of its inputs


def sampled(weights: Floats, n_readers: int) -> Floats:
    """Some rows of a matrix, from all over it, to judge scales by."""
    n_rows = max(LEAST_ROWS, SAMPLE // (n_readers * weights.shape[1]))
    return np.ascontiguousarray(weights[:: max(1, len(weights) // n_rows)])


def find_scale(group: Group, readers: Sequence[Reader], *, threads: int) -> Floats | None:
    """What the group's columns are best multiplied with: (n_channels,); None: leave them alone.

    `readers` are those of the group's matrices that are quantised with a loss, whose inputs are
    known. Their geometric mean is 1, so what is divided stays of its size, too.
    """
    with ThreadPoolExecutor(threads) as executor:
        plain = np.ones(group.n_channels, np.float32)
        before = _losses(group, readers, plain, executor)
        judged = [(reader, loss) for reader, loss in zip(readers, before, strict=True) if loss > 0]
        if not judged:
            return None
        chosen = [reader for reader, _ in judged]
        whole = np.array([loss for _, loss in judged])
        inputs, weights = _sizes(group, chosen)
        best, least = None, 1 - LEAST_GAIN
        for a, b in GRID:
            scale = _normalised(inputs**a * weights**b)
            after = np.mean(np.array(_losses(group, chosen, scale, executor)) / whole)
            if after < least:  # not if it is no number
                best, least = scale, float(after)
    return best


def _losses(
    group: Group, readers: Sequence[Reader], scale: Floats, executor: ThreadPoolExecutor
) -> list[float]:
    """Of each matrix, quantised with its columns multiplied by `scale`."""
    columns = scale[group.channels]
    return list(executor.map(lambda reader: _loss(reader, columns), readers))


def _loss(reader: Reader, columns: Floats) -> float:
    quantize = reader.quant.quantize
    assert quantize is not None
    blocks = quantize(reader.weights * columns, reader.importance / columns**2)
    errors = reader.quant.dequantize(blocks) / columns - reader.weights
    return float(np.einsum("ij,ij,j->", errors, errors, reader.importance, optimize=True))


def _sizes(group: Group, readers: Sequence[Reader]) -> tuple[Floats, Floats]:
    """Root mean squares of each channel's inputs and weights; none is far below the others'."""
    squares = [np.mean([_relative(r.importance) for r in readers], axis=0)]
    squares.append(np.mean([_relative((r.weights**2).mean(axis=0)) for r in readers], axis=0))
    count = np.bincount(group.channels, minlength=group.n_channels)
    found = []
    for each in squares:
        logarithms = np.log(np.maximum(each, FLOOR))
        found.append(np.bincount(group.channels, logarithms, group.n_channels) / count)
    inputs, weights = (np.exp(each / 2).astype(np.float32) for each in found)
    return inputs, weights


def _relative(squares: Floats) -> Floats:
    mean = squares.mean()
    relative: Floats = squares / mean if mean > 0 else np.ones_like(squares)
    return relative


def _normalised(scale: Floats) -> Floats:
    mean = np.exp(np.log(scale).mean())
    clipped: Floats = np.clip(scale / mean, 1 / MOST, MOST).astype(np.float32)
    return clipped


# --- helpers --------------------------------------------------------------------------------------


def stacked(tensor: TensorInfo) -> int:
    """How many matrices a tensor holds."""
    return int(np.prod(tensor.shape[:-2], dtype=np.int64))


class ScaledWeights:
    """A source's tensors, some of them scaled and F32, the others as they are."""

    def __init__(self, source: Source, factors: Mapping[str, Factors]) -> None:
        self.path, self.metadata = source.path, source.metadata
        self._source, self._factors = source, factors
        self.tensors = {
            name: _as_f32(tensor) if name in factors else tensor
            for name, tensor in source.tensors.items()
        }

    def raw(self, name: str) -> Bytes:
        if name not in self._factors:
            return self._source.raw(name)
        return self.rows(name, 0, self.tensors[name].n_rows)

    def rows(self, name: str, first: int, last: int) -> Bytes:
        blocks = self._source.rows(name, first, last)
        if name not in self._factors:
            return blocks
        weights = self._source.tensors[name].quant.dequantize(np.ascontiguousarray(blocks))
        return self._factors[name].apply(weights, first).view(np.uint8)

    def load(self, name: str) -> Floats:
        tensor = self.tensors[name]
        weights: Floats = tensor.quant.dequantize(np.ascontiguousarray(self.raw(name)))
        return weights.reshape(tensor.shape)


def _as_f32(tensor: TensorInfo) -> TensorInfo:
    quant = by_name("F32")
    return TensorInfo(
        tensor.name, quant, tensor.shape, 0, tensor.n_rows * quant.row_bytes(tensor.row_length)
    )
