"""Granite 3: `granite`.

    norm, attention (grouped heads, rotary), add, norm, gated MLP (SiLU), add

`llama` with four factors: of the embedding, of the scores, of what is added to the hidden state,
and of the logits (which are divided by theirs).
"""

from dataclasses import replace

from gguf_tools.archs import llama
from gguf_tools.archs.architecture import MetadataRule, ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import METADATA, read_common, switches
from gguf_tools.archs.rope import LLAMA

FACTORS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def read_facts(config: HFConfig) -> ModelFacts:
    return replace(
        read_common(config, n_ctx=2048, rotary=LLAMA),
        switches=switches(config, "attention_bias", "mlp_bias"),
        more={key: config.real(key, low=1e-9, high=1e9, default=1.0) for key in FACTORS},
    )


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    name="granite",
    classes=("GraniteForCausalLM",),
    model_types=("granite",),
    read_facts=read_facts,
    metadata=(
        *METADATA,
        *llama.LLAMA_METADATA,
        *(MetadataRule(key, "f32", field) for field, key in FACTORS.items()),
    ),
)
