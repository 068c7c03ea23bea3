"""The work file of a calibrated conversion: the blocks of each layer, as far as they are made.

OUTPUT.calibration lies beside the output until that is written:

    gguf-tools calibration 1 DIGEST         64 digits: everything that decides the blocks
    LENGTH CHECKSUM JSON                    for each part: of its blocks, and of this line so far
    blocks of its tensors, LENGTH bytes     one tensor after the other, as JSON lists them

A part is a layer, or the head. It is believed when its checksums (CRC-32)
agree, so whatever a killed process or a power failure left costs time, never the file: a run with
the same digest goes on after the last good part, any other starts over. A file that does not begin
so is somebody else's, and is left alone.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.closing import Closeable
from gguf_tools.errors import OutputError, printable
from gguf_tools.safetensors_file import Bytes
from gguf_tools.writer import open_locked

SUFFIX = ".calibration"
TITLE = b"gguf-tools calibration 1 "
MAX_LINE = 1 << 24  # bytes; a line names the tensors of a layer
CHUNK = 1 << 24


@dataclass(frozen=True)
class Blocks:
    """A finished tensor: its rows in the order of the file."""

    name: str
    type: str
    n_rows: int
    row_bytes: int
    begin: int = 0  # where its blocks are in the work file

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


@dataclass(frozen=True)
class Part:
    """The tensors of a layer, and what is to be told of them."""

    number: int
    tensors: tuple[Blocks, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def work_path(output: Path) -> Path:
    return output.with_name(output.name + SUFFIX)


class CalibrationFile(Closeable):
    """A work file that this process alone writes; for a `with` block. It is left where it is."""

    def __init__(self, path: Path, digest: str, *, resume: bool) -> None:
        """Open what an earlier run with the same digest left, or begin anew."""
        self.path = path
        self.parts: list[Part] = []
        self._title = TITLE + digest.encode("ascii") + b"\n"
        self._end = 0
        try:
            self._fd = open_locked(path)
            try:
                self._begin(resume)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        os.close(self._fd)

    def append(
        self, tensors: Sequence[tuple[str, str, Bytes]], facts: Mapping[str, Any] | None = None
    ) -> Part:
        """Add a part: names, types and blocks (n_rows, row_bytes) of its tensors."""
        described = [Blocks(name, kind, *rows.shape) for name, kind, rows in tensors]
        length = sum(blocks.n_bytes for blocks in described)
        checksum = 0
        for _, _, rows in tensors:
            checksum = zlib.crc32(np.ascontiguousarray(rows).reshape(-1).data, checksum)
        known = {
            "tensors": [asdict(blocks) for blocks in described],
            "facts": dict(facts or {}),
            "checksum": checksum,
        }
        text = json.dumps(known).encode("ascii")
        line = b"%d %08x " % (length, zlib.crc32(text)) + text + b"\n"
        try:
            self._write(line)
            for _, _, rows in tensors:
                self._write(np.ascontiguousarray(rows).reshape(-1).data)
        except OSError as error:
            raise self._failed(error) from error
        self.parts.append(_placed(len(self.parts), known, self._end + len(line)))
        self._end += len(line) + length
        return self.parts[-1]

    def _begin(self, resume: bool) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            beginning = file.read(len(TITLE))
            if beginning and not TITLE.startswith(beginning):
                raise OutputError(
                    f"{printable(self.path, limit=1000)} is to hold what calibrating has made so "
                    "far, and something else is there; remove it or choose another name"
                )
            file.seek(0)
            self.parts, self._end = _read_parts(file, self._title) if resume else ([], 0)
        os.ftruncate(self._fd, self._end)
        os.lseek(self._fd, self._end, os.SEEK_SET)
        if not self._end:
            self._write(self._title)
            self._end = len(self._title)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{printable(self.path, limit=1000)}, where what calibrating makes is kept, cannot be "
            f"written: {error.strerror or error}"
        )


def read_rows(path: Path, blocks: Blocks, first: int, last: int) -> Bytes:
    """Rows `first` to `last` (exclusive) of a tensor, (n, row_bytes)."""
    position, count = blocks.begin + first * blocks.row_bytes, (last - first) * blocks.row_bytes
    with open(path, "rb") as file:
        file.seek(position)
        found = np.fromfile(file, np.uint8, count)
    if found.size != count:
        raise OutputError(
            f"{printable(path, limit=1000)} was cut short while it was read; convert again"
        )
    return found.reshape(last - first, blocks.row_bytes)


def read_parts(path: Path, digest: str) -> list[Part]:
    """The good parts of the work file with this digest."""
    with open(path, "rb") as file:
        return _read_parts(file, TITLE + digest.encode("ascii") + b"\n")[0]


def _read_parts(file: Any, title: bytes) -> tuple[list[Part], int]:
    """The parts up to the first that is damaged, and where the last good one ends."""
    parts: list[Part] = []
    if file.read(len(title)) != title:
        return parts, 0
    end = len(title)
    size = os.fstat(file.fileno()).st_size
    while True:
        line = file.readline(MAX_LINE)
        words = line.split(b" ", 2)
        if len(words) != 3 or not words[0].isdigit() or not line.endswith(b"\n"):
            return parts, end
        if b"%08x" % zlib.crc32(words[2][:-1]) != words[1]:
            return parts, end
        length, known = int(words[0]), json.loads(words[2])
        if end + len(line) + length > size or _checksum(file, length) != known["checksum"]:
            return parts, end
        parts.append(_placed(len(parts), known, end + len(line)))
        end += len(line) + length


def _placed(number: int, known: Mapping[str, Any], begin: int) -> Part:
    """A part whose blocks begin there."""
    tensors = []
    for described in known["tensors"]:
        blocks = Blocks(**{**described, "begin": begin})
        tensors.append(blocks)
        begin += blocks.n_bytes
    return Part(number, tuple(tensors), known["facts"])


def _checksum(file: Any, length: int) -> int:
    checksum = 0
    while length > 0 and (piece := file.read(min(CHUNK, length))):
        checksum = zlib.crc32(piece, checksum)
        length -= len(piece)
    return checksum if length == 0 else -1
