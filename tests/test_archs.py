"""config.json to facts and metadata; which tensors there are; how rows are reordered."""

import math
from typing import Any

import numpy as np
import pytest

from gguf_tools import archs
from gguf_tools.archs import llama
from gguf_tools.archs.architecture import ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.rope import llama3_divisors
from gguf_tools.archs.transforms import interleave_heads
from gguf_tools.errors import CheckpointError, UnsupportedModelError
from tests.checkpoints import llama_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def facts_of(**changes: Any) -> ModelFacts:
    return llama.read_facts(HFConfig(llama_config(**changes), "config.json"))


def rope_metadata(**changes: Any) -> dict[str, Any]:
    return {key: value for key, _, value in facts_of(**changes).rope.metadata()}


def any_config() -> HFConfig:
    """What every architecture can be read from: its sizes under all names they go by."""
    silent = dict.fromkeys(("hidden_act", "tie_word_embeddings", "head_dim"), ...)
    old_names = {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "num_experts_per_tok": 2,
    }
    return HFConfig(llama_config(num_key_value_heads=4, **silent, **old_names), "config.json")


@pytest.mark.parametrize("architecture", archs.ARCHITECTURES, ids=lambda a: a.name)
def test_tables_are_sound(architecture: archs.Architecture) -> None:
    """Every architecture, whatever it is: names are unique, sizes and fields exist."""
    rules = [architecture.embedding, architecture.head, *architecture.tensors]
    for keys in (
        [(rule.source, rule.part, rule.every, rule.cut, rule.when) for rule in rules],
        [(rule.name, rule.when) for rule in rules],
    ):
        assert len(set(keys)) == len(keys)
        assert all(len(key[0].replace("{layer}", "9999")) < 64 for key in keys)
    facts = architecture.read_facts(any_config())
    for rule in rules:
        assert set(rule.shape) <= set(facts.sizes)
        assert ("{layer}" in rule.source) == ("{layer}" in rule.name)
    for metadata in architecture.metadata:
        facts.value(metadata.field)
    for class_name in architecture.classes:
        assert archs.find(HFConfig({"architectures": [class_name]}, "c")) is architecture
    for model_type in architecture.model_types:
        assert archs.find(HFConfig({"model_type": model_type}, "c")) is architecture


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
        {"architectures": ["NoSuchModel"]},
        {"model_type": "no-such"},
        {"architectures": [], "model_type": "bert"},
        {},
    ],
)
def test_unknown_architectures_list_the_known(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM, MistralForCausalLM"):
        archs.find(HFConfig(config, "config.json"))


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [7], [None], {"a": 1}, 5])
def test_architectures_of_the_wrong_form(names: object) -> None:
    with pytest.raises(CheckpointError, match="architectures: expected a list of names"):
        archs.find(HFConfig({"architectures": names}, "config.json"))


def test_facts() -> None:
    facts = facts_of()
    assert (facts.n_layers, facts.dim, facts.ffn_dim) == (2, 64, 96)
    assert (facts.n_heads, facts.n_kv_heads, facts.head_dim) == (4, 2, 16)
    assert (facts.n_vocab, facts.n_ctx, facts.norm_epsilon) == (512, 128, 1e-5)
    assert facts.tied is False
    assert facts.key_length is None
    assert facts.switches == frozenset()
    assert facts_of(attention_bias=True, mlp_bias=True).switches == {"attention_bias", "mlp_bias"}
    assert facts_of(tie_word_embeddings=...).tied is None
    explicit = facts_of(head_dim=32)
    assert (explicit.head_dim, explicit.key_length, explicit.sizes["q"]) == (32, 32, 128)
    assert facts_of(head_dim=None).key_length is None


def test_what_a_silent_config_means() -> None:
    """The defaults of transformers' configuration classes."""
    silent = {
        "num_key_value_heads": ...,
        "max_position_embeddings": ...,
        "rms_norm_eps": ...,
        "rope_theta": ...,
        "num_attention_heads": 8,
    }
    facts = facts_of(**silent)
    assert (facts.n_kv_heads, facts.n_ctx, facts.norm_epsilon) == (8, 2048, 1e-6)
    assert facts.rope.base == 10000.0
    mistral = facts_of(**silent | {"num_attention_heads": 16}, architectures=["MistralForCausalLM"])
    assert (mistral.n_kv_heads, mistral.n_ctx) == (8, 131072)
    assert facts_of(num_key_value_heads=None).n_kv_heads == 4


def test_sliding_window_is_mistrals() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert facts_of(**mistral, sliding_window=512).sliding_window == 512
    assert facts_of(**mistral, sliding_window=None).sliding_window is None
    assert facts_of(**mistral).sliding_window == 4096  # what transformers assumes
    assert facts_of(sliding_window=4096).sliding_window is None


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, "64", 64.0, 64.5, 10**9 * 4, 10**18, 10**4000, [64], {}])
def test_sizes_are_checked(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        facts_of(**{key: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", SIZES[:4])
def test_needed_sizes_are_not_guessed(key: str) -> None:
    for absent in (None, ...):
        with pytest.raises(CheckpointError, match=f"{key}: expected .*, found nothing"):
            facts_of(**{key: absent})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "a divisor of the 4 heads"),
        ({"num_key_value_heads": 8}, "a divisor of the 4 heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "a divisor of hidden_size 64"),
        ({"head_dim": 7}, "heads of an even size"),
        ({"num_attention_heads": 64, "num_key_value_heads": 64}, "heads of an even size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 10**4000}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"attention_bias": 1}, "true or false"),
        ({"rope_scaling": "linear"}, "an object"),
        ({"rope_scaling": {"type": 3}}, "a text"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "more than low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": -1}}, "original_max"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        facts_of(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "expected silu, found gelu"),
        ({"rope_scaling": {"type": "spiral", "factor": 4}}, "spiral is not supported"),
        ({"rope_scaling": {"rope_type": "\x1b[2J"}}, r"\\x1b"),
    ],
)
def test_unsupported_variants_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        facts_of(**changes)


def test_rope_without_scaling() -> None:
    assert rope_metadata(rope_theta=5e5) == {"rope.freq_base": 5e5}
    assert rope_metadata(rope_scaling=None) == {"rope.freq_base": 1e4}
    parameters = {"rope_type": "default", "rope_theta": 250000}
    assert rope_metadata(rope_theta=..., rope_parameters=parameters) == {"rope.freq_base": 250000.0}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_linear(name: str, kind: str) -> None:
    assert rope_metadata(**{name: {kind: "linear", "factor": 4}}) == {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "rope.freq_base": 1e4,
    }


def test_rope_yarn() -> None:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
    common = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 1e4}
    assert rope_metadata(rope_scaling=scaling, max_position_embeddings=4096) == {
        **common,
        "rope.scaling.original_context_length": 4096,
    }
    scaling["original_max_position_embeddings"] = 1024
    common["rope.scaling.original_context_length"] = 1024
    assert rope_metadata(rope_scaling=scaling) == common
    usual = 1 + 0.1 * math.log(4)
    found = rope_metadata(
        rope_scaling={**scaling, "attention_factor": usual, "beta_fast": 16, "beta_slow": 2}
    )
    assert found == {
        **common,
        "rope.scaling.yarn_attn_factor": usual,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    }
    found = rope_metadata(rope_scaling={**scaling, "attention_factor": 1.0})
    assert found["rope.scaling.attn_factor"] == pytest.approx(1 / usual)
    found = rope_metadata(rope_scaling={**scaling, "mscale": 0.707, "mscale_all_dim": 1.0})
    expected = (1 + 0.0707 * math.log(4)) / usual / usual
    assert found["rope.scaling.attn_factor"] == pytest.approx(expected)
    found = rope_metadata(
        rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 1024},
        max_position_embeddings=8192,
    )
    assert found["rope.scaling.factor"] == 8.0


def test_rope_dynamic_is_said() -> None:
    facts = facts_of(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert facts.rope.metadata() == [("rope.freq_base", "f32", 1e4)]
    assert "dynamic" in facts.notes[0]


def test_rope_llama3_divisors() -> None:
    """Against the formula written out pair by pair."""
    facts = facts_of(rope_scaling=LLAMA3, rope_theta=500000.0, head_dim=128)
    found = llama3_divisors(facts.rope, 128)
    assert found is not None
    assert found.dtype == np.float32
    expected = []
    for i in range(64):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 128)
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 1.0 in found
    assert 8.0 in found
    assert ((found > 1.0) & (found < 8.0)).any()
    assert llama3_divisors(facts_of().rope, 128) is None
    bare = facts_of(rope_scaling={"rope_type": "llama3"}, rope_theta=500000.0)
    np.testing.assert_array_equal(llama3_divisors(bare.rope, 128), found)


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 2), (3, 8), (4, 64)])
def test_interleaving_heads(n_heads: int, head_dim: int) -> None:
    rows = np.arange(n_heads * head_dim * 5, dtype=np.float32).reshape(-1, 5)
    found = interleave_heads(head_dim).apply(rows)
    for head in range(n_heads):
        for j in range(head_dim // 2):
            for s in range(2):
                old = rows[head * head_dim + s * (head_dim // 2) + j]
                np.testing.assert_array_equal(found[head * head_dim + 2 * j + s], old)
