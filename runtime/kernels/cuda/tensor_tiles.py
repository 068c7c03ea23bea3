"""The products of tiles.py on tensor cores: int8 in, int32 out, a warp for 32 rows and 16 tokens.

A block makes the same 64 x 64 results of the same tiles. Columns are multiplied 32 at a time where
32 weights share a scale, else 16 (tensor_cores.py); then a lane scales its products. Weights of
16 bits are multiplied as they are, with activations rounded to the same format: rows must begin
where 16 bytes can be loaded.
"""

from typing import Any

import numpy as np
from numba import cuda, types
from numpy import float32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.primitives import as_float, load16, two_bfloats, two_halves
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.tensor_cores import MULTIPLY, MULTIPLY_ADD
from runtime.kernels.cuda.tiles import (
    ALL_RUNS,
    ROWS,
    RUNS,
    STEP,
    THREADS,
    TOKENS,
    Tiles,
    make_loader,
    make_tiles,
)
from runtime.kernels.cuda.unpacking import Unpacking

WORDS = STEP // 4 + 4  # of a row in shared memory: the lanes of a fragment are in 32 banks
ALL_WORDS = ROWS * WORDS
GENERATIONS = ("ampere", "turing")
HALVES = STEP // 2  # columns of 16 bits at a time
LARGEST_HALF = np.float32(65504)


@helper
def rows_32(words, at):
    """A lane's words of 16 rows and 32 columns."""
    return words[at], words[at + 8 * WORDS], words[at + 4], words[at + 8 * WORDS + 4]


@helper
def tokens_32(words, at):
    """A lane's words of 8 tokens and 32 columns."""
    return words[at], words[at + 4]


@helper
def rows_16(words, at):
    return words[at], words[at + 8 * WORDS]


@helper
def tokens_16(words, at):
    return (words[at],)


@helper
def places(warp, lane):
    """Where a warp's rows and tokens begin; a lane's row, token and word in fragments; the first
    token of its products."""
    first_row, first_token = 32 * (warp % 2), 16 * (warp // 2)
    group, member = lane // 4, lane % 4
    return (
        first_row,
        first_token,
        first_row + group,
        first_token + group,
        member,
        first_token + 2 * member,
    )


@helper
def scaled(c, scale, other, d, e):
    """Four products, each times the scales of its row and of its token."""
    return (
        float32(c[0]) * (scale * d),
        float32(c[1]) * (scale * e),
        float32(c[2]) * (other * d),
        float32(c[3]) * (other * e),
    )


@helper
def shifted(c, offset, other, d, e):
    """The same with offsets of rows times sums of tokens added."""
    return c[0] + offset * d, c[1] + offset * e, c[2] + other * d, c[3] + other * e


def _tensor_tile(unpacking: Unpacking, generation: str) -> Any:
    has_offset = unpacking.has_offset
    is_wide = unpacking.per_scale == 32
    multiply = MULTIPLY[generation, unpacking.per_scale]
    rows_of, tokens_of = (rows_32, tokens_32) if is_wide else (rows_16, tokens_16)
    runs_at_once = unpacking.per_scale // 16
    load = make_loader(unpacking, WORDS)

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32)
        scales = cuda.shared.array(ALL_RUNS, types.float32)
        offsets = cuda.shared.array(ALL_RUNS, types.float32)
        others = cuda.shared.array(ALL_WORDS, types.int32)
        their_scales = cuda.shared.array(ALL_RUNS, types.float32)
        their_sums = cuda.shared.array(ALL_RUNS, types.float32)
        sums = cuda.local.array((4, 4), types.float32)  # [rows + 8 i][tokens], as c of `scaled`
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        first_row, first_token, row, token, column, pair = places(warp, lane)
        is_needed = cuda.blockIdx.x * ROWS + first_row < n_rows and y_at[first_token] >= 0
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        for start in range(0, k, STEP):
            load(
                w,
                base,
                n,
                n_rows,
                k,
                xq,
                xd,
                xs,
                x_at,
                start,
                weights,
                scales,
                offsets,
                others,
                their_scales,
                their_sums,
            )
            cuda.syncthreads()
            if is_needed:
                for run in range(0, RUNS, runs_at_once):
                    at = token * WORDS + 4 * run + column
                    near, far = tokens_of(others, at), tokens_of(others, at + 8 * WORDS)
                    for m in range(2):
                        a = rows_of(weights, (row + 16 * m) * WORDS + 4 * run + column)
                        at = (row + 16 * m) * RUNS + run
                        scale, other = scales[at], scales[at + 8 * RUNS]
                        if has_offset:
                            offset, other_offset = offsets[at], offsets[at + 8 * RUNS]
                        for side in range(2):
                            c = multiply(a, near if side == 0 else far, lane)
                            at = (pair + 8 * side) * RUNS + run
                            d, e = their_scales[at], their_scales[at + RUNS]
                            c = scaled(c, scale, other, d, e)
                            if has_offset:
                                d, e = their_sums[at], their_sums[at + RUNS]
                                if is_wide:
                                    d += their_sums[at + 1]
                                    e += their_sums[at + RUNS + 1]
                                c = shifted(c, offset, other_offset, d, e)
                            sums[2 * m, 2 * side] += c[0]
                            sums[2 * m, 2 * side + 1] += c[1]
                            sums[2 * m + 1, 2 * side] += c[2]
                            sums[2 * m + 1, 2 * side + 1] += c[3]
            cuda.syncthreads()
        store(sums, y, y_at, n_rows, row, pair)

    return tile


@helper
def packed_halves(low, high):
    """Two activations as float16; what is too large becomes the largest."""
    low = max(min(low, LARGEST_HALF), -LARGEST_HALF)
    high = max(min(high, LARGEST_HALF), -LARGEST_HALF)
    return two_halves(low, high)


@helper
def packed_bfloats(low, high):
    return two_bfloats(low, high)


def _half_tile(name: str, packed: Any) -> Any:
    multiply_add = MULTIPLY_ADD[name]

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32)
        others = cuda.shared.array(ALL_WORDS, types.int32)
        sums = cuda.local.array((4, 4), types.float32)
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        first_row, first_token, row, token, column, pair = places(warp, lane)
        block_row = cuda.blockIdx.x * ROWS
        is_needed = block_row + first_row < n_rows and y_at[first_token] >= 0
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        for start in range(0, k, HALVES):
            # Eight columns at a time, of a row and of a token.
            for item in range(cuda.threadIdx.x, ROWS * HALVES // 8, THREADS):
                line, here = item // (HALVES // 8), start + 8 * (item % (HALVES // 8))
                at = line * WORDS + 4 * (item % (HALVES // 8))
                a, b, c, d = 0, 0, 0, 0
                if block_row + line < n_rows and here < k:
                    a, b, c, d = load16(w, base + 2 * ((block_row + line) * k + here))
                weights[at], weights[at + 1] = a, b
                weights[at + 2], weights[at + 3] = c, d
                a, b, c, d = 0, 0, 0, 0
                if x_at[line] >= 0 and here < k:
                    e, f, g, h = load16(xq, 4 * (x_at[line] + here))
                    a, b = packed(as_float(e), as_float(f)), packed(as_float(g), as_float(h))
                    e, f, g, h = load16(xq, 4 * (x_at[line] + here) + 16)
                    c, d = packed(as_float(e), as_float(f)), packed(as_float(g), as_float(h))
                others[at], others[at + 1] = a, b
                others[at + 2], others[at + 3] = c, d
            cuda.syncthreads()
            if is_needed:
                for at in range(column, HALVES // 2, 8):
                    near = tokens_32(others, token * WORDS + at)
                    far = tokens_32(others, (token + 8) * WORDS + at)
                    for m in range(2):
                        mine = rows_32(weights, (row + 16 * m) * WORDS + at)
                        for side in range(2):
                            products = (
                                sums[2 * m, 2 * side],
                                sums[2 * m, 2 * side + 1],
                                sums[2 * m + 1, 2 * side],
                                sums[2 * m + 1, 2 * side + 1],
                            )
                            theirs = near if side == 0 else far
                            products = multiply_add(mine, theirs, products, lane)
                            sums[2 * m, 2 * side] = products[0]
                            sums[2 * m, 2 * side + 1] = products[1]
                            sums[2 * m + 1, 2 * side] = products[2]
                            sums[2 * m + 1, 2 * side + 1] = products[3]
            cuda.syncthreads()
        store(sums, y, y_at, n_rows, row, pair)

    return tile


@cuda.jit(device=True)
def store(sums, y, y_at, n_rows, row, pair):
    """What a lane has of 32 rows and 16 tokens."""
    for i in range(4):
        target = cuda.blockIdx.x * ROWS + row + 8 * i
        for j in range(4):
            at = y_at[pair + 8 * (j // 2) + j % 2]
            if target < n_rows and at >= 0:
                y[at + target] = sums[i, j]


def _make(generation: str) -> dict[str, Tiles]:
    return {
        name: make_tiles(f"{name}_{generation}", _tensor_tile(form, generation), form.block_bytes)
        for name, form in BLOCKS.items()
    }


TENSOR_TILES = {generation: _make(generation) for generation in GENERATIONS}
for _name, _packed in (("F16", packed_halves), ("BF16", packed_bfloats)):
    _tiles = make_tiles(f"{_name}_ampere", _half_tile(_name, _packed), 2)
    TENSOR_TILES["ampere"][_name] = _tiles
assert ROWS == TOKENS == 64  # eight warps: two of rows, four of tokens
