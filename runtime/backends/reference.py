"""The definition of right: the program in NumPy, one function per instruction, float32.

Slow and readable. Weights are dequantised a matrix at a time and forgotten; the KV cache is
float32. Other backends are judged against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from runtime.backends.observing import Observe, Product, observed, show
from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Floats,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Matrix,
    RMSNorm,
    Rope,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    Stage,
    StoreKV,
)

WEIGHTS_AT_ONCE = 1 << 20  # of a matrix, dequantised together


class ReferenceBackend:
    """Runs a stage with NumPy."""

    def __init__(self, stage: Stage, *, n_ctx: int) -> None:
        self.stage = stage
        self.notes: tuple[str, ...] = (
            "the reference backend is slow: it is there to compare with",
        )
        self._keys = [
            np.zeros((n_ctx, shape.n_kv_heads, shape.key_dim), np.float32) for shape in stage.caches
        ]
        self._values = [
            np.zeros((n_ctx, shape.n_kv_heads, shape.value_dim), np.float32)
            for shape in stage.caches
        ]

    def run(
        self,
        index: int,
        values: Mapping[str, Floats],
        start: int,
        n_outputs: int,
        observe: Observe | None = None,
    ) -> dict[str, Floats]:
        span = self.stage.spans[index]
        buffers = dict(values)
        product = observed(matmul, observe)
        for step in span.body:
            self._execute(step, buffers, start, product, observe)
        if span.head and n_outputs == 0:
            return {name: np.empty((0, width), np.float32) for name, width in span.outputs.items()}
        if span.head:
            buffers = {"x": buffers["x"][len(buffers["x"]) - n_outputs :]}
            for step in span.head:
                self._execute(step, buffers, start, product, observe)
        return {name: buffers[name] for name in span.outputs}

    def close(self) -> None:
        self._keys, self._values = [], []

    def _execute(
        self,
        step: Instruction,
        buffers: dict[str, Floats],
        start: int,
        product: Product,
        observe: Observe | None,
    ) -> None:
        match step:
            case RMSNorm():
                buffers[step.target] = rms_norm(buffers[step.source], step.weight, step.epsilon)
            case LayerNorm():
                buffers[step.target] = layer_norm(
                    buffers[step.source], step.weight, step.bias, step.epsilon
                )
            case MatMul():
                buffers[step.target] = product(buffers[step.source], step.matrix)
            case Show():
                show(step, buffers[step.source], observe)
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
                n_heads = self.stage.caches[step.layer].n_heads
                buffers[step.target] = attend(
                    buffers[step.queries],
                    self._keys[step.layer],
                    self._values[step.layer],
                    step,
                    n_heads=n_heads,
                    start=start,
                )
            case Gate():
                buffers[step.target] = gate(step.activation, buffers[step.gate], buffers[step.up])
            case Activate():
                buffers[step.target] = activate(step.activation, buffers[step.target])
            case Add():
                buffers[step.target] = buffers[step.target] + buffers[step.source]
            case Scale():
                buffers[step.target] = buffers[step.target] * np.float32(step.factor)
            case SoftCap():
                buffers[step.target] = softcap(buffers[step.target], step.cap)
            case Route():
                buffers[step.routes] = route(buffers[step.scores], step)
            case ExpertMatMul():
                buffers[step.target] = expert_matmul(
                    buffers[step.source], buffers[step.routes], step, product
                )
            case ExpertBias():
                experts = buffers[step.routes][:, : step.n_used].astype(np.intp)
                bias = step.biases[experts].reshape(len(experts), -1)
                buffers[step.target] = buffers[step.target] + bias
            case ExpertSum():
                weights = buffers[step.routes][:, step.n_used :, None]
                each = buffers[step.source].reshape(len(weights), step.n_used, -1)
                buffers[step.target] = (each * weights).sum(axis=1, dtype=np.float32)
            case SigmoidScale():
                buffers[step.target] = buffers[step.target] * sigmoid(buffers[step.gate])


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    groups = x.reshape(-1, len(weight))
    mean: Floats = np.mean(groups * groups, axis=1, keepdims=True, dtype=np.float32)
    normed: Floats = (groups / np.sqrt(mean + np.float32(epsilon)) * weight).reshape(x.shape)
    return normed


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, epsilon: float) -> Floats:
    groups = x.reshape(len(x), -1, weight.shape[-1])
    centred: Floats = groups - np.mean(groups, axis=2, keepdims=True, dtype=np.float32)
    variance: Floats = np.mean(centred * centred, axis=2, keepdims=True, dtype=np.float32)
    normed: Floats = centred / np.sqrt(variance + np.float32(epsilon)) * weight
    return (normed if bias is None else normed + bias).reshape(x.shape)


def sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) is infinite for very negative x: the result is 0
        y: Floats = np.float32(1) / (np.float32(1) + np.exp(-x))
    return y


def activate(name: str, x: Floats) -> Floats:
    y: npt.NDArray[np.floating]
    match name:
        case "silu":
            y = x * sigmoid(x)
        case "gelu":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
            y = 0.5 * x * (1 + np.tanh(inner))
        case "gelu_erf":
            erf = np.vectorize(math.erf, otypes=[np.float64])
            y = 0.5 * x * (1 + erf(x / math.sqrt(2)))
        case "relu":
            y = np.maximum(x, np.float32(0))
        case _:
            raise ValueError(f"no such activation: {name}")
    return y.astype(np.float32)


def gate(name: str, x: Floats, up: Floats) -> Floats:
    if name == "swiglu_oai":  # ggml: swiglu_oai, alpha 1.702, limit 7
        x, up = np.minimum(x, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
        y: Floats = x * sigmoid(np.float32(1.702) * x) * (up + 1)
        return y
    return activate(name, x) * up


def softcap(x: Floats, cap: float) -> Floats:
    y: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return y


def route(scores: Floats, step: Route) -> Floats:
    if step.gating == "sigmoid":
        chances = sigmoid(scores)
    elif step.gating == "softmax":
        chances = softmax(scores)
    else:
        chances = scores
    compared = chances if step.bias is None else chances + step.bias
    if step.n_groups > 1:
        compared = np.where(_in_best_groups(compared, step), compared, np.float32(-np.inf))
    experts = np.argsort(-compared, axis=1, kind="stable")[:, : step.n_used]
    weights = np.take_along_axis(chances, experts, axis=1)
    if step.gating == "chosen":
        weights = softmax(weights)
    if step.normalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    routes = [experts.astype(np.float32), weights * np.float32(step.scale)]
    return np.concatenate(routes, axis=1, dtype=np.float32)


def _in_best_groups(compared: Floats, step: Route) -> npt.NDArray[np.bool_]:
    groups = compared.reshape(len(compared), step.n_groups, -1)
    best = np.sort(groups, axis=2)[:, :, -step.n_compared :].sum(axis=2, dtype=np.float32)
    chosen = np.argsort(-best, axis=1, kind="stable")[:, : step.n_groups_used]
    allowed = np.zeros(best.shape, np.bool_)
    np.put_along_axis(allowed, chosen, True, axis=1)
    return np.repeat(allowed, groups.shape[2], axis=1)


def softmax(x: Floats) -> Floats:
    e: Floats = np.exp(x - x.max(axis=-1, keepdims=True))
    y: Floats = e / e.sum(axis=-1, keepdims=True)
    return y


def expert_matmul(x: Floats, routes: Floats, step: ExpertMatMul, product: Product) -> Floats:
    n_rows, n_columns = step.experts[0].n_rows, step.experts[0].n_columns
    experts = routes[:, : step.n_used].astype(np.intp)  # (n_tokens, n_used)
    sources = np.broadcast_to(x.reshape(len(x), -1, n_columns), (len(x), step.n_used, n_columns))
    y = np.empty((len(x), step.n_used, n_rows), np.float32)
    for expert in np.unique(experts):
        chosen = experts == expert
        y[chosen] = product(sources[chosen], step.experts[expert])
    return y.reshape(len(x), -1)


def matmul(x: Floats, matrix: Matrix) -> Floats:
    y = np.empty((len(x), matrix.n_rows), np.float32)
    step = max(1, WEIGHTS_AT_ONCE // matrix.n_columns)
    for first in range(0, matrix.n_rows, step):
        band = slice(first, first + step)
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
    weights = attention_weights(queries, keys, step, n_heads=n_heads, start=start)
    v = np.repeat(values[: start + len(queries)], n_heads // values.shape[1], axis=1)
    mixed: Floats = np.einsum("htp,phd->thd", weights, v).reshape(len(queries), -1)
    return mixed


def attention_weights(
    queries: Floats, keys: Floats, step: Attend, *, n_heads: int, start: int
) -> Floats:
    """How much of each position's value every query takes: (n_heads, n_tokens, end)."""
    n_tokens, end = len(queries), start + len(queries)
    q = queries.reshape(n_tokens, n_heads, -1)
    k = np.repeat(keys[:end], n_heads // keys.shape[1], axis=1)  # (end, n_heads, key_dim)
    scores = np.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * np.float32(step.scale)
    if step.softcap:
        scores = softcap(scores, step.softcap)
    here, there = np.arange(start, end)[:, None], np.arange(end)[None, :]
    hidden = there > here
    if step.window:
        hidden |= there <= here - step.window
    scores[:, hidden] = -np.inf
    if step.sinks is not None:
        sinks = np.broadcast_to(step.sinks[:, None, None], (n_heads, n_tokens, 1))
        scores = np.concatenate([scores, sinks], axis=2)
    weights: Floats = softmax(scores)[:, :, :end]
    return weights
