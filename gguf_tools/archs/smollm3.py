"""SmolLM3: `smollm3`.

    norm, attention (grouped heads, rotary but in every fourth layer), add, norm,
    gated MLP (SiLU), add

As `llama`, rows of q and k reordered; GGUF knows by itself which layers do not rotate.
"""

from dataclasses import replace

from gguf_tools.archs import llama
from gguf_tools.archs.architecture import ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import (
    ATTENTION_NORM,
    FFN_NORM,
    GATED_FFN,
    METADATA,
    OUTPUT_NORM,
    attention,
    layer_rules,
    read_common,
    refuse_switches,
)
from gguf_tools.archs.rope import Rotary
from gguf_tools.archs.windows import read_pattern

ROTARY = Rotary(base=2e6)
PERIOD = 4  # the last layer of each has no rotary positions


def read_facts(config: HFConfig) -> ModelFacts:
    refuse_switches(config, "attention_bias", "mlp_bias")
    facts = read_common(
        config, n_ctx=32768, n_heads=16, n_kv_heads=4, n_vocab=128256, tied=True, rotary=ROTARY
    )
    _check_rotating(config, facts.n_layers)
    if config.flag("use_sliding_window", default=False):
        none = (False,) * facts.n_layers
        if any(read_pattern(config, facts.n_layers, silent=none)):
            raise config.refuse("use_sliding_window", "false for this architecture", True)
    return facts


def _check_rotating(config: HFConfig, n_layers: int) -> None:
    """`no_rope_layers` has a 1 for each layer that rotates, whatever its name says."""
    expected = [int((layer + 1) % PERIOD != 0) for layer in range(n_layers)]
    found = config.values.get("no_rope_layers")
    if found is None:
        interval = config.integer("no_rope_layer_interval", default=PERIOD)
        found = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    if found != expected:
        raise config.refuse(
            "no_rope_layers", f"0 for every {PERIOD}th of the {n_layers} layers, else 1", found
        )


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    read_facts=read_facts,
    tensors=(
        OUTPUT_NORM,
        *layer_rules(ATTENTION_NORM, *attention(llama.rotary_rows), FFN_NORM, *GATED_FFN),
    ),
    generated=(),
    metadata=(*METADATA, *llama.LLAMA_METADATA),
)
