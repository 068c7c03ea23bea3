"""Gemma 3: `gemma3`; of models that also see, the text part.

    norm, attention (grouped heads, normed, rotary), norm, add,
    norm, gated MLP (GELU), norm, add

As gemma2, without soft caps, with a norm of every head of q and k. Of six layers five have a
window and rotary positions of a base of their own, which are never stretched.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import Architecture, MetadataRule, ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    EMBEDDING,
    GATED_FFN,
    GELU_TANH,
    HEAD,
    IGNORED,
    METADATA,
    attention,
    layer_rules,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.gemma import (
    ATTENTION_NORM,
    OUTPUT_NORM,
    POST_NORMS,
    SCALE,
    plus_one,
    with_scale,
)
from gguf_tools.archs.qwen import HEAD_NORMS
from gguf_tools.archs.rope import Rotary
from gguf_tools.archs.windows import WINDOWS, all_but_each, read_pattern, read_window

GLOBAL = Rotary(base=1e6)
LOCAL_BASE = 1e4
PERIOD = 6
LAYERS_27B = 62  # by which llama.cpp knows the model with another scale of queries


def read_facts(config: HFConfig) -> ModelFacts:
    text = config.nested("text_config")
    if text is not None:
        config = HFConfig({**config.values, **text.values}, config.where)
    refuse_switches(config, "attention_bias", "use_bidirectional_attention")
    if config.has("attn_logit_softcapping"):
        found = config.values["attn_logit_softcapping"]
        raise config.refuse("attn_logit_softcapping", "null for this architecture", found)
    facts = read_common(
        config,
        n_ctx=131072,
        activations=GELU_TANH,
        activation_key="hidden_activation",
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        n_vocab=262208,
        tied=True,
        rotary=GLOBAL,
    )
    cap = None
    if config.has("final_logit_softcapping"):
        cap = config.real("final_logit_softcapping", low=1e-3, high=1e6)
    more = {"final_logit_softcapping": cap, "local_base": _local_base(config)}
    facts = replace(facts, more=more)
    return with_scale(config, _with_windows(config, facts), n_layers_27b=LAYERS_27B)


def _with_windows(config: HFConfig, facts: ModelFacts) -> ModelFacts:
    usual = all_but_each(PERIOD, facts.n_layers)
    period = config.integer("sliding_window_pattern", default=PERIOD)
    silent = all_but_each(period, facts.n_layers)
    pattern = read_pattern(config, facts.n_layers, silent=silent)
    window = read_window(config, default=4096)
    if window is None or not any(pattern):
        return facts
    return replace(
        facts, sliding_window=window, window_pattern=None if pattern == usual else pattern
    )


def _local_base(config: HFConfig) -> float:
    """The rotary base of layers with a window, under its new name or its old one."""
    rope = config.nested("rope_parameters")
    local = rope.nested("sliding_attention") if rope is not None else None
    if local is None:
        return config.real("rope_local_base_freq", low=1.0, high=1e12, default=LOCAL_BASE)
    kind = local.text("rope_type", default="default")
    if kind != "default":
        raise local.refuse("rope_type", "default for layers with a window", kind)
    return local.real("rope_theta", low=1.0, high=1e12, default=LOCAL_BASE)


ARCHITECTURE = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    read_facts=read_facts,
    embedding=EMBEDDING,
    head=HEAD,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(
            ATTENTION_NORM,
            *attention(),
            *(replace(rule, transform=plus_one) for rule in HEAD_NORMS),
            *POST_NORMS,
            *GATED_FFN,
        ),
    ),
    generated=(),
    metadata=(
        *METADATA,
        MetadataRule("final_logit_softcapping", "f32", "final_logit_softcapping"),
        *WINDOWS,
        MetadataRule("rope.freq_base_swa", "f32", "local_base"),
        SCALE,
    ),
    ignored=IGNORED,
    renamed=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    skipped=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
