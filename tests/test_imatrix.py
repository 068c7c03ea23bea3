"""Importance matrix files of both forms: what is read from them, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import GGUFError
from gguf_tools.imatrix import ImportanceMatrix, read_importance_matrix
from tests import gguf_bytes as gb

DENSE = np.array([1, 4, 9, 16], np.float32)
EXPERTS = np.arange(12, dtype=np.float32).reshape(3, 4) + 1


def old_entry(name: str | bytes, n_calls: int, values: np.ndarray) -> bytes:
    text = name.encode() if isinstance(name, str) else name
    data = np.asarray(values, "<f4").tobytes()
    return struct.pack("<i", len(text)) + text + struct.pack("<ii", n_calls, len(data) // 4) + data


def old_file(*entries: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(entries) + tail


def new_file(tensors: dict[str, np.ndarray], *, keys: list[bytes] | None = None) -> bytes:
    """A GGUF file of float32 tensors, as llama-imatrix writes it."""
    if keys is None:
        keys = [
            gb.array_key("imatrix.datasets", gb.STR, 1, gb.string("prose.txt")),
            gb.key("imatrix.chunk_count", gb.U32, gb.u32(7)),
            gb.key("imatrix.chunk_size", gb.U32, gb.u32(512)),
        ]
    keys = [gb.text_key("general.type", "imatrix"), *keys]
    infos, data = b"", b""
    for name, values in tensors.items():
        infos += gb.tensor(name, values.shape[::-1], 0, len(data))
        raw = np.asarray(values, "<f4").tobytes()
        data += raw + bytes(-len(raw) % 32)
    head = b"GGUF" + gb.u32(3) + gb.u64(len(tensors)) + gb.u64(len(keys)) + b"".join(keys) + infos
    return head + bytes(-len(head) % 32) + data


def usual() -> dict[str, np.ndarray]:
    return {
        "a.weight.in_sum2": DENSE[None],
        "a.weight.counts": np.array([[2]], np.float32),
        "e.weight.in_sum2": EXPERTS,
        "e.weight.counts": np.array([[4], [0], [1]], np.float32),
    }


def read(folder: Path, data: bytes) -> ImportanceMatrix:
    path = folder / "matrix"
    path.write_bytes(data)
    return read_importance_matrix(path)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(GGUFError) as caught:
        read(folder, data)
    text = str(caught.value)
    assert "\n" not in text and "matrix" in text
    return text


def values(matrix: ImportanceMatrix, name: str, shape: tuple[int, ...]) -> list[list[float]]:
    found = matrix.find(name, shape)
    assert found is not None
    n_matrices = int(np.prod(shape[:-2]))
    return [found.of_matrix(index).tolist() for index in range(n_matrices)]


def test_gguf(tmp_path: Path) -> None:
    matrix = read(tmp_path, new_file(usual()))
    assert (matrix.dataset, matrix.n_chunks) == ("prose.txt", 7)
    assert list(matrix.entries) == ["a.weight", "e.weight"]
    assert values(matrix, "a.weight", (9, 4)) == [[0.5, 2, 4.5, 8]]
    assert values(matrix, "e.weight", (3, 9, 4)) == [
        [0.25, 0.5, 0.75, 1],
        [1, 1, 1, 1],  # never reached
        [9, 10, 11, 12],
    ]
    experts = matrix.find("e.weight", (3, 9, 4))
    assert experts is not None and experts.without_counts == (1,)
    assert matrix.find("b.weight", (9, 4)) is None


def test_old_form(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 12, 5) + b"prose"
    data = old_file(old_entry("a.weight", 2, DENSE), old_entry("e.weight", 0, EXPERTS), tail=tail)
    matrix = read(tmp_path, data)
    assert (matrix.dataset, matrix.n_chunks) == ("prose", 12)
    assert values(matrix, "a.weight", (9, 4)) == [[0.5, 2, 4.5, 8]]
    assert values(matrix, "e.weight", (3, 9, 4)) == EXPERTS.tolist()  # as they are without calls


def test_old_form_without_its_end(tmp_path: Path) -> None:
    matrix = read(tmp_path, old_file(old_entry("a.weight", 1, DENSE)))
    assert (matrix.dataset, matrix.n_chunks) == ("", 0)
    assert "quantize.imatrix.chunks_count" not in matrix.metadata()
    assert "quantize.imatrix.dataset" not in matrix.metadata()
    matrix = read(tmp_path, old_file(old_entry("a.weight", 1, DENSE), tail=struct.pack("<i", 3)))
    assert (matrix.dataset, matrix.n_chunks) == ("", 3)


def test_metadata(tmp_path: Path) -> None:
    matrix = read(tmp_path, new_file(usual()))
    entries = {key: value.value for key, value in matrix.metadata().items()}  # type: ignore[union-attr]
    path = str(tmp_path / "matrix")
    assert entries == {
        "quantize.imatrix.file": path[:127],
        "quantize.imatrix.dataset": "prose.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 7,
    }


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    tensors = usual()
    tensors["token_embd.weight.in_sum2"] = DENSE[None]
    tensors["token_embd.weight.counts"] = np.ones((1, 1), np.float32)
    matrix = read(tmp_path, new_file(tensors))
    with pytest.raises(GGUFError, match=r"expected 8 numbers for tensor a.weight .* of another"):
        matrix.find("a.weight", (9, 8))
    with pytest.raises(GGUFError, match=r"expected 24 numbers for tensor e.weight"):
        matrix.find("e.weight", (6, 9, 4))
    assert matrix.find("token_embd.weight", (9, 8)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.weight.counts": None}, "expected sums and counts for tensor a.weight"),
        ({"a.weight.in_sum2": None}, "expected sums and counts for tensor a.weight"),
        ({"e.weight.counts": np.ones((5, 1))}, "found 12 sums and 5 counts"),
        ({"a.weight.in_sum2": np.array([[1, np.nan, 2, 3]])}, "found nan at 1"),
        ({"a.weight.in_sum2": np.array([[1, 2, np.inf, 3]])}, "found inf at 2"),
        ({"a.weight.in_sum2": np.array([[1, 2, 3, -4]])}, "found -4 at 3"),
        ({"e.weight.counts": np.array([[1], [-1], [1]])}, "found -1 at 1"),
    ],
)
def test_gguf_that_is_wrong(
    tmp_path: Path, change: dict[str, np.ndarray | None], words: str
) -> None:
    tensors = {**usual(), **change}
    kept = {name: data for name, data in tensors.items() if data is not None}
    assert words in refusal(tmp_path, new_file(kept))


def test_gguf_that_is_none(tmp_path: Path) -> None:
    assert "a GGUF file without them" in refusal(tmp_path, new_file(usual(), keys=[]))
    keys = [
        gb.text_key("imatrix.datasets", "no list"),
        gb.key("imatrix.chunk_count", gb.I32, gb.u32(1)),
        gb.key("imatrix.chunk_size", gb.U32, gb.u32(1)),
    ]
    assert "chunk_count: expected a u32" in refusal(tmp_path, new_file(usual(), keys=keys))
    assert "no entries" in refusal(tmp_path, new_file({"x": DENSE}))


def test_old_form_cut_anywhere(tmp_path: Path) -> None:
    """Every shorter file is refused, or is a whole one of an older kind."""
    tail = struct.pack("<ii", 12, 5) + b"prose"
    data = old_file(old_entry("a.weight", 2, DENSE), old_entry("e.weight", 3, EXPERTS), tail=tail)
    whole = {len(data) - len(tail), len(data) - len(tail) + 4}
    for n in range(len(data)):
        if n in whole:
            read(tmp_path, data[:n])
        else:
            refusal(tmp_path, data[:n])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "found 0 bytes"),
        (b"abc", "found 3 bytes"),
        (struct.pack("<i", 0), "the number of entries, 1 to"),
        (struct.pack("<i", -5), "found -5"),
        (struct.pack("<i", 2**31 - 1), "found 2,147,483,647"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(64), "the length of the name"),
        (struct.pack("<ii", 1, -1) + bytes(64), "found -1"),
        (struct.pack("<ii", 1, 500) + bytes(64), "500 bytes, found 64 up to the end"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**30) + bytes(64), "the number of values"),
        (old_file(old_entry("a", 1, DENSE), old_entry("a", 1, DENSE)), "one entry for tensor a"),
        (old_file(old_entry("a", 1, DENSE * np.nan)), "found nan at 0"),
        (old_file(old_entry("a", 1, -DENSE)), "found -1 at 0"),
        (old_file(old_entry(b"\x1b[2J", 1, -DENSE)), r"tensor \x1b[2J"),
        (old_file(old_entry("a", 1, DENSE), tail=struct.pack("<ii", 1, 1) + b"xy"), "1 bytes more"),
        (old_file(old_entry("a", 1, DENSE), tail=struct.pack("<ii", 1, -1)), "found -1"),
    ],
)
def test_old_form_that_is_wrong(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(tmp_path, data)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(GGUFError, match=str(path)):
            read_importance_matrix(path)
