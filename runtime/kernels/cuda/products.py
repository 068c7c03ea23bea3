"""A matrix times a vector, a warp for two rows: what decoding does most.

Blocks of whole numbers are multiplied with activations of 8 bits: `quantise` gives each 32 of them
one scale, and each 16 the sum that the weights' offsets are multiplied with. Float formats take the
activations as they are.

`routes` of a mixture are the experts' numbers of a token, then their weights; slot s of a token is
its s-th expert.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import cuda
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.blocks_32 import UNPACKINGS as OF_32
from runtime.kernels.cuda.blocks_k import UNPACKINGS as OF_256
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import as_float, dp4a, half, load2, load4, load16
from runtime.kernels.cuda.quantising import quantise_32
from runtime.kernels.cuda.unpacking import Unpacking, first_run
from runtime.kernels.cuda.warps import warp_sum

WARPS = 4  # of a block, each with two rows of its own
ROWS = 2 * WARPS
MOST_TOGETHER = 3  # matrices in one launch
REGISTERS = 128  # of a thread, at most; about half of them are used
BLOCKS = {**OF_32, **OF_256}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Products:
    """The kernels of one format; `dots` is what one lane computes of two rows."""

    dots: Any
    of_two_rows: Any
    matvec: Any
    expert_matvec: Any


@kernel("quantise")
def quantise(x, x_stride, xq, xd, xs, k):
    """Rows of k activations to int8, a warp for each 32: xd their scales, xs sums of 16."""
    group = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    token = cuda.blockIdx.y
    if group * 32 < k:
        i = group * 32 + cuda.threadIdx.x
        quantise_32(x[token * x_stride + i], token * k + i, xq, xd, xs)


@helper
def dot_16(a, b):
    """The sum of 16 products of int8."""
    return dp4a(a[3], b[3], dp4a(a[2], b[2], dp4a(a[1], b[1], dp4a(a[0], b[0], int32(0)))))


@helper
def float_at(x, at):
    """Number `at` of float32 that this kernel does not write."""
    return as_float(load4(x, 4 * at))


def quantised_dots(form: Unpacking) -> Any:
    """dots(w, base, n, row, other, xq, xd, xs, x, k, lane): what a lane makes of two rows.

    The matrix begins at byte `base` and has room for n blocks, or numbers; the activations begin
    at number x. Both rows are multiplied with what is read of them once.
    """
    fetch, decode, size, apart = form.fetch, form.decode, form.size, form.apart
    units, has_offset = size // 32, form.has_offset

    @helper
    def multiplied(raw, part, a, b, d, e, s, t):
        """A unit of a row times two runs: their numbers, scales and sums."""
        first, second, scales, offsets = decode(raw, part)
        near, far = float32(dot_16(first, a)) * d, float32(dot_16(second, b)) * e
        total = scales[0] * near + scales[1] * far
        if has_offset:
            total += offsets[0] * s + offsets[1] * t
        return total

    @helper
    def dots(w, base, n, row, other, xq, xd, xs, x, k, lane):
        total, further_total = float32(0), float32(0)
        part, n_blocks = lane % units, k // size
        run = first_run(part, apart)
        row, other = row * n_blocks, other * n_blocks
        for block in range(lane // units, n_blocks, 32 // units):
            mine = fetch(w, base, n, row + block, part)
            theirs = fetch(w, base, n, other + block, part)
            at = x + 16 * run + size * block
            a, b = load16(xq, at), load16(xq, at + 16 * apart)
            at = (x >> 5) + (run >> 1) + units * block
            d, e = float_at(xd, at), float_at(xd, at + apart // 2)
            s, t = float32(0), float32(0)
            if has_offset:
                at = (x >> 4) + run + 2 * units * block
                s, t = float_at(xs, at), float_at(xs, at + apart)
            total += multiplied(mine, part, a, b, d, e, s, t)
            further_total += multiplied(theirs, part, a, b, d, e, s, t)
        return total, further_total

    return dots


def halves_dots(low: Any, high: Any) -> Any:
    """The same of a format of 16 bits: xq are float32, xd and xs are not read."""

    @helper
    def multiplied(w, at, a, b):
        c, d, e, f = load16(w, at)
        total = low(c) * as_float(a[0]) + high(c) * as_float(a[1])
        total += low(d) * as_float(a[2]) + high(d) * as_float(a[3])
        total += low(e) * as_float(b[0]) + high(e) * as_float(b[1])
        return total + (low(f) * as_float(b[2]) + high(f) * as_float(b[3]))

    @helper
    def dots(w, base, n, row, other, xq, xd, xs, x, k, lane):
        total, further_total = float32(0), float32(0)
        row, other = base + 2 * k * row, base + 2 * k * other
        whole = k // 8 if k % 8 == 0 else 0  # rows that do not begin with 16 bytes go one by one
        for unit in range(lane, whole, 32):
            at = 4 * (x + 8 * unit)
            a, b = load16(xq, at), load16(xq, at + 16)
            total += multiplied(w, row + 16 * unit, a, b)
            further_total += multiplied(w, other + 16 * unit, a, b)
        for i in range(8 * whole + lane, k, 32):
            a = float_at(xq, x + i)
            total += low(load2(w, row + 2 * i)) * a
            further_total += low(load2(w, other + 2 * i)) * a
        return total, further_total

    return dots


@helper
def dot_4(a, b):
    """The sum of four products of float32."""
    total = as_float(a[0]) * as_float(b[0]) + as_float(a[1]) * as_float(b[1])
    return total + (as_float(a[2]) * as_float(b[2]) + as_float(a[3]) * as_float(b[3]))


@helper
def f32_dots(w, base, n, row, other, xq, xd, xs, x, k, lane):
    """The same of F32."""
    total, further_total = float32(0), float32(0)
    row, other = base + 4 * k * row, base + 4 * k * other
    whole = k // 4 if k % 4 == 0 else 0
    for unit in range(lane, whole, 32):
        a = load16(xq, 4 * (x + 4 * unit))
        total += dot_4(load16(w, row + 16 * unit), a)
        further_total += dot_4(load16(w, other + 16 * unit), a)
    for i in range(4 * whole + lane, k, 32):
        a = float_at(xq, x + i)
        total += as_float(load4(w, row + 4 * i)) * a
        further_total += as_float(load4(w, other + 4 * i)) * a
    return total, further_total


@helper
def low_half(word):
    return half(word & 0xFFFF)


@helper
def high_half(word):
    return half(word >> 16 & 0xFFFF)


@helper
def low_bfloat(word):
    return as_float(word << 16)


@helper
def high_bfloat(word):
    return as_float(word & -65536)


def make_products(name: str, dots: Any, block_bytes: int) -> Products:
    """Kernels around what a lane makes of two rows; matrices have room for n blocks."""

    @cuda.jit(device=True)
    def of_two_rows(w, base, n, block, n_rows, xq, xd, xs, x, k):
        """A row that a lane has the product of, the product, and whether it has one: the first two
        lanes of each warp of a block."""
        row, lane = 2 * (block * WARPS + cuda.threadIdx.y), cuda.threadIdx.x
        if row >= n_rows:
            return row, float32(0), False
        a, b = dots(w, base, n, row, min(row + 1, n_rows - 1), xq, xd, xs, x, k, lane)
        a, b = warp_sum(a), warp_sum(b)
        row += lane
        return row, a if lane == 0 else b, lane < 2 and row < n_rows

    @kernel(f"{name}_matvec", registers=REGISTERS)
    def matvec(
        xq,
        xd,
        xs,
        x_stride,
        k,
        w,
        n,
        y,
        y_stride,
        n_rows,
        bias,
        has_bias,
        total,
        total_stride,
        adds,
    ):
        """y = w times each token's activations + bias; then total += y."""
        token = cuda.blockIdx.y
        row, value, is_mine = of_two_rows(
            w, 0, n, cuda.blockIdx.x, n_rows, xq, xd, xs, token * x_stride, k
        )
        if is_mine:
            if has_bias:
                value += bias[row]
            y[token * y_stride + row] = value
            if adds:
                total[token * total_stride + row] += value

    @kernel(f"{name}_expert_matvec", registers=REGISTERS)
    def expert_matvec(
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
        routes,
        routes_stride,
        biases,
        has_biases,
    ):
        """With each slot's expert; its activations are `slot_stride` after the last's."""
        token, slot = cuda.blockIdx.y, cuda.blockIdx.z
        expert = int(routes[token * routes_stride + slot])
        base, x = expert * n * block_bytes, token * x_stride + slot * slot_stride
        row, value, is_mine = of_two_rows(w, base, n, cuda.blockIdx.x, n_rows, xq, xd, xs, x, k)
        if is_mine:
            if has_biases:
                value += biases[expert * n_rows + row]
            y[token * y_stride + slot * n_rows + row] = value

    return Products(dots, of_two_rows, matvec, expert_matvec)


PRODUCTS = {
    **{
        name: make_products(name, quantised_dots(form), form.block_bytes)
        for name, form in BLOCKS.items()
    },
    "F32": make_products("F32", f32_dots, 4),
    "F16": make_products("F16", halves_dots(low_half, high_half), 2),
    "BF16": make_products("BF16", halves_dots(low_bfloat, high_bfloat), 2),
}


@cache
def matvecs_of(first: str, second: str) -> Any:
    """A kernel for up to MOST_TOGETHER matrices of one width: n_first of one format, then others.

    Both formats take the activations as they are, or both as int8.
    """
    rows, others = PRODUCTS[first].of_two_rows, PRODUCTS[second].of_two_rows
    is_one_format = first == second

    @kernel(f"{first}_{second}_matvecs", registers=REGISTERS)
    def matvecs(
        xq,
        xd,
        xs,
        x_stride,
        k,
        n_first,
        w,
        n,
        y,
        y_stride,
        n_rows,
        bias,
        has_bias,
        w_2,
        n_2,
        y_2,
        y_stride_2,
        n_rows_2,
        bias_2,
        has_bias_2,
        w_3,
        n_3,
        y_3,
        y_stride_3,
        n_rows_3,
        bias_3,
        has_bias_3,
    ):
        """y = w times each token's activations + bias, of matrices one after the other."""
        block, matrix = cuda.blockIdx.x, 0
        n_blocks = (n_rows + ROWS - 1) // ROWS
        if block >= n_blocks:
            block, matrix = block - n_blocks, 1
            w, n, y, y_stride, n_rows = w_2, n_2, y_2, y_stride_2, n_rows_2
            bias, has_bias = bias_2, has_bias_2
            n_blocks = (n_rows + ROWS - 1) // ROWS
            if block >= n_blocks:
                block, matrix = block - n_blocks, 2
                w, n, y, y_stride, n_rows = w_3, n_3, y_3, y_stride_3, n_rows_3
                bias, has_bias = bias_3, has_bias_3
        token = cuda.blockIdx.y
        x = token * x_stride
        if is_one_format or matrix < n_first:
            row, value, is_mine = rows(w, 0, n, block, n_rows, xq, xd, xs, x, k)
        else:
            row, value, is_mine = others(w, 0, n, block, n_rows, xq, xd, xs, x, k)
        if is_mine:
            if has_bias:
                value += bias[row]
            y[token * y_stride + row] = value

    return matvecs
