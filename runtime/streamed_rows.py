"""Rows of a matrix that stay where they are until they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """Takes the place of a Matrix's data: (n_rows, row_bytes), read when asked for.

    A slice is streamed, too; an array of indices, or np.asarray, reads.
    """

    read: Callable[[int, int], Bytes]  # first row, row after the last -> (n, row_bytes)
    first: int
    last: int
    row_bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.row_bytes

    @property
    def size(self) -> int:
        return len(self) * self.row_bytes

    @property
    def nbytes(self) -> int:
        return self.size

    def __len__(self) -> int:
        return self.last - self.first

    @overload
    def __getitem__(self, chosen: slice) -> StreamedRows: ...
    @overload
    def __getitem__(self, chosen: npt.NDArray[np.integer]) -> Bytes: ...

    def __getitem__(self, chosen: slice | npt.NDArray[np.integer]) -> StreamedRows | Bytes:
        if isinstance(chosen, slice):
            first, last, step = chosen.indices(len(self))
            if step != 1:
                raise ValueError(f"streamed rows are taken one after the other, not by {step}")
            return replace(self, first=self.first + first, last=self.first + max(first, last))
        if not len(chosen):
            return np.empty((0, self.row_bytes), np.uint8)
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise IndexError(f"expected rows of {len(self)}, found {chosen.min()}..{chosen.max()}")
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return np.concatenate([np.asarray(self[run[0] : run[-1] + 1]) for run in runs])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Bytes:
        return np.ascontiguousarray(self.read(self.first, self.last), np.uint8)
