"""Memory of a GPU: what is put there, counted, and the formats that change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError, device_memset

from gguf_tools.errors import DeviceMemoryError
from runtime.backends.cuda_formats import (
    FLOATS,
    allocated,
    blocks_held,
    held_bytes,
    kept_as,
    weight_bytes,
)
from runtime.kernels.cuda.planes import THREADS, spread
from runtime.kernels.cuda.products import BLOCKS
from runtime.program import Matrix

REMEDY = "use fewer --gpu-layers or a smaller --ctx"
OUT_OF_MEMORY = "OUT_OF_MEMORY"  # of CUDA's name of the error
STAGED = 8 << 20  # bytes of rows on their way, beside what is counted (runtime/split.py, FIXED)

Array = Any  # a numba.cuda device array


class DeviceMemory:
    """Arrays on the current device; freed when they are dropped."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` bytes at most. DeviceMemoryError for more, with the room that there is."""
        self.size = 0
        self._limit = limit
        self._held: dict[int, tuple[Any, Array]] = {}
        self._staging: Array | None = None  # where blocks wait to be spread out

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array:
        """An array of one dimension."""
        n_bytes = allocated(size * np.dtype(dtype).itemsize)
        if self._limit is not None and self.size + n_bytes > self._limit:
            raise DeviceMemoryError(
                f"the GPU may be given {self._limit:,} bytes and {self.size + n_bytes:,} are "
                f"needed: {REMEDY}",
                room=self._limit,
            )
        try:
            array = cuda.device_array(size, dtype)
        except CudaAPIError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            free, _ = cuda.current_context().get_memory_info()
            raise DeviceMemoryError(
                f"the GPU has {free:,} bytes left beside {self.size:,} that these layers have "
                f"taken, and {n_bytes:,} more are needed: {REMEDY}",
                room=self.size + free,
            ) from error
        self.size += n_bytes
        return array

    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array:
        array = self.empty(size, dtype)
        device_memset(array, 0, size * np.dtype(dtype).itemsize)
        return array

    def hold(self, values: npt.NDArray[Any]) -> Array:
        """A copy of a host array, flat; the same one for the same array."""
        known = self._held.get(id(values))
        if known is None:
            flat = np.ascontiguousarray(values).reshape(-1)
            array = self.empty(len(flat), flat.dtype)
            array.copy_to_device(flat)
            known = self._held[id(values)] = (values, array)
        return known[1]

    def weights(self, matrices: Sequence[Matrix]) -> Array:
        """The blocks of matrices of one format and shape, one after the other."""
        key = id(matrices[0])
        if key not in self._held:
            first = matrices[0]
            each = weight_bytes(first)
            blocks = self.empty(held_bytes(matrices), np.uint8)
            for i, matrix in enumerate(matrices):
                self._upload(matrix, blocks[i * each : (i + 1) * each])
            self._held[key] = (matrices, blocks)
        return self._held[key][1]

    def drop(self) -> None:
        self._held.clear()
        self._staging = None

    def _upload(self, matrix: Matrix, target: Array) -> None:
        """The matrix's blocks, their fields apart, or floats where there are no kernels."""
        kept = kept_as(matrix.quant)
        row = weight_bytes(matrix) // matrix.n_rows if kept in FLOATS else matrix.data.shape[1]
        step = max(STAGED // row, 1)
        for start in range(0, matrix.n_rows, step):
            chosen = slice(start, start + step)
            if kept in FLOATS or len(BLOCKS[kept].planes) == 1:
                rows = rows_as_kept(matrix, chosen)
                target[start * row : start * row + len(rows)].copy_to_device(rows)
            else:
                self._spread(matrix, chosen, target)

    def _spread(self, matrix: Matrix, chosen: slice, target: Array) -> None:
        rows = rows_as_kept(matrix, chosen)
        if self._staging is None or len(self._staging) < len(rows):
            self._staging = cuda.device_array(len(rows), np.uint8)
        self._staging[: len(rows)].copy_to_device(rows)
        form = BLOCKS[matrix.quant.name]
        n = len(rows) // form.block_bytes
        before = chosen.start * (matrix.n_columns // form.size)
        grid = -(-n // THREADS), THREADS
        for first, width, at in form.places(blocks_held(matrix)):
            at += before * width
            spread[grid](self._staging, n, form.block_bytes, first, width, target, at)


def spread_out(matrix: Matrix) -> npt.NDArray[np.uint8]:
    """What a matrix of blocks is on the GPU; `spread` makes the same there."""
    form, n = BLOCKS[matrix.quant.name], blocks_held(matrix)
    blocks = rows_as_kept(matrix, slice(None)).reshape(-1, form.block_bytes)
    planes = np.zeros(n * form.block_bytes, np.uint8)
    for first, width, at in form.places(n):
        field = blocks[:, first : first + width].reshape(-1)
        planes[at : at + len(field)] = field
    return planes


def rows_as_kept(matrix: Matrix, chosen: slice) -> npt.NDArray[np.uint8]:
    """The bytes of some rows as the GPU keeps them."""
    if kept_as(matrix.quant) == matrix.quant.name:
        return np.ascontiguousarray(matrix.data[chosen]).reshape(-1)
    return _as_bytes(matrix.rows(chosen), kept_as(matrix.quant))


def _as_bytes(rows: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    if name == "BF16":  # exact for what is kept so
        return np.ascontiguousarray(rows.view(np.uint16)[:, 1::2]).view(np.uint8).reshape(-1)
    dtype = np.float16 if name == "F16" else np.float32
    return rows.astype(dtype).view(np.uint8).reshape(-1)
