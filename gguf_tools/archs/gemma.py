"""Gemma 1 and 2: `gemma`, `gemma2`.

    gemma   norm, attention (grouped heads, rotary), add, norm, gated MLP (GELU), add
    gemma2  norm, attention, norm, add, norm, gated MLP, norm, add

Checkpoints store the weights of norms less one. The embedding is scaled by sqrt(dim) when it is
run, and is the head too. gemma2 caps scores and logits softly, and every other layer has a window.
"""

import math
from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    GATED_FFN,
    GELU_TANH,
    HEAD,
    IGNORED,
    METADATA,
    attention,
    layer_rules,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.transforms import Transform, add_one
from gguf_tools.archs.windows import WINDOWS, all_but_each, read_pattern, read_window

# The first files of Gemma said "gelu" and meant the one with tanh.
ACTIVATIONS = (*GELU_TANH, "gelu")

GEMMA2_PERIOD = 2  # layers 0, 2, 4... have the window
GEMMA2_27B_LAYERS = 46  # by which llama.cpp knows the model with another scale of queries


def read_gemma(config: HFConfig) -> ModelFacts:
    key = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    refuse_switches(config, "attention_bias", "use_bidirectional_attention")
    facts = read_common(
        config,
        n_ctx=8192,
        activations=ACTIVATIONS,
        activation_key=key,
        n_kv_heads=16,
        head_dim=256,
        n_vocab=256000,
        tied=True,
    )
    return check_tied(config, facts)


def read_gemma2(config: HFConfig) -> ModelFacts:
    refuse_switches(config, "attention_bias", "use_bidirectional_attention")
    facts = read_common(
        config,
        n_ctx=8192,
        activations=GELU_TANH,
        activation_key="hidden_activation",
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        n_vocab=256000,
        tied=True,
    )
    window = read_window(config, default=4096)
    if window is None:
        raise config.refuse("sliding_window", "a number of tokens", None)
    usual = all_but_each(GEMMA2_PERIOD, facts.n_layers)
    pattern = read_pattern(config, facts.n_layers, silent=usual)
    caps = {
        cap: config.real(cap, low=1e-3, high=1e6, default=None if cap in config.values else silent)
        for cap, silent in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    facts = replace(
        check_tied(config, facts),
        sliding_window=window,
        window_pattern=None if pattern == usual else pattern,
        more=caps,
    )
    return with_scale(config, facts, n_layers_27b=GEMMA2_27B_LAYERS)


def check_tied(config: HFConfig, facts: ModelFacts) -> ModelFacts:
    if not facts.tied:
        raise config.refuse("tie_word_embeddings", "true for this architecture", False)
    return facts


def with_scale(config: HFConfig, facts: ModelFacts, *, n_layers_27b: int) -> ModelFacts:
    """The scale of queries, written where llama.cpp would not guess it from the layers."""
    divisor = config.real("query_pre_attn_scalar", low=1e-3, high=1e6, default=256.0)
    is_27b = facts.n_layers == n_layers_27b
    guessed = facts.dim // facts.n_heads if is_27b else facts.head_dim
    if divisor == guessed:
        return replace(facts, more={**facts.more, "attention_scale": None})
    note = (
        f"query_pre_attn_scalar is {divisor:g}: the file says so, but llama.cpp takes {guessed} "
        "for a model of this size"
    )
    more = {**facts.more, "attention_scale": 1 / math.sqrt(divisor)}
    return replace(facts, more=more, notes=(*facts.notes, note))


def plus_one(facts: ModelFacts) -> Transform:
    return Transform(1, add_one)


OUTPUT_NORM = TensorRule("model.norm.weight", "output_norm.weight", ("dim",), plus_one)
ATTENTION_NORM = TensorRule("input_layernorm.weight", "attn_norm.weight", ("dim",), plus_one)
POST_NORMS = (
    TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", ("dim",), plus_one),
    TensorRule("pre_feedforward_layernorm.weight", "ffn_norm.weight", ("dim",), plus_one),
    TensorRule("post_feedforward_layernorm.weight", "post_ffw_norm.weight", ("dim",), plus_one),
)
SCALE = MetadataRule("attention.scale", "f32", "attention_scale")

GEMMA = Architecture(
    name="gemma",
    classes=("GemmaForCausalLM",),
    model_types=("gemma",),
    read_facts=read_gemma,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(),
            TensorRule("post_attention_layernorm.weight", "ffn_norm.weight", ("dim",), plus_one),
            *GATED_FFN,
        ),
    ),
    generated=(),
    metadata=METADATA,
    ignored=IGNORED,
)

GEMMA2 = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read_facts=read_gemma2,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *attention(), *POST_NORMS, *GATED_FFN),
    ),
    generated=(),
    metadata=(
        *METADATA,
        MetadataRule("attn_logit_softcapping", "f32", "attn_logit_softcapping"),
        MetadataRule("final_logit_softcapping", "f32", "final_logit_softcapping"),
        *WINDOWS,
        SCALE,
    ),
    ignored=IGNORED,
)
