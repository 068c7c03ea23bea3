"""One safetensors file: its header checked, its tensors read by bands of rows.

    length u64 | JSON of that length | the tensors' bytes

The JSON gives each tensor's dtype, shape and data_offsets, which count from the JSON's end. All of
it is checked against the file before any of it is used. Weights are read with plain reads, never
through a memory map, so that what was read and converted does not stay in memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import CheckpointError, printable
from gguf_tools.json_files import open_regular, parse_json, shown

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
MAX_DIMS = 8
MAX_DIM = 2**48

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
READABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for, a band of rows at a time.

    Its rows are those of the matrix (product of all dimensions but the last, last dimension); a
    vector is one row.
    """

    name: str
    shape: tuple[int, ...]  # NumPy order
    dtype: str  # as the file calls it
    load: Callable[[int, int], Floats]  # first row, row after the last -> (n, row_length)
    raw: Callable[[int, int], Bytes] | None = None  # the same rows as they are stored
    scheme: str = ""  # what it had been quantised with: "GPTQ, 4 bits", "Q8_0"

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_length(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a tensor are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # position in the file
    end: int


def read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, every number checked against the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{shown(path)}: header length: expected 2 to {max(size - 8, 2):,} bytes, found "
                f"{length if len(start) == 8 else 'the end of the file'}{_looks_like(start)}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{shown(path)}: header length: expected at most {MAX_HEADER:,} bytes, "
                f"found {length:,}"
            )
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{shown(path)}: the file ended inside its header of {length:,}")
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{shown(path)}: header: expected a JSON object, "
            f"found {printable(text[:8])}{_looks_like(start)}"
        )
    header = parse_json(text, path, "header", unique=True)
    remarks = header.get("__metadata__")
    if remarks is not None and not (
        isinstance(remarks, dict) and all(isinstance(text, str) for text in remarks.values())
    ):
        raise CheckpointError(f"{shown(path)}: header: __metadata__: expected an object of texts")
    data_size = size - 8 - length
    entries = {
        name: _read_entry(path, name, value, data_size)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_coverage(path, entries, data_size)
    offset = 8 + length
    return {
        name: _Entry(entry.dtype, entry.shape, entry.begin + offset, entry.end + offset)
        for name, entry in entries.items()
    }


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name."""
    return {name: _lazy(name, path, entry) for name, entry in read_header(path).items()}


def unreadable(name: str, dtype: str) -> str:
    """The sentence that refuses a tensor for its dtype."""
    return (
        f"tensor {printable(name)} is {printable(dtype)}: expected one of {', '.join(READABLE)}; "
        "get the checkpoint in one of these"
    )


def _read_entry(path: Path, name: str, value: Any, data_size: int) -> _Entry:
    """One tensor's entry; positions are relative to the end of the header."""

    def refuse(part: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{shown(path)}: tensor {printable(name)}: {part}expected {expected}, "
            f"found {printable(found)}"
        )

    if not isinstance(value, dict):
        raise refuse("", "an object", type(value).__name__)
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse("dtype: ", f"one of {', '.join(DTYPE_BITS)}", repr(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise refuse("shape: ", f"at most {MAX_DIMS} sizes from 0", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise refuse("data_offsets: ", "two positions", offsets)
    begin, end = offsets
    if not begin <= end <= data_size:
        raise refuse("data_offsets: ", f"a range within 0 to {data_size:,}", offsets)
    n_bits = prod(shape) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise refuse(
            "data_offsets: ",
            f"{n_bits / 8:,.0f} bytes for {dtype} {printable(shape)}",
            f"{end - begin:,}",
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIM


def _check_coverage(path: Path, entries: dict[str, _Entry], data_size: int) -> None:
    """Tensors lie one after the other, from the first byte of the data to the last."""
    position, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise CheckpointError(
                f"{shown(path)}: tensors {printable(before)} and {printable(name)} overlap"
            )
        if entry.begin > position:
            raise CheckpointError(
                f"{shown(path)}: tensor {printable(name)}: expected to begin at {position:,}, "
                f"found {entry.begin:,}"
            )
        position, before = entry.end, name
    if position != data_size:
        raise CheckpointError(
            f"{shown(path)}: expected {position:,} bytes of tensors, found {data_size:,}"
        )


def _lazy(name: str, path: Path, entry: _Entry) -> LazyTensor:
    row_length = entry.shape[-1] if entry.shape else 1
    row_bytes = row_length * DTYPE_BITS[entry.dtype] // 8

    def load(first: int, last: int) -> Floats:
        if entry.dtype not in READABLE:
            raise CheckpointError(unreadable(name, entry.dtype))
        return _to_float32(raw(first, last), entry.dtype).reshape(last - first, row_length)

    def raw(first: int, last: int) -> Bytes:
        data = _read_at(path, entry.begin + first * row_bytes, (last - first) * row_bytes)
        return data.reshape(last - first, row_bytes)

    return LazyTensor(name, entry.shape, entry.dtype, load, raw)


def _read_at(path: Path, position: int, size: int) -> npt.NDArray[np.uint8]:
    data = np.empty(size, np.uint8)
    done = 0
    with open_regular(path) as file:
        file.seek(position)
        while done < size:
            n = file.readinto(data[done:])
            if not n:
                raise CheckpointError(
                    f"{shown(path)}: expected {size:,} bytes at {position:,}, found {done:,}: "
                    "the file has shrunk"
                )
            done += n
    return data


def _to_float32(data: npt.NDArray[np.uint8], dtype: str) -> Floats:
    if dtype == "BF16":
        wide = data.view("<u2").astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if dtype == "F32":
        return data.view("<f4").astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which conversion reports
        return data.view("<f8" if dtype == "F64" else "<f2").astype(np.float32)


def _looks_like(start: bytes) -> str:
    kinds = (
        (b"PK\x03\x04", "a zip archive, such as PyTorch's pickles are"),
        (b"\x80\x02", "a pickle"),
        (b"GGUF", "a GGUF file"),
        (b"version ", "a git-lfs pointer: fetch the file itself with `git lfs pull`"),
        (b"<!DOCTYP", "a web page"),
        (b"<html", "a web page"),
    )
    return next((f"; it looks like {kind}" for magic, kind in kinds if start.startswith(magic)), "")
