"""gpt-oss: `gpt-oss`.

    norm, attention (biases, sinks, a window on every other layer), add, norm, gated MLPs of some
    experts (clamped SwiGLU, biases), add

The experts' gate and up are the even and the odd outputs of one tensor. It has inputs before
outputs, or, as OpenAI published it, MXFP4 blocks of every output: they are kept, as llama.cpp does.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.experts import EXPERT_METADATA, with_experts
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    EMBEDDING,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    output_bias,
    qkv_biases,
    read_common,
)
from gguf_tools.archs.rope import Rotary
from gguf_tools.archs.windows import WINDOWS, all_but_each, read_pattern, read_window

COUNT = ("num_local_experts", "num_experts")
KNOWN_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # GGUF has no place for others


def read_facts(config: HFConfig) -> ModelFacts:
    if config.flag("attention_bias", default=True) is False:
        raise config.refuse("attention_bias", "true for this architecture", False)
    for key, known in KNOWN_SWIGLU.items():
        found = config.real(key, low=0.0, high=1e6, default=known)
        if found != known:
            raise config.refuse(key, f"{known:g}: GGUF has no place for another", found)
    rotary = Rotary(kinds=("default", "linear", "yarn"), base=150000.0)
    facts = read_common(
        config, n_ctx=131072, n_kv_heads=8, head_dim=64, epsilon=1e-5, rotary=rotary
    )
    window = read_window(config, default=128)
    if window is None:
        raise config.refuse("sliding_window", "a number of tokens", None)
    usual = all_but_each(2, facts.n_layers)
    pattern = read_pattern(config, facts.n_layers, silent=usual)
    facts = replace(
        facts, sliding_window=window, window_pattern=pattern if pattern != usual else None
    )
    ffn_dim = facts.ffn_dim
    return with_experts(config, facts, count=COUNT, n_experts=128, n_used=4, ffn_dim=ffn_dim)


PLAIN, BLOCKS = "plain_experts", "mxfp4_experts"
LAYOUTS = ((BLOCKS, ".mlp.experts.gate_up_proj_blocks"), (PLAIN, ""))

INWARDS, OUTWARDS = ("experts", "expert_ffn", "dim"), ("experts", "dim", "expert_ffn")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
GATES, UPS = (0, 2), (1, 2)

ROUTER = (
    TensorRule("mlp.router.weight", "ffn_gate_inp.weight", ("experts", "dim")),
    TensorRule("mlp.router.bias", "ffn_gate_inp.bias", ("experts",)),
)
EXPERTS = (
    TensorRule(GATE_UP, "ffn_gate_exps.weight", INWARDS, when=PLAIN, transposed=True, every=GATES),
    TensorRule(GATE_UP, "ffn_up_exps.weight", INWARDS, when=PLAIN, transposed=True, every=UPS),
    TensorRule(DOWN, "ffn_down_exps.weight", OUTWARDS, when=PLAIN, transposed=True),
)
EXPERT_BLOCKS = (
    TensorRule(
        GATE_UP + "_blocks", "ffn_gate_exps.weight", INWARDS, when=BLOCKS, mxfp4=True, part=GATES
    ),
    TensorRule(
        GATE_UP + "_blocks", "ffn_up_exps.weight", INWARDS, when=BLOCKS, mxfp4=True, part=UPS
    ),
    TensorRule(DOWN + "_blocks", "ffn_down_exps.weight", OUTWARDS, when=BLOCKS, mxfp4=True),
)
EXPERT_BIASES = (
    TensorRule(GATE_UP + "_bias", "ffn_gate_exps.bias", ("experts", "expert_ffn"), every=GATES),
    TensorRule(GATE_UP + "_bias", "ffn_up_exps.bias", ("experts", "expert_ffn"), every=UPS),
    TensorRule(DOWN + "_bias", "ffn_down_exps.bias", ("experts", "dim")),
)

ARCHITECTURE = Architecture(
    name="gpt-oss",
    classes=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(),
            *qkv_biases(),
            output_bias(),
            TensorRule("self_attn.sinks", "attn_sinks.weight", ("heads",)),
            TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", ("dim",)),
            *ROUTER,
            *EXPERTS,
            *EXPERT_BLOCKS,
            *EXPERT_BIASES,
        ),
    ),
    generated=(),
    metadata=(*METADATA, *EXPERT_METADATA, *WINDOWS),
    ignored=IGNORED,
    layouts=LAYOUTS,
)
