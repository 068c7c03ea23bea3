"""Importance matrix files: how much an error in each column of a weight matrix counts.

llama-imatrix runs a text through a model and adds up the squares of what each matrix is multiplied
with. There are two forms of file, told apart by their first bytes: GGUF, with tensors
NAME.in_sum2 and NAME.counts (llama.cpp's common/imatrix-loader.cpp), and the older .dat:

    n_entries i32, for each: length i32 | name | n_calls i32 | n_values i32 | float32 values
    then, in newer ones: n_chunks i32 | length i32 | name of the text

Sums stay in the mapped file; a column's importance is its sum over the count of its matrix.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError, printable
from gguf_tools.json_files import open_regular
from gguf_tools.quants.quanttype import Floats
from gguf_tools.reader import GGUFFile
from gguf_tools.values import MAGIC, MetadataValue, Value

SUMS, COUNTS = ".in_sum2", ".counts"
IDENTITY_KEY = "gguf_tools.imatrix.identity"  # a digest; ours alone writes it
MAX_ENTRIES = 1 << 17
MAX_NAME = 1 << 10
MAX_TEXT = 1 << 16  # bytes of the name of a text
MAX_METADATA_TEXT = 127  # what llama-quantize keeps of a name in bytes


@dataclass(frozen=True, eq=False)
class Entry:
    """What the file says of one tensor."""

    sums: Floats  # (n_values,)
    counts: npt.NDArray[np.float32]  # (1,) or one for each expert


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of the columns of one tensor: a matrix, or one for each expert."""

    sums: Floats  # (n_matrices, k)
    counts: npt.NDArray[np.float32]  # (n_matrices,)

    def of_matrix(self, index: int) -> Floats:
        """(k,); ones for an expert that the text never reached."""
        count = self.counts[index]
        if count <= 0:
            return np.ones(self.sums.shape[1], np.float32)
        importance: Floats = self.sums[index] / count
        return importance

    @property
    def without_counts(self) -> tuple[int, ...]:
        """The matrices that the text never reached."""
        return tuple(int(index) for index in np.flatnonzero(self.counts <= 0))


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """A whole file, every number checked."""

    path: Path  # as it was given
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]  # what it was made from
    n_chunks: int  # 0 if unknown
    chunk_size: int  # tokens; 0 in the old form, whose counts are of chunks and not of tokens
    identity: str = ""  # of what it is being made from, by ours: see imatrix_writing.py

    @property
    def dataset(self) -> str:
        """The first text that it was made from, "" if unknown."""
        return self.datasets[0] if self.datasets else ""

    def find(self, name: str, shape: tuple[int, ...]) -> Importance | None:
        """For a tensor of this shape (NumPy order), or None; an error if it is of another shape.

        The embedding is looked up, not multiplied with: an entry that does not fit it is passed
        over, as llama-quantize does.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        k = shape[-1]
        n_matrices = int(np.prod(shape[:-2], dtype=np.int64))
        if entry.sums.size != n_matrices * k or len(entry.counts) not in (1, n_matrices):
            if name.endswith("token_embd.weight"):
                return None
            raise FormatError(
                f"{_shown(self.path)}: expected {n_matrices * k:,} numbers for tensor "
                f"{printable(name)} of shape {shape}, found {entry.sums.size:,} with "
                f"{len(entry.counts):,} counts; the importance matrix is of another model"
            )
        counts = np.broadcast_to(entry.counts, n_matrices)
        return Importance(entry.sums.reshape(n_matrices, k), counts)

    def metadata(self) -> dict[str, MetadataValue]:
        """quantize.imatrix.*, as llama-quantize writes them."""
        entries: dict[str, MetadataValue] = {
            "quantize.imatrix.file": Value("str", _cut(str(self.path)))
        }
        if self.dataset:
            entries["quantize.imatrix.dataset"] = Value("str", _cut(self.dataset))
        entries["quantize.imatrix.entries_count"] = Value("u32", len(self.entries))
        if self.n_chunks > 0:
            entries["quantize.imatrix.chunks_count"] = Value("u32", self.n_chunks)
        return entries


def read_importance_matrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Read either form; FormatError says what is wrong with the file."""
    path = Path(path)
    with open_regular(path) as file:
        beginning = file.read(len(MAGIC))
        if beginning == MAGIC:
            return _read_gguf(path)
        size = os.fstat(file.fileno()).st_size
        if size < 4:
            raise FormatError(
                f"{_shown(path)}: expected an importance matrix, found {size} bytes; make it again"
            )
        return _OldFile(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).read()


def _read_gguf(path: Path) -> ImportanceMatrix:
    shown = _shown(path)
    with GGUFFile(path) as file:
        known = file.metadata
        dataset_names = known.get("imatrix.datasets")
        n_chunks = known.get("imatrix.chunk_count")
        if dataset_names is None or n_chunks is None or "imatrix.chunk_size" not in known:
            raise FormatError(
                f"{shown}: expected an importance matrix with metadata imatrix.datasets, "
                "imatrix.chunk_count and imatrix.chunk_size, found a GGUF file without them; give "
                "the file that llama-imatrix wrote"
            )
        for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
            if file.metadata_types[key] != "u32":
                raise FormatError(f"{shown}: metadata {key}: expected a u32")
        texts = list(dataset_names) if isinstance(dataset_names, list | tuple) else []
        datasets = tuple(text for text in texts if isinstance(text, str))
        identity = known.get(IDENTITY_KEY)
        names = dict.fromkeys(  # other tensors are no business of ours
            name.removesuffix(end)
            for end in (SUMS, COUNTS)
            for name in file.tensors
            if name.endswith(end)
        )
        entries = {}
        for name in names:
            halves = [name + SUMS, name + COUNTS]
            if any(half not in file.tensors for half in halves):
                raise FormatError(
                    f"{shown}: expected sums and counts for tensor {printable(name)}, found one of "
                    "them; make the importance matrix again"
                )
            if any(file.tensors[half].quant.name != "F32" for half in halves):
                raise FormatError(
                    f"{shown}: expected sums and counts of type F32 for tensor {printable(name)}"
                )
            sums, counts = (file.raw(half).reshape(-1).view("<f4") for half in halves)
            entries[name] = _checked(Entry(sums, _rounded(counts)), name, shown)
        chunk_size = int(known["imatrix.chunk_size"])
    _refuse_nothing(path, entries)
    made_from = identity if isinstance(identity, str) else ""
    return ImportanceMatrix(path, entries, datasets, int(n_chunks), chunk_size, made_from)


class _OldFile:
    """A .dat file, read from the start; every length is checked against what is left."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.shown = _shown(path)
        self.mapping = mapping
        self.position = 0

    def read(self) -> ImportanceMatrix:
        n_entries = self._number("the number of entries", 1, MAX_ENTRIES)
        entries: dict[str, Entry] = {}
        for name, entry in self._entries(n_entries):
            if name in entries:
                raise self._error(f"expected one entry for tensor {printable(name)}", "two")
            entries[name] = _checked(entry, name, self.shown)
        n_chunks, dataset = 0, ""
        if self._left:  # older ones end here
            n_chunks = max(0, self._number("the number of chunks", -(2**31), 2**31))
            if self._left:
                length = self._number("the length of the text's name", 0, MAX_TEXT)
                dataset = self._bytes(length, "the text's name").decode(errors="replace")
        if self._left:
            raise self._error("expected the end of the file", f"{self._left:,} bytes more")
        datasets = (dataset,) if dataset else ()
        return ImportanceMatrix(self.path, entries, datasets, n_chunks, chunk_size=0)

    @property
    def _left(self) -> int:
        return len(self.mapping) - self.position

    def _entries(self, n_entries: int) -> Iterator[tuple[str, Entry]]:
        for index in range(n_entries):
            which = f"entry {index + 1:,} of {n_entries:,}"
            length = self._number(f"the length of the name of {which}", 1, MAX_NAME)
            name = self._bytes(length, f"the name of {which}").decode(errors="backslashreplace")
            n_calls = self._number(f"the calls of {which}", -(2**31), 2**31)
            n_values = self._number(f"the number of values of {which}", 1, self._left // 4)
            start = self.position
            self._bytes(4 * n_values, f"the values of {which}")
            sums = np.frombuffer(self.mapping, "<f4", n_values, start)
            yield name, Entry(sums, np.array([n_calls if n_calls > 0 else 1], np.float32))

    def _number(self, what: str, least: int, most: int) -> int:
        """A little-endian i32 within bounds."""
        (number,) = struct.unpack("<i", self._bytes(4, what))
        if not least <= number <= most:
            raise self._error(f"expected {what}, {least:,} to {most:,}", f"{number:,}")
        return int(number)

    def _bytes(self, n: int, what: str) -> bytes:
        if n > self._left:
            raise self._error(f"expected {what}, {n:,} bytes", f"{self._left:,} up to the end")
        start, self.position = self.position, self.position + n
        return self.mapping[start : self.position] if n <= MAX_TEXT else b""

    def _error(self, expected: str, found: str) -> FormatError:
        return FormatError(
            f"{self.shown}: {expected}, found {found}, at byte {self.position:,}; the importance "
            "matrix is damaged, or the file is none"
        )


def _rounded(counts: Floats) -> Floats:
    """C's lround: half away from zero."""
    whole = np.trunc(counts)
    away: Floats = whole + np.copysign(np.abs(counts - whole) >= 0.5, counts)
    return np.asarray(away, np.float32)


def _checked(entry: Entry, name: str, shown: str) -> Entry:
    """The entry, if its numbers are sums of squares and counts."""
    n_values, n_counts = entry.sums.size, entry.counts.size
    if n_counts == 0 or n_values == 0 or n_values % n_counts:
        raise FormatError(
            f"{shown}: tensor {printable(name)}: expected as many sums for each count, found "
            f"{n_values:,} sums and {n_counts:,} counts; make the importance matrix again"
        )
    for numbers in (entry.sums, entry.counts):
        bad = np.flatnonzero(~np.isfinite(numbers) | (numbers < 0))
        if bad.size:
            raise FormatError(
                f"{shown}: tensor {printable(name)}: expected numbers that are not negative, found "
                f"{numbers[bad[0]]:g} at {int(bad[0]):,}; make the importance matrix again"
            )
    return entry


def _refuse_nothing(path: Path, entries: Mapping[str, Entry]) -> None:
    if not entries:
        raise FormatError(f"{_shown(path)}: expected an importance matrix, found no entries")


def _cut(text: str) -> str:
    return text.encode(errors="replace")[:MAX_METADATA_TEXT].decode(errors="ignore")


def _shown(path: Path) -> str:
    return printable(path, limit=1000)
