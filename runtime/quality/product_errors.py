"""How wrong a matrix's products become with each type: on sampled rows and sampled inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gguf_tools.quants import by_name
from runtime.program import Floats, Matrix
from runtime.quality.trial_types import TrialTypes

INPUTS = 96  # that are kept of a matrix
MATRICES = 4  # of a stack
ROWS, RUN = 128, 16  # of a matrix, in runs of neighbours


@dataclass(frozen=True)
class ProductErrors:
    """Of one tensor."""

    by_type: dict[str, float]  # sums of squares of products with what a type loses
    size: float  # the same of products with the weights themselves


class Inputs:
    """What matrices are multiplied with: an observer that keeps a sample."""

    def __init__(self, names: Collection[str], n_windows: int) -> None:
        self.by_name: dict[str, dict[int, list[Floats]]] = {}
        self._names = names
        self._share = -(-INPUTS // n_windows)

    def observe(self, matrix: Matrix, x: Floats) -> None:
        if matrix.name not in self._names:
            return
        kept = self.by_name.setdefault(matrix.name, {})
        index = matrix.index or 0
        if len(kept.get(index, ())) >= INPUTS or (index not in kept and len(kept) == MATRICES):
            return
        # Not the first token of a window: its inputs are far from all others.
        chosen = np.unique(np.linspace(min(1, len(x) - 1), len(x) - 1, self._share).astype(int))
        kept.setdefault(index, []).append(x[chosen].copy())


def product_errors(
    trial: TrialTypes, name: str, types: Sequence[str], inputs: dict[int, list[Floats]]
) -> ProductErrors:
    """Without inputs every column counts the same: of a tensor that is looked up."""
    tensor = trial.tensors[name]
    height = tensor.shape[-2]
    by_type, size = dict.fromkeys(types, 0.0), 0.0
    for index in inputs or {0: []}:
        # A tensor may be told of as one matrix though it is a stack.
        rows = height if len(inputs) > 1 or index else tensor.n_rows
        x = np.concatenate(inputs[index]) if inputs else None
        runs = _runs(index * height, rows)
        weights = np.concatenate([trial.weights(name, first, last) for first, last in runs])
        size += _square(weights, x)
        for type_ in types:
            # Rows are quantised one by one, with the importance of their matrix.
            blocks = trial.quantise(name, type_, weights, index * height)
            made = by_name(type_).dequantize(blocks).reshape(weights.shape)
            by_type[type_] += _square(weights - made, x)
    return ProductErrors(by_type, size)


def _runs(begin: int, n_rows: int) -> list[tuple[int, int]]:
    """Runs of neighbouring rows, evenly spread."""
    count = min(ROWS // RUN, -(-n_rows // RUN))
    starts = np.linspace(0, max(n_rows - RUN, 0), count).astype(int)
    return [(begin + start, begin + min(start + RUN, n_rows)) for start in starts.tolist()]


def _square(weights: Floats, x: Floats | None) -> float:
    """The sum of squares of x times the weights, or of the weights."""
    made = (weights if x is None else x @ weights.T).ravel()
    return float(np.dot(made, made))
