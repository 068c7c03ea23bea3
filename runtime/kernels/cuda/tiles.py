"""A matrix times many tokens: blocks of threads that share tiles of weights and activations.

A block makes 64 rows of the result for 64 tokens, each of its 16 x 16 threads 4 x 4 of them. Blocks
of whole numbers are unpacked to int8 with a scale and an offset for each 16 weights; float formats
become float32. `x_at` and `y_at` say where a token's activations begin and where its result goes,
so that a mixture's slots, sorted by expert, go the same way as the tokens of a prompt.
"""

from dataclasses import dataclass
from typing import Any

from numba import cuda, types
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import as_float, dp4a, half, load2, load4, load16
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.unpacking import Unpacking, first_run

ROWS = TOKENS = 64
THREADS = 256
STEP = 128  # columns of whole numbers at a time
WORDS = STEP // 4 + 1  # of a row in shared memory; an odd number keeps its banks apart
RUNS = STEP // 16
ALL_WORDS, ALL_RUNS = ROWS * WORDS, ROWS * RUNS
FLOAT_STEP = 16
FLOAT_ROW = FLOAT_STEP + 1
ALL_FLOATS = ROWS * FLOAT_ROW


@dataclass(frozen=True, eq=False)
class Tiles:
    """The kernels of one format."""

    matmul: Any
    expert_matmul: Any


def make_put(unpacking: Unpacking, words: int) -> Any:
    """put(w, base, n, here, row, unit, weights, scales, offsets): unit `here` of the matrix at byte
    `base`, or zeros below 0, to where unit `unit` of a tile's row is; rows of so many words."""
    fetch, decode = unpacking.fetch, unpacking.decode
    apart, has_offset = unpacking.apart, unpacking.has_offset
    units = unpacking.size // 32

    @helper
    def put(w, base, n, here, row, unit, weights, scales, offsets):
        run = first_run(unit, apart)
        at = row * words + 4 * run
        further = at + 4 * apart
        item = row * RUNS + run
        if here >= 0:
            part = here % units
            one, two, scale, offset = decode(fetch(w, base, n, here // units, part), part)
            for i in range(4):
                weights[at + i] = one[i]
                weights[further + i] = two[i]
            scales[item] = scale[0]
            scales[item + apart] = scale[1]
            if has_offset:
                offsets[item] = offset[0]
                offsets[item + apart] = offset[1]
        else:
            for i in range(4):
                weights[at + i] = 0
                weights[further + i] = 0
            scales[item] = float32(0)
            scales[item + apart] = float32(0)
            if has_offset:
                offsets[item] = float32(0)
                offsets[item + apart] = float32(0)

    return put


def make_loader(unpacking: Unpacking, words: int) -> Any:
    """What brings STEP columns of a tile to shared memory, in rows of so many words."""
    put = make_put(unpacking, words)

    @cuda.jit(device=True)
    def load(
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
    ):
        thread = cuda.threadIdx.x
        first_row = cuda.blockIdx.x * ROWS
        # One unit of weights for each thread.
        row, unit = thread // 4, thread % 4
        here = start // 32 + unit
        if first_row + row >= n_rows or here * 32 >= k:
            here = -1
        else:
            here += (first_row + row) * (k // 32)
        put(w, base, n, here, row, unit, weights, scales, offsets)
        for item in range(thread, TOKENS * RUNS, THREADS):
            token, run = item // RUNS, item % RUNS
            at = token * words + 4 * run
            column = start + 16 * run
            if x_at[token] >= 0 and column < k:
                source = x_at[token] + column
                q = load16(xq, source)
                for i in range(4):
                    others[at + i] = q[i]
                their_scales[item] = xd[source >> 5]
                their_sums[item] = xs[source >> 4]
            else:
                for i in range(4):
                    others[at + i] = 0
                their_scales[item] = float32(0)
                their_sums[item] = float32(0)

    return load


def _quantised_tile(unpacking: Unpacking) -> Any:
    has_offset = unpacking.has_offset
    load = make_loader(unpacking, WORDS)

    @cuda.jit(device=True)
    def tile(w, base, n, n_rows, k, xq, xd, xs, x_at, y, y_at):
        weights = cuda.shared.array(ALL_WORDS, types.int32)
        scales = cuda.shared.array(ALL_RUNS, types.float32)
        offsets = cuda.shared.array(ALL_RUNS, types.float32)
        others = cuda.shared.array(ALL_WORDS, types.int32)
        their_scales = cuda.shared.array(ALL_RUNS, types.float32)
        their_sums = cuda.shared.array(ALL_RUNS, types.float32)
        sums = cuda.local.array((4, 4), types.float32)
        a = cuda.local.array((4, 4), types.int32)
        thread = cuda.threadIdx.x
        down, along = thread // 16, thread % 16
        first_row = cuda.blockIdx.x * ROWS
        n_wide = wide_tokens(y_at)
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
            for run in range(RUNS):
                for i in range(4):
                    at = (down + 16 * i) * WORDS + 4 * run
                    for word in range(4):
                        a[i, word] = weights[at + word]
                for j in range(4):
                    if j < n_wide:
                        at = (along + 16 * j) * WORDS + 4 * run
                        b, c, d, e = others[at], others[at + 1], others[at + 2], others[at + 3]
                        item = (along + 16 * j) * RUNS + run
                        for i in range(4):
                            dot = dp4a(a[i, 0], b, dp4a(a[i, 1], c, dp4a(a[i, 2], d, int32(0))))
                            dot = dp4a(a[i, 3], e, dot)
                            at = (down + 16 * i) * RUNS + run
                            sums[i, j] += float32(dot) * (scales[at] * their_scales[item])
                            if has_offset:
                                sums[i, j] += offsets[at] * their_sums[item]
            cuda.syncthreads()
        _store(sums, y, y_at, first_row, n_rows, down, along)

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
                weights[at] = float32(0)
                others[at] = float32(0)
                if column < k:
                    if first_row + row < n_rows:
                        place = base + size * ((first_row + row) * k + column)
                        weights[at] = element(w, place)
                    if x_at[row] >= 0:
                        others[at] = xq[x_at[row] + column]
            cuda.syncthreads()
            for column in range(FLOAT_STEP):
                for i in range(4):
                    a[i] = weights[(down + 16 * i) * FLOAT_ROW + column]
                for j in range(4):
                    if j < n_wide:
                        b = others[(along + 16 * j) * FLOAT_ROW + column]
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
            at = y_at[along + 16 * j]
            if row < n_rows and at >= 0:
                y[at + row] = sums[i, j]


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
