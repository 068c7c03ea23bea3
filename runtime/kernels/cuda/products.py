"""A matrix times a vector, a warp for each row: what decoding does most.

Blocks of whole numbers are multiplied with activations of 8 bits: `quantise` gives each 32 of them
one scale, and each 16 the sum that the weights' offsets are multiplied with. Float formats take the
activations as they are.

`routes` of a mixture are the experts' numbers of a token, then their weights; slot s of a token is
its s-th expert.
"""

from dataclasses import dataclass
from typing import Any

from numba import cuda
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.blocks_32 import UNPACKINGS as OF_32
from runtime.kernels.cuda.blocks_k import UNPACKINGS as OF_256
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import as_float, dp4a, half, load2, load16, nearest
from runtime.kernels.cuda.unpacking import Unpacking, first_run
from runtime.kernels.cuda.warps import warp_max, warp_sum

WARPS = 4  # of a block, each with a row of its own
MOST_TOGETHER = 3  # matrices in one launch
BLOCKS = {**OF_32, **OF_256}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Products:
    """The kernels of one format; `dot` is what one lane computes of a row."""

    dot: Any
    matvec: Any
    matvecs: Any  # of up to MOST_TOGETHER matrices
    expert_matvec: Any


@kernel("quantise")
def quantise(x, x_stride, xq, xd, xs, k):
    """Rows of k activations to int8, a warp for each 32: xd their scales, xs sums of 16."""
    group = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    token = cuda.blockIdx.y
    lane = cuda.threadIdx.x
    if group * 32 < k:
        value = x[token * x_stride + group * 32 + lane]
        scale = warp_max(abs(value)) / float32(127)
        q = 0
        if scale > float32(0):
            q = nearest(value / scale)
        at = token * k + group * 32
        xq[at + lane] = q
        # The sum of each half of the warp.
        total = float32(q)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 8)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 4)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 2)
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 1)
        if lane == 0:
            xd[at // 32] = scale
        if lane % 16 == 0:
            xs[at // 16 + lane // 16] = scale * total


@helper
def dot_16(a, b):
    """The sum of 16 products of int8."""
    return dp4a(a[3], b[3], dp4a(a[2], b[2], dp4a(a[1], b[1], dp4a(a[0], b[0], int32(0)))))


def quantised_dot(unpacking: Unpacking) -> Any:
    """dot(w, row, xq, xd, xs, x, k, lane): the row at byte `row`, the activations from x on."""
    unpack, apart, has_offset = unpacking.unpack, unpacking.apart, unpacking.has_offset

    @helper
    def dot(w, row, xq, xd, xs, x, k, lane):
        total = float32(0)
        for unit in range(lane, k // 32, 32):
            first, other, scales, offsets = unpack(w, row, unit)
            at = x + 16 * first_run(unit, apart)
            further = at + 16 * apart
            near = float32(dot_16(first, load16(xq, at))) * xd[at >> 5]
            far = float32(dot_16(other, load16(xq, further))) * xd[further >> 5]
            total += scales[0] * near + scales[1] * far
            if has_offset:
                total += offsets[0] * xs[at >> 4] + offsets[1] * xs[further >> 4]
        return total

    return dot


def halves_dot(low: Any, high: Any) -> Any:
    """The same of a format of 16 bits: xq are float32, xd and xs are not read."""

    @helper
    def dot(w, row, xq, xd, xs, x, k, lane):
        total = float32(0)
        whole = k // 8 if k % 8 == 0 else 0  # rows that do not begin with 16 bytes go one by one
        for unit in range(lane, whole, 32):
            at = x + 8 * unit
            a, b, c, d = load16(w, row + 16 * unit)
            total += low(a) * xq[at] + high(a) * xq[at + 1]
            total += low(b) * xq[at + 2] + high(b) * xq[at + 3]
            total += low(c) * xq[at + 4] + high(c) * xq[at + 5]
            total += low(d) * xq[at + 6] + high(d) * xq[at + 7]
        for i in range(8 * whole + lane, k, 32):
            total += low(load2(w, row + 2 * i)) * xq[x + i]
        return total

    return dot


@helper
def f32_dot(w, row, xq, xd, xs, x, k, lane):
    """The same of F32."""
    total = float32(0)
    whole = k // 4 if k % 4 == 0 else 0
    for unit in range(lane, whole, 32):
        at = x + 4 * unit
        a, b, c, d = load16(w, row + 16 * unit)
        total += as_float(a) * xq[at] + as_float(b) * xq[at + 1]
        total += as_float(c) * xq[at + 2] + as_float(d) * xq[at + 3]
    for i in range(4 * whole + lane, k, 32):
        bits = load2(w, row + 4 * i) | load2(w, row + 4 * i + 2) << 16
        total += as_float(bits) * xq[x + i]
    return total


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


def make_products(name: str, dot: Any) -> Products:
    """Kernels around a dot."""

    @kernel(f"{name}_matvec")
    def matvec(
        w,
        xq,
        xd,
        xs,
        x_stride,
        k,
        row_bytes,
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
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        token = cuda.blockIdx.y
        lane = cuda.threadIdx.x
        if row < n_rows:
            value = dot(w, row * row_bytes, xq, xd, xs, token * x_stride, k, lane)
            value = warp_sum(value)
            if lane == 0:
                if has_bias:
                    value += bias[row]
                y[token * y_stride + row] = value
                if adds:
                    total[token * total_stride + row] += value

    @kernel(f"{name}_matvecs")
    def matvecs(
        xq,
        xd,
        xs,
        x_stride,
        k,
        row_bytes,
        w,
        y,
        y_stride,
        n_rows,
        bias,
        has_bias,
        w_2,
        y_2,
        y_stride_2,
        n_rows_2,
        bias_2,
        has_bias_2,
        w_3,
        y_3,
        y_stride_3,
        n_rows_3,
        bias_3,
        has_bias_3,
    ):
        """The same of several matrices, without a total: their blocks one after the other."""
        block, rows = cuda.blockIdx.x, cuda.blockDim.y
        n_blocks = (n_rows + rows - 1) // rows
        if block >= n_blocks:
            block -= n_blocks
            w, y, y_stride, n_rows = w_2, y_2, y_stride_2, n_rows_2
            bias, has_bias = bias_2, has_bias_2
            n_blocks = (n_rows + rows - 1) // rows
            if block >= n_blocks:
                block -= n_blocks
                w, y, y_stride, n_rows = w_3, y_3, y_stride_3, n_rows_3
                bias, has_bias = bias_3, has_bias_3
        row = block * rows + cuda.threadIdx.y
        token = cuda.blockIdx.y
        lane = cuda.threadIdx.x
        if row < n_rows:
            value = dot(w, row * row_bytes, xq, xd, xs, token * x_stride, k, lane)
            value = warp_sum(value)
            if lane == 0:
                if has_bias:
                    value += bias[row]
                y[token * y_stride + row] = value

    @kernel(f"{name}_expert_matvec")
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
        row_bytes,
        routes,
        routes_stride,
        biases,
        has_biases,
    ):
        """With each slot's expert; its activations are `slot_stride` after the last's."""
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        token, slot = cuda.blockIdx.y, cuda.blockIdx.z
        lane = cuda.threadIdx.x
        if row < n_rows:
            expert = int(routes[token * routes_stride + slot])
            at = (expert * n_rows + row) * row_bytes
            x = token * x_stride + slot * slot_stride
            value = warp_sum(dot(w, at, xq, xd, xs, x, k, lane))
            if lane == 0:
                if has_biases:
                    value += biases[expert * n_rows + row]
                y[token * y_stride + slot * n_rows + row] = value

    return Products(dot, matvec, matvecs, expert_matvec)


PRODUCTS = {
    **{name: make_products(name, quantised_dot(form)) for name, form in BLOCKS.items()},
    "F32": make_products("F32", f32_dot),
    "F16": make_products("F16", halves_dot(low_half, high_half)),
    "BF16": make_products("BF16", halves_dot(low_bfloat, high_bfloat)),
}
