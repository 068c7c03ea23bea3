"""Llama-like decoders: norm, grouped-query attention with rope, norm, gated feed-forward.

The order follows ggml's graphs (llama.cpp, src/models/llama.cpp, qwen2.cpp, qwen3.cpp,
qwen2moe.cpp, qwen3moe.cpp, smollm3.cpp, granite.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from runtime.config import MAX_SIZE, ModelConfig
from runtime.decoders.blocks import Blocks, Experts
from runtime.decoders.experts import has_experts, read_experts
from runtime.decoders.windows import layer_windows
from runtime.program import Program, Scale
from runtime.rope import rope_factors, rope_table
from runtime.weights import Weights

NO_WINDOWS = 1  # a period: one layer without a window comes after none with
SMOLLM3_PERIOD = 4  # the last layer of each has no rotary positions


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """llama: pairs of neighbours turn, as llama.cpp's converter reorders the rows of q and k.

    Mixtral is a llama with experts.
    """
    experts = None
    if has_experts(config):
        experts = replace(read_experts(config, normalize=True), ffn_dim=config.ffn_dim)
    return _build(weights, config, n_ctx, interleaved=True, experts=experts)


def build_phi3(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """phi3: one tensor of q, k and v, one of gate and up; halves of a part of each head turn.

    A window in the file counts, as in transformers (modeling_phi3.py); llama.cpp leaves it out.
    """
    return _build(weights, config, n_ctx, interleaved=False)


def build_qwen2(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """qwen2: biases on q, k, v; halves turn."""
    return _build(weights, config, n_ctx, windows=layer_windows(config, period=NO_WINDOWS))


def build_qwen3(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """qwen3: norms of q's and k's heads; halves turn."""
    windows = layer_windows(config, period=NO_WINDOWS)
    return _build(weights, config, n_ctx, windows=windows, head_norms=True)


def build_qwen2moe(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """qwen2moe: as qwen2, with experts and one more that all tokens use, behind a gate."""
    width = config.own.integer(
        "expert_shared_feed_forward_length", low=1, high=MAX_SIZE, default=config.ffn_dim
    )
    experts = read_experts(config, normalize=False)
    experts = replace(experts, shared_ffn_dim=width, shared_gate=True)
    windows = layer_windows(config, period=NO_WINDOWS)
    return _build(weights, config, n_ctx, windows=windows, experts=experts)


def build_qwen3moe(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """qwen3moe: as qwen3, with experts."""
    windows = layer_windows(config, period=NO_WINDOWS)
    experts = read_experts(config, normalize=True)
    return _build(weights, config, n_ctx, windows=windows, head_norms=True, experts=experts)


def build_smollm3(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """smollm3: as llama, but every fourth layer knows no positions."""
    rotating = [(layer + 1) % SMOLLM3_PERIOD != 0 for layer in range(config.n_layers)]
    return _build(weights, config, n_ctx, interleaved=True, rotating=rotating)


def build_granite(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """granite: as llama, with factors on the embedding, the scores, what is added, the logits."""

    def factor(key: str, default: float | None = None) -> float:
        return config.own.real(key, low=1e-9, high=1e9, default=default)

    # llama.cpp takes this key as a switch for positions.
    rotates = config.own.flag("rope.scaling.finetuned", default=True)
    usual = 1 / math.sqrt(config.key_dim)
    return _build(
        weights,
        config,
        n_ctx,
        interleaved=True,
        rotating=[rotates] * config.n_layers,
        score_scale=factor("attention.scale", usual),
        embedding_scale=factor("embedding_scale", 1.0),
        residual_scale=factor("residual_scale", 1.0),
        logit_scale=1 / factor("logit_scale"),
    )


def _build(
    weights: Weights,
    config: ModelConfig,
    n_ctx: int,
    *,
    interleaved: bool = False,
    windows: Sequence[int] | None = None,  # of each layer; None: the model's on all
    rotating: Sequence[bool] | None = None,  # which layers have positions; None: all
    head_norms: bool = False,
    experts: Experts | None = None,
    score_scale: float | None = None,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> Program:
    blocks = Blocks(weights, config)
    factors = rope_factors(weights, config, n_ctx)
    table = rope_table(config, interleaved=interleaved, factors=factors)

    def add() -> None:
        if residual_scale != 1.0:
            blocks.emit(Scale("delta", residual_scale))
        blocks.residual()

    def layer(index: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        if head_norms:
            blocks.head_norm("attn_q_norm", "q", config.key_dim)
            blocks.head_norm("attn_k_norm", "k", config.key_dim)
        if rotating is None or rotating[index]:
            blocks.rope(table)
        window = config.sliding_window if windows is None else windows[index]
        blocks.attend(window=window, scale=score_scale)
        add()
        blocks.norm("ffn_norm")
        if experts is None:
            blocks.gated_ffn()
        else:
            blocks.moe_ffn(experts)
        add()

    finish = [Scale("logits", logit_scale)] if logit_scale != 1.0 else []
    return blocks.program(layer, embedding_scale=embedding_scale, finish=finish)
