"""DeepSeek V2 and V3: `deepseek2`.

    norm, latent attention, add, norm, gated MLP (SiLU), add      in the first layers
    norm, latent attention, add, norm, experts and shared ones, add      in the others

Keys and values of all heads come from one short vector of a token, and from a rotary part that the
heads share. llama.cpp multiplies queries with the keys' matrix instead of expanding the keys: a
file has that matrix of every head transposed, apart from the values', and counts one KV head.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.experts import EXPERT_METADATA, EXPERTS, LAYOUTS, ROUTER, with_experts
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    EMBEDDING,
    FFN_NORM,
    GATED_FFN,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    layer_rules,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.rope import PLAIN, Rope, read_rope

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp: llama_expert_gating_func_type


def read_facts(config: HFConfig) -> ModelFacts:
    is_v3 = V3 in (config.class_name, "") and config.model_type != "deepseek_v2"
    refuse_switches(config, "attention_bias", "mlp_bias")
    if config.flag("rope_interleave", default=True) is False:
        raise config.refuse("rope_interleave", "true: in GGUF neighbours turn", False)
    step = config.integer("moe_layer_freq", default=1)
    if step != 1:
        raise config.refuse("moe_layer_freq", "1: in GGUF all later layers have experts", step)
    facts = read_common(config, n_ctx=4096 if is_v3 else 2048)
    nope = config.integer("qk_nope_head_dim", default=128)
    rotary = config.integer("qk_rope_head_dim", default=64)
    value = config.integer("v_head_dim", default=128)
    kv_rank = config.integer("kv_lora_rank", default=512)
    q_rank = _q_rank(config)
    rope = read_rope(config, n_ctx=facts.n_ctx, head_dim=rotary, rotary=PLAIN)
    key = nope + rotary
    sizes = {
        "q_rank": q_rank or 0,
        "kv_rank": kv_rank,
        "kv_in": kv_rank + rotary,
        "nope": nope,
        "value": value,
        "q": facts.n_heads * key,
        "values": facts.n_heads * value,
    }
    more = {
        "q_rank": q_rank,
        "kv_rank": kv_rank,
        "latent_key": kv_rank + rotary,
        "key_mla": key,
        "value_mla": value,
        "rotary": rotary,
        "log_multiplier": _log_multiplier(config, rope),
        **_routing(config, is_v3, facts.n_layers),
    }
    switches = {"q_rank" if q_rank else "q_whole"}
    if is_v3 or config.text("topk_method", default="greedy") == "noaux_tc":
        switches.add("correction")
    facts = replace(
        facts,
        n_kv_heads=1,
        rope=replace(rope, attention_factor=None),  # it is in the multiplier
        more=more,
        more_sizes=sizes,
        switches=frozenset(switches),
    )
    width = config.integer("moe_intermediate_size", default=2048 if is_v3 else 1407)
    n_shared = config.integer("n_shared_experts", default=1 if is_v3 else 2)
    facts = with_experts(
        config,
        facts,
        count=("n_routed_experts", "num_local_experts", "num_experts"),
        n_experts=256 if is_v3 else 64,
        n_used=8 if is_v3 else None,
        ffn_dim=width,
        normalizes=config.flag("norm_topk_prob", default=is_v3) or None,
    )
    return replace(
        facts,
        more={**facts.more, "n_shared": n_shared},
        more_sizes={**facts.more_sizes, "shared_ffn": n_shared * width},
    )


def dense_layers(facts: ModelFacts) -> Sequence[int]:
    return range(_n_dense(facts))


def expert_layers(facts: ModelFacts) -> Sequence[int]:
    return range(_n_dense(facts), facts.n_layers)


def keys_of_heads(facts: ModelFacts) -> tuple[int, int, int, int]:
    sizes = facts.sizes
    return facts.n_heads, sizes["nope"] + sizes["value"], 0, sizes["nope"]


def values_of_heads(facts: ModelFacts) -> tuple[int, int, int, int]:
    sizes = facts.sizes
    return facts.n_heads, sizes["nope"] + sizes["value"], sizes["nope"], sizes["value"]


def _n_dense(facts: ModelFacts) -> int:
    n_dense = facts.more["n_dense"]
    assert isinstance(n_dense, int)
    return n_dense


def _q_rank(config: HFConfig) -> int | None:
    if "q_lora_rank" in config.values and not config.has("q_lora_rank"):
        return None
    return config.integer("q_lora_rank", default=1536)


def _routing(config: HFConfig, is_v3: bool, n_layers: int) -> dict[str, int | float | None]:
    """How experts are chosen, and from which layer on there are any."""
    usual = "sigmoid" if is_v3 else "softmax"
    scores = config.text("scoring_func", default=usual)
    if scores not in GATING:
        raise config.refuse("scoring_func", " or ".join(GATING), scores)
    said = is_v3 or config.has("scoring_func")
    groups = {"n_groups": "n_group", "n_groups_used": "topk_group"}
    silent = {"n_group": 8, "topk_group": 4} if is_v3 else {}
    routing: dict[str, int | float | None] = {
        name: config.integer(key, default=silent.get(key, 1))
        if config.has(key) or key in silent
        else None
        for name, key in groups.items()
    }
    dense = config.integer(
        "first_k_dense_replace", low=0, high=n_layers, default=min(3 * is_v3, n_layers)
    )
    scale = config.real("routed_scaling_factor", low=1e-6, high=1e6, default=2.5 if is_v3 else 1.0)
    return {
        **routing,
        "gating": GATING[scores] if said else None,
        "n_dense": dense,
        "weights_scale": scale,
    }


def _log_multiplier(config: HFConfig, rope: Rope) -> float | None:
    """YaRN's factor of the scores; llama.cpp takes the rotary part as not scaled by itself."""
    scaling = config.nested("rope_parameters") or config.nested("rope_scaling")
    if scaling is None or rope.kind != "yarn":
        return None
    if rope.attention_factor is None or not math.isclose(rope.attention_factor, 1.0):
        expected = "the same number as mscale: GGUF has no place for two"
        raise scaling.refuse("mscale_all_dim", expected, scaling.values.get("mscale_all_dim"))
    return 0.1 * scaling.real("mscale_all_dim", low=0.0, high=1e3)


LATENT_ATTENTION = (
    TensorRule("self_attn.q_proj.weight", "attn_q.weight", ("q", "dim"), when="q_whole"),
    TensorRule("self_attn.q_a_proj.weight", "attn_q_a.weight", ("q_rank", "dim"), when="q_rank"),
    TensorRule(
        "self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", ("q_rank",), when="q_rank"
    ),
    TensorRule("self_attn.q_b_proj.weight", "attn_q_b.weight", ("q", "q_rank"), when="q_rank"),
    TensorRule("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", ("kv_in", "dim")),
    TensorRule("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", ("kv_rank",)),
    TensorRule(
        "self_attn.kv_b_proj.weight",
        "attn_k_b.weight",
        ("heads", "kv_rank", "nope"),
        cut=keys_of_heads,
        transposed=True,
    ),
    TensorRule(
        "self_attn.kv_b_proj.weight",
        "attn_v_b.weight",
        ("heads", "value", "kv_rank"),
        cut=values_of_heads,
    ),
    TensorRule("self_attn.o_proj.weight", "attn_output.weight", ("dim", "values")),
)
SHARED_EXPERTS = (
    TensorRule(
        "mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight", ("shared_ffn", "dim")
    ),
    TensorRule("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight", ("shared_ffn", "dim")),
    TensorRule(
        "mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", ("dim", "shared_ffn")
    ),
)
CORRECTION = TensorRule(
    "mlp.gate.e_score_correction_bias", "exp_probs_b.bias", ("experts",), when="correction"
)

ARCHITECTURE = Architecture(
    name="deepseek2",
    classes=(V2, V3),
    model_types=("deepseek_v2", "deepseek_v3"),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *LATENT_ATTENTION, FFN_NORM),
        *layer_rules(*(replace(rule, layers=dense_layers) for rule in GATED_FFN)),
        *layer_rules(
            *(
                replace(rule, layers=expert_layers)
                for rule in (ROUTER, CORRECTION, *EXPERTS, *SHARED_EXPERTS)
            )
        ),
    ),
    generated=(),
    metadata=(
        *(rule for rule in METADATA if rule.field != "key_length"),
        MetadataRule("vocab_size", "u32", "n_vocab"),
        MetadataRule("attention.q_lora_rank", "u32", "q_rank"),
        MetadataRule("attention.kv_lora_rank", "u32", "kv_rank"),
        MetadataRule("attention.key_length", "u32", "latent_key"),
        MetadataRule("attention.value_length", "u32", "kv_rank"),
        MetadataRule("attention.key_length_mla", "u32", "key_mla"),
        MetadataRule("attention.value_length_mla", "u32", "value_mla"),
        MetadataRule("rope.dimension_count", "u32", "rotary"),
        MetadataRule("rope.scaling.yarn_log_multiplier", "f32", "log_multiplier"),
        *EXPERT_METADATA,
        MetadataRule("leading_dense_block_count", "u32", "n_dense"),
        MetadataRule("expert_shared_count", "u32", "n_shared"),
        MetadataRule("expert_weights_scale", "f32", "weights_scale"),
        MetadataRule("expert_gating_func", "u32", "gating"),
        MetadataRule("expert_group_count", "u32", "n_groups"),
        MetadataRule("expert_group_used_count", "u32", "n_groups_used"),
    ),
    ignored=IGNORED,
    layouts=LAYOUTS,
    predictors=True,
)
