"""What the lanes of a warp bring to tensor cores and make of what they get, on real weights.

The functions are those that the kernels are made of, compiled for the CPU; the tensor cores are
NumPy, which puts the lanes' words where the PTX ISA says that they belong.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.quants import by_name

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)

import tests.cuda.cpu_bodies  # noqa: F401 - CPU bodies of the primitives
from runtime.kernels.cuda import tensor_tiles as tensor
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.tiles import (
    ROWS,
    STEP,
    TOKENS,
    fetch_theirs,
    make_fetch,
    make_put,
    make_put_theirs,
)
from tests.cuda.test_lanes import on_gpu, quantised, real_blocks
from tests.kernels.blocks import dequantise

LANES = np.arange(32)


def multiply(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """mma.m16n8k16 or mma.m16n8k32 of int8, of all lanes: (32, 2 or 4) and (32, 1 or 2) words to
    (32, 4) results (PTX ISA, matrix fragments; a and b of a lane are its bytes, low to high)."""
    a, b = rows.view(np.int8), tokens.view(np.int8)
    group, member = LANES[:, None] >> 2, LANES[:, None] % 4
    i, j = np.arange(a.shape[1])[None, :], np.arange(b.shape[1])[None, :]
    left = np.zeros((16, 2 * a.shape[1]), np.int64)
    right = np.zeros((4 * b.shape[1], 8), np.int64)
    low_rows = (i < 4) | ((i >= 8) & (i < 12))
    columns = member * 4 + (i & 3) + np.where(i < 8, 0, 16)
    left[np.where(low_rows, group, group + 8), columns] = a
    right[member * 4 + (j & 3) + np.where(j < 4, 0, 16), np.broadcast_to(group, b.shape)] = b
    made = left @ right
    c = np.arange(4)[None, :]
    return made[np.where(c < 2, group, group + 8), member * 2 + (c & 1)]


def load_words(words: np.ndarray, at: list[int]) -> np.ndarray:
    """ldmatrix .x4 of all lanes, (32, 4): 8 rows of 16 bytes each, the lanes' words of them."""
    begin = np.array(at).reshape(4, 8)[:, LANES // 4]  # (matrix, lane)
    return words[begin + LANES % 4].T


def in_rows(values: np.ndarray) -> np.ndarray:
    """Rows as they lie in shared memory."""
    words = np.zeros((len(values), tensor.WORDS), np.int32)
    stored = np.ascontiguousarray(values).view(np.int32)
    words[:, : stored.shape[1]] = stored
    return words.reshape(-1)


def test_what_the_tensor_cores_are_given() -> None:
    """16 rows and 16 tokens of random bytes, word by word as the lanes take them."""
    rng = np.random.default_rng(7)
    left = rng.integers(-128, 128, (16, STEP), dtype=np.int8)
    right = rng.integers(-128, 128, (16, STEP), dtype=np.int8)
    rows = load_words(in_rows(left), [tensor.row_at(0, lane) + 8 for lane in LANES])
    tokens = load_words(in_rows(right), [tensor.token_at(0, lane) + 8 for lane in LANES])
    for width, pieces in ((32, tensor.wide), (16, tensor.narrow)):
        for each in range(32 // width):
            parts = [pieces(tuple(a), tuple(b), each) for a, b in zip(rows, tokens, strict=True)]
            mine, near, far = (np.array(part, np.int32) for part in zip(*parts, strict=True))
            here = slice(32 + width * each, 32 + width * (each + 1))
            expected = left[:, here].astype(int) @ right[:, here].astype(int).T
            for theirs, first in ((near, 0), (far, 8)):
                for lane, made in enumerate(multiply(mine, theirs)):
                    row, token = lane // 4, first + 2 * (lane % 4)
                    assert list(made[:2]) == list(expected[row, token : token + 2])
                    assert list(made[2:]) == list(expected[row + 8, token : token + 2])


def test_floats_of_16_bits() -> None:
    """The same words are those of mma.m16n8k16 with .f16, two columns in each."""
    rng = np.random.default_rng(8)
    left = rng.integers(-9, 9, (16, 64)).astype(np.float16)
    right = rng.integers(-9, 9, (16, 64)).astype(np.float16)
    rows = load_words(in_rows(left), [tensor.row_at(0, lane) + 16 for lane in LANES])
    tokens = load_words(in_rows(right), [tensor.token_at(0, lane) + 16 for lane in LANES])
    found_left, found_right = np.zeros((16, 16)), np.zeros((8, 16))
    for first in (0, 8):
        for lane in LANES:
            group, member = lane >> 2, lane % 4
            a = rows[lane].view(np.float16)
            b = tokens[lane, first // 4 : first // 4 + 2].view(np.float16)
            for i in range(8):
                row = group if i < 2 or 4 <= i < 6 else group + 8
                found_left[row, member * 2 + (i & 1) + (8 if i >= 4 else 0)] = a[i]
            for i in range(4):
                found_right[group, member * 2 + (i & 1) + (8 if i >= 2 else 0)] = b[i]
        assert np.array_equal(found_left, left[:, 32:48])
        assert np.array_equal(found_right, right[first : first + 8, 32:48])


def tile(name: str, blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
    """64 rows times 64 tokens as the warps of a block make it, (tokens, rows)."""
    form, k = BLOCKS[name], x.shape[1]
    n_each = 32 // form.per_scale
    pieces = tensor.wide if n_each == 1 else tensor.narrow
    fetch, put = make_fetch(form), make_put(form, tensor.WORDS)
    put_theirs = make_put_theirs(form, tensor.WORDS)
    w, n_blocks = on_gpu(name, blocks, k)
    activations = (np.concatenate(part) for part in zip(*map(quantised, x), strict=True))
    xq, xd, xs = activations
    sums = np.zeros((TOKENS, ROWS), np.float32)
    for start in range(0, k, STEP):
        weights, others = np.zeros((2, ROWS * tensor.WORDS), np.int32)
        scales, offsets, their_sums = np.zeros((3, ROWS * n_each * STEP // 32), np.float32)
        their_scales = np.zeros(TOKENS * STEP // 32, np.float32)
        for thread in range(256):
            line, unit = thread // 4, thread % 4
            raw, part = fetch(w, 0, n_blocks, line, k, start, unit)
            put(raw, part, line, unit, weights, scales, offsets)
            q, floats = fetch_theirs(xq, xd, xs, line * k, k, start, unit)
            put_theirs(q, floats, line, unit, others, their_scales, their_sums)
        for warp in range(8):
            at = [tensor.places(warp, lane) for lane in LANES]
            rows_at = [tensor.row_at(at[0][0], lane) for lane in LANES]
            tokens_at = [tensor.token_at(at[0][1], lane) for lane in LANES]
            for columns in range(STEP // 32):
                theirs = load_words(others, [place + 8 * columns for place in tokens_at])
                for m in range(2):
                    mine = load_words(
                        weights, [p + 16 * m * tensor.WORDS + 8 * columns for p in rows_at]
                    )
                    for each in range(n_each):
                        parts = [
                            pieces(tuple(a), tuple(b), each)
                            for a, b in zip(mine, theirs, strict=True)
                        ]
                        rows, *sides = (
                            np.array(part, np.int32) for part in zip(*parts, strict=True)
                        )
                        group = columns * n_each + each
                        for side, tokens in enumerate(sides):
                            made = multiply(rows, tokens)
                            for (_, _, row, pair), c in zip(at, made, strict=True):
                                row, pair = row + 16 * m, pair + 8 * side
                                item, token = group * ROWS + row, group * TOKENS + pair
                                d = columns * TOKENS + pair
                                here = [pair, pair, pair + 1, pair + 1], [row, row + 8] * 2
                                one, two, three, four = tensor.added(
                                    (np.float32(0),) * 4,
                                    tuple(int(v) for v in c),
                                    *(scales[item], scales[item + 8]),
                                    *(their_scales[d], their_scales[d + 1]),
                                )
                                if form.has_offset:
                                    one, two, three, four = tensor.shifted(
                                        (one, two, three, four),
                                        *(offsets[item], offsets[item + 8]),
                                        *(their_sums[token], their_sums[token + 1]),
                                    )
                                sums[here] += one, three, two, four
    return sums


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("n_columns", [256, 160])
def test_a_tile_of_a_real_model(name: str, n_columns: int, smollm2_gguf: Path) -> None:
    """Also with a last step that is not whole."""
    if n_columns % by_name(name).block_size:
        n_columns = 512
    blocks = real_blocks(smollm2_gguf, name, "blk.7.ffn_down.weight", ROWS)[
        :, : by_name(name).row_bytes(n_columns)
    ]
    x = np.random.default_rng(3).normal(size=(TOKENS, n_columns)).astype(np.float32)
    found = tile(name, blocks, x)
    seen = [(q.reshape(-1, 32) * scales[:, None]).reshape(-1) for q, scales, _ in map(quantised, x)]
    exact = np.array(seen, np.float64) @ dequantise(name, blocks).astype(np.float64).T
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
