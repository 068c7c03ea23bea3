"""GPT-NeoX and Pythia: `gptneox`.

    x + attention(norm(x)) + MLP(another norm(x)), or one after the other

The checkpoint has q, k and v of a head next to each other; the file has all q, all k, all v.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import IGNORED, LAYER_NORM_METADATA, read_common
from gguf_tools.archs.gelu import ACTIVATION, ERF_FIRST, unusual
from gguf_tools.archs.rope import Rotary

ROTARY = Rotary(part=0.25, part_key="rotary_pct", base_key="rotary_emb_base")


def read_facts(config: HFConfig) -> ModelFacts:
    facts = read_common(
        config,
        n_ctx=2048,
        activations=ERF_FIRST,
        epsilon=1e-5,
        epsilon_key="layer_norm_eps",
        tied=False,
        rotary=ROTARY,
    )
    for key, found in (("num_key_value_heads", facts.n_kv_heads), ("head_dim", facts.head_dim)):
        expected = facts.n_heads if key != "head_dim" else facts.dim // facts.n_heads
        if found != expected:
            raise config.refuse(key, f"{expected} for this architecture", found)
    if config.flag("attention_bias", default=True) is False:
        raise config.refuse("attention_bias", "true for this architecture", False)
    return replace(
        facts,
        key_length=None,
        more_sizes={"qkv": 3 * facts.dim},
        more={
            "rope_dims": facts.rope.n_dims,
            "parallel": config.flag("use_parallel_residual", default=True),
            "hidden_activation": unusual(config, "hidden_act", ERF_FIRST),
        },
    )


def heads_of_three(facts: ModelFacts) -> tuple[int, int]:
    return facts.n_heads, 3


SOURCE, TARGET = "gpt_neox.layers.{layer}.", "blk.{layer}."

ARCHITECTURE = Architecture(
    name="gptneox",
    classes=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    read_facts=read_facts,
    embedding=TensorRule("gpt_neox.embed_in.weight", "token_embd.weight", ("vocab", "dim")),
    head=TensorRule("embed_out.weight", "output.weight", ("vocab", "dim")),
    tensors=(
        TensorRule("gpt_neox.final_layer_norm.weight", "output_norm.weight", ("dim",)),
        TensorRule("gpt_neox.final_layer_norm.bias", "output_norm.bias", ("dim",)),
        *(
            TensorRule(
                f"{SOURCE}{source}.{part}",
                f"{TARGET}{name}.{part}",
                shape,
                regrouped=heads_of_three if name == "attn_qkv" else None,
            )
            for source, name, full in (
                ("input_layernorm", "attn_norm", ("dim",)),
                ("attention.query_key_value", "attn_qkv", ("qkv", "dim")),
                ("attention.dense", "attn_output", ("dim", "dim")),
                ("post_attention_layernorm", "ffn_norm", ("dim",)),
                ("mlp.dense_h_to_4h", "ffn_up", ("ffn", "dim")),
                ("mlp.dense_4h_to_h", "ffn_down", ("dim", "ffn")),
            )
            for part, shape in (("weight", full), ("bias", full[:1]))
        ),
    ),
    generated=(),
    metadata=(
        *(rule for rule in LAYER_NORM_METADATA if rule.field != "n_kv_heads"),
        MetadataRule("rope.dimension_count", "u32", "rope_dims"),
        MetadataRule("use_parallel_residual", "bool", "parallel"),
        ACTIVATION,
    ),
    ignored=IGNORED,
)
