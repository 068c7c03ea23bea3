"""Decoders with a plain feed-forward, and norms with mean and bias: GPT-2, GPT-NeoX, StarCoder2.

The order follows ggml's graphs (llama.cpp, src/models/gpt2.cpp, gptneox.cpp, starcoder2.cpp).
"""

from __future__ import annotations

from gguf_tools.errors import ContextFullError, printable
from runtime.config import ModelConfig
from runtime.decoders.blocks import Blocks
from runtime.program import Program
from runtime.rope import rope_table
from runtime.weights import Weights

# What hidden_activation may say: names of config.json, and ours. It is not usual in files: where
# it is absent a family's own form counts, though llama.cpp computes "gelu" for all of them.
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def build_gpt2(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gpt2: a learned vector for each position; ContextFullError if there are fewer than n_ctx."""
    n_positions = config.n_ctx_train
    if n_ctx > n_positions:
        raise ContextFullError(
            f"{printable(weights.file.path)}: this model has learned {n_positions:,} positions, "
            f"and a context of {n_ctx:,} tokens was asked for; use --ctx {n_positions} or less"
        )
    blocks = Blocks(weights, config, norm="layer")
    positions = weights.matrix("position_embd.weight", n_positions, config.dim)
    activation = _activation(config, "gelu_new")

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.attend()
        blocks.residual()
        blocks.norm("ffn_norm")
        blocks.plain_ffn(activation)
        blocks.residual()

    return blocks.program(layer, positions=positions)


def build_starcoder2(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """starcoder2: a window in the file counts, as in transformers (modeling_starcoder2.py)."""
    blocks = Blocks(weights, config, norm="layer")
    table = rope_table(config, interleaved=False)
    activation = _activation(config, "gelu_new")

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.rope(table)
        blocks.attend(window=config.sliding_window)
        blocks.residual()
        blocks.norm("ffn_norm")
        blocks.plain_ffn(activation)
        blocks.residual()

    return blocks.program(layer)


def build_gptneox(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """gptneox: the feed-forward reads the layer's input, or what attention has been added to.

    GELU is with erf unless the file says otherwise, as in every published model but the 20B.
    """
    blocks = Blocks(weights, config, norm="layer")
    table = rope_table(config, interleaved=False)
    parallel = config.own.flag("use_parallel_residual", default=True)
    activation = _activation(config, "gelu")

    def layer(_: int) -> None:
        blocks.norm("attn_norm")
        blocks.qkv()
        blocks.rope(table)
        if parallel:
            blocks.attend(target="attention")
            blocks.norm("ffn_norm")
            blocks.residual("attention")
        else:
            blocks.attend()
            blocks.residual()
            blocks.norm("ffn_norm")
        blocks.plain_ffn(activation)
        blocks.residual()

    return blocks.program(layer)


def _activation(config: ModelConfig, silent: str) -> str:
    name = config.own.text("hidden_activation", default=silent)
    if name not in ACTIVATIONS:
        raise config.own.refuse("hidden_activation", f"one of {', '.join(ACTIVATIONS)}", name)
    return ACTIVATIONS[name]
