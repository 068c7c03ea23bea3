"""A GGUF file that another process is writing, one tensor after the other.

Its bytes are read and never mapped: a page of a mapping that lies beyond the end of the file is a
signal that ends the process, and where the end is another process decides.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import numpy.typing as npt

from gguf_tools.closing import Closeable
from gguf_tools.errors import FormatError, GGUFError, printable
from gguf_tools.reader import TensorInfo, UnfinishedFile
from runtime.streamed_rows import Bytes


class GrowingFile(Closeable):
    """A Source, for a `with` block. What is asked for must be of a tensor that is there."""

    def __init__(self, begun: UnfinishedFile) -> None:
        """GGUFError where what is announced of the tensors is not right."""
        self.path = begun.path
        self.metadata = begun.metadata
        self.tensors = begun.planned_tensors()
        self._size = 0  # bytes that are known to be there
        self._lock = threading.Lock()  # of the stream's position
        try:
            self._stream = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise GGUFError(
                f"{printable(self.path, limit=1000)}: cannot be opened: {error.strerror}"
            ) from error

    def there(self) -> set[str]:
        """The tensors that are whole by now."""
        self._size = os.fstat(self._stream.fileno()).st_size
        return {name for name, tensor in self.tensors.items() if self._has(tensor)}

    def raw(self, name: str) -> Bytes:
        return self.rows(name, 0, self.tensors[name].n_rows)

    def rows(self, name: str, first: int, last: int) -> Bytes:
        tensor = self.tensors[name]
        if not self._has(tensor):
            raise ValueError(f"{name} is not there yet")
        rows = np.empty((last - first, tensor.row_bytes), np.uint8)
        left = rows.reshape(-1).data
        with self._lock:
            self._stream.seek(tensor.offset + first * tensor.row_bytes)
            while len(left):
                count = self._stream.readinto(left)
                if not count:
                    raise FormatError(
                        f"{printable(self.path, limit=1000)}: tensor {printable(name)}: the file "
                        "has become shorter while it was read"
                    )
                left = left[count:]
        return rows

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """The weights of a tensor; NaN for one that is not there yet.

        A program is built with the vectors of all its layers. Those of layers that are not run may
        come later; if they were used, that would show.
        """
        tensor = self.tensors[name]
        if not self._has(tensor):
            return np.full(tensor.shape, np.nan, np.float32)
        weights: npt.NDArray[np.float32] = tensor.quant.dequantize(self.raw(name))
        return weights.reshape(tensor.shape)

    def close(self) -> None:
        self._stream.close()

    def _has(self, tensor: TensorInfo) -> bool:
        return tensor.offset + tensor.nbytes <= self._size
