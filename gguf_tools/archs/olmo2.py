"""OLMo 2 and 3: `olmo2`.

    attention (grouped heads, rotary), norm, add, gated MLP (SiLU), norm, add

No norm goes before; q and k have one each, over all heads together. In OLMo 3 three layers of four
have a window, and rotary positions that are not stretched.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    GATED_FFN,
    HEAD,
    IGNORED,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.rope import Rotary
from gguf_tools.archs.windows import WINDOWS, all_but_each, read_pattern, read_window

OLMO2, OLMO3 = "Olmo2ForCausalLM", "Olmo3ForCausalLM"
PERIOD = 4


def read_facts(config: HFConfig) -> ModelFacts:
    refuse_switches(config, "attention_bias")
    if (config.class_name or config.model_type) not in (OLMO3, "olmo3"):
        return read_common(config, n_ctx=2048, epsilon=1e-5)
    facts = read_common(config, n_ctx=2048, epsilon=1e-5, rotary=Rotary(base=500000.0))
    window = read_window(config, default=4096)
    if window is None:
        return facts
    silent = all_but_each(PERIOD, facts.n_layers)
    pattern = read_pattern(config, facts.n_layers, silent=silent)
    return replace(facts, sliding_window=window, window_pattern=pattern)


ARCHITECTURE = Architecture(
    name="olmo2",
    classes=(OLMO2, OLMO3),
    model_types=("olmo2", "olmo3"),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            *attention(),
            TensorRule("self_attn.q_norm.weight", "attn_q_norm.weight", ("q",)),
            TensorRule("self_attn.k_norm.weight", "attn_k_norm.weight", ("kv",)),
            TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", ("dim",)),
            *GATED_FFN,
            TensorRule("post_feedforward_layernorm.weight", "post_ffw_norm.weight", ("dim",)),
        ),
    ),
    generated=(),
    metadata=(*METADATA, *WINDOWS),
    ignored=IGNORED,
)
