"""gpt-oss: attention with sinks, a window on every other layer; experts with biases.

A sink is a score of each head's own in the softmax, of no value. The order follows ggml's graph
(llama.cpp, src/models/openai-moe.cpp).
"""

from __future__ import annotations

from dataclasses import replace

from runtime.config import ModelConfig
from runtime.decoders.blocks import Blocks
from runtime.decoders.experts import read_experts
from runtime.decoders.windows import layer_windows
from runtime.program import Program
from runtime.rope import rope_table
from runtime.weights import Weights

PERIOD = 2  # the last layer of each has no window


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gpt-oss: halves turn; the softmax is of the scores of those chosen."""
    blocks = Blocks(weights, config)
    # The published models say `truncate: false`, for which llama.cpp's files have no key.
    truncate = config.own.flag("rope.scaling.yarn_truncate", default=False)
    scaling = replace(config.rope_scaling, truncate=truncate)
    table = rope_table(config, interleaved=False, scaling=scaling)
    windows = layer_windows(config, period=PERIOD)
    experts = replace(read_experts(config, normalize=False), gating="chosen")

    def layer(index: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.rope(table)
        sinks = weights.vector(f"blk.{index}.attn_sinks.weight", config.n_heads)
        blocks.attend(window=windows[index], sinks=sinks)
        blocks.residual()
        blocks.norm("post_attention_norm")
        blocks.moe_ffn(experts, "swiglu_oai")
        blocks.residual()

    return blocks.program(layer)
