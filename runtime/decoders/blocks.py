"""The parts that decoders are put together from: norms, projections, attention, feed-forward.

A `Blocks` collects instructions and the buffers they need. Its methods emit one part each, from
config and the tensors that are present; a decoder (one file per family) says in which order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runtime.config import ModelConfig
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
    KVShape,
    LayerNorm,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    Route,
    SigmoidScale,
    StoreKV,
)
from runtime.weights import Weights


@dataclass(frozen=True)
class Experts:
    """The mixture of a feed-forward: how many, how they are chosen."""

    n_experts: int
    n_used: int
    ffn_dim: int  # of one expert
    normalize: bool
    gating: str = "softmax"
    scale: float = 1.0
    bias: Floats | None = None
    n_groups: int = 1  # that experts lie in: see program.Route
    n_groups_used: int = 1
    n_compared: int = 1
    shared_ffn_dim: int = 0  # of the expert that every token uses; 0: there is none
    shared_gate: bool = False  # the shared expert has one of its own


class Blocks:
    """Emits parts of a decoder; what the tensors lack is noted in `weights` for one error."""

    def __init__(self, weights: Weights, config: ModelConfig, *, norm: str = "rms") -> None:
        """`norm` is "rms", or "layer": with mean and optional bias."""
        self.weights, self.config = weights, config
        self.layer_norms = norm == "layer"
        self.buffers = {"x": config.dim, "normed": config.dim, "delta": config.dim}
        self.prefix = ""
        self.layer = 0
        self._steps: list[Instruction] = []

    # --- the frame -----------------------------------------------------------------------

    def program(
        self,
        emit_layer: Callable[[int], None],
        *,
        embedding_scale: float = 1.0,
        positions: Matrix | None = None,
        finish: Sequence[Instruction] = (),
    ) -> Program:
        """All layers, each emitted by `emit_layer`, between embedding and head.

        The head is `output.weight`, or the embedding where there is none; `finish` is what is done
        to "logits" after it.
        """
        c = self.config
        embedding = self.weights.matrix("token_embd.weight", c.n_vocab, c.dim)
        layers = []
        for self.layer in range(c.n_layers):
            self.prefix, self._steps = f"blk.{self.layer}.", []
            emit_layer(self.layer)
            layers.append(tuple(self._steps))
        self.prefix, self._steps = "", []
        self.norm("output_norm")
        separate = self.weights.has("output.weight")
        output = self.weights.matrix("output.weight", c.n_vocab, c.dim) if separate else embedding
        self._matmul(output, "normed", "logits")
        self._bias("output", "logits", c.n_vocab)
        head = (*self._steps, *finish)
        cache = KVShape(c.n_heads, c.n_kv_heads, c.key_dim, c.value_dim)
        return Program(
            buffers=self.buffers,
            embedding=embedding,
            layers=tuple(layers),
            head=head,
            caches=(cache,) * c.n_layers,
            embedding_scale=embedding_scale,
            positions=positions,
        )

    def emit(self, *steps: Instruction) -> None:
        self._steps += steps

    def buffer(self, name: str, width: int) -> str:
        """Room for `width` numbers per token under `name`; the widest of several wishes."""
        self.buffers[name] = max(width, self.buffers.get(name, 0))
        return name

    def has(self, name: str) -> bool:
        """Whether this layer has such a matrix or norm."""
        return self.weights.has(f"{self.prefix}{name}.weight")

    # --- parts ---------------------------------------------------------------------------

    def norm(self, name: str, source: str = "x", target: str = "normed") -> None:
        full, bias_name = f"{self.prefix}{name}.weight", f"{self.prefix}{name}.bias"
        weight = self.weights.vector(full, self.buffers[source])
        epsilon = self.config.norm_epsilon
        if self.layer_norms:
            bias = self.weights.optional_vector(bias_name, len(weight))
            self.emit(LayerNorm(source, target, weight, bias, epsilon, full, bias_name))
        else:
            self.emit(RMSNorm(source, target, weight, epsilon, full))

    def head_norm(self, name: str, target: str, head_dim: int) -> None:
        """A norm of every head by itself, all with the same weights."""
        full = f"{self.prefix}{name}.weight"
        weight = self.weights.vector(full, head_dim)
        self.emit(RMSNorm(target, target, weight, self.config.norm_epsilon, full))

    def head_norms(self, name: str, target: str, n_heads: int) -> None:
        """A norm of every head by itself, each with weights of its own; nothing without tensor."""
        full, head_dim = f"{self.prefix}{name}.weight", self.buffers[target] // n_heads
        if self.weights.has(full):
            weight = self.weights.table(full, n_heads, head_dim)
            self.emit(LayerNorm(target, target, weight, None, self.config.norm_epsilon, full))

    def linear(
        self, name: str, source: str, target: str, n_rows: int, n_columns: int | None = None
    ) -> None:
        """target = source times a matrix, plus its bias where the file has one.

        The matrix takes `n_columns` of source, all by default.
        """
        columns = n_columns or self.buffers[source]
        matrix = self.weights.matrix(f"{self.prefix}{name}.weight", n_rows, columns)
        self._matmul(matrix, source, target)
        self._bias(name, target, n_rows)

    def split_linear(
        self, name: str, source: str, targets: Sequence[str], sizes: Sequence[int]
    ) -> None:
        """As `linear`, for a matrix that holds several, one after the other."""
        full = f"{self.prefix}{name}"
        parts = self.weights.split_matrix(f"{full}.weight", sizes, self.buffers[source])
        for target, matrix in zip(targets, parts, strict=True):
            self._matmul(matrix, source, target)
        bias = self.weights.optional_vector(f"{full}.bias", sum(sizes))
        if bias is not None:
            first = 0
            for target, size in zip(targets, sizes, strict=True):
                part = bias[first : first + size]
                self.emit(AddBias(target, part, f"{full}.bias", first))
                first += size

    def qkv(self, source: str = "normed") -> None:
        """Queries, keys and values, from three tensors or from a fused one."""
        c = self.config
        sizes = (c.n_heads * c.key_dim, c.n_kv_heads * c.key_dim, c.n_kv_heads * c.value_dim)
        if self.weights.has(f"{self.prefix}attn_qkv.weight"):
            self.split_linear("attn_qkv", source, "qkv", sizes)
            for letter, size in zip("qkv", sizes, strict=True):  # older files have them apart
                self._bias(f"attn_{letter}", letter, size)
            return
        for letter, size in zip("qkv", sizes, strict=True):
            self.linear(f"attn_{letter}", source, letter, size)

    def rope(self, table: RopeTable) -> None:
        c = self.config
        self.emit(Rope("q", c.n_heads, c.key_dim, table))
        self.emit(Rope("k", c.n_kv_heads, c.key_dim, table))

    def attend(
        self,
        target: str = "delta",
        *,
        window: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Floats | None = None,
    ) -> None:
        """Attention of q, k, v and its output projection."""
        c = self.config
        attended = self.buffer("attended", c.n_heads * c.value_dim)
        self.emit(StoreKV("k", "v", self.layer))
        factor = 1 / math.sqrt(c.key_dim) if scale is None else scale
        self.emit(Attend("q", attended, self.layer, factor, window, softcap, sinks))
        self.linear("attn_output", attended, target, c.dim)

    def gated_ffn(
        self,
        activation: str = "silu",
        *,
        target: str = "delta",
        source: str = "normed",
        suffix: str = "",
        ffn_dim: int | None = None,
    ) -> None:
        """target = down(activation(gate) * up); gate and up from one tensor where they are fused.

        Fused, `ffn_up` has twice the rows, the gate's first (phi3).
        """
        width = ffn_dim or self.config.ffn_dim
        gate, up, down = (f"ffn_{part}{suffix}" for part in ("gate", "up", "down"))
        if self.weights.has(f"{self.prefix}{gate}.weight"):
            self.linear(gate, source, "gate", width)
            self.linear(up, source, "up", width)
        else:
            self.split_linear(up, source, ("gate", "up"), (width, width))
        self.emit(Gate("gate", "up", "gate", activation))
        self.linear(down, "gate", target, self.config.dim, width)

    def plain_ffn(self, activation: str, *, target: str = "delta", source: str = "normed") -> None:
        """target = down(activation(up))"""
        self.linear("ffn_up", source, "up", self.config.ffn_dim)
        self.emit(Activate("up", activation))
        self.linear("ffn_down", "up", target, self.config.dim)

    def moe_ffn(self, experts: Experts, activation: str = "silu") -> None:
        """delta = the chosen experts' feed-forwards, weighted, and the shared one's."""
        e, c, n = experts, self.config, experts.n_used
        self.linear("ffn_gate_inp", "normed", "router", e.n_experts)
        routes = self.buffer("routes", 2 * n)
        groups = (e.n_groups, e.n_groups_used, e.n_compared)
        self.emit(Route("router", routes, n, e.gating, e.normalize, e.scale, e.bias, *groups))
        gate, up = (
            self.buffer("expert_gate", n * e.ffn_dim),
            self.buffer("expert_up", n * e.ffn_dim),
        )
        out = self.buffer("expert_out", n * c.dim)

        def product(part: str, source: str, target: str, n_rows: int, n_columns: int) -> None:
            name = f"{self.prefix}ffn_{part}_exps"
            matrices = self.weights.experts(f"{name}.weight", e.n_experts, n_rows, n_columns)
            self.emit(ExpertMatMul(source, target, routes, n, matrices, f"{name}.weight"))
            if self.weights.has(f"{name}.bias"):
                biases = self.weights.table(f"{name}.bias", e.n_experts, n_rows)
                self.emit(ExpertBias(target, routes, n, biases, f"{name}.bias"))

        if self.weights.has(f"{self.prefix}ffn_gate_up_exps.weight"):
            self._fused_experts(e, routes, gate, up)
        else:
            product("gate", "normed", gate, e.ffn_dim, c.dim)
            product("up", "normed", up, e.ffn_dim, c.dim)
        self.emit(Gate(gate, up, gate, activation))
        product("down", gate, out, c.dim, e.ffn_dim)
        self.emit(ExpertSum(out, routes, n, "delta"))
        if e.shared_ffn_dim:
            shared = self.buffer("shared", c.dim)
            if e.shared_gate:  # how much of it a token gets: one number
                row = self.weights.row(f"{self.prefix}ffn_gate_inp_shexp.weight", c.dim)
                self._matmul(row, "normed", "shared_gate")
            width = e.shared_ffn_dim
            self.gated_ffn(activation, target=shared, suffix="_shexp", ffn_dim=width)
            if e.shared_gate:
                self.emit(SigmoidScale("shared_gate", shared))
            self.emit(Add(shared, "delta"))

    def residual(self, source: str = "delta") -> None:
        self.emit(Add(source, "x"))

    # --- helpers -------------------------------------------------------------------------

    def _matmul(self, matrix: Matrix, source: str, target: str) -> None:
        self.buffer(target, matrix.n_rows)
        self.emit(MatMul(source, target, matrix))

    def _bias(self, name: str, target: str, size: int) -> None:
        full = f"{self.prefix}{name}.bias"
        bias = self.weights.optional_vector(full, size)
        if bias is not None:
            self.emit(AddBias(target, bias, full))

    def _fused_experts(self, experts: Experts, routes: str, gate: str, up: str) -> None:
        """The experts' gate and up from one tensor, each expert's gate before its up."""
        e, name = experts, f"{self.prefix}ffn_gate_up_exps.weight"
        whole = self.weights.experts(name, e.n_experts, 2 * e.ffn_dim, self.config.dim)
        for target, first in ((gate, 0), (up, e.ffn_dim)):
            halves = tuple(
                replace(matrix, n_rows=e.ffn_dim, data=matrix.data[first : first + e.ffn_dim])
                for matrix in whole
            )
            self.emit(ExpertMatMul("normed", target, routes, e.n_used, halves, name))
