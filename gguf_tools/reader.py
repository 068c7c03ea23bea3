"""Open a GGUF file: its metadata, and its tensors as views into the mapped bytes."""

import errno
import mmap
import os
import stat
from pathlib import Path
from types import TracebackType

import numpy as np

from gguf_tools.errors import FormatError, GGUFError, printable
from gguf_tools.header import HeaderParser, TensorInfo

__all__ = ["GGUFFile", "TensorInfo"]


class GGUFFile:
    """An open GGUF file. Arrays from `raw` are views into the mapping and keep it alive."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        mapping = _map_file(self.path)
        header = HeaderParser(mapping, printable(self.path, limit=1000))
        header.parse()
        self._map = mapping
        self.file_size = len(mapping)
        self.version = header.version
        self.alignment = header.alignment
        self.data_offset = header.data_offset
        self.metadata = header.metadata
        self.metadata_types = header.metadata_types
        self.tensors = header.tensors

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping; it is gone once the last view into it is."""
        self._map = None

    def raw(self, name: str) -> np.ndarray:
        """The blocks of a tensor as they are in the file, uint8 (n_rows, row_bytes), read-only."""
        if self._map is None:
            raise ValueError("the file is closed")
        tensor = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return data.reshape(tensor.n_rows, tensor.row_bytes)

    def load(self, name: str) -> np.ndarray:
        """The weights of a tensor, dequantised to float32."""
        tensor = self.tensors[name]
        return tensor.quant.dequantize(self.raw(name)).reshape(tensor.shape)


def _map_file(path: Path) -> mmap.mmap:
    """Map a regular file that looks like GGUF; anything else is refused without reading it."""
    shown = printable(path, limit=1000)
    try:
        _check_regular(os.stat(path).st_mode, shown)
        # Between the two looks the name may have come to mean a pipe, which must not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags)
        try:
            status = os.fstat(fd)
            _check_regular(status.st_mode, shown)
            if status.st_size == 0:
                raise FormatError(f"{shown}: expected a GGUF file, found an empty file")
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise GGUFError(f"{shown}: no such file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise GGUFError(f"{shown}: the link leads back to itself") from error
        raise GGUFError(f"{shown}: cannot be opened: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name, or a file emptied a moment ago
        raise GGUFError(f"{shown}: cannot be opened: {error}") from error


def _check_regular(mode: int, shown: str) -> None:
    if stat.S_ISDIR(mode):
        raise GGUFError(f"{shown}: expected a GGUF file, found a folder")
    if not stat.S_ISREG(mode):
        raise GGUFError(f"{shown}: expected a regular file, found a device, a pipe or a socket")
