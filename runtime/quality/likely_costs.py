"""How much each quantised matrix of a file is likely to cost, from what it is multiplied with.

Of every matrix a few rows are multiplied with the inputs of a few tokens, with the source's weights
and with the file's: the relative error of the products. A product that becomes a large part of what
the model carries from layer to layer counts more, and so does an error at a window's first token:
attention reads that one everywhere. On a 135M model the estimates are within a factor of two for
two tensors of three, up to a common factor. They choose which tensors are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.program import Floats, Matrix
from runtime.sources import Source

PROBED = 32  # tokens, spread over a window; the first is its first
RUNS, RUN = 4, 32  # rows of a matrix: so many runs of so many
MATRICES = 4  # of a stack of experts
FIRST_TOKEN = 0.03  # how much its error counts
SHARE_POWER = 0.25  # of the part that a product becomes: fitted to measured costs, as is the other

Doubles = npt.NDArray[np.float64]


@dataclass(eq=False)
class Probes:
    """What the matrices of some layers are multiplied with; `observe` is for LayerwiseModel."""

    positions: npt.NDArray[np.intp]  # of the tokens that are kept, in the window
    inputs: dict[str, dict[int, Floats]] = field(default_factory=dict)  # by tensor and expert

    def observe(self, matrix: Matrix, x: Floats) -> None:
        """Of an expert, whose rows are those of its own tokens, the first few are kept."""
        if matrix.index is None:
            self.inputs[matrix.name] = {0: x[self.positions].copy()}
        else:
            held = self.inputs.setdefault(matrix.name, {})
            if len(held) < MATRICES and len(x):
                held[matrix.index] = x[:PROBED].copy()


def probed_positions(n_tokens: int) -> npt.NDArray[np.intp]:
    """Positions spread over a window of so many tokens, the first included."""
    return np.unique(np.linspace(0, n_tokens - 1, min(PROBED, n_tokens)).astype(np.intp))


def layer_shares(before: Floats, after: Floats) -> Doubles:
    """For each token how much of its hidden state (n_tokens, dim) a layer has made."""
    return _squares(after - before) / np.maximum(_squares(after), 1e-30)


def estimate(
    name: str, inputs: Mapping[int, Floats], shares: Doubles | None, source: Source, file: Source
) -> float:
    """What the tensor costs, in no unit; `shares` of the tokens kept, None where it is all.

    0 for a tensor of another width than its inputs.
    """
    total = 0.0
    for index, x in inputs.items():
        tensor = source.tensors[name]
        if x.shape[1] != tensor.row_length:
            return 0.0
        errors = relative_errors(name, index, x, source, file)
        if not np.isfinite(errors).all():
            return np.inf
        parts = np.ones(len(x)) if shares is None or len(shares) != len(x) else shares
        rest = slice(1, None) if len(x) > 1 else slice(None)
        total += float(errors[rest].mean() * parts[rest].mean() ** SHARE_POWER)
        total += FIRST_TOKEN * float(errors[0] * parts[0] ** SHARE_POWER)
    return total / max(1, len(inputs))


def relative_errors(name: str, index: int, x: Floats, source: Source, file: Source) -> Doubles:
    """Of the products of each of the inputs with rows of the file's matrix: squared, relative."""
    height = source.tensors[name].shape[-2]
    runs = list(_runs(index * height, height))
    weights, blocks = (
        np.concatenate([_rows(each, name, *run) for run in runs]) for each in (source, file)
    )
    # One product: on a busy machine each call of BLAS waits for its threads.
    made = x @ np.concatenate([weights, blocks - weights]).T
    right, wrong = made[:, : len(weights)], made[:, len(weights) :]
    relative: Doubles = _squares(wrong) / np.maximum(_squares(right), 1e-30)
    return relative


def lookup_error(name: str, ids: Sequence[int], source: Source, file: Source) -> float:
    """The relative error of the rows of an embedding that the tokens look up."""
    errors = []
    for token in ids:
        weights, blocks = (_rows(each, name, token, token + 1) for each in (source, file))
        errors.append(float(_squares(blocks - weights)[0] / max(_squares(weights)[0], 1e-30)))
    return float(np.mean(errors))


def _runs(start: int, height: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring rows, spread over the `height` rows from `start` on."""
    if height <= RUNS * RUN:
        yield start, start + height
        return
    for first in np.linspace(0, height - RUN, RUNS).astype(int).tolist():
        yield start + first, start + first + RUN


def _rows(source: Source, name: str, first: int, last: int) -> Floats:
    tensor = source.tensors[name]
    rows: Floats = tensor.quant.dequantize(source.rows(name, first, last))
    return rows.reshape(last - first, tensor.row_length)


def _squares(rows: Floats) -> Doubles:
    """The sum of squares of each row."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares: Doubles = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return squares
