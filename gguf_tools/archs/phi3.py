"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: `phi3`.

    norm, attention (rotary, of a part of each head in Phi-4-mini), add, norm, gated MLP, add

Q, k and v are one tensor, and so are gate and up, the gate first: both stay as they are. The
rotary divisors of longrope, one set within the original context and one beyond it, become tensors.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import (
    Architecture,
    GeneratedTensor,
    MetadataRule,
    ModelFacts,
    TensorRule,
)
from gguf_tools.archs.config import MAX_CONTEXT, HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    layer_rules,
    read_common,
)
from gguf_tools.archs.rope import Rotary, long_factors, short_factors

ORIGINAL_CONTEXT = 4096  # what transformers assumes
ROTARY = Rotary(kinds=("default", "longrope"), part=1.0, original_context=ORIGINAL_CONTEXT)


def read_facts(config: HFConfig) -> ModelFacts:
    facts = read_common(config, n_ctx=4096, epsilon=1e-5, tied=False, rotary=ROTARY)
    if facts.n_heads * facts.head_dim != facts.dim:
        raise config.refuse("head_dim", f"{facts.dim} / {facts.n_heads}", facts.head_dim)
    window = None
    if config.has("sliding_window"):
        window = config.integer("sliding_window", low=0, high=MAX_CONTEXT)
    original = config.integer(
        "original_max_position_embeddings", low=2, high=MAX_CONTEXT, default=ORIGINAL_CONTEXT
    )
    return replace(
        facts,
        # 0 says that there is none: by that llama.cpp tells Phi-4 from the others.
        sliding_window=window or 0,
        more_sizes={
            "qkv": (facts.n_heads + 2 * facts.n_kv_heads) * facts.head_dim,
            "gate_up": 2 * facts.ffn_dim,
        },
        more={
            "original_context": facts.rope.original_context or original,
            "rope_dims": facts.rope.n_dims,
        },
    )


ARCHITECTURE = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            TensorRule("input_layernorm.weight", "attn_norm.weight", ("dim",)),
            TensorRule("self_attn.qkv_proj.weight", "attn_qkv.weight", ("qkv", "dim")),
            TensorRule("self_attn.o_proj.weight", "attn_output.weight", ("dim", "q")),
            TensorRule("post_attention_layernorm.weight", "ffn_norm.weight", ("dim",)),
            TensorRule("mlp.gate_up_proj.weight", "ffn_up.weight", ("gate_up", "dim")),
            TensorRule("mlp.down_proj.weight", "ffn_down.weight", ("dim", "ffn")),
        ),
    ),
    generated=(
        GeneratedTensor("rope_factors_long.weight", lambda facts: long_factors(facts.rope)),
        GeneratedTensor("rope_factors_short.weight", lambda facts: short_factors(facts.rope)),
    ),
    metadata=(
        *METADATA,
        MetadataRule("rope.scaling.original_context_length", "u32", "original_context"),
        MetadataRule("rope.dimension_count", "u32", "rope_dims"),
        MetadataRule("attention.sliding_window", "u32", "sliding_window"),
    ),
    ignored=IGNORED,
)
