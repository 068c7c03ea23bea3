"""A matrix times many tokens: blocks of threads that share tiles of weights and activations.

A block makes 64 rows of the result for 64 tokens, each of its 16 x 16 threads 4 x 4 of them. Blocks
of whole numbers are unpacked to int8 with a scale and an offset for each 16 or 32 weights, and the
next ones are on their way meanwhile; float formats become float32. `x_at` and `y_at` say where a
token's activations begin and where its result goes, so that a mixture's slots, sorted by expert, go
the same way as the tokens of a prompt.
"""

from dataclasses import dataclass
from typing import Any

from numba import cuda, types
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import (
    as_float,
    dp4a,
    half,
    load2,
    load4,
    load8,
    load16,
    place,
)
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.unpacking import Unpacking, first_run

ROWS = TOKENS = 64
THREADS = 256
STEP = 128  # columns of whole numbers at a time
WORDS = STEP // 4 + 1  # of a row in shared memory; an odd number keeps its banks apart
RUNS = STEP // 16
ALL_WORDS, ALL_GROUPS = ROWS * WORDS, ROWS * (STEP // 32)
FLOAT_STEP = 16
FLOAT_ROW = FLOAT_STEP + 1
ALL_FLOATS = ROWS * FLOAT_ROW


@dataclass(frozen=True, eq=False)
class Tiles:
    """The kernels of one format."""

    matmul: Any
    expert_matmul: Any


def make_put(form: Unpacking, words: int) -> Any:
    """put(raw, part, row, unit, weights, scales, offsets): what a lane has fetched, to where unit
    `unit` of a tile's row is; rows have so many words, scales and offsets are [group][row]."""
    decode, apart, has_offset = form.decode, form.apart, form.has_offset
    per_group = form.per_scale // 16

    @helper
    def put(raw, part, row, unit, weights, scales, offsets):
        one, two, scale, offset = decode(raw, part)
        run = first_run(unit, apart)
        at = row * words + 4 * run
        further = at + 4 * apart
        for i in range(4):
            weights[place(at + i)] = one[i]
            weights[place(further + i)] = two[i]
        at = run // per_group * ROWS + row
        further = (run + apart) // per_group * ROWS + row
        scales[place(at)] = scale[0]
        scales[place(further)] = scale[1]
        if has_offset:
            offsets[place(at)] = offset[0]
            offsets[place(further)] = offset[1]

    return put


def make_fetch(form: Unpacking) -> Any:
    """fetch(w, base, n, row, k, start, unit): unit `unit` of the columns from `start` on, or the
    row's last one, and which of its block that is."""
    fetch_unit, size = form.fetch, form.size
    units = size // 32

    @helper
    def fetch(w, base, n, row, k, start, unit):
        here = min(start // 32 + unit, k // 32 - 1)
        part = here % units
        return fetch_unit(w, base, n, row * (k // size) + here // units, part), part

    return fetch


@helper
def fetch_theirs(xq, xd, xs, x, k, start, unit):
    """The same of a token whose activations begin at number x; no scale and no sums behind the
    last one, where weights are multiplied that count already."""
    here = start // 32 + unit
    column = min(here, k // 32 - 1)
    at = (x >> 5) + column
    a, b = load8(xs, 8 * at)
    d, s, t = as_float(load4(xd, 4 * at)), as_float(a), as_float(b)
    if here != column:
        d, s, t = float32(0), float32(0), float32(0)
    return (*load16(xq, 32 * at), *load16(xq, 32 * at + 16)), (d, s, t)


def make_put_theirs(form: Unpacking, words: int) -> Any:
    """put_theirs(q, floats, token, unit, others, their_scales, their_sums): to a tile's token;
    scales are [32 columns][token], sums [group][token]."""
    is_wide = form.per_scale == 32

    @helper
    def put_theirs(q, floats, token, unit, others, their_scales, their_sums):
        at = token * words + 8 * unit
        for i in range(8):
            others[place(at + i)] = q[i]
        d, s, t = floats
        their_scales[place(unit * TOKENS + token)] = d
        if is_wide:
            their_sums[place(unit * TOKENS + token)] = s + t
        else:
            their_sums[place(2 * unit * TOKENS + token)] = s
            their_sums[place((2 * unit + 1) * TOKENS + token)] = t

    return put_theirs


@helper
def source(n_rows, x_at):
    """The row of the matrix and the activations that a thread fetches, of a unit each.

    Behind the last row it is the last one, for tokens that are not there the first token's: what is
    made of them is not stored.
    """
    thread = cuda.threadIdx.x
    row = min(cuda.blockIdx.x * ROWS + thread // 4, n_rows - 1)
    x = x_at[place(thread // 4)]
    return row, x if x >= 0 else x_at[0]


def _quantised_tile(form: Unpacking) -> Any:
    has_offset = form.has_offset
    fetch, put, put_theirs = make_fetch(form), make_put(form, WORDS), make_put_theirs(form, WORDS)
    per_group = form.per_scale // 16
    all_groups = ROWS * (RUNS // per_group)

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32)
        scales = cuda.shared.array(all_groups, types.float32)
        offsets = cuda.shared.array(all_groups, types.float32)
        others = cuda.shared.array(ALL_WORDS, types.int32)
        their_scales = cuda.shared.array(ALL_GROUPS, types.float32)
        their_sums = cuda.shared.array(all_groups, types.float32)
        sums = cuda.local.array((4, 4), types.float32)
        a = cuda.local.array((4, 4), types.int32)
        thread = cuda.threadIdx.x
        down, along = thread // 16, thread % 16
        line, unit = thread // 4, thread % 4
        row, x = source(n_rows, x_at)
        n_wide = wide_tokens(y_at)
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        raw, part = fetch(w, base, n, row, k, 0, unit)
        q, floats = fetch_theirs(xq, xd, xs, x, k, 0, unit)
        for start in range(0, k, STEP):
            put(raw, part, line, unit, weights, scales, offsets)
            put_theirs(q, floats, line, unit, others, their_scales, their_sums)
            cuda.syncthreads()
            # What the next step takes is on its way while this one is computed.
            raw, part = fetch(w, base, n, row, k, start + STEP, unit)
            q, floats = fetch_theirs(xq, xd, xs, x, k, start + STEP, unit)
            for run in range(RUNS):
                for i in range(4):
                    at = (down + 16 * i) * WORDS + 4 * run
                    for word in range(4):
                        a[i, word] = weights[place(at + word)]
                for j in range(4):
                    if j < n_wide:
                        token = along + 16 * j
                        at = token * WORDS + 4 * run
                        b, c = others[place(at)], others[place(at + 1)]
                        d, e = others[place(at + 2)], others[place(at + 3)]
                        scale = their_scales[place(run // 2 * TOKENS + token)]
                        for i in range(4):
                            dot = dp4a(a[i, 0], b, dp4a(a[i, 1], c, dp4a(a[i, 2], d, int32(0))))
                            dot = dp4a(a[i, 3], e, dot)
                            at = run // per_group * ROWS + down + 16 * i
                            sums[i, j] += float32(dot) * (scales[place(at)] * scale)
                            if has_offset and run % per_group == 0:
                                total = their_sums[place(run // per_group * TOKENS + token)]
                                sums[i, j] += offsets[place(at)] * total
            cuda.syncthreads()
        _store(sums, y, y_at, cuda.blockIdx.x * ROWS, n_rows, down, along)

    return tile


def _float_tile(size: int, element: Any) -> Any:
    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_FLOATS, types.float32)
        others = cuda.shared.array(ALL_FLOATS, types.float32)
        sums = cuda.local.array((4, 4), types.float32)
        a = cuda.local.array(4, types.float32)
        thread = cuda.threadIdx.x
        down, along = thread // 16, thread % 16
        first_row = cuda.blockIdx.x * ROWS
        n_wide = wide_tokens(y_at)
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        for start in range(0, k, FLOAT_STEP):
            for i in range(4):
                row, column = down + 16 * i, start + along
                at = row * FLOAT_ROW + along
                weights[place(at)] = float32(0)
                others[place(at)] = float32(0)
                if column < k:
                    if first_row + row < n_rows:
                        at_weight = base + size * ((first_row + row) * k + column)
                        weights[place(at)] = element(w, at_weight)
                    if x_at[place(row)] >= 0:
                        others[place(at)] = xq[place(x_at[place(row)] + column)]
            cuda.syncthreads()
            for column in range(FLOAT_STEP):
                for i in range(4):
                    a[i] = weights[place((down + 16 * i) * FLOAT_ROW + column)]
                for j in range(4):
                    if j < n_wide:
                        b = others[place((along + 16 * j) * FLOAT_ROW + column)]
                        for i in range(4):
                            sums[i, j] += a[i] * b
            cuda.syncthreads()
        _store(sums, y, y_at, first_row, n_rows, down, along)

    return tile


@helper
def wide_tokens(y_at):
    """How many sixteens of a tile's tokens are there, given that the first ones are."""
    n = 0
    for j in range(4):
        if y_at[16 * j] >= 0:
            n = j + 1
    return n


@cuda.jit(device=True)
def _store(sums, y, y_at, first_row, n_rows, down, along):
    for i in range(4):
        row = first_row + down + 16 * i
        for j in range(4):
            at = y_at[place(along + 16 * j)]
            if row < n_rows and at >= 0:
                y[place(at + row)] = sums[i, j]


@helper
def f32_at(w, at):
    return as_float(load4(w, at))


@helper
def f16_at(w, at):
    return half(load2(w, at))


@helper
def bf16_at(w, at):
    return as_float(load2(w, at) << 16)


def make_tiles(name: str, tile: Any, block_bytes: int) -> Tiles:
    @kernel(f"{name}_matmul")
    def matmul(w, xq, xd, xs, x_stride, y, y_stride, n_rows, k, n, n_tokens):
        """y = each token's activations times w, transposed."""
        x_at = cuda.shared.array(TOKENS, types.int64)
        y_at = cuda.shared.array(TOKENS, types.int64)
        thread = cuda.threadIdx.x
        if thread < TOKENS:
            token = cuda.blockIdx.y * TOKENS + thread
            inside = token < n_tokens
            x_at[thread] = token * x_stride if inside else -1
            y_at[thread] = token * y_stride if inside else -1
        cuda.syncthreads()
        tile(w, 0, n, n_rows, k, xq, xd, xs, x_at, y, y_at)

    @kernel(f"{name}_expert_matmul")
    def expert_matmul(
        w,
        xq,
        xd,
        xs,
        x_stride,
        slot_stride,
        y,
        y_stride,
        n_rows,
        k,
        n,
        order,
        starts,
        n_used,
    ):
        """The same of each slot with its expert, the third coordinate of a block."""
        x_at = cuda.shared.array(TOKENS, types.int64)
        y_at = cuda.shared.array(TOKENS, types.int64)
        thread = cuda.threadIdx.x
        expert = cuda.blockIdx.z
        first = starts[expert] + cuda.blockIdx.y * TOKENS
        end = starts[expert + 1]
        if first < end:
            if thread < TOKENS:
                x_at[thread] = -1
                y_at[thread] = -1
                if first + thread < end:
                    token, slot = order[first + thread] // n_used, order[first + thread] % n_used
                    x_at[thread] = token * x_stride + slot * slot_stride
                    y_at[thread] = token * y_stride + slot * n_rows
            cuda.syncthreads()
            base = expert * n * block_bytes
            tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at)

    return Tiles(matmul, expert_matmul)


@kernel("sort_slots")
def sort_slots(routes, routes_stride, n_tokens, n_used, n_experts, order, starts):
    """Slots (token * n_used + slot) by expert; those of expert e are starts[e] to starts[e + 1]."""
    counts = cuda.shared.array(0, types.int32)
    thread = cuda.threadIdx.x
    for expert in range(thread, n_experts, THREADS):
        counts[expert] = 0
    cuda.syncthreads()
    for i in range(thread, n_tokens * n_used, THREADS):
        expert = int(routes[i // n_used * routes_stride + i % n_used])
        cuda.atomic.add(counts, expert, 1)
    cuda.syncthreads()
    if thread == 0:
        total = 0
        for expert in range(n_experts):
            starts[expert] = total
            total += counts[expert]
            counts[expert] = starts[expert]
        starts[n_experts] = total
    cuda.syncthreads()
    for i in range(thread, n_tokens * n_used, THREADS):
        expert = int(routes[i // n_used * routes_stride + i % n_used])
        order[cuda.atomic.add(counts, expert, 1)] = i


TILES = {
    **{
        name: make_tiles(name, _quantised_tile(form), form.block_bytes)
        for name, form in BLOCKS.items()
    },
    "F32": make_tiles("F32", _float_tile(4, f32_at), 4),
    "F16": make_tiles("F16", _float_tile(2, f16_at), 2),
    "BF16": make_tiles("BF16", _float_tile(2, bf16_at), 2),
}
