"""GPT-2: `gpt2`.

    norm, attention, add, norm, MLP (GELU), add

Positions are learned: a row of a table is added to each token's embedding. The checkpoint has its
matrices the other way round (Conv1D: inputs are rows); published ones name them with and without
`transformer.` in front.
"""

from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import MAX_LAYERS, MAX_SIZE, HFConfig
from gguf_tools.archs.facts import LAYER_NORM_METADATA, check_activation
from gguf_tools.archs.gelu import ACTIVATION, TANH_FIRST, unusual
from gguf_tools.archs.rope import NO_ROPE

# What no file can say and llama.cpp does not do: the only value that is known.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_facts(config: HFConfig) -> ModelFacts:
    check_activation(config, "activation_function", TANH_FIRST)
    for key, only in FIXED.items():
        if config.flag(key, default=only) is not only:
            raise config.refuse(key, f"{str(only).lower()} for this architecture", not only)
    dim = config.integer("n_embd", default=768)
    n_heads = config.integer("n_head", default=12)
    if dim % n_heads:
        raise config.refuse("n_head", f"a divisor of n_embd {dim}", n_heads)
    silent = config.integer("n_ctx", high=MAX_SIZE, default=1024)  # before n_positions
    n_ctx = config.integer("n_positions", high=MAX_SIZE, default=silent)
    return ModelFacts(
        n_layers=config.integer("n_layer", high=MAX_LAYERS, default=12),
        dim=dim,
        ffn_dim=config.integer("n_inner", default=4 * dim),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        n_vocab=config.integer("vocab_size", default=50257),
        n_ctx=n_ctx,
        norm_epsilon=config.real("layer_norm_epsilon", low=0.0, high=1.0, default=1e-5),
        rope=NO_ROPE,
        tied=config.flag("tie_word_embeddings", default=True),
        more_sizes={"qkv": 3 * dim, "positions": n_ctx},
        more={"hidden_activation": unusual(config, "activation_function", TANH_FIRST)},
    )


SOURCE, TARGET = "h.{layer}.", "blk.{layer}."

ARCHITECTURE = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    read_facts=read_facts,
    embedding=TensorRule("wte.weight", "token_embd.weight", ("vocab", "dim")),
    head=TensorRule("lm_head.weight", "output.weight", ("vocab", "dim")),
    tensors=(
        TensorRule("wpe.weight", "position_embd.weight", ("positions", "dim")),
        TensorRule("ln_f.weight", "output_norm.weight", ("dim",)),
        TensorRule("ln_f.bias", "output_norm.bias", ("dim",)),
        *(
            TensorRule(
                f"{SOURCE}{source}.{part}",
                f"{TARGET}{name}.{part}",
                shape,
                transposed=len(shape) == 2,
            )
            for source, name, full in (
                ("ln_1", "attn_norm", ("dim",)),
                ("attn.c_attn", "attn_qkv", ("qkv", "dim")),
                ("attn.c_proj", "attn_output", ("dim", "dim")),
                ("ln_2", "ffn_norm", ("dim",)),
                ("mlp.c_fc", "ffn_up", ("ffn", "dim")),
                ("mlp.c_proj", "ffn_down", ("dim", "ffn")),
            )
            for part, shape in (("weight", full), ("bias", full[:1]))
        ),
    ),
    generated=(),
    metadata=(*(rule for rule in LAYER_NORM_METADATA if rule.field != "n_kv_heads"), ACTIVATION),
    ignored=(".attn.bias", ".attn.masked_bias"),
    renamed=(("transformer.", ""),),
)
