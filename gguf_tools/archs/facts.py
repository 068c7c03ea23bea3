"""What most architectures say alike: the numbers of config.json, tensors, metadata."""

from collections.abc import Callable
from dataclasses import replace

from gguf_tools.archs.architecture import MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import MAX_CONTEXT, MAX_LAYERS, HFConfig
from gguf_tools.archs.rope import PLAIN, Rotary, read_rope
from gguf_tools.archs.transforms import Transform
from gguf_tools.errors import UnsupportedModelError, printable

Rotate = Callable[[ModelFacts], Transform]

SILU = ("silu", "swish")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # one function by three names

EMBEDDING = TensorRule("model.embed_tokens.weight", "token_embd.weight", ("vocab", "dim"))
HEAD = TensorRule("lm_head.weight", "output.weight", ("vocab", "dim"))
OUTPUT_NORM = TensorRule("model.norm.weight", "output_norm.weight", ("dim",))

SOURCE, TARGET = "model.layers.{layer}.", "blk.{layer}."  # what layer_rules puts in front

IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

ATTENTION_NORM = TensorRule("input_layernorm.weight", "attn_norm.weight", ("dim",))
FFN_NORM = TensorRule("post_attention_layernorm.weight", "ffn_norm.weight", ("dim",))
GATED_FFN = (
    TensorRule("mlp.gate_proj.weight", "ffn_gate.weight", ("ffn", "dim")),
    TensorRule("mlp.up_proj.weight", "ffn_up.weight", ("ffn", "dim")),
    TensorRule("mlp.down_proj.weight", "ffn_down.weight", ("dim", "ffn")),
)
GATED_FFN_BIASES = (
    TensorRule("mlp.gate_proj.bias", "ffn_gate.bias", ("ffn",), when="mlp_bias"),
    TensorRule("mlp.up_proj.bias", "ffn_up.bias", ("ffn",), when="mlp_bias"),
    TensorRule("mlp.down_proj.bias", "ffn_down.bias", ("dim",), when="mlp_bias"),
)

METADATA = (
    MetadataRule("block_count", "u32", "n_layers"),
    MetadataRule("context_length", "u32", "n_ctx"),
    MetadataRule("embedding_length", "u32", "dim"),
    MetadataRule("feed_forward_length", "u32", "ffn_dim"),
    MetadataRule("attention.head_count", "u32", "n_heads"),
    MetadataRule("attention.head_count_kv", "u32", "n_kv_heads"),
    MetadataRule("attention.layer_norm_rms_epsilon", "f32", "norm_epsilon"),
    MetadataRule("attention.key_length", "u32", "key_length"),
    MetadataRule("attention.value_length", "u32", "key_length"),
)

LAYER_NORM_METADATA = tuple(
    replace(rule, key="attention.layer_norm_epsilon") if rule.field == "norm_epsilon" else rule
    for rule in METADATA
)


def read_common(
    config: HFConfig,
    *,
    n_ctx: int,
    activations: tuple[str, ...] = SILU,
    activation_key: str = "hidden_act",
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    n_vocab: int | None = None,
    epsilon: float = 1e-6,
    epsilon_key: str = "rms_norm_eps",
    tied: bool | None = None,
    rotary: Rotary = PLAIN,
) -> ModelFacts:
    """The numbers that nearly every config.json gives under the same names.

    Arguments that are numbers are what transformers assumes where config.json is silent; without
    one there are as many KV heads as heads, heads of dim / n_heads, and a vocabulary that must be
    given. The first of `activations` is assumed too; any other than these is refused.
    """
    check_activation(config, activation_key, activations)
    dim = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", default=n_heads)
    kv_heads = _kv_heads(config, heads, n_kv_heads)
    size = _head_dim(config, dim, heads, head_dim)
    context = config.integer("max_position_embeddings", high=MAX_CONTEXT, default=n_ctx)
    rope = read_rope(config, n_ctx=context, head_dim=size, rotary=rotary)
    return ModelFacts(
        n_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        dim=dim,
        ffn_dim=config.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=size,
        n_vocab=config.integer("vocab_size", default=n_vocab),
        n_ctx=context,
        norm_epsilon=config.real(epsilon_key, low=0.0, high=1.0, default=epsilon),
        rope=rope,
        tied=config.flag("tie_word_embeddings", default=tied),
        key_length=size if config.has("head_dim") or head_dim is not None else None,
        notes=rope.notes,
    )


def check_activation(config: HFConfig, key: str, known: tuple[str, ...]) -> None:
    """Refuse an activation other than those known, the first of which silence means."""
    activation = config.text(key, default=known[0])
    if activation not in known:
        raise UnsupportedModelError(
            f"{config.where}: {key}: expected {known[0]}, found {printable(activation)}: GGUF has "
            "no other activation for this architecture"
        )


def switches(config: HFConfig, *names: str) -> frozenset[str]:
    """Those of the flags `names` that config.json says are on."""
    return frozenset(name for name in names if config.flag(name, default=False))


def refuse_switches(config: HFConfig, *names: str) -> None:
    """An error if one of the flags `names` is on: GGUF has no tensors for what it adds."""
    for name in sorted(switches(config, *names)):
        raise config.refuse(name, "false for this architecture", True)


def attention(rotate: Rotate | None = None) -> tuple[TensorRule, ...]:
    """q, k, v and the output projection of a layer; `rotate` reorders the rows of q and k."""
    return (
        TensorRule("self_attn.q_proj.weight", "attn_q.weight", ("q", "dim"), rotate),
        TensorRule("self_attn.k_proj.weight", "attn_k.weight", ("kv", "dim"), rotate),
        TensorRule("self_attn.v_proj.weight", "attn_v.weight", ("kv", "dim")),
        TensorRule("self_attn.o_proj.weight", "attn_output.weight", ("dim", "q")),
    )


def qkv_biases(*, when: str = "", rotate: Rotate | None = None) -> tuple[TensorRule, ...]:
    return (
        TensorRule("self_attn.q_proj.bias", "attn_q.bias", ("q",), rotate, when),
        TensorRule("self_attn.k_proj.bias", "attn_k.bias", ("kv",), rotate, when),
        TensorRule("self_attn.v_proj.bias", "attn_v.bias", ("kv",), when=when),
    )


def output_bias(*, when: str = "") -> TensorRule:
    return TensorRule("self_attn.o_proj.bias", "attn_output.bias", ("dim",), when=when)


def layer_rules(*rules: TensorRule) -> tuple[TensorRule, ...]:
    """The rules, whose names say only what follows the layer, with their full names."""
    return tuple(
        replace(rule, source=SOURCE + rule.source, name=TARGET + rule.name) for rule in rules
    )


def _kv_heads(config: HFConfig, n_heads: int, silent: int | None) -> int:
    if "num_key_value_heads" in config.values:  # a null says: as many as heads
        n_kv_heads = config.integer("num_key_value_heads", default=n_heads)
    else:
        n_kv_heads = silent or n_heads
    if n_heads % n_kv_heads:
        raise config.refuse("num_key_value_heads", f"a divisor of the {n_heads} heads", n_kv_heads)
    return n_kv_heads


def _head_dim(config: HFConfig, dim: int, n_heads: int, silent: int | None) -> int:
    explicit = config.has("head_dim")
    if not explicit and silent is None and dim % n_heads:
        raise config.refuse("num_attention_heads", f"a divisor of hidden_size {dim}", n_heads)
    head_dim = config.integer("head_dim", default=silent or dim // n_heads)
    if head_dim % 2:
        key = "head_dim" if explicit else "num_attention_heads"
        raise config.refuse(key, "heads of an even size", head_dim)
    return head_dim
