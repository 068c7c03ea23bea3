"""Files that are fine: read like gguf.GGUFReader reads them, and quickly."""

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_tools.quants import QUANTS, by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.writer import Array, GGUFWriter, TensorSpec, Value
from tests.gguf_bytes import (
    ARR,
    BOOL,
    F64,
    I8,
    I16,
    I64,
    STR,
    U8,
    U16,
    U32,
    U64,
    Parts,
    array_key,
    key,
    string,
    tensor,
    text_key,
    u32,
    u64,
)


def open_bytes(folder: Path, data: bytes) -> GGUFFile:
    path = folder / "made.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def assert_same_as_gguf_package(path: Path) -> None:
    file = GGUFFile(path)
    theirs = gguf.GGUFReader(path)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        value = file.metadata[name]
        if isinstance(value, np.ndarray):
            value = value.tolist()
        assert value == field.contents(), name
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor_ in theirs.tensors:
        info = file.tensors[tensor_.name]
        assert info.quant.type_id == tensor_.tensor_type
        assert list(info.shape) == tensor_.shape.tolist()[::-1]
        assert info.offset == tensor_.data_offset
        assert info.nbytes == tensor_.n_bytes
        assert info.n_elements == tensor_.n_elements
        assert np.array_equal(file.raw(info.name).reshape(-1), tensor_.data.view("u1").reshape(-1))
    assert file.data_offset == theirs.data_offset
    assert file.alignment == theirs.alignment


def test_same_as_gguf_package_on_a_real_model(smollm2_gguf: Path) -> None:
    assert_same_as_gguf_package(smollm2_gguf)


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_same_as_gguf_package_on_our_own_file(tmp_path: Path, alignment: int) -> None:
    """Every type of value, and a tensor of every block format that the package knows as ggml does.

    It takes Q8_1, which no file holds, for 40 bytes where ggml has 36, and lacks the newest ones.
    """
    path = tmp_path / "all.gguf"
    metadata = {
        "general.architecture": Value("str", "test"),
        "u8": Value("u8", 255),
        "i8": Value("i8", -128),
        "u16": Value("u16", 65535),
        "i16": Value("i16", -32768),
        "u32": Value("u32", 2**32 - 1),
        "i32": Value("i32", -(2**31)),
        "f32": Value("f32", 0.1),
        "bool": Value("bool", True),
        "str": Value("str", "h\u00e9llo \U0001f642\n\0 end"),
        "u64": Value("u64", 2**64 - 1),
        "i64": Value("i64", -(2**63)),
        "f64": Value("f64", 0.1),
        "strings": Array("str", ["a", "", "\u0120b"]),
        "floats": Array("f32", [0.5, -1.0]),
        "none": Array("i32", []),
        "bools": Array("bool", [True, False]),
    }
    theirs = {int(type_id): sizes for type_id, sizes in gguf.GGML_QUANT_SIZES.items()}
    quants = [q for q in QUANTS if theirs.get(q.type_id) == (q.block_size, q.block_bytes)]
    assert len(quants) >= 30
    specs = [TensorSpec(f"t.{q.name}", q, (2, 3, 2 * q.block_size)) for q in quants]
    random_ = np.random.default_rng(5)
    with GGUFWriter(path, metadata=metadata, tensors=specs, alignment=alignment) as writer:
        for spec in specs:
            writer.write(spec.name, random_.integers(0, 256, spec.nbytes, dtype=np.uint8))
    assert_same_as_gguf_package(path)


def test_shapes_and_weights(tmp_path: Path) -> None:
    weights = np.arange(96, dtype=np.float32)
    parts = Parts(data=weights.tobytes() + bytes(128 + 102))
    with open_bytes(tmp_path, parts.build()) as file:
        info = file.tensors["token_embd.weight"]
        assert info.shape == (3, 32)
        assert (info.n_rows, info.row_length, info.row_bytes) == (3, 32, 128)
        assert (info.n_elements, info.nbytes) == (96, 384)
        raw = file.raw(info.name)
        assert raw.shape == (3, 128) and raw.dtype == np.uint8
        assert not raw.flags.writeable
        loaded = file.load(info.name)
        assert loaded.dtype == np.float32
        assert np.array_equal(loaded, weights.reshape(3, 32))
        assert file.load("output.weight").shape == (3, 32)
        assert file.load("output_norm.weight").shape == (32,)
        assert file.file_size == len(parts.build())
        assert file.version == 3


def test_views_outlive_the_file(tmp_path: Path) -> None:
    with open_bytes(tmp_path, Parts().build()) as file:
        raw = file.raw("token_embd.weight")
        scores = file.metadata["tokenizer.ggml.scores"]
    assert raw.reshape(-1)[:4].tolist() == [0, 1, 2, 3]
    assert scores.tolist() == [0.0, -1.0, -2.0]
    with pytest.raises(ValueError, match="closed"):
        file.raw("token_embd.weight")
    file.close()


def test_metadata_values(tmp_path: Path) -> None:
    parts = Parts(
        keys=[
            key("a.u8", U8, b"\xff"),
            key("a.i8", I8, b"\xff"),
            key("a.u16", U16, b"\xff\xff"),
            key("a.i16", I16, b"\xff\xff"),
            key("a.u64", U64, b"\xff" * 8),
            key("a.i64", I64, b"\xff" * 8),
            key("a.f64", F64, struct.pack("<d", 0.1)),
            key("a.no", BOOL, b"\0"),
            text_key("a.text", "\u0120 \u4e16"),
            array_key("a.bools", BOOL, 2, b"\0\1"),
            array_key("a.strings", STR, 2, string("x") + string("")),
            array_key("a.none", U32, 0, b""),
            array_key("a.no_strings", STR, 0, b""),
        ]
    )
    file = open_bytes(tmp_path, parts.build())
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in file.metadata.items()
    }
    assert plain == {
        "a.u8": 255,
        "a.i8": -1,
        "a.u16": 65535,
        "a.i16": -1,
        "a.u64": 2**64 - 1,
        "a.i64": -1,
        "a.f64": 0.1,
        "a.no": False,
        "a.text": "\u0120 \u4e16",
        "a.bools": [False, True],
        "a.strings": ["x", ""],
        "a.none": [],
        "a.no_strings": [],
    }
    assert file.metadata["a.no"] is False
    assert file.metadata["a.bools"].dtype == np.bool_
    kinds = file.metadata_types
    assert list(kinds) == list(plain)
    assert kinds["a.i16"] == "i16" and kinds["a.text"] == "str"
    assert kinds["a.bools"] == "arr[bool]" and kinds["a.no_strings"] == "arr[str]"


def test_nested_arrays(tmp_path: Path) -> None:
    inner = u32(U8) + u64(2) + b"\1\2"
    words = u32(STR) + u64(1) + string("w")
    middle = u32(ARR) + u64(2) + inner + words
    parts = Parts(keys=[key("n", ARR, u32(ARR) + u64(3) + inner + middle + inner)])
    value = open_bytes(tmp_path, parts.build()).metadata["n"]
    assert value[0].tolist() == [1, 2]
    assert value[1][0].tolist() == [1, 2] and value[1][1] == ["w"]
    assert value[2].tolist() == [1, 2]


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    """Token lists of real files hold lone bytes and cut characters."""
    tokens = [b"\xff", b"ok", b"\xe4\xb8", b"a\0b", "\u4e16".encode()]
    parts = Parts(keys=[array_key("t", STR, len(tokens), b"".join(map(string, tokens)))])
    read = open_bytes(tmp_path, parts.build()).metadata["t"]
    assert [token.encode("utf-8", "surrogateescape") for token in read] == tokens
    path = tmp_path / "again.gguf"
    with GGUFWriter(path, metadata={"t": Array("str", read)}, tensors=[]):
        pass
    assert GGUFFile(path).metadata["t"] == read


def test_version_2(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, Parts(version=2).build())
    assert file.version == 2 and len(file.tensors) == 3


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_alignments(tmp_path: Path, alignment: int) -> None:
    parts = Parts(alignment=alignment, tensors=[tensor("a", (4,), 0, alignment)])
    parts.keys.append(key("general.alignment", U32, u32(alignment)))
    parts.data = bytes(alignment) + struct.pack("<4f", 1, 2, 3, 4)
    file = open_bytes(tmp_path, parts.build())
    assert file.alignment == alignment
    assert file.load("a").tolist() == [1, 2, 3, 4]


def test_vocabulary_only(tmp_path: Path) -> None:
    """No tensors: neither padding nor data need follow the header."""
    file = open_bytes(tmp_path, Parts(tensors=[]).header())
    assert file.tensors == {} and file.metadata["tokenizer.ggml.tokens"] == ["a", "bc", ""]


def test_tensors_in_any_order_with_gaps_and_a_tail(tmp_path: Path) -> None:
    parts = Parts(tensors=[tensor("b", (4,), 0, 96), tensor("a", (8,), 0, 0)])
    parts.data = bytes(range(112)) + bytes(999)
    file = open_bytes(tmp_path, parts.build())
    assert list(file.tensors) == ["b", "a"]
    assert file.raw("b")[0, 0] == 96


def test_split_count_of_one_is_a_whole_model(tmp_path: Path) -> None:
    parts = Parts()
    parts.keys.append(key("split.count", U16, b"\1\0"))
    assert len(open_bytes(tmp_path, parts.build()).tensors) == 3


def test_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    """150,000 tokens and 300,000 merges; a generous limit, for busy machines."""
    random_ = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz\u0120\u00e9\u00f1\u6f22"
    words = ["".join(random_.choices(letters, k=random_.randint(1, 14))) for _ in range(150_000)]
    metadata = {
        "general.architecture": Value("str", "llama"),
        "tokenizer.ggml.tokens": Array("str", words),
        "tokenizer.ggml.token_type": Array("i32", np.ones(len(words), np.int32)),
        "tokenizer.ggml.merges": Array("str", [f"{a} {b}" for a in words for b in "xy"]),
    }
    path = tmp_path / "large.gguf"
    specs = [TensorSpec("a", by_name("F32"), (4,))]
    with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
        writer.write("a", np.zeros(16, np.uint8))
    start = time.perf_counter()
    file = GGUFFile(path)
    assert time.perf_counter() - start < 2
    assert file.metadata["tokenizer.ggml.tokens"] == words
