"""Gemma 1, 2 and 3: the embedding times sqrt(dim), GELU, and norms after as well as before.

The order follows ggml's graphs (llama.cpp, src/models/gemma.cpp, gemma2.cpp, gemma3.cpp).
"""

from __future__ import annotations

import math

from runtime.config import ModelConfig, RopeScaling
from runtime.decoders.blocks import Blocks
from runtime.decoders.windows import layer_windows
from runtime.program import Program, RopeTable, SoftCap
from runtime.rope import rope_table
from runtime.weights import Weights

# The largest of each family scales queries by another size; nothing but its depth tells it.
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62

GEMMA2_WINDOW, GEMMA2_SCORE_CAP, GEMMA2_LOGIT_CAP = 4096, 50.0, 30.0  # where a file is silent
GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6  # the last layer of each has no window
GEMMA3_LOCAL_BASE = 10000.0


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gemma: norms before attention and feed-forward only."""
    blocks = Blocks(weights, config)
    table = rope_table(config, interleaved=False)

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.rope(table)
        blocks.attend()
        blocks.residual()
        blocks.norm("ffn_norm")
        blocks.gated_ffn("gelu")
        blocks.residual()

    return blocks.program(layer, embedding_scale=math.sqrt(config.dim))


def build_gemma2(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gemma2: soft caps on scores and logits; a window in every other layer."""
    local = config.own.real("rope.freq_base_swa", low=1.0, high=1e12, default=config.rope_base)
    return _build(
        weights,
        config,
        windows=layer_windows(
            config, period=GEMMA2_PERIOD, window=config.sliding_window or GEMMA2_WINDOW
        ),
        local=rope_table(config, interleaved=False, base=local),
        scale=_query_scale(config, GEMMA2_27B_LAYERS),
        score_cap=_cap(config, "attn_logit_softcapping", GEMMA2_SCORE_CAP),
        logit_cap=_cap(config, "final_logit_softcapping", GEMMA2_LOGIT_CAP),
    )


def build_gemma3(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gemma3: norms of q's and k's heads; five layers with a window, then one without.

    Layers with a window have positions of their own, which are not stretched.
    """
    base = config.own.real("rope.freq_base_swa", low=1.0, high=1e12, default=GEMMA3_LOCAL_BASE)
    return _build(
        weights,
        config,
        windows=layer_windows(config, period=GEMMA3_PERIOD),
        local=rope_table(config, interleaved=False, base=base, scaling=RopeScaling()),
        scale=_query_scale(config, GEMMA3_27B_LAYERS),
        logit_cap=_cap(config, "final_logit_softcapping", 0.0),
        head_norms=True,
    )


def _build(
    weights: Weights,
    config: ModelConfig,
    *,
    windows: tuple[int, ...],
    local: RopeTable,  # of layers with a window
    scale: float,
    score_cap: float = 0.0,
    logit_cap: float = 0.0,
    head_norms: bool = False,
) -> Program:
    blocks = Blocks(weights, config)
    everywhere = rope_table(config, interleaved=False)

    def layer(index: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        if head_norms:
            blocks.head_norm("attn_q_norm", "q", config.key_dim)
            blocks.head_norm("attn_k_norm", "k", config.key_dim)
        blocks.rope(local if windows[index] else everywhere)
        blocks.attend(window=windows[index], scale=scale, softcap=score_cap)
        blocks.norm("post_attention_norm", "delta", "delta")
        blocks.residual()
        blocks.norm("ffn_norm")
        blocks.gated_ffn("gelu")
        blocks.norm("post_ffw_norm", "delta", "delta")
        blocks.residual()

    finish = [SoftCap("logits", logit_cap)] if logit_cap else []
    return blocks.program(layer, embedding_scale=math.sqrt(config.dim), finish=finish)


def _query_scale(config: ModelConfig, n_layers_27b: int) -> float:
    is_27b = config.n_layers == n_layers_27b
    divisor = config.dim / config.n_heads if is_27b else config.key_dim
    usual = 1 / math.sqrt(divisor)
    return config.own.real("attention.scale", low=1e-6, high=1e6, default=usual)


def _cap(config: ModelConfig, key: str, default: float) -> float:
    return config.own.real(key, low=0.0, high=1e6, default=default)
