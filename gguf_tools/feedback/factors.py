"""U of a matrix's second moments, in the memory of these: of a wide matrix that is gigabytes.

H is a matrix of float64 that becomes U, upper triangular, with H^-1 = U^T U. On the way its upper
triangle holds R = U^-1, with R R^T = H; the lower one is left as it is until R is found, for H must
be damped more where there is none. Both steps go by blocks of columns, each mostly one product.
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.quanttype import Array

DAMPING = 0.01  # of the mean of the diagonal
MOST_DAMPING = 1e12
SQUARE = 128  # a triangle of this size is inverted at once
BLOCK = 256  # columns that are worked on together
ROWS = 2048  # rows of U that are multiplied together

Doubles = npt.NDArray[np.float64]


def invert_moments(moments: Doubles) -> None:
    """Turn H, symmetric, into U of H / mean of the diagonal, damped.

    Damping of DAMPING keeps U bounded; columns that had no data get it alone. More is added,
    tenfold each time, while the matrix is not positive definite.
    """
    mean = moments.diagonal().mean()
    if mean > 0:
        moments /= mean
    else:
        moments[:] = np.eye(len(moments))
    diagonal = moments.diagonal().copy()
    damping = DAMPING
    while damping <= MOST_DAMPING:
        np.fill_diagonal(moments, diagonal + damping)
        if _factor_from_the_end(moments):
            _invert_upper_in_place(moments)
            return
        _restore_upper(moments)
        damping *= 10
    raise ValueError("second moments are far from positive definite")


def _factor_from_the_end(moments: Doubles) -> bool:
    """Put R above the diagonal and on it; False where the matrix is not positive definite."""
    for columns in reversed(_blocks(len(moments), BLOCK)):
        above, end = columns.start, columns.stop
        rest = moments[:end, columns] - moments[:end, end:] @ moments[columns, end:].T
        try:
            # Of a matrix turned round the lower factor is the upper one, turned round.
            turned: Array = np.linalg.cholesky(rest[above:][::-1, ::-1])
        except np.linalg.LinAlgError:
            return False
        factor = turned[::-1, ::-1]
        moments[columns, columns] = np.tril(moments[columns, columns], -1) + factor
        moments[:above, columns] = rest[:above] @ _invert_upper(factor).T
    return True


def _restore_upper(moments: Doubles) -> None:
    """Copy what is below the diagonal above it."""
    for columns in _blocks(len(moments), BLOCK):
        moments[columns, columns.stop :] = moments[columns.stop :, columns].T
        lower = np.tril(moments[columns, columns], -1)
        moments[columns, columns] = lower + lower.T


def _invert_upper_in_place(matrix: Doubles) -> None:
    """Turn R into its inverse, with nothing below the diagonal."""
    for columns in _blocks(len(matrix), BLOCK):
        above = columns.start
        matrix[columns.stop :, columns] = 0
        own = matrix[columns, columns] = _invert_upper(np.triu(matrix[columns, columns]))
        column = matrix[:above, columns]
        for rows in _blocks(above, ROWS):
            # Rows further down are those of R still.
            product = matrix[rows, rows.start : above] @ column[rows.start :]
            column[rows] = -(product @ own)


def _invert_upper(matrix: Doubles) -> Doubles:
    """The inverse of an upper triangular matrix."""
    n = len(matrix)
    if n <= SQUARE:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    inverse = np.zeros_like(matrix)
    first = inverse[:half, :half] = _invert_upper(matrix[:half, :half])
    last = inverse[half:, half:] = _invert_upper(matrix[half:, half:])
    inverse[:half, half:] = -(first @ matrix[:half, half:] @ last)
    return inverse


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]
