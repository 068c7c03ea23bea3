"""The definition of right: the program in NumPy, one function per instruction, float32.

Slow and readable. Weights are dequantised a matrix at a time and forgotten; the KV cache is
float32. Other backends are judged against it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.program import (
    Add,
    AddBias,
    Attend,
    Floats,
    Gate,
    Instruction,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    StoreKV,
)

ROWS_AT_ONCE = 4096  # rows of a matrix dequantised together


class ReferenceBackend:
    """Runs a program with NumPy."""

    def __init__(self, program: Program, *, n_ctx: int) -> None:
        self.program = program
        self.notes: tuple[str, ...] = (
            "the reference backend is slow: it is there to compare with",
        )
        self._keys = [
            np.zeros((n_ctx, shape.n_kv_heads, shape.key_dim), np.float32)
            for shape in program.caches
        ]
        self._values = [
            np.zeros((n_ctx, shape.n_kv_heads, shape.value_dim), np.float32)
            for shape in program.caches
        ]

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        buffers: dict[str, Floats] = {"x": self.program.embedding.rows(ids)}
        for layer in self.program.layers:
            for step in layer:
                self._execute(step, buffers, start)
        if n_outputs == 0:
            return np.empty((0, self.program.buffers["logits"]), np.float32)
        buffers = {"x": buffers["x"][-n_outputs:]}
        for step in self.program.head:
            self._execute(step, buffers, start)
        return buffers["logits"]

    def close(self) -> None:
        self._keys, self._values = [], []

    def _execute(self, step: Instruction, buffers: dict[str, Floats], start: int) -> None:
        match step:
            case RMSNorm():
                buffers[step.target] = rms_norm(buffers[step.source], step.weight, step.epsilon)
            case MatMul():
                buffers[step.target] = matmul(buffers[step.source], step)
            case AddBias():
                buffers[step.target] = buffers[step.target] + step.bias
            case Rope():
                buffers[step.target] = rope(buffers[step.target], step, start)
            case StoreKV():
                end = start + len(buffers[step.keys])
                keys, values = self._keys[step.layer], self._values[step.layer]
                keys[start:end] = buffers[step.keys].reshape(-1, *keys.shape[1:])
                values[start:end] = buffers[step.values].reshape(-1, *values.shape[1:])
            case Attend():
                n_heads = self.program.caches[step.layer].n_heads
                buffers[step.target] = attend(
                    buffers[step.queries],
                    self._keys[step.layer],
                    self._values[step.layer],
                    step,
                    n_heads=n_heads,
                    start=start,
                )
            case Gate():
                buffers[step.target] = silu(buffers[step.gate]) * buffers[step.up]
            case Add():
                buffers[step.target] = buffers[step.target] + buffers[step.source]


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    groups = x.reshape(-1, len(weight))
    mean: Floats = np.mean(groups * groups, axis=1, keepdims=True, dtype=np.float32)
    normed: Floats = (groups / np.sqrt(mean + np.float32(epsilon)) * weight).reshape(x.shape)
    return normed


def silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) is infinite for very negative x: the result is 0
        y: Floats = x / (1 + np.exp(-x))
    return y


def matmul(x: Floats, step: MatMul) -> Floats:
    matrix = step.matrix
    y = np.empty((len(x), matrix.n_rows), np.float32)
    for first in range(0, matrix.n_rows, ROWS_AT_ONCE):
        band = slice(first, first + ROWS_AT_ONCE)
        y[:, band] = x @ matrix.rows(band).T
    return y


def rope(x: Floats, step: Rope, start: int) -> Floats:
    table = step.table
    heads = x.reshape(len(x), step.n_heads, step.head_dim).copy()
    cosines, sines = table.angles(np.arange(start, start + len(x)))
    cosines, sines = cosines[:, None, :], sines[:, None, :]
    half = table.n_dims // 2
    if table.interleaved:
        first, second = slice(0, table.n_dims, 2), slice(1, table.n_dims, 2)
    else:
        first, second = slice(0, half), slice(half, table.n_dims)
    a, b = heads[:, :, first].copy(), heads[:, :, second].copy()
    heads[:, :, first] = a * cosines - b * sines
    heads[:, :, second] = a * sines + b * cosines
    return heads.reshape(x.shape)


def attend(
    queries: Floats,
    keys: Floats,  # (n_ctx, n_kv_heads, key_dim)
    values: Floats,  # (n_ctx, n_kv_heads, value_dim)
    step: Attend,
    *,
    n_heads: int,
    start: int,
) -> Floats:
    n_tokens, end = len(queries), start + len(queries)
    q = queries.reshape(n_tokens, n_heads, -1)
    group = n_heads // keys.shape[1]
    k = np.repeat(keys[:end], group, axis=1)  # (end, n_heads, key_dim)
    v = np.repeat(values[:end], group, axis=1)
    scores = np.einsum("thd,phd->htp", q, k) * np.float32(step.scale)
    here, there = np.arange(start, end)[:, None], np.arange(end)[None, :]
    hidden = there > here
    if step.window:
        hidden |= there <= here - step.window
    scores[:, hidden] = -np.inf
    scores -= scores.max(axis=2, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=2, keepdims=True)
    mixed: Floats = np.einsum("htp,phd->thd", weights, v).reshape(n_tokens, -1)
    return mixed
