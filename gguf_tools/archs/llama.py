"""Llama 1 to 3 and Mistral: `llama`.

    norm, attention (grouped heads, rotary), add, norm, gated MLP (SiLU), add

GGUF's `llama` rotates neighbouring rows, Hugging Face's rows of two halves, so q and k are
reordered. Biases are there when config.json says so.
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.architecture import (
    Architecture,
    GeneratedTensor,
    MetadataRule,
    ModelFacts,
    TensorRule,
)
from gguf_tools.archs.config import MAX_CONTEXT, MAX_LAYERS, HFConfig
from gguf_tools.archs.rope import llama3_divisors, long_factors, read_rope, short_factors
from gguf_tools.archs.transforms import Transform, interleave_heads
from gguf_tools.errors import UnsupportedModelError, printable

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"

# What transformers assumes when config.json is silent.
SILENT_CONTEXT = {LLAMA: 2048, MISTRAL: 131072}
SILENT_KV_HEADS = {MISTRAL: 8}  # Llama: as many as heads
SILENT_EPSILON = 1e-6


def read_facts(config: HFConfig) -> ModelFacts:
    class_name = config.class_name or (MISTRAL if config.model_type == "mistral" else LLAMA)
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{config.where}: hidden_act: expected silu, found {printable(activation)}: GGUF's "
            "llama architecture has no other activation"
        )
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if "num_key_value_heads" in config.values:  # a null says: as many as heads
        n_kv_heads = config.integer("num_key_value_heads", default=n_heads)
    else:
        n_kv_heads = SILENT_KV_HEADS.get(class_name, n_heads)
    if n_heads % n_kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of the {n_heads} heads", n_kv_heads)
    explicit = config.has("head_dim")
    if not explicit and dim % n_heads:
        raise config.refuse("num_attention_heads", f"a divisor of hidden_size {dim}", n_heads)
    head_dim = config.integer("head_dim", default=dim // n_heads)
    if head_dim % 2:
        key = "head_dim" if explicit else "num_attention_heads"
        raise config.refuse(key, "heads of an even size", head_dim)
    n_ctx = config.integer(
        "max_position_embeddings", high=MAX_CONTEXT, default=SILENT_CONTEXT.get(class_name, 2048)
    )
    rope = read_rope(config, n_ctx=n_ctx, head_dim=head_dim)
    window = None
    if class_name == MISTRAL and config.has("sliding_window"):
        window = config.integer("sliding_window", low=0, high=MAX_CONTEXT) or None
    biases = (
        ("attention_bias", "mlp_bias") if class_name == LLAMA else ()
    )  # Mistral has none whatever its config.json says
    return ModelFacts(
        n_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        dim=dim,
        ffn_dim=config.integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_vocab=config.integer("vocab_size"),
        n_ctx=n_ctx,
        norm_epsilon=config.real("rms_norm_eps", low=0.0, high=1.0, default=SILENT_EPSILON),
        rope=rope,
        tied=config.flag("tie_word_embeddings", default=None),
        key_length=head_dim if explicit else None,
        sliding_window=window,
        switches=frozenset(name for name in biases if config.flag(name, default=False)),
        notes=rope.notes,
    )


def rotary_rows(facts: ModelFacts) -> Transform:
    return interleave_heads(facts.head_dim)


def rope_divisors(facts: ModelFacts) -> npt.NDArray[np.float32] | None:
    return llama3_divisors(facts.rope, facts.head_dim)


SOURCE, TARGET = "model.layers.{layer}.", "blk.{layer}."

ARCHITECTURE = Architecture(
    name="llama",
    classes=(LLAMA, MISTRAL),
    model_types=("llama", "mistral"),
    read_facts=read_facts,
    embedding=TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocab", "dim")),
    head=TensorRule("lm_head.weight", "output.weight", ("vocab", "dim")),
    tensors=(
        TensorRule("model.norm.weight", "output_norm.weight", ("dim",)),
        *(
            TensorRule(f"{SOURCE}{source}", f"{TARGET}{name}", shape, transform, when)
            for source, name, shape, transform, when in (
                ("input_layernorm.weight", "attn_norm.weight", ("dim",), None, ""),
                ("self_attn.q_proj.weight", "attn_q.weight", ("q", "dim"), rotary_rows, ""),
                ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "dim"), rotary_rows, ""),
                ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "dim"), None, ""),
                ("self_attn.o_proj.weight", "attn_output.weight", ("dim", "q"), None, ""),
                ("self_attn.q_proj.bias", "attn_q.bias", ("q",), rotary_rows, "attention_bias"),
                ("self_attn.k_proj.bias", "attn_k.bias", ("kv",), rotary_rows, "attention_bias"),
                ("self_attn.v_proj.bias", "attn_v.bias", ("kv",), None, "attention_bias"),
                ("self_attn.o_proj.bias", "attn_output.bias", ("dim",), None, "attention_bias"),
                ("post_attention_layernorm.weight", "ffn_norm.weight", ("dim",), None, ""),
                ("mlp.gate_proj.weight", "ffn_gate.weight", ("ffn", "dim"), None, ""),
                ("mlp.up_proj.weight", "ffn_up.weight", ("ffn", "dim"), None, ""),
                ("mlp.down_proj.weight", "ffn_down.weight", ("dim", "ffn"), None, ""),
                ("mlp.gate_proj.bias", "ffn_gate.bias", ("ffn",), None, "mlp_bias"),
                ("mlp.up_proj.bias", "ffn_up.bias", ("ffn",), None, "mlp_bias"),
                ("mlp.down_proj.bias", "ffn_down.bias", ("dim",), None, "mlp_bias"),
            )
        ),
    ),
    generated=(
        GeneratedTensor("rope_freqs.weight", rope_divisors),
        GeneratedTensor("rope_factors_long.weight", lambda facts: long_factors(facts.rope)),
        GeneratedTensor("rope_factors_short.weight", lambda facts: short_factors(facts.rope)),
    ),
    metadata=(
        MetadataRule("block_count", "u32", "n_layers"),
        MetadataRule("context_length", "u32", "n_ctx"),
        MetadataRule("embedding_length", "u32", "dim"),
        MetadataRule("feed_forward_length", "u32", "ffn_dim"),
        MetadataRule("attention.head_count", "u32", "n_heads"),
        MetadataRule("attention.head_count_kv", "u32", "n_kv_heads"),
        MetadataRule("attention.layer_norm_rms_epsilon", "f32", "norm_epsilon"),
        MetadataRule("attention.key_length", "u32", "key_length"),
        MetadataRule("attention.value_length", "u32", "key_length"),
        MetadataRule("attention.sliding_window", "u32", "sliding_window"),
        MetadataRule("vocab_size", "u32", "n_vocab"),
        MetadataRule("rope.dimension_count", "u32", "head_dim"),
    ),
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
