"""Weights that share a scale, and perhaps a zero point, in rectangles of rows and columns.

    weight = (code - zero[row / height, column / width]) * scale[row / height, column / width]

One scale for a tensor, a row (channel), a group of a row or a block of 128 x 128 differ in the
rectangle only.
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.safetensors_file import Floats, LazyTensor

Rectangle = tuple[int, int]  # height, width
GROUP_KEYS = ("group_size", "q_group_size")


def grid_shape(shape: tuple[int, ...], rectangle: Rectangle) -> tuple[int, ...]:
    """How many scales a tensor has: rectangles at the edges may be cut off."""
    *outer, height, width = shape
    return (*outer, -(-height // rectangle[0]), -(-width // rectangle[1]))


def group_size(config: HFConfig, width: int) -> int:
    """How many inputs of `width` share a scale, as the configuration says: -1 is all of them."""
    key = next((key for key in GROUP_KEYS if config.has(key)), GROUP_KEYS[0])
    if config.values.get(key) == -1:
        return width
    size = config.integer(key)
    if width % size:
        raise config.refuse(key, f"groups that divide {width} inputs", size)
    return size


def scaled(
    codes: LazyTensor,
    scales: LazyTensor,
    rectangle: Rectangle,
    *,
    zeros: LazyTensor | None = None,
    columns: npt.NDArray[np.int64] | None = None,
    divisor: float = 1.0,
) -> LazyTensor:
    """The weights of `codes` (..., height, width).

    `scales` and `zeros` are read as rows of grid_shape(codes.shape, rectangle), whatever their own
    shape is. `columns` gives the scale of each column where neighbours do not share one. Scales are
    divided by `divisor`.
    """
    height, width = codes.shape[-2], codes.shape[-1]
    tall, wide = rectangle
    n_down, n_across = -(-height // tall), -(-width // wide)
    single = scales.n_elements == 1  # a vector of one, or none at all: one row either way

    def spread(grid: LazyTensor, first: int, last: int) -> Floats:
        if single:
            return grid.load(0, 1)
        matrices, rows = np.divmod(np.arange(first, last), height)
        at = matrices * n_down + rows // tall
        band: Floats = _rows_of(grid, int(at[0]), int(at[-1]) + 1, n_across)[at - at[0]]
        if columns is not None:
            band = band[:, columns]
        elif n_across > 1:
            band = np.repeat(band, wide, axis=1)[:, :width]
        return band

    def load(first: int, last: int) -> Floats:
        weights = np.array(codes.load(first, last), np.float32)
        if zeros is not None:
            weights -= spread(zeros, first, last)
        scale = spread(scales, first, last)
        weights *= scale if divisor == 1.0 else scale / np.float32(divisor)
        return weights

    return LazyTensor(codes.name, codes.shape, "F32", load)


def _rows_of(grid: LazyTensor, first: int, last: int, width: int) -> Floats:
    """Rows of a grid that may be stored as a vector, which is one row to read."""
    if grid.row_length == width:
        return grid.load(first, last)
    return grid.load(0, grid.n_rows).reshape(-1, width)[first:last]
