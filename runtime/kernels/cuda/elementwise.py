"""Instructions on single numbers: a thread for each column, a row of blocks for each token.

What `gate` and `activate` make becomes int8 as well if `quantises` (quantising.py).
"""

import math

import numpy as np
from numba import cuda

from gguf_tools.compiler import helper
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.quantising import quantise_32

ROOT_HALF = np.float32(math.sqrt(0.5))
ROOT_2_OVER_PI = np.float32(math.sqrt(2 / math.pi))
CUBIC = np.float32(0.044715)
ALPHA, LIMIT = np.float32(1.702), np.float32(7)  # of swiglu_oai
HALF, ONE, ZERO = np.float32(0.5), np.float32(1), np.float32(0)


@helper
def sigmoid(x):
    e = math.exp(-abs(x))
    return (ONE if x >= ZERO else e) / (ONE + e)


@helper
def silu(x):
    return x * sigmoid(x)


@helper
def gelu(x):
    return HALF * x * (ONE + math.tanh(ROOT_2_OVER_PI * x * (ONE + CUBIC * x * x)))


@helper
def gelu_erf(x):
    return HALF * x * (ONE + math.erf(x * ROOT_HALF))


@helper
def relu(x):
    return max(x, ZERO)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_erf": gelu_erf, "relu": relu}


def _gated(activation):
    @helper
    def gated(x, up):
        return activation(x) * up

    return gated


@helper
def swiglu_oai(x, up):
    x, up = min(x, LIMIT), min(max(up, -LIMIT), LIMIT)
    return x * sigmoid(ALPHA * x) * (up + ONE)


def _make_gate(name, function):
    @kernel(f"{name}_gate")
    def gate(x, x_stride, up, up_stride, y, y_stride, xq, xd, xs, quantises, width):
        i, token = cuda.grid(2)
        if i < width:
            value = function(x[token * x_stride + i], up[token * up_stride + i])
            y[token * y_stride + i] = value
            if quantises:
                quantise_32(value, token * width + i, xq, xd, xs)

    return gate


def _make_activate(name, function):
    @kernel(f"{name}_activate")
    def activate(x, stride, xq, xd, xs, quantises, width):
        i, token = cuda.grid(2)
        if i < width:
            value = function(x[token * stride + i])
            x[token * stride + i] = value
            if quantises:
                quantise_32(value, token * width + i, xq, xd, xs)

    return activate


GATES = {
    **{name: _make_gate(name, _gated(function)) for name, function in ACTIVATIONS.items()},
    "swiglu_oai": _make_gate("swiglu_oai", swiglu_oai),
}
ALONE = {name: _make_activate(name, function) for name, function in ACTIVATIONS.items()}


@kernel("carry")
def carry(source, target, n):
    """n numbers from one array to another: one of them the host's, of memory that both share."""
    i = cuda.grid(1)
    if i < n:
        target[i] = source[i]


@kernel("add_bias")
def add_bias(x, stride, bias, width):
    i, token = cuda.grid(2)
    if i < width:
        x[token * stride + i] += bias[i]


@kernel("add")
def add(x, x_stride, y, y_stride, width):
    """y += x"""
    i, token = cuda.grid(2)
    if i < width:
        y[token * y_stride + i] += x[token * x_stride + i]


@kernel("scale")
def scale(x, stride, factor, width):
    i, token = cuda.grid(2)
    if i < width:
        x[token * stride + i] *= factor


@kernel("softcap")
def softcap(x, stride, cap, width):
    i, token = cuda.grid(2)
    if i < width:
        x[token * stride + i] = cap * math.tanh(x[token * stride + i] / cap)


@kernel("sigmoid_scale")
def sigmoid_scale(gate, gate_stride, x, stride, width):
    """x *= sigmoid(gate), one gate for each token."""
    i, token = cuda.grid(2)
    if i < width:
        x[token * stride + i] *= sigmoid(gate[token * gate_stride])


@kernel("expert_bias")
def expert_bias(x, stride, routes, routes_stride, biases, n_rows, width):
    """x += the biases of each slot's expert; width = slots * n_rows."""
    i, token = cuda.grid(2)
    if i < width:
        expert = int(routes[token * routes_stride + i // n_rows])
        x[token * stride + i] += biases[expert * n_rows + i % n_rows]


@kernel("expert_sum")
def expert_sum(
    x, x_stride, routes, routes_stride, n_used, y, y_stride, total, total_stride, adds, width
):
    """y = sum over slots of the slot's weight times x; total += y if `adds`."""
    i, token = cuda.grid(2)
    if i < width:
        mixed = ZERO
        for slot in range(n_used):
            weight = routes[token * routes_stride + n_used + slot]
            mixed += weight * x[token * x_stride + slot * width + i]
        y[token * y_stride + i] = mixed
        if adds:
            total[token * total_stride + i] += mixed
