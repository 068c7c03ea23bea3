"""What config.json says of each family, as facts and metadata; what is refused."""

from typing import Any

import numpy as np
import pytest

from gguf_tools import archs
from gguf_tools.archs.architecture import ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import GGUFError
from tests.checkpoints import llama_config

SLIDING, FULL = "sliding_attention", "full_attention"


def config_of(class_name: str, **changes: Any) -> HFConfig:
    silent: dict[str, Any] = dict.fromkeys(("hidden_act", "rope_theta", "tie_word_embeddings"), ...)
    config = llama_config(architectures=[class_name], **{**silent, **changes})
    return HFConfig(config, "config.json")


def facts_of(class_name: str, **changes: Any) -> ModelFacts:
    config = config_of(class_name, **changes)
    return archs.find(config).read_facts(config)


def metadata_of(class_name: str, **changes: Any) -> dict[str, Any]:
    config = config_of(class_name, **changes)
    architecture = archs.find(config)
    facts = architecture.read_facts(config)
    values = {rule.key: facts.value(rule.field) for rule in architecture.metadata}
    rope = {key: value for key, _, value in facts.rope.metadata()}
    return {key: value for key, value in {**values, **rope}.items() if value is not None}


def test_qwen_layers_with_a_window() -> None:
    assert facts_of("Qwen2ForCausalLM", sliding_window=32).sliding_window is None
    windows = {"use_sliding_window": True, "sliding_window": 32, "num_hidden_layers": 4}
    facts = facts_of("Qwen2ForCausalLM", **windows, max_window_layers=3)
    assert (facts.sliding_window, facts.window_pattern) == (32, (False, False, False, True))
    assert "llama.cpp" in facts.notes[0]
    types = [FULL, SLIDING, FULL, FULL]
    assert facts_of("Qwen3ForCausalLM", **windows, layer_types=types).window_pattern == (
        *(False, True, False, False),
    )
    assert facts_of("Qwen3ForCausalLM", **windows, layer_types=[FULL] * 4).sliding_window is None
    assert facts_of("Qwen3ForCausalLM", **windows).sliding_window is None  # from layer 28 on


def test_qwen3_heads_are_always_written() -> None:
    assert metadata_of("Qwen3ForCausalLM")["attention.key_length"] == 128
    assert metadata_of("Qwen3ForCausalLM", head_dim=32)["attention.value_length"] == 32
    assert "attention.key_length" not in metadata_of("Qwen2ForCausalLM")


def test_gemma3_of_a_silent_config() -> None:
    """As the published multimodal ones: nearly everything is what transformers assumes."""
    names = ("num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
    silent = dict.fromkeys((*names, "max_position_embeddings"), ...)
    stretched = {"rope_type": "linear", "factor": 8.0}
    text = {"hidden_size": 2560, "sliding_window": 1024, "rope_scaling": stretched}
    metadata = metadata_of("Gemma3ForConditionalGeneration", text_config=text, **silent)
    expected = {
        "context_length": 131072,
        "embedding_length": 2560,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    assert expected.items() <= metadata.items()
    assert not {"attention.sliding_window_pattern", "attention.scale"} & metadata.keys()
    config = config_of("Gemma3ForConditionalGeneration", text_config=text, **silent)
    assert archs.find(config).read_facts(config).n_vocab == 262208


def test_gemma3_patterns() -> None:
    def pattern(**changes: Any) -> Any:
        facts = facts_of("Gemma3ForCausalLM", num_hidden_layers=7, **changes)
        return facts.sliding_window, facts.window_pattern

    usual = [SLIDING] * 5 + [FULL, SLIDING]
    assert pattern() == pattern(layer_types=usual) == (4096, None)
    assert pattern(sliding_window_pattern=6, sliding_window=64) == (64, None)
    assert pattern(sliding_window_pattern=3)[1] == (True, True, False, True, True, False, True)
    assert pattern(sliding_window_pattern=1) == (None, None)
    assert pattern(sliding_window=None) == (None, None)
    assert pattern(layer_types=[FULL] * 7) == (None, None)
    assert pattern(layer_types=[FULL] + [SLIDING] * 6)[1] == (False,) + (True,) * 6


def test_gemma_query_scales() -> None:
    """Written only where llama.cpp, which goes by the number of layers, would take another."""
    wide = {"hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16}
    gemma2 = {**wide, "head_dim": 128, "query_pre_attn_scalar": 144}
    assert "attention.scale" not in metadata_of("Gemma2ForCausalLM", num_hidden_layers=46, **gemma2)
    facts = facts_of("Gemma2ForCausalLM", num_hidden_layers=42, **gemma2)
    assert facts.value("attention_scale") == pytest.approx(1 / 12)
    assert "144" in facts.notes[0]
    gemma3 = {"hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16}
    gemma3 |= {"head_dim": 128, "query_pre_attn_scalar": 168}
    assert "attention.scale" not in metadata_of("Gemma3ForCausalLM", num_hidden_layers=62, **gemma3)
    assert "attention.scale" in metadata_of("Gemma3ForCausalLM", num_hidden_layers=48, **gemma3)


def test_gemma2_caps() -> None:
    metadata = metadata_of("Gemma2ForCausalLM", attn_logit_softcapping=20.0)
    assert metadata["attn_logit_softcapping"] == 20.0
    assert metadata["final_logit_softcapping"] == 30.0
    assert metadata["attention.sliding_window"] == 4096


def test_granite_factors_are_always_written() -> None:
    factors = {"attention.scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0}
    assert {**factors, "logit_scale": 1.0}.items() <= metadata_of("GraniteForCausalLM").items()
    assert metadata_of("GraniteForCausalLM", logits_scaling=8)["logit_scale"] == 8.0


def test_what_olmo_assumes() -> None:
    assert facts_of("Olmo2ForCausalLM").rope.base == 10000
    assert facts_of("Olmo3ForCausalLM").rope.base == 500000


def test_olmo3_windows() -> None:
    facts = facts_of("Olmo3ForCausalLM", num_hidden_layers=5, sliding_window=64)
    assert facts.window_pattern == (True, True, True, False, True)
    assert facts_of("Olmo2ForCausalLM").window_pattern is None


def test_norms_of_gemma_are_stored_whole() -> None:
    for class_name, n_norms in (("GemmaForCausalLM", 3), ("Gemma3ForCausalLM", 7)):
        architecture = archs.find(config_of(class_name))
        changed = [rule for rule in architecture.tensors if rule.transform is not None]
        assert len(changed) == n_norms
        assert all("norm" in rule.name for rule in changed)
        transform = changed[0].transform
        assert transform is not None
        rows = np.array([[-0.25], [1.5]], np.float32)
        assert transform(facts_of(class_name)).apply(rows).tolist() == [[0.75], [2.5]]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window list of another length": (
        *("Gemma3ForCausalLM", {"layer_types": [FULL]}),
        "layer_types: expected sliding_attention or full_attention for each of the 2 layers",
    ),
    "unheard of layer": ("Gemma3ForCausalLM", {"layer_types": [FULL, "round"]}, "layer_types"),
    "both ways": ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional"),
    "capped scores": ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "expected null"),
    "stretched local positions": (
        "Gemma3ForCausalLM",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention: rope_type",
    ),
    "no caps": ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "no window": ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window"),
    "own head": ("Gemma2ForCausalLM", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "gelu": ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation"),
    "biases": ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias: expected false"),
    "rotating elsewhere": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "rotating oftener": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, "no_rope_layers"),
    "smollm3 windows": (
        "SmolLM3ForCausalLM",
        {"use_sliding_window": True, "layer_types": [SLIDING, FULL]},
        "use_sliding_window",
    ),
    "factor of nothing": ("GraniteForCausalLM", {"residual_multiplier": 0}, "residual_multiplier"),
    "llama3 positions": (
        "Qwen2ForCausalLM",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "llama3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say(case: str) -> None:
    class_name, changes, named = REFUSED[case]
    with pytest.raises(GGUFError, match=named) as raised:
        facts_of(class_name, **changes)
    assert str(raised.value).startswith("config.json: ")
    assert "\n" not in str(raised.value)
