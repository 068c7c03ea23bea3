"""Llama-like decoders: norm, grouped-query attention with rope, norm, gated feed-forward.

The order follows ggml's llama and qwen graphs (llama.cpp, src/models/llama.cpp, qwen2.cpp,
qwen3.cpp).
"""

from __future__ import annotations

from runtime.config import ModelConfig
from runtime.decoders.blocks import Blocks
from runtime.program import Program
from runtime.rope import rope_factors, rope_table
from runtime.weights import Weights


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """llama: pairs of neighbours turn, as llama.cpp's converter reorders the rows of q and k."""
    return _build(weights, config, n_ctx, interleaved=True)


def build_phi3(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """phi3: one tensor of q, k and v, one of gate and up; halves of a part of each head turn.

    A window in the file counts, as in transformers (modeling_phi3.py); llama.cpp leaves it out.
    """
    return _build(weights, config, n_ctx, interleaved=False)


def build_qwen(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """qwen2 (biases on q, k, v) and qwen3 (norms of q's and k's heads): halves turn."""
    return _build(weights, config, n_ctx, interleaved=False)


def _build(weights: Weights, config: ModelConfig, n_ctx: int, *, interleaved: bool) -> Program:
    blocks = Blocks(weights, config)
    factors = rope_factors(weights, config, n_ctx)
    table = rope_table(config, interleaved=interleaved, factors=factors)

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.head_norm("attn_q_norm", "q", config.key_dim)
        blocks.head_norm("attn_k_norm", "k", config.key_dim)
        blocks.rope(table)
        blocks.attend(window=config.sliding_window)
        blocks.residual()
        blocks.norm("ffn_norm")
        blocks.gated_ffn()
        blocks.residual()

    return blocks.program(layer)
