"""Llama 1 to 3 and Mistral: `llama`.

    norm, attention (grouped heads, rotary), add, norm, gated MLP (SiLU), add

GGUF's `llama` rotates neighbouring rows, Hugging Face's rows of two halves, so q and k are
reordered. Biases are there when config.json says so.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.architecture import (
    Architecture,
    GeneratedTensor,
    MetadataRule,
    ModelFacts,
)
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    EMBEDDING,
    FFN_NORM,
    GATED_FFN,
    GATED_FFN_BIASES,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    output_bias,
    qkv_biases,
    read_common,
    switches,
)
from gguf_tools.archs.rope import LLAMA as LLAMA_ROTARY
from gguf_tools.archs.rope import llama3_divisors, long_factors, short_factors
from gguf_tools.archs.transforms import Transform, interleave_heads
from gguf_tools.archs.windows import read_window

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"


def read_facts(config: HFConfig) -> ModelFacts:
    class_name = config.class_name or (MISTRAL if config.model_type == "mistral" else LLAMA)
    if class_name == MISTRAL:  # has no biases whatever its config.json says
        facts = read_common(config, n_ctx=131072, n_kv_heads=8, rotary=LLAMA_ROTARY)
        return replace(facts, sliding_window=read_window(config, default=4096))
    facts = read_common(config, n_ctx=2048, rotary=LLAMA_ROTARY)
    return replace(facts, switches=switches(config, "attention_bias", "mlp_bias"))


def rotary_rows(facts: ModelFacts) -> Transform:
    return interleave_heads(facts.head_dim)


def rope_divisors(facts: ModelFacts) -> npt.NDArray[np.float32] | None:
    return llama3_divisors(facts.rope, facts.head_dim)


LLAMA_METADATA = (
    MetadataRule("vocab_size", "u32", "n_vocab"),
    MetadataRule("rope.dimension_count", "u32", "head_dim"),
)

ARCHITECTURE = Architecture(
    name="llama",
    classes=(LLAMA, MISTRAL),
    model_types=("llama", "mistral"),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(rotary_rows),
            *qkv_biases(when="attention_bias", rotate=rotary_rows),
            output_bias(when="attention_bias"),
            FFN_NORM,
            *GATED_FFN,
            *GATED_FFN_BIASES,
        ),
    ),
    generated=(
        GeneratedTensor("rope_freqs.weight", rope_divisors),
        GeneratedTensor("rope_factors_long.weight", lambda facts: long_factors(facts.rope)),
        GeneratedTensor("rope_factors_short.weight", lambda facts: short_factors(facts.rope)),
    ),
    metadata=(
        *METADATA,
        MetadataRule("attention.sliding_window", "u32", "sliding_window"),
        *LLAMA_METADATA,
    ),
    ignored=IGNORED,
)
