"""What error feedback needs of the inputs of a matrix: their second moments, and their inverse.

A matrix W meets inputs X. Rounding it to V costs tr((W - V) H (W - V)^T) with H = X^T X / n. With
H^-1 = U^T U (U upper triangular) that is the sum of squares of (W - V) U^-1, and column by column:
when column j is rounded, (V - W)[:, j] / U[j, j] times U[j, j + 1:] is what the later columns
should take up (GPTQ, Frantar et al. 2022, arXiv:2210.17323).
"""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.feedback.factors import invert_moments
from gguf_tools.quants.levels import Levels
from gguf_tools.quants.quanttype import Floats

BAND = 256  # rows that are put in order together

Order = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Feedback:
    """U for the columns in the order in which they are rounded."""

    order: Order  # (n_columns,)
    strips: Floats  # (n_columns / group, n_columns, group): the columns of U, a group each
    pivots: Floats  # (n_columns,): 1 / U[j, j]
    ones: Floats  # (n_columns,): of each group, a row of ones divided by its square of U, negative


class Moments:
    """The second moments of a matrix's inputs, for all matrices that have the same inputs.

    What one kind of block needs of them is made when it is first asked for and then kept; threads
    may share it.
    """

    def __init__(self, moments: Floats) -> None:
        """`moments` (n_columns, n_columns), symmetric; ValueError if it has no such shape or holds
        what is not a number."""
        if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or not moments.size:
            raise ValueError(f"second moments are a square matrix, not of shape {moments.shape}")
        if not np.isfinite(moments).all():
            raise ValueError("second moments must be numbers; found NaN or infinity")
        self.moments = moments
        self._lock = threading.Lock()
        self._made: dict[tuple[int, int], Feedback] = {}

    @property
    def n_columns(self) -> int:
        return len(self.moments)

    def feedback(self, levels: Levels) -> Feedback:
        """For blocks of such groups; n_columns must be whole blocks."""
        with self._lock:
            layout = levels.group, levels.n_groups
            if layout not in self._made:
                self._made[layout] = prepare(self.moments, levels)
            return self._made[layout]


def prepare(moments: Floats, levels: Levels) -> Feedback:
    """Order the columns and find U; see factors.py for how moments are damped."""
    n = len(moments)
    order = order_columns(moments.diagonal(), levels)
    # Of a wide matrix this is more than a gigabyte: no copy of it is made.
    upper = np.empty((n, n))
    for first in range(0, n, BAND):
        upper[first : first + BAND] = moments[np.ix_(order[first : first + BAND], order)]
    invert_moments(upper)
    group, n_groups = levels.group, n // levels.group
    strips = upper.reshape(n, n_groups, group).transpose(1, 0, 2)
    pivots = 1 / upper.diagonal()
    ones = np.empty((n_groups, group))
    for j in range(group):
        above = np.stack([strips[g, g * group : g * group + j, j] for g in range(n_groups)])
        ones[:, j] = -(1 + (ones[:, :j] * above).sum(1)) * pivots[j::group]
    return Feedback(
        order,
        np.ascontiguousarray(strips, dtype=np.float32),
        pivots.astype(np.float32),
        ones.reshape(n).astype(np.float32),
    )


def order_columns(diagonal: Floats, levels: Levels) -> Order:
    """Columns that matter most first, as far as blocks allow.

    What is rounded last takes up the errors of all others. Blocks by the mean of their diagonal,
    then the groups of a block, then the columns of a group, each descending.
    """
    shape = (-1, levels.n_groups, levels.group)
    importance = diagonal.astype(np.float64).reshape(shape)
    order = np.arange(len(diagonal)).reshape(shape)
    blocks = np.argsort(-importance.mean((1, 2)), kind="stable")
    importance, order = importance[blocks], order[blocks]
    groups = np.argsort(-importance.mean(2), axis=1, kind="stable")[:, :, None]
    importance = np.take_along_axis(importance, groups, 1)
    order = np.take_along_axis(order, groups, 1)
    columns = np.argsort(-importance, axis=2, kind="stable")
    return np.take_along_axis(order, columns, 2).reshape(-1)
