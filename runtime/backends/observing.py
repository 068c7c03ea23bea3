"""Telling an observer what the matrices of a file are multiplied with.

Importance matrices and calibrated rounding are made of that. A matrix is known by its tensor's name
and, in a stack, its index; where a tensor is cut into several (fused q, k and v), their inputs are
the same, and it is told of once.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.program import Floats, Matrix, Show
from runtime.streamed_rows import StreamedRows

Product = Callable[[Floats, Matrix], Floats]  # (n, n_columns) times a matrix: (n, n_rows)

# Called before a product with its matrix and (n, n_columns): for an expert the rows of its own
# tokens, for others a row for each. They are valid during the call alone.
Observe = Callable[[Matrix, Floats], None]


def observed(product: Product, observe: Observe | None) -> Product:
    """`product`, for one run of a layer or the head, that tells `observe` before it multiplies.

    Only of matrices as they are in the file, which in a streamed program are streamed.
    """
    if observe is None:
        return product
    told: set[tuple[str, int | None]] = set()

    def multiply(x: Floats, matrix: Matrix) -> Floats:
        key = matrix.name, matrix.index
        if isinstance(matrix.data, StreamedRows) and key not in told:
            told.add(key)
            observe(matrix, x)
        return product(x, matrix)

    return multiply


def show(step: Show, x: Floats, observe: Observe | None) -> None:
    """Tell `observe` of the step's matrices; x (n_tokens, width) is its source."""
    if observe is not None:
        for place, matrix in enumerate(step.matrices):
            first = place * step.stride
            observe(matrix, x[:, first : first + matrix.n_columns])
