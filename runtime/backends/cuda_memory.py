"""Memory of a GPU: what is put there, counted, and the formats that change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError, device_memset

from gguf_tools.errors import DeviceMemoryError
from runtime.backends.cuda_formats import allocated, held_bytes, kept_as, row_bytes
from runtime.program import Matrix

REMEDY = "use fewer --gpu-layers or a smaller --ctx"
OUT_OF_MEMORY = "OUT_OF_MEMORY"  # of CUDA's name of the error
ROWS_AT_ONCE = 1024  # dequantised together on the way to the GPU

Array = Any  # a numba.cuda device array


class DeviceMemory:
    """Arrays on the current device; freed when they are dropped."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` bytes at most. DeviceMemoryError for more, with the room that there is."""
        self.size = 0
        self._limit = limit
        self._held: dict[int, tuple[Any, Array]] = {}

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
            each = first.n_rows * row_bytes(first)
            blocks = self.empty(held_bytes(matrices), np.uint8)
            for i, matrix in enumerate(matrices):
                _upload(matrix, blocks[i * each : (i + 1) * each])
            self._held[key] = (matrices, blocks)
        return self._held[key][1]

    def drop(self) -> None:
        self._held.clear()


def _upload(matrix: Matrix, target: Array) -> None:
    """The matrix's rows as they lie in the file, or as floats where there are no kernels."""
    each = row_bytes(matrix)
    if kept_as(matrix.quant) == matrix.quant.name:
        target.copy_to_device(np.ascontiguousarray(matrix.data).reshape(-1))
        return
    for start in range(0, matrix.n_rows, ROWS_AT_ONCE):
        blocks = rows_as_kept(matrix, slice(start, start + ROWS_AT_ONCE))
        target[start * each : start * each + len(blocks)].copy_to_device(blocks)


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
