"""Activations, alone or as gates: a pair of kernels for each of program.ACTIVATIONS.

Operations on columns, as those of elementwise.py. Where a function only bends a number, NaN stays
NaN.
"""

from typing import Any

from gguf_tools.jit import Kernel, jit, kernel
from gguf_tools.simd import (
    float32,
    fma,
    ld_f32x16,
    sel_lt,
    splat_f32x16,
    st,
    vfabs,
    vmax,
    zero_f32x16,
)
from runtime.kernels.functions import erfc16, over_exp
from runtime.kernels.interpreter import ROWS, arg, n_tokens


@jit
def silu(x):
    return over_exp(x, x)


@jit
def gelu(x):
    """0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)"""
    cubic = fma(x * x, splat_f32x16(float32(0.044715)), splat_f32x16(float32(1.0)))
    return over_exp(x, splat_f32x16(float32(1.5957691216057308)) * x * cubic)


@jit
def gelu_erf(x):
    """0.5 x (1 + erf(x / sqrt(2))): of the part below 0 what erfc leaves."""
    size = vfabs(x)
    tail = size * erfc16(size * splat_f32x16(float32(0.7071067811865476)))
    return fma(tail, splat_f32x16(float32(-0.5)), vmax(x, zero_f32x16()))


@jit
def relu(x):
    return sel_lt(x, zero_f32x16(), zero_f32x16(), x)


@jit
def swiglu_oai(x, up):
    """gpt-oss (ggml: swiglu_oai, alpha 1.702, limit 7)"""
    most, least = splat_f32x16(float32(7.0)), splat_f32x16(float32(-7.0))
    x = sel_lt(most, x, most, x)
    up = sel_lt(most, up, most, sel_lt(up, least, least, up))
    return over_exp(x, splat_f32x16(float32(1.702)) * x) * (up + splat_f32x16(float32(1.0)))


def _alone(function: Any) -> Any:
    """A loop that applies `function` to columns."""

    @jit
    def loop(op, state, thread, first, last):
        end = min(last * ROWS, arg(op, 3))
        for t in range(n_tokens(state)):
            y = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
            for i in range(first * ROWS, end, 16):
                st(y + i * 4, function(ld_f32x16(y + i * 4)))

    return loop


def _gate(function: Any) -> Any:
    """A loop that applies `function` of gate and up to columns."""

    @jit
    def loop(op, state, thread, first, last):
        end = min(last * ROWS, arg(op, 9))
        for t in range(n_tokens(state)):
            g = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
            u = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
            y = arg(op, 6) + thread * arg(op, 7) + t * arg(op, 8)
            for i in range(first * ROWS, end, 16):
                st(y + i * 4, function(ld_f32x16(g + i * 4), ld_f32x16(u + i * 4)))

    return loop


def _times_up(function: Any) -> Any:
    @jit
    def product(gate, up):
        return function(gate) * up

    return product


_gate_silu, _activate_silu = _gate(_times_up(silu)), _alone(silu)
_gate_gelu, _activate_gelu = _gate(_times_up(gelu)), _alone(gelu)
_gate_gelu_erf, _activate_gelu_erf = _gate(_times_up(gelu_erf)), _alone(gelu_erf)
_gate_relu, _activate_relu = _gate(_times_up(relu)), _alone(relu)
_gate_swiglu_oai = _gate(swiglu_oai)

# Gates: target 6-8 = function(gate 0-2) * up 3-5; width 9; unit: 32 columns


@kernel("iiiii")
def gate_silu(op, state, thread, first, last):
    _gate_silu(op, state, thread, first, last)


@kernel("iiiii")
def gate_gelu(op, state, thread, first, last):
    _gate_gelu(op, state, thread, first, last)


@kernel("iiiii")
def gate_gelu_erf(op, state, thread, first, last):
    _gate_gelu_erf(op, state, thread, first, last)


@kernel("iiiii")
def gate_relu(op, state, thread, first, last):
    _gate_relu(op, state, thread, first, last)


@kernel("iiiii")
def gate_swiglu_oai(op, state, thread, first, last):
    _gate_swiglu_oai(op, state, thread, first, last)


# Alone: target 0-2 = function(target); width 3; unit: 32 columns


@kernel("iiiii")
def activate_silu(op, state, thread, first, last):
    _activate_silu(op, state, thread, first, last)


@kernel("iiiii")
def activate_gelu(op, state, thread, first, last):
    _activate_gelu(op, state, thread, first, last)


@kernel("iiiii")
def activate_gelu_erf(op, state, thread, first, last):
    _activate_gelu_erf(op, state, thread, first, last)


@kernel("iiiii")
def activate_relu(op, state, thread, first, last):
    _activate_relu(op, state, thread, first, last)


GATES: dict[str, Kernel] = {
    "silu": gate_silu,
    "gelu": gate_gelu,
    "gelu_erf": gate_gelu_erf,
    "relu": gate_relu,
    "swiglu_oai": gate_swiglu_oai,
}
ALONE: dict[str, Kernel] = {  # swiglu_oai takes two sides
    "silu": activate_silu,
    "gelu": activate_gelu,
    "gelu_erf": activate_gelu_erf,
    "relu": activate_relu,
}
