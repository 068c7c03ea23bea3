"""StableLM: norms with mean and bias, rotary of a part of each head, gated feed-forward.

The order follows ggml's graph (llama.cpp, src/models/stablelm.cpp). Without a norm of its own the
feed-forward reads what attention reads (StableLM 2 12B).
"""

from __future__ import annotations

from runtime.config import ModelConfig
from runtime.decoders.blocks import Blocks
from runtime.program import Program
from runtime.rope import rope_table
from runtime.weights import Weights


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    blocks = Blocks(weights, config, norm="layer")
    table = rope_table(config, interleaved=False)

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.head_norms("attn_q_norm", "q", config.n_heads)
        blocks.head_norms("attn_k_norm", "k", config.n_kv_heads)
        blocks.rope(table)
        blocks.attend()
        blocks.residual()
        if blocks.has("ffn_norm"):
            blocks.norm("ffn_norm")
        blocks.gated_ffn()
        blocks.residual()

    return blocks.program(layer)
