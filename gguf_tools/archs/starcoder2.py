"""StarCoder2: `starcoder2`.

    norm, attention (grouped heads, rotary), add, norm, MLP (GELU), add

Norms take the mean away and have biases, and so has everything else unless config.json says not.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import MAX_CONTEXT, HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    HEAD,
    IGNORED,
    LAYER_NORM_METADATA,
    OUTPUT_NORM,
    layer_rules,
    read_common,
)
from gguf_tools.archs.gelu import ACTIVATION, TANH_FIRST, unusual


def read_facts(config: HFConfig) -> ModelFacts:
    facts = read_common(
        config,
        n_ctx=4096,
        activations=TANH_FIRST,
        n_kv_heads=2,
        epsilon=1e-5,
        epsilon_key="norm_epsilon",
        tied=True,
    )
    if facts.n_heads * facts.head_dim != facts.dim:
        raise config.refuse("head_dim", f"{facts.dim} / {facts.n_heads}", facts.head_dim)
    window = None
    if config.has("sliding_window"):
        window = config.integer("sliding_window", low=0, high=MAX_CONTEXT) or None
    biased = config.flag("use_bias", default=True)
    notes = () if biased else ("llama.cpp does not load a starcoder2 without biases",)
    return replace(
        facts,
        sliding_window=window,
        switches=frozenset(("bias",) if biased else ()),
        more={"hidden_activation": unusual(config, "hidden_act", TANH_FIRST)},
        notes=(*facts.notes, *notes),
    )


ARCHITECTURE = Architecture(
    name="starcoder2",
    classes=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        TensorRule("model.norm.bias", "output_norm.bias", ("dim",)),
        *layer_rules(
            *(
                TensorRule(f"{source}.{part}", f"{name}.{part}", shape, when=when)
                for source, name, full, when_biased in (
                    ("input_layernorm", "attn_norm", ("dim",), ""),
                    ("self_attn.q_proj", "attn_q", ("q", "dim"), "bias"),
                    ("self_attn.k_proj", "attn_k", ("kv", "dim"), "bias"),
                    ("self_attn.v_proj", "attn_v", ("kv", "dim"), "bias"),
                    ("self_attn.o_proj", "attn_output", ("dim", "q"), "bias"),
                    ("post_attention_layernorm", "ffn_norm", ("dim",), ""),
                    ("mlp.c_fc", "ffn_up", ("ffn", "dim"), "bias"),
                    ("mlp.c_proj", "ffn_down", ("dim", "ffn"), "bias"),
                )
                for part, shape, when in (("weight", full, ""), ("bias", full[:1], when_biased))
            )
        ),
    ),
    generated=(),
    metadata=(
        *LAYER_NORM_METADATA,
        MetadataRule("attention.sliding_window", "u32", "sliding_window"),
        ACTIVATION,
    ),
    ignored=IGNORED,
)
