"""What is done to a tensor's rows on the way, a band of rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Transform:
    """A change within groups of `group` rows; `apply` takes and gives whole groups."""

    group: int
    apply: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def interleave_heads(head_dim: int) -> Transform:
    """Rows of q and k from half-split to interleaved rotary order.

    Hugging Face rotates row j of a head with row j + head_dim/2; GGUF's `llama` rotates row 2j
    with row 2j + 1. So new row 2j + s is old row s * head_dim/2 + j.
    """

    def apply(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    return Transform(head_dim, apply)


def add_one(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Norm weights that a checkpoint stores less one."""
    return rows + np.float32(1)


def transformed(
    rows: npt.NDArray[np.float32], transform: Transform, n_dims: int
) -> npt.NDArray[np.float32]:
    """Whole groups of rows of a tensor with n_dims axes, changed.

    The elements of a vector are what its matrix has as rows.
    """
    apart = rows.reshape(-1, 1) if n_dims < 2 else rows
    return transform.apply(apart).reshape(rows.shape)
