"""Everything in a GGUF file before the tensors' bytes, believed only where it has been checked.

Kernels read the mapped file through raw addresses, so this is the place where a file is believed or
not. Every count, length, dimension, type and offset is checked against the size of the file, in
Python's unbounded integers, before anything is allocated, looped over or handed on.
"""

import mmap
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any, NoReturn

import numpy as np

from gguf_tools.errors import FormatError, UnsupportedQuantError, printable
from gguf_tools.lookalikes import describe_beginning
from gguf_tools.quants import by_id
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.values import (
    ALIGNMENT_KEY,
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    SCALAR_BY_ID,
    STRING_ID,
    ScalarType,
)

# What no honest file comes near, and what bounds the memory that a dishonest one can cost.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 65535  # by the specification
MAX_NAME_BYTES = 64  # by the specification
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_STRINGS = 1 << 21  # in all arrays together
MAX_TEXT_BYTES = 1 << 25  # of all keys and strings together
MAX_NESTED_ARRAYS = 1 << 16
MAX_DEPTH = 4
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20

HEADER_BYTES = 24
MIN_KEY_ENTRY = 14  # length, one letter, type, one byte of value
MIN_TENSOR_ENTRY = 33  # length, one letter, n_dims, one dimension, type, offset
MAX_FILE_BYTES = 1 << 62  # of a file that is still being written
MAX_COPIED_BYTES = 1 << 24  # numeric arrays are copies until this is used up, then views

REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class TensorInfo:
    """What the file says about a tensor; every number has been checked against the file."""

    name: str
    quant: QuantType
    shape: tuple[int, ...]  # NumPy order, outermost first: token_embd is (n_vocab, dim)
    offset: int  # bytes from the start of the file
    nbytes: int
    part: int = 0  # of a split model: which of its files, from 0

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def row_length(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.n_rows


@dataclass(frozen=True)
class Split:
    """What a part of a split model says of itself."""

    number: int  # from 0
    count: int  # parts, more than one
    n_tensors: int | None  # in all parts together


class HeaderParser:
    """Reads everything before the tensors' bytes; `pos` moves only over bytes that exist."""

    def __init__(self, data: mmap.mmap, shown: str) -> None:
        self.data = data
        self.shown = shown
        self.size = len(data)
        self.end = self.size  # up to where tensors may reach
        self.pos = 0
        self.n_strings = 0
        self.n_nested = 0
        self.n_text_bytes = 0
        self.n_copied_bytes = 0
        self.version = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.data_offset = 0
        self.metadata: dict[str, Any] = {}
        self.metadata_types: dict[str, str] = {}
        self.value_spans: dict[str, tuple[int, int]] = {}  # bytes of each value and its type
        self.infos_span = (0, 0)  # bytes of what is said of the tensors
        self.tensors: dict[str, TensorInfo] = {}
        self.split: Split | None = None
        self._n_tensors = 0
        self._before_tensors = (0, 0)  # pos and n_text_bytes

    def parse_metadata(self) -> None:
        """Read as far as the metadata goes."""
        self._n_tensors, n_keys = self._parse_counts()
        for index in range(n_keys):
            self._parse_entry(index)
        self._before_tensors = self.pos, self.n_text_bytes

    def parse_tensors(self, data: mmap.mmap, *, is_whole: bool = True) -> None:
        """Read what follows the metadata from `data`, the same file, which may have grown since.

        Of a file that is not whole yet tensors may lie beyond its end. It can be read again.
        """
        self.data, self.size = data, len(data)
        self.end = self.size if is_whole else MAX_FILE_BYTES
        self.pos, self.n_text_bytes = self._before_tensors
        self.tensors = {}
        self.split = self._find_split()
        self.alignment = self._find_alignment()
        start = self.pos
        offsets = [self._parse_tensor(index) for index in range(self._n_tensors)]
        self.infos_span = (start, self.pos)
        self.data_offset = self.pos + -self.pos % self.alignment
        for name, offset in offsets:
            self._place(name, offset)
        self._refuse_overlaps()

    # --- the header

    def _parse_counts(self) -> tuple[int, int]:
        start = self.data[:1024]
        if not start.startswith(MAGIC):
            if len(start) < 4 and MAGIC.startswith(start):
                self._refuse("header", f"{HEADER_BYTES} bytes", f"{self.size}: the file is cut off")
            self._refuse("magic", "a GGUF file", describe_beginning(start))
        self._need(HEADER_BYTES - self.pos, "header")
        (self.version,) = _u32(start, 4)
        if self.version not in (2, 3):
            self._refuse("version at byte 4", "2 or 3", _describe_version(self.version))
        (n_tensors,) = _u64(start, 8)
        (n_keys,) = _u64(start, 16)
        self.pos = HEADER_BYTES
        self._check_count("tensor count at byte 8", n_tensors, MIN_TENSOR_ENTRY, MAX_TENSORS)
        self._check_count("metadata count at byte 16", n_keys, MIN_KEY_ENTRY, MAX_KEYS)
        return n_tensors, n_keys

    def _check_count(self, where: str, count: int, item_bytes: int, limit: int) -> None:
        room = (self.size - self.pos) // item_bytes
        if count > room:
            self._refuse(where, f"at most {room:,} (the file has no room for more)", f"{count:,}")
        if count > limit:
            self._refuse(where, f"at most {limit:,}", f"{count:,}")

    # --- metadata

    def _parse_entry(self, index: int) -> None:
        where = f"metadata key {index} at byte {self.pos}"
        key = self._parse_name(where, MAX_KEY_BYTES)
        if key in self.metadata:
            self._refuse(where, "a new key", f"{printable(key)} a second time")
        where = f"metadata {printable(key)}"
        start = self.pos
        type_id = self._parse_u32(where)
        value: Any
        if type_id == STRING_ID:
            value, type_name = self._parse_string(where), "str"
        elif type_id == ARRAY_ID:
            value, type_name = self._parse_array(where)
        else:
            scalar = self._scalar(type_id, where)
            value, type_name = self._parse_scalar(scalar, where), scalar.name
        self.metadata[key] = value
        self.metadata_types[key] = type_name
        self.value_spans[key] = (start, self.pos)

    def _parse_array(self, where: str) -> tuple[Any, str]:
        element, count = self._parse_array_start(where)
        if element != ARRAY_ID:
            name = "str" if element == STRING_ID else SCALAR_BY_ID[element].name
            return self._parse_flat(element, count, where), f"arr[{name}]"
        values: list[Any] = []
        stack = [(values, iter(range(count)))]
        while stack:
            parent, rest = stack[-1]
            if next(rest, None) is None:
                stack.pop()
                continue
            element, count = self._parse_array_start(where)
            if element != ARRAY_ID:
                parent.append(self._parse_flat(element, count, where))
                continue
            if len(stack) + 1 == MAX_DEPTH:
                self._refuse(where, f"arrays at most {MAX_DEPTH} deep", "deeper ones")
            child: list[Any] = []
            parent.append(child)
            stack.append((child, iter(range(count))))
        return values, "arr[arr]"

    def _parse_array_start(self, where: str) -> tuple[int, int]:
        element = self._parse_u32(where)
        if element == STRING_ID:
            item_bytes = 8
        elif element == ARRAY_ID:
            item_bytes = 12
        else:
            item_bytes = self._scalar(element, where).size
        at = f"{where}: array length at byte {self.pos}"
        count = self._parse_u64(where)
        self._check_count(at, count, item_bytes, self.size)
        if element == STRING_ID:
            self.n_strings += count
            if self.n_strings > MAX_ARRAY_STRINGS:
                self._refuse(at, f"at most {MAX_ARRAY_STRINGS:,} strings", f"{self.n_strings:,}")
        if element == ARRAY_ID:
            self.n_nested += count
            if self.n_nested > MAX_NESTED_ARRAYS:
                self._refuse(at, f"at most {MAX_NESTED_ARRAYS:,} arrays", f"{self.n_nested:,}")
        return element, count

    def _parse_flat(self, element: int, count: int, where: str) -> Any:
        """The elements of an array whose count has been checked, strings or numbers."""
        if element == STRING_ID:
            return self._parse_strings(count, where)
        scalar = SCALAR_BY_ID[element]
        array = np.frombuffer(self.data, scalar.dtype, count, self.pos)
        if scalar.name == "bool":
            found = int(array.view(np.uint8).max(initial=0))
            if found > 1:
                self._refuse(where, "booleans 0 or 1", str(found))
        self.pos += array.nbytes
        self.n_copied_bytes += array.nbytes
        return array.copy() if self.n_copied_bytes <= MAX_COPIED_BYTES else array

    def _parse_strings(self, count: int, where: str) -> list[str]:
        """`count` strings. The one loop here that runs a million times: kept flat."""
        data, pos = self.data, self.pos
        first = pos
        end = min(self.size, pos + MAX_TEXT_BYTES - self.n_text_bytes + 8 * count)
        last = end - 8
        strings: list[str] = []
        for _ in range(count):
            if pos > last:
                break
            (length,) = _u64(data, pos)
            start = pos + 8
            pos = start + length
            if pos > end:
                break
            # Tokens need not be UTF-8: the escape keeps their bytes, and gives them back.
            strings.append(str(data[start:pos], "utf-8", "surrogateescape"))
        if len(strings) < count:
            at = f"{where}: string {len(strings):,} of {count:,}"
            why = "the file ends there" if end == self.size else f"{MAX_TEXT_BYTES:,} bytes of text"
            self._refuse(at, f"its end by byte {end:,} ({why})", f"byte {max(pos, last + 9):,}")
        self.pos = pos
        self.n_text_bytes += pos - first - 8 * count
        return strings

    def _parse_scalar(self, scalar: ScalarType, where: str) -> int | float | bool:
        at = self.pos
        self._need(scalar.size, where)
        self.pos += scalar.size
        if scalar.name == "bool":
            if self.data[at] > 1:
                self._refuse(f"{where} at byte {at}", "a boolean, 0 or 1", str(self.data[at]))
            return bool(self.data[at])
        value: int | float = struct.unpack_from("<" + scalar.code, self.data, at)[0]
        return value

    def _scalar(self, type_id: int, where: str) -> ScalarType:
        scalar = SCALAR_BY_ID.get(type_id)
        if scalar is None:
            at = f"{where}: value type at byte {self.pos - 4}"
            self._refuse(at, "a type from 0 to 12", f"{type_id}")
        return scalar

    def _find_alignment(self) -> int:
        if ALIGNMENT_KEY not in self.metadata:
            return DEFAULT_ALIGNMENT
        alignment, kind = self.metadata[ALIGNMENT_KEY], self.metadata_types[ALIGNMENT_KEY]
        where = f"metadata {ALIGNMENT_KEY}"
        if kind != "u32":
            self._refuse(where, "a value of type u32", kind)
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            expected = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
            self._refuse(where, expected, f"{alignment:,}")
        return int(alignment)

    def _find_split(self) -> Split | None:
        """What the file says of being a part; None for a whole model."""
        count = self._split_number("split.count")
        if count is None or count <= 1:
            return None
        number = self._split_number("split.no")
        if number is None or not 0 <= number < count:
            found = "none" if number is None else f"{number:,}"
            self._refuse("metadata split.no", f"a number from 0 to {count - 1:,}", found)
        return Split(number, count, self._split_number("split.tensors.count"))

    def _split_number(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self._refuse(f"metadata {key}", "a whole number", self.metadata_types[key])
        return value

    # --- tensors

    def _parse_tensor(self, index: int) -> tuple[str, int]:
        where = f"tensor {index} at byte {self.pos}"
        name = self._parse_name(where, MAX_NAME_BYTES)
        if name in self.tensors:
            self._refuse(where, "a new name", f"{printable(name)} a second time")
        where = f"tensor {printable(name)}"
        at = self.pos
        n_dims = self._parse_u32(where)
        if not 1 <= n_dims <= MAX_DIMS:
            expected = f"1 to {MAX_DIMS} dimensions"
            self._refuse(f"{where}: n_dims at byte {at}", expected, f"{n_dims:,}")
        at = self.pos
        dims = [self._parse_u64(where) for _ in range(n_dims)]
        elements = prod(dims)
        if elements == 0:
            self._refuse(f"{where}: shape at byte {at}", "dimensions of at least 1", f"{dims}")
        quant = self._parse_quant(where)
        if dims[0] % quant.block_size:
            expected = f"rows of whole blocks of {quant.block_size} ({quant.name})"
            self._refuse(f"{where}: shape at byte {at}", expected, f"rows of {dims[0]:,}")
        nbytes = elements // quant.block_size * quant.block_bytes
        if nbytes > self.end:
            expected = f"a tensor that fits in the file of {self.end:,} bytes"
            found = f"{' x '.join(map(str, dims))} {quant.name}, {nbytes:,} bytes"
            self._refuse(f"{where}: shape at byte {at}", expected, found)
        offset = self._parse_u64(where)
        self.tensors[name] = TensorInfo(name, quant, tuple(reversed(dims)), offset, nbytes)
        return name, offset

    def _parse_quant(self, where: str) -> QuantType:
        at = f"{where}: type at byte {self.pos}"
        type_id = self._parse_u32(where)
        if type_id in REMOVED_TYPES:
            found = f"{type_id} ({REMOVED_TYPES[type_id]}, removed from the format)"
            self._refuse(at, "a ggml type in use", f"{found}; quantise the model again")
        try:
            return by_id(type_id)
        except UnsupportedQuantError:
            self._refuse(at, "a known ggml type", f"{type_id:,}")

    def _place(self, name: str, offset: int) -> None:
        """Turn the offset in the data section into one in the file, and check it."""
        tensor = self.tensors[name]
        where = f"tensor {printable(name)}: offset"
        if offset % self.alignment:
            self._refuse(where, f"a multiple of {self.alignment}", f"{offset:,}")
        start = self.data_offset + offset
        if start + tensor.nbytes > self.end:
            expected = f"its {tensor.nbytes:,} bytes within the file of {self.end:,} bytes"
            found = f"bytes {start:,} to {start + tensor.nbytes:,}: the file is cut off or damaged"
            self._refuse(where, expected, found)
        self.tensors[name] = replace(tensor, offset=start)

    def _refuse_overlaps(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda tensor: tensor.offset)
        for before, tensor in pairwise(ordered):
            end = before.offset + before.nbytes
            if end > tensor.offset:
                self._refuse(
                    f"tensor {printable(tensor.name)}: offset",
                    f"byte {end:,} or later, where {printable(before.name)} ends",
                    f"{tensor.offset:,}",
                )

    # --- the primitives

    def _parse_u32(self, where: str) -> int:
        self._need(4, where)
        (value,) = _u32(self.data, self.pos)
        self.pos += 4
        return int(value)

    def _parse_u64(self, where: str) -> int:
        self._need(8, where)
        (value,) = _u64(self.data, self.pos)
        self.pos += 8
        return int(value)

    def _parse_bytes(self, where: str, limit: int) -> bytes:
        at = f"{where}: string length at byte {self.pos}"
        length = self._parse_u64(where)
        left = self.size - self.pos
        if length > left:
            self._refuse(at, f"at most {left:,} (the file ends there)", f"{length:,}")
        if length > limit:
            self._refuse(at, f"at most {limit:,} bytes", f"{length:,}")
        self.n_text_bytes += length
        if self.n_text_bytes > MAX_TEXT_BYTES:
            self._refuse(at, f"at most {MAX_TEXT_BYTES:,} bytes of text in all keys", "more")
        self.pos += length
        return self.data[self.pos - length : self.pos]

    def _parse_string(self, where: str) -> str:
        return str(self._parse_bytes(where, MAX_STRING_BYTES), "utf-8", "surrogateescape")

    def _parse_name(self, where: str, limit: int) -> str:
        """A key or a tensor's name: UTF-8, not empty, without NUL."""
        name = self._parse_bytes(where, limit)
        try:
            text = str(name, "utf-8")
        except UnicodeDecodeError:
            self._refuse(where, "a name in UTF-8", f"{name[:60]!r}")
        if not text or "\0" in text:
            self._refuse(where, "a name without NUL bytes", f"'{printable(text)}'")
        return text

    def _need(self, count: int, where: str) -> None:
        if count > self.size - self.pos:
            self._refuse(
                f"{where} at byte {self.pos}",
                f"{count} more bytes",
                f"{self.size - self.pos}: the file is cut off",
            )

    def _refuse(self, where: str, expected: str, found: str) -> NoReturn:
        raise FormatError(f"{self.shown}: {where}: expected {expected}, found {found}")


def _describe_version(version: int) -> str:
    if version & 0xFFFF == 0 and version:
        return (
            "its bytes swapped: the file was made for a big-endian machine; "
            "download or convert the model again for this one"
        )
    if version == 1:
        return "1, which is no longer in use; convert the model again"
    return f"{version}" + ("; a newer version of this program may know it" if version > 3 else "")
