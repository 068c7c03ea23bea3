"""Qwen 2, 2.5 (`qwen2`) and 3 (`qwen3`).

    norm, attention (grouped heads, rotary), add, norm, gated MLP (SiLU), add

qwen2 has biases on q, k and v; qwen3 a norm of every head of q and k. Rotary halves turn, in GGUF
as in Hugging Face. A window on some layers is rare; llama.cpp has no place for one.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    EMBEDDING,
    FFN_NORM,
    GATED_FFN,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    qkv_biases,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.windows import WINDOWS, read_pattern, read_window

CONTEXT, KV_HEADS = 32768, 32  # if config.json is silent


def read_qwen2(config: HFConfig) -> ModelFacts:
    return with_windows(config, read_common(config, n_ctx=CONTEXT, n_kv_heads=KV_HEADS))


def read_qwen3(config: HFConfig) -> ModelFacts:
    refuse_switches(config, "attention_bias")
    facts = read_common(config, n_ctx=CONTEXT, n_kv_heads=KV_HEADS, head_dim=128)
    return with_windows(config, facts)


def with_windows(
    config: HFConfig, facts: ModelFacts, *, silent: tuple[bool, ...] | None = None
) -> ModelFacts:
    """With `use_sliding_window`, layers have one as `layer_types` says.

    Where it is silent they have one as `silent` says, or the last ones.
    """
    if not config.flag("use_sliding_window", default=False):
        return facts
    if silent is None:
        first = config.integer("max_window_layers", low=0, default=28)
        silent = tuple(layer >= first for layer in range(facts.n_layers))
    pattern = read_pattern(config, facts.n_layers, silent=silent)
    window = read_window(config, default=4096)
    if window is None or not any(pattern):
        return facts
    note = (
        f"{sum(pattern)} of {facts.n_layers} layers see {window:,} tokens: the file says so, but "
        "llama.cpp lets them see all"
    )
    return replace(
        facts,
        sliding_window=window,
        window_pattern=pattern,
        notes=(*facts.notes, note),
    )


HEAD_NORMS = (
    TensorRule("self_attn.q_norm.weight", "attn_q_norm.weight", ("head",)),
    TensorRule("self_attn.k_norm.weight", "attn_k_norm.weight", ("head",)),
)

QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read_facts=read_qwen2,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *attention(), *qkv_biases(), FFN_NORM, *GATED_FFN),
    ),
    generated=(),
    metadata=(*METADATA, *WINDOWS),
    ignored=IGNORED,
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read_facts=read_qwen3,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *attention(), *HEAD_NORMS, FFN_NORM, *GATED_FFN),
    ),
    generated=(),
    metadata=(*METADATA, *WINDOWS),
    ignored=IGNORED,
)
