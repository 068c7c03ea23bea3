"""Qwen 1.5 and 2 with experts (`qwen2moe`), and Qwen 3 (`qwen3moe`).

    norm, attention (grouped heads, rotary), add, norm, gated MLPs (SiLU) of some experts, add

qwen2moe has biases on q, k and v, and an expert that every token uses, behind a gate of its own;
the weights of the chosen are as the softmax gives them. qwen3moe has a norm of every head of q and
k, and divides the weights by their sum. GGUF has no place for layers without experts.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.experts import EXPERT_METADATA, EXPERTS, LAYOUTS, ROUTER, with_experts
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
    qkv_biases,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.qwen import CONTEXT, HEAD_NORMS, with_windows
from gguf_tools.archs.windows import WINDOWS

COUNT = ("num_experts", "num_local_experts")


def read_qwen2moe(config: HFConfig) -> ModelFacts:
    refuse_dense_layers(config)
    facts = read_common(config, n_ctx=CONTEXT, n_kv_heads=16)
    if config.flag("qkv_bias", default=True):
        facts = replace(facts, switches=frozenset({"qkv_bias"}))
    shared = config.integer("shared_expert_intermediate_size", default=5632)
    first = config.integer("max_window_layers", low=0, default=28)
    windows = tuple(layer % 2 == 0 and layer < first for layer in range(facts.n_layers))
    return _with_experts(
        config,
        with_windows(config, facts, silent=windows),
        n_experts=60,
        n_used=4,
        ffn_dim=1408,
        shared_ffn_dim=shared,
        usual=False,
    )


def read_qwen3moe(config: HFConfig) -> ModelFacts:
    refuse_dense_layers(config)
    refuse_switches(config, "attention_bias")
    facts = read_common(config, n_ctx=CONTEXT, n_kv_heads=4)
    windows = (True,) * facts.n_layers
    return _with_experts(
        config,
        with_windows(config, facts, silent=windows),
        n_experts=128,
        n_used=8,
        ffn_dim=768,
        shared_ffn_dim=None,
        usual=True,
    )


def refuse_dense_layers(config: HFConfig) -> None:
    """An error unless all layers have experts."""
    dense = config.values.get("mlp_only_layers")
    if dense not in (None, []):
        raise config.refuse("mlp_only_layers", "no layers: in GGUF all have experts", dense)
    step = config.integer("decoder_sparse_step", default=1)
    if step != 1:
        raise config.refuse("decoder_sparse_step", "1: in GGUF all layers have experts", step)


def _with_experts(
    config: HFConfig,
    facts: ModelFacts,
    *,
    n_experts: int,
    n_used: int,
    ffn_dim: int,
    shared_ffn_dim: int | None,
    usual: bool,  # whether llama.cpp divides the weights by their sum for this architecture
) -> ModelFacts:
    normalizes = config.flag("norm_topk_prob", default=False)
    if normalizes != usual:
        word = "" if normalizes else "not "
        note = (
            f"the weights of a token's experts are {word}divided by their sum: the file says so, "
            "but llama.cpp knows this architecture otherwise only, so that its answers differ"
        )
        facts = replace(facts, notes=(*facts.notes, note))
    return with_experts(
        config,
        facts,
        count=COUNT,
        n_experts=n_experts,
        n_used=n_used,
        ffn_dim=config.integer("moe_intermediate_size", default=ffn_dim),
        shared_ffn_dim=shared_ffn_dim,
        normalizes=normalizes if normalizes != usual else None,
    )


SHARED_EXPERT = (
    TensorRule(
        "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", ("shared_ffn", "dim")
    ),
    TensorRule("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", ("shared_ffn", "dim")),
    TensorRule(
        "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", ("dim", "shared_ffn")
    ),
    TensorRule("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", ("one", "dim")),
)

QWEN2MOE = Architecture(
    name="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    read_facts=read_qwen2moe,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(),
            *qkv_biases(when="qkv_bias"),
            FFN_NORM,
            ROUTER,
            *EXPERTS,
            *SHARED_EXPERT,
        ),
    ),
    generated=(),
    metadata=(*METADATA, *EXPERT_METADATA, *WINDOWS),
    ignored=IGNORED,
    layouts=LAYOUTS,
)

QWEN3MOE = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read_facts=read_qwen3moe,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *attention(), *HEAD_NORMS, FFN_NORM, ROUTER, *EXPERTS),
    ),
    generated=(),
    metadata=(*METADATA, *EXPERT_METADATA, *WINDOWS),
    ignored=IGNORED,
    layouts=LAYOUTS,
)
