"""Write a GGUF file: sizes first, then the header, then the tensors in order, then a rename.

The size of every tensor follows from its type and shape, so the whole header is known before any
weight has been read, and tensors can be written band by band as they are made. Until the last byte
is on the disk the file is called NAME.part; whatever goes wrong before, it is removed. With a
journal (gguf_tools/journal.py) it is kept if a later run can go on from it.
"""

import errno
import os
import shutil
import stat
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from gguf_tools.errors import GGUFError, OutputError, printable
from gguf_tools.flushing import Flusher
from gguf_tools.journal import Journal
from gguf_tools.values import (
    ALIGNMENT_KEY,
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    RESERVE_KEY,
    SCALAR_BY_NAME,
    STRING_ID,
    VERSION,
    Array,
    Encoded,
    MetadataValue,
    Value,
)

if TYPE_CHECKING:
    from gguf_tools.quants.quanttype import QuantType
if sys.platform != "win32":
    import fcntl

__all__ = ["Array", "GGUFWriter", "MetadataValue", "TensorSpec", "Value", "file_size"]

MAX_TENSOR_NAME = 63  # bytes; llama.cpp keeps names in 64 with the final zero
MAX_KEY = 65535  # bytes
LOCK_ATTEMPTS = 100
N_ENTRIES_AT = 16  # bytes: where the header counts its metadata


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    quant: "QuantType"
    shape: tuple[int, ...]  # NumPy order, outermost first

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.quant.row_bytes(self.shape[-1])


def file_size(
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[TensorSpec],
    alignment: int = DEFAULT_ALIGNMENT,
) -> int:
    """The exact size in bytes of the file that GGUFWriter would write."""
    header = _encode_header(metadata, tensors, alignment)
    return len(header) + sum(_padded(tensor.nbytes, alignment) for tensor in tensors)


class GGUFWriter:
    """A GGUF file in the making. A context manager: the file exists when the block ends well.

    with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
        for spec in specs:
            writer.write(spec.name, blocks)

    With a journal, writing begins at `position`: what lies before is there already.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, MetadataValue],
        tensors: Sequence[TensorSpec],
        force: bool = False,
        alignment: int = DEFAULT_ALIGNMENT,
        journal: Journal | None = None,
    ) -> None:
        self.path = Path(path)
        self.part = self.path.parent / (self.path.name + ".part")
        self._tensors = tuple(tensors)
        self._alignment = alignment
        self._force = force
        self._header = _encode_header(metadata, self._tensors, alignment)
        self._n_entries = len(metadata)
        self._room = b""  # what of the header may be filled later
        if RESERVE_KEY in metadata:
            self._room = encode_string(RESERVE_KEY) + encode_value(metadata[RESERVE_KEY])
        self._changes: list[tuple[int, bytes]] = []  # of the header: where, and what
        padded = [_padded(tensor.nbytes, alignment) for tensor in self._tensors]
        self.total_size = len(self._header) + sum(padded)
        # On Windows it is the removal of an old .part that tells whether somebody writes it.
        self._journal = journal if sys.platform != "win32" else None
        self._fd = -1
        self._current = 0  # index of the tensor being written
        self._written = 0  # bytes of it written so far
        self._flusher = Flusher()
        self._check_target()

    def __enter__(self) -> "GGUFWriter":
        try:
            self._fd = open_locked(self.part)
            try:
                self._check_target()  # another process may have finished the same file just now
                self._begin()
            except BaseException as error:
                self._leave(error)
                raise
        except OSError as error:
            raise self._output_error(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            error = failure
            raise self._output_error(failure) from failure
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._leave(error)

    @property
    def position(self) -> tuple[int, int]:
        """The index of the tensor to be written next, and how many bytes of it are written."""
        return self._current, self._written

    def write(self, name: str, data: np.ndarray, checksum: int | None = None) -> None:
        """Append `data`, the uint8 bytes of tensor `name` or of its next band of rows.

        Tensors come in the order in which they were announced. `checksum` is the CRC-32 of the
        bytes, where it is known already.
        """
        if self._fd < 0:
            raise ValueError("the file is not open: write inside the with block")
        if data.dtype != np.uint8:
            raise ValueError(f"expected uint8 blocks for {name}, got {data.dtype}")
        if self._current == len(self._tensors):
            raise ValueError(f"{name} comes after the last tensor")
        tensor = self._tensors[self._current]
        if tensor.name != name:
            raise ValueError(f"{name} is out of order: {tensor.name} is not complete yet")
        left = tensor.nbytes - self._written
        if data.size > left:
            raise OutputError(
                f"{self._shown}: tensor {printable(name)}: expected {tensor.nbytes:,} bytes, "
                f"got at least {self._written + data.size:,}"
            )
        try:
            padding = bytes(_padding(tensor.nbytes, self._alignment) if data.size == left else 0)
            band = np.ascontiguousarray(data).reshape(-1).data
            self._write_all(band)
            self._write_all(padding)
            self._flusher.wrote(self._fd, len(band) + len(padding))
            if self._journal is not None:
                checksum = zlib.crc32(band) if checksum is None else checksum
                self._journal.append(len(band) + len(padding), zlib.crc32(padding, checksum))
            self._written += data.size
            if data.size == left:
                self._current += 1
                self._written = 0
        except OSError as error:
            raise self._output_error(error) from error

    def fill_room(self, entries: Mapping[str, MetadataValue]) -> None:
        """Put new keys where the zeros of RESERVE_KEY are; what is left of those stays.

        Nothing moves. It is done when all else is on the disk; a run that goes on from what this
        one has left begins with the header as it was.
        """
        data = b"".join(encode_string(key) + encode_value(value) for key, value in entries.items())
        empty = encode_string(RESERVE_KEY) + encode_value(Array("u8", b""))
        left = len(self._room) - len(data) - len(empty)
        if left < 0:
            raise ValueError(f"{len(data)} bytes of metadata do not fit into the room for them")
        zeros = Array("u8", np.zeros(left, np.uint8))
        data += encode_string(RESERVE_KEY) + encode_value(zeros)
        count = struct.pack("<Q", self._n_entries + len(entries))
        # The room is the last that looks like it: after it come names of tensors alone.
        self._changes = [(N_ENTRIES_AT, count), (self._header.rindex(self._room), data)]

    @property
    def _shown(self) -> str:
        return printable(self.path, limit=1000)

    def _check_target(self) -> None:
        """Refuse, before any work is done, a path that cannot become the file."""
        folder = self.path.parent
        if not folder.is_dir():
            raise OutputError(
                f"{self._shown}: the folder {printable(folder, limit=1000)} does not exist; "
                "create it first"
            )
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            if os.path.islink(self.path) and not self._force:
                raise OutputError(
                    f"{self._shown} is a link to nowhere; remove it or choose another name"
                ) from None
            return
        except OSError as error:
            raise self._output_error(error) from error
        if stat.S_ISDIR(mode):
            raise OutputError(f"{self._shown} is a folder; name a file in it")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{self._shown} is not a regular file; choose another name")
        if not self._force:
            raise OutputError(
                f"{self._shown} exists already; use --force to replace it, or choose another name"
            ) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _begin(self) -> None:
        """Write the header, or find the place from which an earlier run can be continued."""
        kept = 0
        if self._journal is not None:
            kept = self._journal.open(
                self.part, self._fd, header=self._header, total=self.total_size
            )
        os.ftruncate(self._fd, kept)
        self._check_space(self.total_size - kept)
        self._write_all(self._header)  # that of a stopped run may have its room filled
        if not kept:
            return
        os.lseek(self._fd, kept, os.SEEK_SET)
        self._written = kept - len(self._header)
        for tensor in self._tensors:
            size = _padded(tensor.nbytes, self._alignment)
            if self._written < size:
                break
            self._current += 1
            self._written -= size

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OutputError(
                f"{self._shown}: the file needs {needed:,} bytes and the disk has {free:,} free"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _finish(self) -> None:
        """Flush everything to the disk, then give the file its name."""
        if self._current < len(self._tensors):
            tensor = self._tensors[self._current]
            raise OutputError(
                f"{self._shown}: tensor {printable(tensor.name)}: expected "
                f"{tensor.nbytes:,} bytes, got {self._written:,}"
            )
        try:
            self._flusher.close()
            if self._flusher.failure:
                raise self._flusher.failure
            os.fsync(self._fd)
            for offset, data in self._changes:
                os.lseek(self._fd, offset, os.SEEK_SET)
                self._write_all(data)
            if self._changes:
                os.fsync(self._fd)
        except OSError as error:  # what is read back now may never reach the disk: keep nothing
            raise OutputError(
                f"{self._shown}: the disk failed: {error.strerror}; the incomplete file was removed"
            ) from None
        self._check_target()
        if sys.platform == "win32":  # an open file cannot be renamed there
            os.close(self._fd)
            self._fd = -1
            os.replace(self.part, self.path)
            return
        os.replace(self.part, self.path)  # while the lock is held
        if self._journal is not None:
            self._journal.close(keep=False)
        os.close(self._fd)
        self._fd = -1
        with suppress(OSError):  # some file systems cannot flush a folder; the file is safe
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _leave(self, error: BaseException | None) -> None:
        """Unless the file is finished, remove what was written or keep it for the next run."""
        self._flusher.close()
        if self._fd < 0:
            return
        if self._journal is not None:
            keep = self._journal.has_bands and self._is_there() and _may_go_better(error)
            keep = keep and self._flusher.failure is None
            self._journal.close(keep=keep)
            if keep:
                os.close(self._fd)
                self._fd = -1
                return
        with suppress(OSError):  # gone already, or a folder that has become read-only
            if sys.platform != "win32":
                os.unlink(self.part)  # while the lock is held
        os.close(self._fd)
        self._fd = -1
        if sys.platform == "win32":
            with suppress(OSError):
                os.unlink(self.part)

    def _is_there(self) -> bool:
        """Whether what is written still has its name."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.part))
        except OSError:
            return False

    def _output_error(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kept = self._journal is not None and self._journal.has_bands  # as the journal will say
            return OutputError(
                f"{self._shown}: no room for {self.total_size:,} bytes ({error.strerror})"
                + ("" if kept else "; the incomplete file was removed")
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return OutputError(
                f"{self._shown}: no permission to write here ({error.strerror}); "
                "choose another folder"
            )
        shown = self._shown if error.filename is None else printable(error.filename, limit=1000)
        return OutputError(f"{shown}: cannot be written: {error.strerror or error}")


def _may_go_better(error: BaseException | None) -> bool:
    """Whether the next run can get further: the user or the machine ended this, not the input."""
    if isinstance(error, GGUFError):
        error = error.__cause__
    return isinstance(error, (OSError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit))


def open_locked(part: Path) -> int:
    """A descriptor of `part`, which this process alone may write.

    The lock vanishes with its process, so what a killed one left behind is simply reused. Between
    opening a file and locking it, its owner may have renamed or removed it: then try again.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    busy = OutputError(
        f"{printable(part, limit=1000)} is being written by another process; "
        "wait for it or choose another name"
    )
    if sys.platform == "win32":  # an open file cannot be removed there: that is the lock
        try:
            with suppress(FileNotFoundError):
                os.unlink(part)
            return os.open(part, flags | os.O_EXCL)
        except (PermissionError, FileExistsError):
            raise busy from None
    for _ in range(LOCK_ATTEMPTS):
        fd = os.open(part, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OutputError(f"{printable(part, limit=1000)} is not a regular file; remove it")
            _lock(fd, busy)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(part)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise busy


def _lock(fd: int, busy: OutputError) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise busy from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise  # some network file systems have no locks: go on without


def _padding(size: int, alignment: int) -> int:
    return -size % alignment


def _padded(size: int, alignment: int) -> int:
    return size + _padding(size, alignment)


def _encode_header(
    metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorSpec], alignment: int
) -> bytes:
    """Everything before the first tensor's bytes, padding included."""
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two from 8, got {alignment}")
    entries = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        entries.setdefault(ALIGNMENT_KEY, Value("u32", alignment))
    if entries.get(ALIGNMENT_KEY, Value("u32", alignment)) != Value("u32", alignment):
        raise ValueError(f"{ALIGNMENT_KEY} contradicts the alignment {alignment}")

    pieces = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries))]
    for key, entry in entries.items():
        if not key or "\0" in key or len(key.encode("utf-8", "surrogatepass")) > MAX_KEY:
            raise OutputError(f"metadata key {printable(key)!r}: empty, too long or with a NUL")
        try:
            pieces += [encode_string(key), encode_value(entry)]
        except (struct.error, OverflowError, UnicodeEncodeError) as error:
            kind = "Encoded" if isinstance(entry, Encoded) else entry.type
            raise OutputError(
                f"metadata {printable(key)}: not a value of type {kind}: {error}"
            ) from error

    offset = 0
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"two tensors are called {tensor.name}")
        names.add(tensor.name)
        pieces.append(_encode_tensor(tensor, offset))
        offset += _padded(tensor.nbytes, alignment)
    header = b"".join(pieces)
    return header + bytes(_padding(len(header), alignment))


def _encode_tensor(tensor: TensorSpec, offset: int) -> bytes:
    if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
        raise OutputError(
            f"tensor {printable(tensor.name)}: expected 1 to {MAX_DIMS} dimensions of at least 1, "
            f"found {tensor.shape}"
        )
    if not 1 <= len(tensor.name.encode("utf-8", "surrogatepass")) <= MAX_TENSOR_NAME:
        raise OutputError(
            f"tensor {printable(tensor.name)!r}: expected a name of 1 to {MAX_TENSOR_NAME} bytes"
        )
    n_dims = len(tensor.shape)
    return encode_string(tensor.name) + struct.pack(
        f"<I{n_dims}QIQ", n_dims, *reversed(tensor.shape), tensor.quant.type_id, offset
    )


def encode_string(text: str) -> bytes:
    """The length of `text` and its bytes."""
    # Bytes that were no UTF-8 in the file that a string comes from are written back as they were.
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _encode_strings(texts: Iterable[str]) -> bytes:
    """What `encode_string` makes of each, joined; a vocabulary has a quarter of a million."""
    data = [text.encode("utf-8", "surrogateescape") for text in texts]
    parts = [b""] * (2 * len(data))
    parts[0::2] = map(struct.Struct("<Q").pack, map(len, data))
    parts[1::2] = data
    return b"".join(parts)


def encode_value(entry: MetadataValue) -> bytes:
    """The type of a metadata value and its bytes; struct.error or OverflowError if it cannot be."""
    if isinstance(entry, Encoded):
        return entry.data
    if isinstance(entry, Array):
        return struct.pack("<I", ARRAY_ID) + _encode_array(entry)
    if entry.type == "str":
        return struct.pack("<I", STRING_ID) + encode_string(entry.value)
    scalar = SCALAR_BY_NAME[entry.type]
    return struct.pack("<I" + scalar.code, scalar.type_id, entry.value)


def _encode_array(array: Array) -> bytes:
    n = len(array.values)
    if array.type == "str":
        return struct.pack("<IQ", STRING_ID, n) + _encode_strings(array.values)
    scalar = SCALAR_BY_NAME[array.type]
    start = struct.pack("<IQ", scalar.type_id, n)
    if isinstance(array.values, np.ndarray):
        if array.values.dtype == scalar.dtype:
            return start + array.values.tobytes()
        return start + struct.pack(f"<{n}{scalar.code}", *array.values.tolist())
    return start + struct.pack(f"<{n}{scalar.code}", *array.values)
