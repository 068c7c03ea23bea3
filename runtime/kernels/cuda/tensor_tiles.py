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
from runtime.kernels.cuda.primitives import as_float, load16, place, two_bfloats, two_halves
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.tensor_cores import ALIGNMENT, MULTIPLY, MULTIPLY_ADD, load_words
from runtime.kernels.cuda.tiles import (
    ALL_GROUPS,
    ROWS,
    STEP,
    TOKENS,
    Tiles,
    fetch_theirs,
    make_fetch,
    make_put,
    make_put_theirs,
    make_tiles,
    source,
)
from runtime.kernels.cuda.unpacking import Unpacking

WORDS = STEP // 4 + 4  # of a row in shared memory: 8 rows of 16 bytes are in 32 banks
ALL_WORDS = ROWS * WORDS
GENERATIONS = ("ampere", "turing")
HALVES = STEP // 2  # columns of 16 bits at a time
LARGEST_HALF = np.float32(65504)


@helper
def row_at(first, lane):
    """Where a lane has load_words begin: 16 rows from `first` on, 32 bytes, as (row, row + 8) and
    the same of the next 16 bytes."""
    return (first + lane % 16) * WORDS + 4 * (lane // 16)


@helper
def token_at(first, lane):
    """The same of 16 tokens: (token, its next 16 bytes) and the same of token + 8."""
    return (first + lane // 16 * 8 + lane % 8) * WORDS + 4 * (lane // 8 % 2)


@helper
def places(warp, lane):
    """Where a warp's rows and tokens begin; the first row and token of a lane's products."""
    first_row, first_token = 32 * (warp % 2), 16 * (warp // 2)
    return first_row, first_token, first_row + lane // 4, first_token + 2 * (lane % 4)


@helper
def wide(a, b, each):
    """Of load_words' rows and tokens: 16 rows, 8 tokens and 8 more, of 32 columns."""
    return a, (b[0], b[1]), (b[2], b[3])


@helper
def narrow(a, b, each):
    """The same of the first 16 columns, or the others."""
    if each == 0:
        return (a[0], a[1]), (b[0],), (b[2],)
    return (a[2], a[3]), (b[1],), (b[3],)


@helper
def added(sums, c, scale, other, d, e):
    """Four sums, plus products times the scales of their rows and of their tokens."""
    return (
        sums[0] + float32(c[0]) * (scale * d),
        sums[1] + float32(c[1]) * (scale * e),
        sums[2] + float32(c[2]) * (other * d),
        sums[3] + float32(c[3]) * (other * e),
    )


@helper
def shifted(sums, offset, other, d, e):
    """Four sums, plus offsets of their rows times sums of their tokens."""
    return (
        sums[0] + offset * d,
        sums[1] + offset * e,
        sums[2] + other * d,
        sums[3] + other * e,
    )


def _tensor_tile(form: Unpacking, generation: str) -> Any:
    has_offset = form.has_offset
    multiply = MULTIPLY[generation, form.per_scale]
    fetch, put, put_theirs = make_fetch(form), make_put(form, WORDS), make_put_theirs(form, WORDS)
    n_each, pieces = 32 // form.per_scale, wide if form.per_scale == 32 else narrow
    all_groups = ROWS * n_each * (STEP // 32)

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32, alignment=ALIGNMENT)
        scales = cuda.shared.array(all_groups, types.float32)
        offsets = cuda.shared.array(all_groups, types.float32)
        others = cuda.shared.array(ALL_WORDS, types.int32, alignment=ALIGNMENT)
        their_scales = cuda.shared.array(ALL_GROUPS, types.float32)
        their_sums = cuda.shared.array(all_groups, types.float32)
        sums = cuda.local.array((4, 4), types.float32)  # [rows + 8 i][tokens], as in `added`
        thread = cuda.threadIdx.x
        line, unit = thread // 4, thread % 4
        warp, lane = thread // 32, thread % 32
        first_row, first_token, row, pair = places(warp, lane)
        is_needed = cuda.blockIdx.x * ROWS + first_row < n_rows and y_at[place(first_token)] >= 0
        my_row, x = source(n_rows, x_at)
        rows_at, tokens_at = row_at(first_row, lane), token_at(first_token, lane)
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        raw, part = fetch(w, base, n, my_row, k, 0, unit)
        q, floats = fetch_theirs(xq, xd, xs, x, k, 0, unit)
        for start in range(0, k, STEP):
            put(raw, part, line, unit, weights, scales, offsets)
            put_theirs(q, floats, line, unit, others, their_scales, their_sums)
            cuda.syncthreads()
            # What the next step takes is on its way while this one is computed.
            raw, part = fetch(w, base, n, my_row, k, start + STEP, unit)
            q, floats = fetch_theirs(xq, xd, xs, x, k, start + STEP, unit)
            if is_needed:
                for columns in range(STEP // 32):
                    b = load_words(others, tokens_at + 8 * columns, lane)
                    for m in range(2):
                        at = rows_at + 16 * m * WORDS + 8 * columns
                        a = load_words(weights, at, lane)
                        for each in range(n_each):
                            group = columns * n_each + each
                            at = group * ROWS + row + 16 * m
                            scale, other = scales[place(at)], scales[place(at + 8)]
                            if has_offset:
                                offset, other_offset = offsets[place(at)], offsets[place(at + 8)]
                            mine, near, far = pieces(a, b, each)
                            for side in range(2):
                                c = multiply(mine, near if side == 0 else far, lane)
                                made = (
                                    sums[2 * m, 2 * side],
                                    sums[2 * m, 2 * side + 1],
                                    sums[2 * m + 1, 2 * side],
                                    sums[2 * m + 1, 2 * side + 1],
                                )
                                if has_offset:
                                    at = group * TOKENS + pair + 8 * side
                                    d, e = their_sums[place(at)], their_sums[place(at + 1)]
                                    made = shifted(made, offset, other_offset, d, e)
                                at = columns * TOKENS + pair + 8 * side
                                d, e = their_scales[place(at)], their_scales[place(at + 1)]
                                made = added(made, c, scale, other, d, e)
                                sums[2 * m, 2 * side] = made[0]
                                sums[2 * m, 2 * side + 1] = made[1]
                                sums[2 * m + 1, 2 * side] = made[2]
                                sums[2 * m + 1, 2 * side + 1] = made[3]
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


@helper
def fetch_halves(w, at, column, k):
    """Sixteen columns of a row that begins at byte `at`; zeros behind the last."""
    a, b = (0, 0, 0, 0), (0, 0, 0, 0)
    if column < k:
        a = load16(w, at + 2 * column)
    if column + 8 < k:
        b = load16(w, at + 2 * column + 16)
    return (*a, *b)


def _make_fetch_theirs(packed: Any) -> Any:
    @helper
    def eight(x, at):
        a, b, c, d = load16(x, 4 * at)
        e, f, g, h = load16(x, 4 * at + 16)
        return (
            packed(as_float(a), as_float(b)),
            packed(as_float(c), as_float(d)),
            packed(as_float(e), as_float(f)),
            packed(as_float(g), as_float(h)),
        )

    @helper
    def fetch(x, at, column, k):
        """Sixteen activations of a token that begins at number `at`, rounded to 16 bits."""
        a, b = (0, 0, 0, 0), (0, 0, 0, 0)
        if column < k:
            a = eight(x, at + column)
        if column + 8 < k:
            b = eight(x, at + column + 8)
        return (*a, *b)

    return fetch


@helper
def put_words(q, words, line, unit):
    """Eight words to a row of shared memory."""
    for i in range(8):
        words[place(line * WORDS + 8 * unit + i)] = q[i]


def _half_tile(name: str, packed: Any) -> Any:
    multiply_add, fetch_theirs = MULTIPLY_ADD[name], _make_fetch_theirs(packed)

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32, alignment=ALIGNMENT)
        others = cuda.shared.array(ALL_WORDS, types.int32, alignment=ALIGNMENT)
        sums = cuda.local.array((4, 4), types.float32)
        thread = cuda.threadIdx.x
        line, unit = thread // 4, thread % 4
        warp, lane = thread // 32, thread % 32
        first_row, first_token, row, pair = places(warp, lane)
        is_needed = cuda.blockIdx.x * ROWS + first_row < n_rows and y_at[place(first_token)] >= 0
        my_row, x = source(n_rows, x_at)
        w_at = base + 2 * my_row * k
        rows_at, tokens_at = row_at(first_row, lane), token_at(first_token, lane)
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        column = 16 * unit
        mine, theirs = fetch_halves(w, w_at, column, k), fetch_theirs(xq, x, column, k)
        for start in range(0, k, HALVES):
            put_words(mine, weights, line, unit)
            put_words(theirs, others, line, unit)
            cuda.syncthreads()
            column = start + HALVES + 16 * unit
            mine, theirs = fetch_halves(w, w_at, column, k), fetch_theirs(xq, x, column, k)
            if is_needed:
                for columns in range(HALVES // 16):
                    b = load_words(others, tokens_at + 8 * columns, lane)
                    for m in range(2):
                        at = rows_at + 16 * m * WORDS + 8 * columns
                        a = load_words(weights, at, lane)
                        for side in range(2):
                            products = (
                                sums[2 * m, 2 * side],
                                sums[2 * m, 2 * side + 1],
                                sums[2 * m + 1, 2 * side],
                                sums[2 * m + 1, 2 * side + 1],
                            )
                            tokens = (b[0], b[1]) if side == 0 else (b[2], b[3])
                            products = multiply_add(a, tokens, products, lane)
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
            at = y_at[place(pair + 8 * (j // 2) + j % 2)]
            if target < n_rows and at >= 0:
                y[place(at + target)] = sums[i, j]


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
