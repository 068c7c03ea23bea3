"""Matrix products: matvec for one token or a few, tiles of 32 rows x 6 tokens for prompts.

A few tokens have matvec kernels for 2 to 4 columns, which read and unpack the weights once and
compute what the kernel for one computes.

For a prompt, 32 rows of weights at a time are decoded to bytes (or float32) in this thread's
scratch, turned so that 16 rows lie in the 16 lanes, and multiplied with all tokens.
"""

from gguf_tools.control import call3, call5, call7, call9, call12
from gguf_tools.jit import Kernel, jit, kernel
from gguf_tools.simd import (
    float32,
    hsum,
    st,
    st_f32,
    st_i32,
    transpose16,
    zero_f32x16,
)
from gguf_tools.tiles import float_tile, int8_tile
from runtime.kernels.activations import quantise_group
from runtime.kernels.formats import FormatKernels
from runtime.kernels.interpreter import ROWS, arg, n_tokens, scratch

COLUMNS = 6  # tokens per tile; buffers have room for a whole last tile
FEW_TOKENS = 8  # up to here matvec kernels for several columns cost less than a tile
MOST_COLUMNS = 4  # of a matvec: with 5, the sums of some formats do not fit the registers
FLOAT_CHUNK = 512  # columns of float32 weights decoded at a time: 64 kB
TILE_SLACK = 2048


def scratch_bytes(k: int) -> int:
    """Scratch per thread of a tiled product with rows of k weights."""
    groups = (k // 16 + 31) // 16 * 16
    tile = 32 * k + 2 * groups * 128
    row_store = 16 * k + 2 * 16 * (groups * 4 + 64)
    floats = FLOAT_CHUNK * 128 + 16 * (FLOAT_CHUNK * 4 + 64)
    return max(tile + TILE_SLACK + row_store, floats) + 4096


@kernel("iiiii")
def quantise(op, state, thread, first, last):
    """Tokens for matvec: source 0-2, target 3-5, quantiser 6, k 7; unit: a token"""
    for t in range(first, last):
        source = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        target = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        call3(arg(op, 6), source, target, arg(op, 7))


@kernel("iiiii")
def matvec(op, state, thread, first, last):
    """w 0, bytes per row 1, rows 2, k 3, kernel 4, activation 5-6, target 7; unit: 32 rows"""
    begin = first * ROWS
    end = min(last * ROWS, arg(op, 2))
    activation = arg(op, 5) + thread * arg(op, 6)
    call7(arg(op, 4), arg(op, 0), arg(op, 1), begin, end, activation, arg(op, 7), arg(op, 3))


@kernel("iiiii")
def matvec_few(op, state, thread, first, last):
    """w 0, bytes per row 1, rows 2, k 3, kernels for 1 to 4 columns 4-7, activations 8, bytes per
    token 9, target 10, bytes per token 11; unit: 32 rows"""
    n = n_tokens(state)
    groups = (n + MOST_COLUMNS - 1) // MOST_COLUMNS
    end = min(last * ROWS, arg(op, 2))
    for r in range(first * ROWS, end, ROWS):
        stop = min(r + ROWS, end)
        for g in range(groups):  # all but the first find the rows in the cache
            t = n * g // groups
            count = n * (g + 1) // groups - t
            x = arg(op, 8) + t * arg(op, 9)
            y = arg(op, 10) + t * arg(op, 11)
            each = arg(op, 3 + count)
            if count == 1:
                call7(each, arg(op, 0), arg(op, 1), r, stop, x, y, arg(op, 3))
            else:
                call9(
                    each,
                    arg(op, 0),
                    arg(op, 1),
                    r,
                    stop,
                    x,
                    arg(op, 9),
                    y,
                    arg(op, 11),
                    arg(op, 3),
                )


@jit
def _describe_group(i, d, total, bias, scales, corrections, sums):
    st_f32(scales + i * 4, d)
    st_i32(corrections + i * 4, -bias * total)
    st_f32(sums + i * 4, d * float32(total))


@jit
def quantise_column(x, q, scales, corrections, sums, k, group, bias):
    """One token for the byte tile: int8 in natural order, one scale per 32.

    For each `group` of 16 or 32: scales[i] = d, corrections[i] = -bias * sum of q (int32),
    sums[i] = d * sum.
    """
    for i in range(k // 32):
        d, low, high = quantise_group(x + i * 128, q + i * 32, q + i * 32 + 16)
        if group == 32:
            _describe_group(i, d, hsum(low + high), bias, scales, corrections, sums)
        else:
            _describe_group(2 * i, d, hsum(low), bias, scales, corrections, sums)
            _describe_group(2 * i + 1, d, hsum(high), bias, scales, corrections, sums)


@kernel("iiiii")
def quantise_columns(op, state, thread, first, last):
    """source 0-2, q 3, scales 4, corrections 5, sums 6, bytes per token of q 7 and of the others
    8, k 9, group 10, bias 11; unit: a token"""
    for t in range(first, last):
        quantise_column(
            arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2),
            arg(op, 3) + t * arg(op, 7),
            arg(op, 4) + t * arg(op, 8),
            arg(op, 5) + t * arg(op, 8),
            arg(op, 6) + t * arg(op, 8),
            arg(op, 9),
            arg(op, 10),
            arg(op, 11),
        )


@kernel("iiiiiiiiiiii")
def tile_32(w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups):
    int8_tile(6, 32, False, False, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups)


@kernel("iiiiiiiiiiii")
def tile_32_small(w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups):
    int8_tile(6, 32, False, True, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups)


@kernel("iiiiiiiiiiii")
def tile_32_offset(w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups):
    int8_tile(6, 32, True, True, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups)


@kernel("iiiiiiiiiiii")
def tile_16(w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups):
    int8_tile(6, 16, False, True, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups)


@kernel("iiiiiiiiiiii")
def tile_16_offset(w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups):
    int8_tile(6, 16, True, True, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups)


def tile_for(kernels: FormatKernels) -> Kernel:
    """The tile of a format; all but the first hold weights below 128 only."""
    if kernels.bias >= 128:
        return tile_32
    if kernels.has_offset:
        return tile_32_offset if kernels.group == 32 else tile_16_offset
    return tile_32_small if kernels.group == 32 else tile_16


@kernel("iiiii")
def matmul_bytes(op, state, thread, first, last):
    """w 0, bytes per row 1, rows 2, k 3, row decoder 4, tile 5, q 6, scales 7, corrections 8,
    sums 9, bytes per token of q 10 and of the others 11, target 12, bytes per token 13, group 14,
    has offset 15; unit: 32 rows"""
    n_rows = arg(op, 2)
    k = arg(op, 3)
    n_groups = k // arg(op, 14)
    padded = (n_groups + 15) & ~15
    # Where k is an odd multiple of 32 the last transpose writes 1 kB too much: TILE_SLACK.
    tile = (scratch(state, thread) + 63) & ~63
    scales = tile + 32 * k + TILE_SLACK
    offsets = scales + padded * 128
    row_q = offsets + padded * 128
    stride = n_groups * 4 + 64  # transposes read whole vectors
    row_scales = row_q + 16 * k
    row_offsets = row_scales + 16 * stride
    tiles = (n_tokens(state) + COLUMNS - 1) // COLUMNS
    for r in range(first * ROWS, last * ROWS, ROWS):
        for half in range(2):
            for i in range(16):
                row = min(r + half * 16 + i, n_rows - 1)
                source = arg(op, 0) + row * arg(op, 1)
                to = row_offsets + i * stride
                call5(arg(op, 4), source, row_q + i * k, row_scales + i * stride, to, k)
            for j in range(0, k, 64):
                transpose16(row_q + j, k, tile + j * 32 + half * 64, 128)
            for j in range(0, n_groups, 16):
                place = j * 128 + half * 64
                transpose16(row_scales + j * 4, stride, scales + place, 128)
                if arg(op, 15):
                    transpose16(row_offsets + j * 4, stride, offsets + place, 128)
        for c in range(tiles):
            token = c * COLUMNS
            meta = token * arg(op, 11)
            call12(
                arg(op, 5),
                tile,
                scales,
                offsets,
                arg(op, 6) + token * arg(op, 10),
                arg(op, 10),
                arg(op, 7) + meta,
                arg(op, 8) + meta,
                arg(op, 9) + meta,
                arg(op, 11),
                arg(op, 12) + token * arg(op, 13) + r * 4,
                arg(op, 13),
                n_groups,
            )


@kernel("iiiiiii")
def tile_floats(x, xs, w, ws, y, ys, n):
    float_tile(6, 2, 4, False, x, xs, w, ws, y, ys, n, 0)


@kernel("iiiii")
def matmul_floats(op, state, thread, first, last):
    """w 0, bytes per row 1, rows 2, k 3, row decoder 4, tile 5, bytes per weight 6, source 7-9,
    target 10, bytes per token 11; unit: 32 rows"""
    n_rows = arg(op, 2)
    k = arg(op, 3)
    tile = (scratch(state, thread) + 63) & ~63
    rows = tile + FLOAT_CHUNK * 128
    stride = FLOAT_CHUNK * 4 + 64
    tiles = (n_tokens(state) + COLUMNS - 1) // COLUMNS
    source = arg(op, 7) + thread * arg(op, 8)
    for r in range(first * ROWS, last * ROWS, ROWS):
        for c in range(tiles * COLUMNS):
            st(arg(op, 10) + c * arg(op, 11) + r * 4, zero_f32x16())
            st(arg(op, 10) + c * arg(op, 11) + r * 4 + 64, zero_f32x16())
        for start in range(0, k, FLOAT_CHUNK):
            n = min(FLOAT_CHUNK, k - start)
            for half in range(2):
                for i in range(16):
                    row = min(r + half * 16 + i, n_rows - 1)
                    at = arg(op, 0) + row * arg(op, 1) + start * arg(op, 6)
                    call5(arg(op, 4), at, rows + i * stride, 0, 0, n)
                for j in range(0, n, 16):
                    transpose16(rows + j * 4, stride, tile + j * 128 + half * 64, 128)
            for c in range(tiles):
                token = c * COLUMNS
                call7(
                    arg(op, 5),
                    source + token * arg(op, 9) + start * 4,
                    arg(op, 9),
                    tile,
                    128,
                    arg(op, 10) + token * arg(op, 11) + r * 4,
                    arg(op, 11),
                    n,
                )
