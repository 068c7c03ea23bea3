"""StableLM 3B, StableLM 2 1.6B and 12B, StableCode: `stablelm`.

    norm, attention (rotary, of a part of each head), add, norm, gated MLP (SiLU), add

Norms take the mean away and have biases. In the 12B the MLP reads what attention reads, and its
result is added at the same time; there every head of q and k has a norm of its own.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    HEAD,
    IGNORED,
    LAYER_NORM_METADATA,
    OUTPUT_NORM,
    layer_rules,
    read_common,
    switches,
)
from gguf_tools.archs.rope import Rotary


def read_facts(config: HFConfig) -> ModelFacts:
    older = not config.has("partial_rotary_factor")  # StableLMEpoch's names
    facts = read_common(
        config,
        n_ctx=4096,
        epsilon=1e-5,
        epsilon_key="norm_eps" if config.has("norm_eps") else "layer_norm_eps",
        tied=False,
        rotary=Rotary(part=0.25, part_key="rope_pct" if older else "partial_rotary_factor"),
    )
    if facts.n_heads * facts.head_dim != facts.dim:
        raise config.refuse("head_dim", f"{facts.dim} / {facts.n_heads}", facts.head_dim)
    parallel = config.flag("use_parallel_residual", default=False)
    on = switches(config, "use_qkv_bias", "qk_layernorm")
    return replace(
        facts,
        switches=on if parallel else on | {"ffn_norm"},
        key_length=None,
        more_sizes={"heads": facts.n_heads, "kv_heads": facts.n_kv_heads},
        more={"rope_dims": facts.rope.n_dims, "parallel": parallel},
    )


ARCHITECTURE = Architecture(
    name="stablelm",
    classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    model_types=("stablelm", "stablelm_epoch"),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        TensorRule("model.norm.bias", "output_norm.bias", ("dim",)),
        *layer_rules(
            *(
                TensorRule(source, name, shape, when=when)
                for source, name, shape, when in (
                    ("input_layernorm.weight", "attn_norm.weight", ("dim",), ""),
                    ("input_layernorm.bias", "attn_norm.bias", ("dim",), ""),
                    ("self_attn.q_proj.weight", "attn_q.weight", ("q", "dim"), ""),
                    ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "dim"), ""),
                    ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "dim"), ""),
                    ("self_attn.q_proj.bias", "attn_q.bias", ("q",), "use_qkv_bias"),
                    ("self_attn.k_proj.bias", "attn_k.bias", ("kv",), "use_qkv_bias"),
                    ("self_attn.v_proj.bias", "attn_v.bias", ("kv",), "use_qkv_bias"),
                    (
                        "self_attn.q_layernorm.norms.{expert}.weight",
                        "attn_q_norm.weight",
                        ("heads", "head"),
                        "qk_layernorm",
                    ),
                    (
                        "self_attn.k_layernorm.norms.{expert}.weight",
                        "attn_k_norm.weight",
                        ("kv_heads", "head"),
                        "qk_layernorm",
                    ),
                    ("self_attn.o_proj.weight", "attn_output.weight", ("dim", "q"), ""),
                    ("post_attention_layernorm.weight", "ffn_norm.weight", ("dim",), "ffn_norm"),
                    ("post_attention_layernorm.bias", "ffn_norm.bias", ("dim",), "ffn_norm"),
                    ("mlp.gate_proj.weight", "ffn_gate.weight", ("ffn", "dim"), ""),
                    ("mlp.up_proj.weight", "ffn_up.weight", ("ffn", "dim"), ""),
                    ("mlp.down_proj.weight", "ffn_down.weight", ("dim", "ffn"), ""),
                )
            )
        ),
    ),
    generated=(),
    metadata=(
        *LAYER_NORM_METADATA,
        MetadataRule("rope.dimension_count", "u32", "rope_dims"),
        MetadataRule("use_parallel_residual", "bool", "parallel"),
    ),
    ignored=IGNORED,
)
