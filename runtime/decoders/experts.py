"""What a file says about its experts, checked."""

from __future__ import annotations

from runtime.config import MAX_SIZE, ModelConfig
from runtime.decoders.blocks import Experts

MAX_EXPERTS = 4096


def read_experts(config: ModelConfig, *, normalize: bool) -> Experts:
    """The experts of a model whose layers all have them; FormatError names the wrong key.

    `normalize` is what the architecture does where the file does not say.
    """
    own = config.own
    n_experts = own.integer("expert_count", low=1, high=MAX_EXPERTS)
    n_used = own.integer("expert_used_count", low=1, high=n_experts)
    # As llama.cpp has it: without a size of their own, those chosen share the whole.
    silent = max(config.ffn_dim // n_used, 1)
    return Experts(
        n_experts=n_experts,
        n_used=n_used,
        ffn_dim=own.integer("expert_feed_forward_length", low=1, high=MAX_SIZE, default=silent),
        normalize=own.flag("expert_weights_norm", default=normalize),
    )


def has_experts(config: ModelConfig) -> bool:
    """Whether there are any: one or none is a plain feed-forward, as llama.cpp takes it."""
    return config.own.integer("expert_count", low=0, high=MAX_EXPERTS, default=0) > 1
