"""Mixtral: `llama` with experts.

    norm, attention (grouped heads, rotary), add, norm, gated MLPs (SiLU) of two experts, add

All experts' scores go through a softmax; the weights of those chosen are divided by their sum.
"""

from dataclasses import replace

from gguf_tools.archs import llama
from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.experts import (
    EXPERT_COUNTS,
    LAYOUTS,
    ROUTER,
    SEPARATE,
    STACKED,
    STACKED_EXPERTS,
    separate_experts,
    with_experts,
)
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    EMBEDDING,
    FFN_NORM,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    read_common,
)
from gguf_tools.archs.rope import LLAMA as LLAMA_ROTARY
from gguf_tools.archs.windows import read_window

MIXTRAL_ROTARY = replace(LLAMA_ROTARY, base=1e6)
COUNT = ("num_local_experts", "num_experts")


def read_facts(config: HFConfig) -> ModelFacts:
    facts = read_common(config, n_ctx=131072, n_kv_heads=8, epsilon=1e-5, rotary=MIXTRAL_ROTARY)
    facts = replace(facts, sliding_window=read_window(config))
    return with_experts(config, facts, count=COUNT, n_experts=8, n_used=2)


ARCHITECTURE = Architecture(
    name="llama",
    classes=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(llama.rotary_rows),
            FFN_NORM,
            replace(ROUTER, source="block_sparse_moe.gate.weight", when=SEPARATE),
            replace(ROUTER, when=STACKED),
            *separate_experts(
                "block_sparse_moe.experts.{expert}.w1.weight",
                "block_sparse_moe.experts.{expert}.w3.weight",
                "block_sparse_moe.experts.{expert}.w2.weight",
            ),
            *STACKED_EXPERTS,
        ),
    ),
    generated=llama.ARCHITECTURE.generated,
    metadata=(
        *METADATA,
        *EXPERT_COUNTS,
        MetadataRule("attention.sliding_window", "u32", "sliding_window"),
        *llama.LLAMA_METADATA,
    ),
    ignored=IGNORED,
    layouts=LAYOUTS,
)
