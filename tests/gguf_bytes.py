"""GGUF files put together byte by byte, so that tests can make any part of them wrong.

Nothing here uses the project's own writer: what the reader is told is written out in full.
"""

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def key(name: str | bytes, type_id: int, payload: bytes) -> bytes:
    return string(name) + u32(type_id) + payload


def text_key(name: str | bytes, text: str | bytes) -> bytes:
    return key(name, STR, string(text))


def array_key(name: str, element: int, count: int, payload: bytes) -> bytes:
    return key(name, ARR, u32(element) + u64(count) + payload)


def tensor(
    name: str | bytes, dims: tuple[int, ...], type_id: int, offset: int, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


@dataclass
class Parts:
    """A small, valid file with three tensors; fields are replaced to break it."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    keys: list[bytes] = field(
        default_factory=lambda: [
            text_key("general.architecture", "llama"),
            key("llama.context_length", U32, u32(2048)),
            key("llama.rope.freq_base", F32, struct.pack("<f", 10000.0)),
            key("tokenizer.ggml.add_bos_token", BOOL, b"\1"),
            array_key("tokenizer.ggml.tokens", STR, 3, string("a") + string("bc") + string("")),
            array_key("tokenizer.ggml.scores", F32, 3, struct.pack("<3f", 0.0, -1.0, -2.0)),
        ]
    )
    tensors: list[bytes] = field(
        default_factory=lambda: [
            tensor("token_embd.weight", (32, 3), 0, 0),  # F32, 384 bytes
            tensor("output_norm.weight", (32,), 0, 384),  # F32, 128 bytes
            tensor("output.weight", (32, 3), 8, 512),  # Q8_0, 102 bytes
        ]
    )
    alignment: int = 32
    data: bytes = bytes(range(256)) * 2 + bytes(102)

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        start = self.magic + u32(self.version) + u64(n_tensors) + u64(n_keys)
        return start + b"".join(self.keys) + b"".join(self.tensors)

    def build(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data
