"""Llama-like decoders: norm, grouped-query attention with rope, norm, gated feed-forward.

The order follows ggml's llama graph (llama.cpp, src/models/llama.cpp).
"""

from __future__ import annotations

import math

from runtime.config import ModelConfig
from runtime.program import (
    Add,
    AddBias,
    Attend,
    Gate,
    Instruction,
    KVShape,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    StoreKV,
)
from runtime.rope import rope_table
from runtime.weights import Weights


def build(weights: Weights, config: ModelConfig) -> Program:
    """Emit the program; what the tensors lack is noted in `weights` for one error."""
    c = config
    q_width, k_width, v_width = (
        c.n_heads * c.key_dim,
        c.n_kv_heads * c.key_dim,
        c.n_kv_heads * c.value_dim,
    )
    buffers = {
        "x": c.dim,
        "normed": c.dim,
        "q": q_width,
        "k": k_width,
        "v": v_width,
        "attended": c.n_heads * c.value_dim,
        "gate": c.ffn_dim,
        "up": c.ffn_dim,
        "delta": c.dim,
        "logits": c.n_vocab,
    }
    factors = weights.optional_vector("rope_freqs.weight", c.rope_dims // 2)
    table = rope_table(c, interleaved=True, factors=factors)
    embedding = weights.matrix("token_embd.weight", c.n_vocab, c.dim)
    layers = tuple(_layer(weights, c, table, i) for i in range(c.n_layers))
    separate = weights.has("output.weight")
    output = weights.matrix("output.weight", c.n_vocab, c.dim) if separate else embedding
    head: tuple[Instruction, ...] = (
        RMSNorm("x", "normed", weights.vector("output_norm.weight", c.dim), c.norm_epsilon),
        MatMul("normed", "logits", output),
    )
    cache = KVShape(c.n_heads, c.n_kv_heads, c.key_dim, c.value_dim)
    return Program(buffers, embedding, layers, head, (cache,) * c.n_layers)


def _layer(
    weights: Weights, c: ModelConfig, table: RopeTable, layer: int
) -> tuple[Instruction, ...]:
    block = f"blk.{layer}"
    steps: list[Instruction] = []

    def norm(name: str) -> None:
        weight = weights.vector(f"{block}.{name}.weight", c.dim)
        steps.append(RMSNorm("x", "normed", weight, c.norm_epsilon))

    def linear(name: str, source: str, target: str, n_rows: int, n_columns: int) -> None:
        steps.append(
            MatMul(source, target, weights.matrix(f"{block}.{name}.weight", n_rows, n_columns))
        )
        bias = weights.optional_vector(f"{block}.{name}.bias", n_rows)
        if bias is not None:
            steps.append(AddBias(target, bias))

    norm("attn_norm")
    linear("attn_q", "normed", "q", c.n_heads * c.key_dim, c.dim)
    linear("attn_k", "normed", "k", c.n_kv_heads * c.key_dim, c.dim)
    linear("attn_v", "normed", "v", c.n_kv_heads * c.value_dim, c.dim)
    steps.append(Rope("q", c.n_heads, c.key_dim, table))
    steps.append(Rope("k", c.n_kv_heads, c.key_dim, table))
    steps.append(StoreKV("k", "v", layer))
    steps.append(Attend("q", "attended", layer, 1 / math.sqrt(c.key_dim), c.sliding_window))
    linear("attn_output", "attended", "delta", c.dim, c.n_heads * c.value_dim)
    steps.append(Add("delta", "x"))
    norm("ffn_norm")
    linear("ffn_gate", "normed", "gate", c.ffn_dim, c.dim)
    linear("ffn_up", "normed", "up", c.ffn_dim, c.dim)
    steps.append(Gate("gate", "up", "gate"))
    linear("ffn_down", "gate", "delta", c.dim, c.ffn_dim)
    steps.append(Add("delta", "x"))
    return tuple(steps)
