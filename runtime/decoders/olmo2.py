"""OLMo 2 and 3: norms after attention and feed-forward, none before; q and k normed as a whole.

The order follows ggml's graph (llama.cpp, src/models/olmo2.cpp).
"""

from __future__ import annotations

from runtime.config import ModelConfig, RopeScaling
from runtime.decoders.blocks import Blocks
from runtime.decoders.windows import layer_windows
from runtime.program import Program
from runtime.rope import rope_table
from runtime.weights import Weights

PERIOD = 4  # in OLMo 3 the last layer of each has no window


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """Layers with a window (OLMo 3) have positions that are not stretched."""
    blocks = Blocks(weights, config)
    windows = layer_windows(config, period=PERIOD)
    everywhere = rope_table(config, interleaved=False)
    local = rope_table(config, interleaved=False, scaling=RopeScaling())

    def layer(index: int) -> None:
        blocks.qkv("x")
        blocks.norm("attn_q_norm", "q", "q")
        blocks.norm("attn_k_norm", "k", "k")
        blocks.rope(local if windows[index] else everywhere)
        blocks.attend(window=windows[index])
        blocks.norm("post_attention_norm", "delta", "delta")
        blocks.residual()
        blocks.gated_ffn(source="x")
        blocks.norm("post_ffw_norm", "delta", "delta")
        blocks.residual()

    return blocks.program(layer)
