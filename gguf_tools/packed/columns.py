"""Bands of columns of tensors that are stored by rows: GPTQ and AWQ keep a matrix inputs first.

A band of the weights' rows is then a band of columns of what is stored. Columns are read in panels
of a bounded size, and the last few panels are kept: the next band is mostly in one of them.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.packed.numbers import read_words
from gguf_tools.safetensors_file import LazyTensor

PANEL_BYTES = 1 << 25
READ_BYTES = 1 << 22  # of rows, of which a panel takes its columns
N_KEPT = 3  # weights, zero points and scales of a matrix

Numbers: TypeAlias = npt.NDArray[Any]
Read: TypeAlias = Callable[[int, int], Numbers]


class Columns:
    """Columns of some tensors; may be asked by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], Numbers] = OrderedDict()

    def words(self, tensor: LazyTensor, begin: int, end: int) -> Numbers:
        """Columns `begin` to `end` (exclusive) of a tensor of whole numbers: (n_rows, n)."""
        return self._read(tensor, lambda first, last: read_words(tensor, first, last), begin, end)

    def floats(self, tensor: LazyTensor, begin: int, end: int) -> Numbers:
        """The same of a tensor of floats."""
        return self._read(tensor, tensor.load, begin, end)

    def _read(self, tensor: LazyTensor, read: Read, begin: int, end: int) -> Numbers:
        width = max(1, PANEL_BYTES // (4 * tensor.n_rows))
        bands = []
        while begin < end:
            number, column = divmod(begin, width)
            last = min(end - number * width, width)
            bands.append(self._panel(tensor, read, number, width)[:, column:last])
            begin += last - column
        return bands[0] if len(bands) == 1 else np.concatenate(bands, axis=1)

    def _panel(self, tensor: LazyTensor, read: Read, number: int, width: int) -> Numbers:
        key = tensor.name, number
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _read_panel(tensor, read, number * width, width)
            self._kept.move_to_end(key)
            while len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def _read_panel(tensor: LazyTensor, read: Read, column: int, width: int) -> Numbers:
    step = max(1, READ_BYTES // (4 * tensor.row_length))
    width = min(width, tensor.row_length - column)
    panel: Numbers = np.empty((tensor.n_rows, width), read(0, 1).dtype)
    for first in range(0, tensor.n_rows, step):
        last = min(first + step, tensor.n_rows)
        panel[first:last] = read(first, last)[:, column : column + width]
    return panel
