"""The container's constants, and the types that a metadata value can have.

    "GGUF"  version u32  tensors u64  keys u64       the header
    key  type u32  value                             once for each key
    name  n_dims u32  dims u64 ...  type u32  offset u64   once for each tensor
    padding to the alignment, then the tensors' bytes, each padded

All numbers are little-endian. A string is a u64 length and its bytes. An array is the type of its
elements (u32), their number (u64), and the elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

MAGIC = b"GGUF"
VERSION = 3  # written; 2 is read as well and differs in nothing we use
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
ALIGNMENT_KEY = "general.alignment"
RESERVE_KEY = "gguf_tools.reserve"  # zeros, which later changes shrink and grow

STRING_ID = 8
ARRAY_ID = 9


@dataclass(frozen=True)
class ScalarType:
    """A number type of the metadata."""

    name: str
    type_id: int
    code: str  # of the struct module
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return self.dtype.itemsize


SCALARS: tuple[ScalarType, ...] = (
    ScalarType("u8", 0, "B", np.dtype("<u1")),
    ScalarType("i8", 1, "b", np.dtype("<i1")),
    ScalarType("u16", 2, "H", np.dtype("<u2")),
    ScalarType("i16", 3, "h", np.dtype("<i2")),
    ScalarType("u32", 4, "I", np.dtype("<u4")),
    ScalarType("i32", 5, "i", np.dtype("<i4")),
    ScalarType("f32", 6, "f", np.dtype("<f4")),
    ScalarType("bool", 7, "?", np.dtype("?")),
    ScalarType("u64", 10, "Q", np.dtype("<u8")),
    ScalarType("i64", 11, "q", np.dtype("<i8")),
    ScalarType("f64", 12, "d", np.dtype("<f8")),
)
SCALAR_BY_ID = {scalar.type_id: scalar for scalar in SCALARS}
SCALAR_BY_NAME = {scalar.name: scalar for scalar in SCALARS}


@dataclass(frozen=True)
class Value:
    """One metadata value to be written: `Value("u32", 4096)`, `Value("str", "llama")`."""

    type: str  # "str" or the name of a ScalarType
    value: Any


@dataclass(frozen=True)
class Array:
    """A metadata array to be written: `Array("str", tokens)`, `Array("f32", scores)`."""

    type: str  # of the elements
    values: Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A metadata value in the bytes that another file has it in: its type and what follows."""

    data: bytes


MetadataValue: TypeAlias = Value | Array | Encoded
