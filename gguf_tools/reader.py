"""Open a GGUF file: its metadata, and its tensors as views into the mapped bytes.

A model that is split into several files is opened by its first part. That one has the metadata;
tensors are in all of them.
"""

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gguf_tools.closing import Closeable
from gguf_tools.errors import FormatError, GGUFError, printable
from gguf_tools.header import HeaderParser, TensorInfo
from gguf_tools.parts import parse_part_name
from gguf_tools.values import Encoded

__all__ = ["GGUFFile", "TensorInfo", "UnfinishedFile"]

BAND = 1 << 20  # weights that are looked at together
MAPPED_TOGETHER = 2 << 20  # bytes, at most: a large page
UNDO_MAGIC = b"GGUFUNDO"  # how a file that an edit in place leaves behind begins


class GGUFFile(Closeable):
    """An open GGUF file. Arrays from `raw` are views into the mapping and keep it alive."""

    def __init__(
        self, path: str | os.PathLike[str], *, begun: "UnfinishedFile | None" = None
    ) -> None:
        """`begun`: the same file before its tensors were there. Its metadata is not read again."""
        self.path = Path(path)
        first = _open_part(self.path, begun.header if begun is not None else None)
        parts = [first, *_other_parts(first)]
        header = first.header
        self._maps: tuple[mmap.mmap, ...] = tuple(part.mapping for part in parts)
        self.paths = tuple(part.path for part in parts)  # one, or those of all parts
        self.file_size = sum(len(part.mapping) for part in parts)
        self.version = header.version
        self.alignment = header.alignment
        self.data_offset = header.data_offset
        self.metadata = header.metadata
        self.metadata_types = header.metadata_types
        self.value_spans = header.value_spans  # of the first part, like all metadata
        self.infos_span = header.infos_span
        self.part_sizes = tuple(len(part.mapping) for part in parts)
        self.data_offsets = tuple(part.header.data_offset for part in parts)
        self.tensors = _join_tensors(parts)

    def close(self) -> None:
        """Let go of the mapping; it is gone once the last view into it is."""
        self._maps = ()

    def raw(self, name: str) -> np.ndarray:
        """The blocks of a tensor as they are in the file, uint8 (n_rows, row_bytes), read-only."""
        if not self._maps:
            raise ValueError("the file is closed")
        tensor = self.tensors[name]
        data = np.frombuffer(self._maps[tensor.part], np.uint8, tensor.nbytes, tensor.offset)
        return data.reshape(tensor.n_rows, tensor.row_bytes)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """A copy of rows `first` to `last` (exclusive) of `raw`; what was copied is let go of."""
        tensor = self.tensors[name]
        blocks = self.raw(name)[first:last].copy()
        start = tensor.offset + first * tensor.row_bytes
        self._release(tensor.part, start, blocks.nbytes)
        return blocks

    def bands(self, name: str, n_weights: int = BAND) -> Iterator[np.ndarray]:
        """The bytes of a tensor in order, in bands of whole blocks of about `n_weights`.

        What has been passed is let go of: a file of any size is read in bounded memory.
        """
        tensor = self.tensors[name]
        blocks = self.raw(name).reshape(-1)
        step = max(1, n_weights // tensor.quant.block_size) * tensor.quant.block_bytes
        for first in range(0, tensor.nbytes, step):
            band = blocks[first : first + step]
            yield band
            self._release(tensor.part, tensor.offset + first, band.size)

    def has_bytes(self, part: int, start: int, count: int) -> bool:
        """Whether any of `count` bytes of one of the files, none of them past its end, is not 0."""
        return any(self._maps[part][start : start + max(0, count)])

    def encoded(self, key: str) -> Encoded:
        """A metadata value as it is in the file, to be written into another."""
        if not self._maps:
            raise ValueError("the file is closed")
        first, last = self.value_spans[key]
        return Encoded(self._maps[0][first:last])

    def _release(self, part: int, start: int, n_bytes: int) -> None:
        """Drop pages from memory; they are read again when they are needed again.

        With what lies around them: the system maps a stretch of a file where a page is touched.
        """
        if hasattr(mmap, "MADV_DONTNEED") and self._maps:
            first = start - start % MAPPED_TOGETHER
            last = start + n_bytes + -(start + n_bytes) % MAPPED_TOGETHER
            count = min(last, len(self._maps[part])) - first
            self._maps[part].madvise(mmap.MADV_DONTNEED, first, count)

    def load(self, name: str) -> np.ndarray:
        """The weights of a tensor, dequantised to float32."""
        tensor = self.tensors[name]
        return tensor.quant.dequantize(self.raw(name)).reshape(tensor.shape)


class UnfinishedFile:
    """A file whose tensors need not all be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = HeaderParser(_map_file(path), printable(path, limit=1000))
        self.header.parse_metadata()
        self.metadata = self.header.metadata

    def planned_tensors(self) -> dict[str, TensorInfo]:
        """All tensors as they are announced; any of them may lie beyond the end of the file."""
        self.header.parse_tensors(_map_file(self.path), is_whole=False)
        return self.header.tensors


def undo_path(path: Path) -> Path:
    """Where an edit in place keeps what it overwrites, while it does."""
    return path.with_name(path.name + ".undo")


@dataclass(frozen=True, eq=False)
class _Part:
    """A mapped file whose header has been checked."""

    path: Path
    shown: str
    mapping: mmap.mmap
    header: HeaderParser


def _open_part(path: Path, begun: HeaderParser | None = None) -> _Part:
    mapping = _map_file(path)
    shown = printable(path, limit=1000)
    _refuse_interrupted(path, shown)
    header = begun if begun is not None else HeaderParser(mapping, shown)
    if begun is None:
        header.parse_metadata()
    header.parse_tensors(mapping)
    return _Part(path, shown, mapping, header)


def _other_parts(first: _Part) -> Iterator[_Part]:
    """The second and all other parts of a split model, each checked against the first."""
    split = first.header.split
    if split is None:
        return
    name = parse_part_name(first.path.name)
    if split.number > 0:
        known = name is not None and name.count == split.count
        which = printable(name.sibling(1), limit=1000) if name and known else "its first part"
        raise FormatError(
            f"{first.shown}: expected a whole model or the first part of a split one, found part "
            f"{split.number + 1} of {split.count}; open {which} instead, which finds the others"
        )
    if name is None or name.count != split.count or name.number != 1:
        raise FormatError(
            f"{first.shown}: found part 1 of {split.count} of a split model, whose other parts "
            f"are found by its name: expected one that ends in -00001-of-{split.count:05}.gguf; "
            "rename the parts as they were"
        )
    for number in range(2, split.count + 1):
        path = first.path.with_name(str(name.sibling(number)))
        if not path.exists():
            raise GGUFError(
                f"{first.shown}: the model is split into {split.count} files, and part {number}, "
                f"{printable(path.name, limit=1000)}, is not beside it; download it to there"
            )
        part = _open_part(path)
        _check_part(part, number - 1, first)
        yield part


def _check_part(part: _Part, number: int, first: _Part) -> None:
    """Refuse a part that says of itself that it belongs elsewhere."""
    asked, found = first.header.split, part.header.split
    assert asked is not None
    if found is None or (found.number, found.count) != (number, asked.count):
        says = "a whole model" if found is None else f"part {found.number + 1} of {found.count}"
        raise FormatError(
            f"{part.shown}: expected part {number + 1} of {asked.count} of a split model, found "
            f"{says}; download the parts again"
        )
    ours, theirs = (each.header.metadata.get("general.architecture") for each in (first, part))
    if theirs is not None and theirs != ours:
        raise FormatError(
            f"{part.shown}: expected a part of the same model as {first.shown}, found another "
            f"architecture, {printable(theirs)} instead of {printable(ours)}; download the parts "
            "again"
        )


def _join_tensors(parts: list[_Part]) -> dict[str, TensorInfo]:
    """The tensors of all parts, as many as the first part says there are."""
    first = parts[0]
    tensors = dict(first.header.tensors)
    for index, part in enumerate(parts[1:], 1):
        for name, tensor in part.header.tensors.items():
            if name in tensors:
                raise FormatError(
                    f"{part.shown}: tensor {printable(name)}: expected a new name, found one "
                    f"that {parts[tensors[name].part].shown} has, too; download the parts again"
                )
            tensors[name] = replace(tensor, part=index)
    split = first.header.split
    if split is not None and split.n_tensors not in (None, len(tensors)):
        raise FormatError(
            f"{first.shown}: metadata split.tensors.count: expected {len(tensors):,}, the tensors "
            f"of all parts, found {split.n_tensors:,}; download the parts again"
        )
    return tensors


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


def _refuse_interrupted(path: Path, shown: str) -> None:
    """A header that an edit had begun to overwrite may look whole and be wrong."""
    undo = undo_path(path)
    if not undo.is_file():
        return
    with open(undo, "rb") as file:
        interrupted = file.read(len(UNDO_MAGIC)) == UNDO_MAGIC
    if interrupted:
        raise FormatError(
            f"{shown}: a change of its metadata is under way or was interrupted; in the second "
            "case `gguf set FILE --recover` puts back what it was"
        )


def _check_regular(mode: int, shown: str) -> None:
    if stat.S_ISDIR(mode):
        raise GGUFError(f"{shown}: expected a GGUF file, found a folder")
    if not stat.S_ISREG(mode):
        raise GGUFError(f"{shown}: expected a regular file, found a device, a pipe or a socket")
