"""Broken and hostile files: each is refused with one sentence that names the place."""

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import FormatError, GGUFError
from gguf_tools.reader import GGUFFile
from tests.gguf_bytes import (
    ARR,
    BOOL,
    F32,
    I32,
    STR,
    U8,
    U32,
    Parts,
    array_key,
    key,
    string,
    tensor,
    text_key,
    u32,
    u64,
)

ABSURD = [-1, 1 << 63, 1 << 62, 1 << 40, 1 << 31, 1 << 30]


def with_keys(*keys: bytes) -> bytes:
    parts = Parts()
    parts.keys += keys
    return parts.build()


def with_tensors(*tensors: bytes, data: bytes = bytes(4096)) -> bytes:
    return Parts(tensors=list(tensors), data=data).build()


def nested(depth: int, innermost: bytes) -> bytes:
    """An array of an array of ... `innermost`, each of one element."""
    return key("deep", ARR, (u32(ARR) + u64(1)) * depth + innermost)


def not_gguf() -> Iterator[tuple[str, bytes, str]]:
    good = Parts().build()
    yield "empty", b"", "empty file"
    yield "two-letters", b"GG", "cut off"
    yield "magic-only", b"GGUF", "header"
    yield "zeros", bytes(5000), "zero bytes"
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>", "web page"
    yield "xml", b'\n <?xml version="1.0"?><Error>Denied</Error>', "web page"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"
    yield "zip", b"PK\3\4" + bytes(100), "zip"
    yield "pickle", b"\x80\2}q\0." + bytes(40), "pickle"
    yield "gzip", b"\x1f\x8b\x08" + bytes(100), "gzip"
    yield "json", b'{"architectures": ["LlamaForCausalLM"]}', "JSON"
    yield "text", b"Entry not found", "text beginning 'Entry not found'"
    yield "escape", b"\x1b[31mred\x1b[0m and more", "\\x1b"
    yield "safetensors", u64(40) + b'{"a":{"dtype":"F32"' + bytes(60), "safetensors"
    yield "ggml", b"tjgg" + u32(3) + bytes(100), "before GGUF"
    yield "swapped-magic", b"FUGG" + good[4:], "byte-swapped"
    yield "noise", b"\xfe\x01\x02\x03" * 20, "fe 01 02 03"
    yield "v0", Parts(version=0).build(), "version"
    yield "v1", Parts(version=1).build(), "convert the model again"
    yield "v4", Parts(version=4).build(), "newer version"
    yield "v-big-endian", Parts(version=3 << 24).build(), "big-endian"
    yield "v-max", Parts(version=0xFFFFFFFF).build(), "version"


def counts() -> Iterator[tuple[str, bytes, str]]:
    for n in [*ABSURD, 1 << 20]:
        yield f"tensors-{n}", Parts(n_tensors=n).build(), "tensor count at byte 8"
        yield f"keys-{n}", Parts(n_keys=n).build(), "metadata count at byte 16"
        length = u64(n)
        yield f"key-length-{n}", with_keys(length + b"abc"), "metadata key 6"
        yield f"string-{n}", with_keys(key("s", STR, length + b"abc")), "metadata s"
        yield f"tensor-name-{n}", with_tensors(length + b"abc"), "tensor 0"
        for name, element in (("bytes", U8), ("floats", F32), ("strings", STR), ("arrays", ARR)):
            data = with_keys(array_key("a", element, n, b"abc"))
            yield f"{name}-{n}", data, "metadata a"
        inside = array_key("a", STR, 2, string("x") + length + b"yz")
        yield f"inner-string-{n}", with_keys(inside), "string 1 of 2"
    yield "tensors-one-more", Parts(n_tensors=4).build(), "tensor 3"
    yield "keys-one-more", Parts(n_keys=7, tensors=[]).build(), "metadata key 6"
    last = key("z", STR, u64(9) + b"12345678")
    one_past = Parts(tensors=[], keys=[last], alignment=1, data=b"").build()
    yield "string-one-past", one_past, "metadata z: string length"
    yield "key-70000", with_keys(text_key("k" * 70000, "v")), "at most 65,535"
    yield "name-65", with_tensors(tensor("t" * 65, (4,), 0, 0)), "at most 64"


def types() -> Iterator[tuple[str, bytes, str]]:
    for type_id in (13, 14, 255, 1 << 31, 0xFFFFFFFF):
        yield f"value-{type_id}", with_keys(key("x", type_id, bytes(16))), "metadata x: value type"
        data = with_keys(array_key("x", type_id, 0, b""))
        yield f"empty-array-of-{type_id}", data, "metadata x: value type"
    yield "bool-2", with_keys(key("x", BOOL, b"\2")), "metadata x at byte"
    yield "bools-2", with_keys(array_key("x", BOOL, 3, b"\0\1\2")), "0 or 1"
    for depth in (4, 100, 100_000):
        data = with_keys(nested(depth, u32(U8) + u64(0)))
        yield f"nested-{depth}", data, "metadata deep: expected arrays at most 4 deep"
    wide = array_key("wide", ARR, 70_000, (u32(U8) + u64(0)) * 70_000)
    yield "nested-wide", with_keys(wide), "at most 65,536 arrays"


def names() -> Iterator[tuple[str, bytes, str]]:
    yield "key-empty", with_keys(text_key("", "v")), "metadata key 6"
    yield "key-twice", with_keys(text_key("a", "v"), text_key("a", "v")), "a second time"
    yield "key-latin-1", with_keys(text_key(b"caf\xe9", "v")), "UTF-8"
    yield "key-nul", with_keys(text_key(b"a\0b", "v")), "NUL"
    twice = tensor("a", (4,), 0, 0), tensor("a", (4,), 0, 32)
    yield "tensor-twice", with_tensors(*twice), "a second time"
    yield "tensor-empty", with_tensors(tensor("", (4,), 0, 0)), "tensor 0"
    yield "tensor-latin-1", with_tensors(tensor(b"\xff", (4,), 0, 0)), "UTF-8"
    yield "tensor-nul", with_tensors(tensor(b"a\0", (4,), 0, 0)), "NUL"
    escape = tensor("\x1b[2J", (4,), 4, 0)
    yield "tensor-escape", with_tensors(escape), "tensor \\x1b[2J: type"


def alignments() -> Iterator[tuple[str, bytes, str]]:
    place = "metadata general.alignment: expected"
    for value in (0, 1, 3, 4, 7, 24, 33, 1 << 31, 0xFFFFFFFF):
        yield f"is-{value}", with_keys(key("general.alignment", U32, u32(value))), place
    yield "string", with_keys(text_key("general.alignment", "32")), place
    yield "float", with_keys(key("general.alignment", F32, struct.pack("<f", 32))), place
    yield "i32", with_keys(key("general.alignment", I32, u32(-32))), place
    yield "array", with_keys(array_key("general.alignment", U32, 1, u32(32))), place
    wide = key("general.alignment", U32, u32(64))
    parts = Parts(alignment=64, tensors=[tensor("a", (4,), 0, 32)])
    parts.keys.append(wide)
    yield "offset-32-of-64", parts.build(), "tensor a: offset: expected a multiple of 64"


def tensors() -> Iterator[tuple[str, bytes, str]]:
    for n_dims in (0, 5, 6, 1 << 31, 0xFFFFFFFF):
        one = tensor("a", (4,), 0, 0, n_dims=n_dims)
        yield f"n_dims-{n_dims}", with_tensors(one), "tensor a: n_dims"
    shapes: dict[str, tuple[int, ...]] = {
        "zero": (0,),
        "zero-inside": (32, 0, 4),
        "zero-times-huge": ((1 << 63), 0),
        "negative": (-1,),
        "negative-pair": (-32, -32),
        "int32-wrap": (1 << 32, 1),
        "wraps-to-32": (32, (1 << 64) // 32 + 1),
        "wraps-to-zero": (1 << 32, 1 << 32),
        "huge": (1 << 62, 1 << 62, 1 << 62, 1 << 62),
        "one-row-more": (32, 33),
    }
    for name, dims in shapes.items():
        for type_id in (0, 8):
            data = with_tensors(tensor("a", dims, type_id, 0), data=bytes(32 * 32))
            yield f"{name}-type-{type_id}", data, "tensor a:"
    for type_id in (4, 5, 31, 32, 33, 36, 37, 38):
        yield f"removed-{type_id}", with_tensors(tensor("a", (32,), type_id, 0)), "removed"
    for type_id in (43, 99, 1 << 31, 0xFFFFFFFF):
        yield f"unknown-{type_id}", with_tensors(tensor("a", (32,), type_id, 0)), "tensor a: type"
    yield "part-of-block", with_tensors(tensor("a", (33,), 8, 0)), "whole blocks of 32 (Q8_0)"
    yield "part-of-256", with_tensors(tensor("a", (128, 2), 12, 0)), "whole blocks of 256 (Q4_K)"
    for offset in (*ABSURD, 4096, 1 << 63):
        yield f"offset-{offset}", with_tensors(tensor("a", (4,), 0, offset)), "tensor a: offset"
    into_header = (1 << 64) - 64
    yield "offset-wraps", with_tensors(tensor("a", (4,), 0, into_header)), "tensor a: offset"
    yield "unaligned", with_tensors(tensor("a", (4,), 0, 4)), "a multiple of 32"
    yield "same-place", with_tensors(tensor("a", (4,), 0, 0), tensor("b", (4,), 0, 0)), "a ends"
    over = tensor("b", (4,), 0, 32), tensor("a", (16,), 0, 0)
    yield "overlap", with_tensors(*over), "tensor b: offset: expected byte"
    for short in (1, 32, 257):
        parts = Parts()
        parts.data = parts.data[:-short]
        yield f"short-by-{short}", parts.build(), "cut off"


def splits() -> Iterator[tuple[str, bytes, str]]:
    u16 = 2
    no, count = key("split.no", u16, b"\1\0"), key("split.count", u16, b"\3\0")
    yield "second-of-three", with_keys(no, count), "part 2 of 3"
    yield "no-number", with_keys(key("split.count", u16, b"\xff\xff")), "split.no"
    yield "count-text", with_keys(text_key("split.count", "3")), "split.count"


CASES = [
    pytest.param(data, place, id=f"{group.__name__}-{name}")
    for group in (not_gguf, counts, types, names, alignments, tensors, splits)
    for name, data, place in group()
]


@pytest.mark.parametrize(("data", "place"), CASES)
def test_refused_with_the_place_named(tmp_path: Path, data: bytes, place: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(FormatError) as caught:
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert place in message
    assert "expected" in message and "found" in message
    assert message.isprintable()
    assert len(message) < 500
    assert peak < 30_000_000
    assert time.perf_counter() - start < 5


def test_cut_anywhere(tmp_path: Path) -> None:
    """No prefix of a file opens, up to the last byte of its last tensor."""
    data = Parts().build()
    path = tmp_path / "cut.gguf"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match="found"):
            GGUFFile(path)
    path.write_bytes(data)
    GGUFFile(path)


def test_bytes_changed_at_random(tmp_path: Path) -> None:
    """Whatever a file says, it is refused, or its tensors lie within it."""
    random_ = random.Random(20)
    seed = Parts().build()
    n_header = len(Parts().header())
    path = tmp_path / "fuzz.gguf"
    edges = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 63, 64, 127, 128, 254, 255)
    opened = 0
    for _ in range(4000):
        data = bytearray(seed)
        for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
            at = random_.randrange(n_header)
            kind = random_.randrange(5)
            if kind == 0:
                data[at] ^= 1 << random_.randrange(8)
            elif kind == 1:
                data[at] = random_.choice(edges)
            elif kind == 2:
                data[at : at + 8] = u64(random_.choice((-1, 1 << 63, 1 << 32, 0, 1, len(seed))))
            elif kind == 3:
                del data[at : at + random_.randrange(1, 40)]
            else:
                data[at:at] = data[at : at + random_.randrange(1, 40)]
        path.write_bytes(data)
        try:
            file = GGUFFile(path)
        except GGUFError as error:
            assert str(error).isprintable()
            continue
        opened += 1
        size = len(data)
        ends = [0]
        for info in sorted(file.tensors.values(), key=lambda info: info.offset):
            assert info.offset >= max(file.data_offset, ends[-1])
            ends.append(info.offset + info.nbytes)
            assert info.nbytes == info.n_rows * info.row_bytes > 0
            assert file.raw(info.name).shape == (info.n_rows, info.row_bytes)
            int(file.raw(info.name).sum(dtype=np.int64))
        assert ends[-1] <= size
    assert 100 < opened < 3900  # both ways out are exercised


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file of `start` and zeros that takes no room on the disk."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def header_with(*keys: bytes) -> bytes:
    return Parts(keys=list(keys), tensors=[]).header()


@pytest.mark.parametrize(
    ("start", "size", "place"),
    [
        (header_with(key("s", STR, u64(1 << 25))), 1 << 26, "metadata s: string length"),
        (
            header_with(*(key(k, STR, u64(15 << 20) + bytes(15 << 20)) for k in "abc")),
            1 << 26,
            "metadata c: string length",
        ),
        (header_with(array_key("s", STR, 1 << 22, b"")), 1 << 26, "metadata s: array length"),
        (header_with(array_key("s", STR, 2, u64(1 << 26))), 1 << 30, "metadata s: string 0 of 2"),
        (Parts(n_keys=1 << 20).header(), 1 << 30, "metadata count"),
        (Parts(n_tensors=1 << 20).header(), 1 << 30, "tensor count"),
    ],
)
def test_large_files_cost_little(tmp_path: Path, start: bytes, size: int, place: str) -> None:
    """Counts for which the file has room, and which no honest file has."""
    path = sparse(tmp_path / "sparse.gguf", start, size)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()
    assert place in str(caught.value)


def test_large_arrays_are_views(tmp_path: Path) -> None:
    start = header_with(array_key("a", U8, 1 << 30, b""))
    path = sparse(tmp_path / "sparse.gguf", start, len(start) + (1 << 30))
    tracemalloc.start()
    try:
        assert len(GGUFFile(path).metadata["a"]) == 1 << 30
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "device", "loop", "nul"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        path = tmp_path / "a\0b"
    with pytest.raises(GGUFError, match=r"x\.gguf|/dev/zero|x00b"):
        GGUFFile(path)


def test_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(Parts().build())
    (tmp_path / "x.gguf").symlink_to(tmp_path / "blob")
    assert len(GGUFFile(tmp_path / "x.gguf").tensors) == 3


def test_escapes_in_the_file_name_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2Jb.gguf"
    path.write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        GGUFFile(path)
    assert "a\\x1b[2Jb" in str(caught.value)
