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
from runtime.kernels.cuda.tiles import ROWS, RUNS, STEP, TOKENS, make_put
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


def test_what_the_tensor_cores_are_given() -> None:
    """16 rows and 8 tokens of random bytes, word by word as the lanes take them."""
    rng = np.random.default_rng(7)
    left = rng.integers(-128, 128, (16, STEP), dtype=np.int8)
    right = rng.integers(-128, 128, (8, STEP), dtype=np.int8)
    words, others = np.zeros((16, tensor.WORDS), np.int32), np.zeros((8, tensor.WORDS), np.int32)
    words[:, : STEP // 4], others[:, : STEP // 4] = left.view(np.int32), right.view(np.int32)
    words, others = words.reshape(-1), others.reshape(-1)
    for width, of_rows, of_tokens in (
        (32, tensor.rows_32, tensor.tokens_32),
        (16, tensor.rows_16, tensor.tokens_16),
    ):
        at = [lane // 4 * tensor.WORDS + 8 + lane % 4 for lane in LANES]  # columns from 32 on
        rows = np.array([of_rows(words, place) for place in at], np.int32)
        tokens = np.array([of_tokens(others, place) for place in at], np.int32)
        here = slice(32, 32 + width)
        expected = left[:, here].astype(int) @ right[:, here].astype(int).T
        for lane, made in enumerate(multiply(rows, tokens)):
            row, token = lane // 4, 2 * (lane % 4)
            pairs = [(row, token), (row, token + 1), (row + 8, token), (row + 8, token + 1)]
            assert [int(value) for value in made] == [expected[pair] for pair in pairs]


def test_floats_of_16_bits() -> None:
    """The same words are those of mma.m16n8k16 with .f16, two columns in each."""
    rng = np.random.default_rng(8)
    left = rng.integers(-9, 9, (16, 64)).astype(np.float16)
    right = rng.integers(-9, 9, (8, 64)).astype(np.float16)
    words, others = np.zeros((16, tensor.WORDS), np.int32), np.zeros((8, tensor.WORDS), np.int32)
    words[:, :32], others[:, :32] = left.view(np.int32), right.view(np.int32)
    found_left, found_right = np.zeros((16, 16)), np.zeros((8, 16))
    for lane in LANES:
        group, member = lane >> 2, lane % 4
        at = group * tensor.WORDS + 16 + member  # columns from 32 on
        a = np.array(tensor.rows_32(words.reshape(-1), at), np.int32).view(np.float16)
        b = np.array(tensor.tokens_32(others.reshape(-1), at), np.int32).view(np.float16)
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            found_left[row, member * 2 + (i & 1) + (8 if i >= 4 else 0)] = a[i]
        for i in range(4):
            found_right[group, member * 2 + (i & 1) + (8 if i >= 2 else 0)] = b[i]
    assert np.array_equal(found_left, left[:, 32:48])
    assert np.array_equal(found_right, right[:, 32:48])


def tile(name: str, blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
    """64 rows times 64 tokens as the warps of a block make it, (tokens, rows)."""
    form = BLOCKS[name]
    is_wide = form.per_scale == 32
    of_rows, of_tokens = (
        (tensor.rows_32, tensor.tokens_32) if is_wide else (tensor.rows_16, tensor.tokens_16)
    )
    put = make_put(form, tensor.WORDS)
    k = x.shape[1]
    w, n_blocks = on_gpu(name, blocks, k)
    xq, xd, xs = (np.array(part) for part in zip(*(quantised(row) for row in x), strict=True))
    sums = np.zeros((TOKENS, ROWS), np.float32)
    for start in range(0, k, STEP):
        weights = np.zeros(ROWS * tensor.WORDS, np.int32)
        scales, offsets = np.zeros((2, ROWS * RUNS), np.float32)
        for thread in range(256):
            row, unit = thread // 4, thread % 4
            here = start // 32 + unit
            here = here + row * (k // 32) if here * 32 < k else -1
            put(w, 0, n_blocks, here, row, unit, weights, scales, offsets)
        others = np.zeros((TOKENS, tensor.WORDS), np.int32)
        n_words, n_runs = min(STEP, k - start) // 4, min(STEP, k - start) // 16
        others[:, :n_words] = xq[:, start : start + STEP].view(np.int32)
        d, s = np.zeros((2, TOKENS, RUNS), np.float32)
        d[:, :n_runs] = xd[:, start // 32 : start // 32 + STEP // 32].repeat(2, 1)
        s[:, :n_runs] = xs[:, start // 16 : start // 16 + RUNS]
        for warp in range(8):
            at = [tensor.places(warp, lane) for lane in LANES]
            for run in range(0, RUNS, form.per_scale // 16):
                for m in range(2):
                    rows = np.array(
                        [
                            of_rows(weights, (p[2] + 16 * m) * tensor.WORDS + 4 * run + p[4])
                            for p in at
                        ],
                        np.int32,
                    )
                    for n in range(2):
                        tokens = np.array(
                            [
                                of_tokens(
                                    others.reshape(-1),
                                    (p[3] + 8 * n) * tensor.WORDS + 4 * run + p[4],
                                )
                                for p in at
                            ],
                            np.int32,
                        )
                        made = multiply(rows, tokens)
                        for p, c in zip(at, made, strict=True):
                            row, pair = p[2] + 16 * m, p[5] + 8 * n
                            item = row * RUNS + run
                            c = tensor.scaled(
                                tuple(int(v) for v in c),
                                scales[item],
                                scales[item + 8 * RUNS],
                                d[pair, run],
                                d[pair + 1, run],
                            )
                            if form.has_offset:
                                e = s[:, run] + (s[:, run + 1] if is_wide else np.float32(0))
                                c = tensor.shifted(
                                    c, offsets[item], offsets[item + 8 * RUNS], e[pair], e[pair + 1]
                                )
                            sums[pair, row] += c[0]
                            sums[pair + 1, row] += c[1]
                            sums[pair, row + 8] += c[2]
                            sums[pair + 1, row + 8] += c[3]
    return sums


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_tile_of_a_real_model(name: str, smollm2_gguf: Path) -> None:
    blocks = real_blocks(smollm2_gguf, name, "blk.7.ffn_down.weight", ROWS)[
        :, : by_name(name).row_bytes(256)
    ]
    x = np.random.default_rng(3).normal(size=(TOKENS, 256)).astype(np.float32)
    found = tile(name, blocks, x)
    seen = [(q.reshape(-1, 32) * scales[:, None]).reshape(-1) for q, scales, _ in map(quantised, x)]
    exact = np.array(seen, np.float64) @ dequantise(name, blocks).astype(np.float64).T
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
