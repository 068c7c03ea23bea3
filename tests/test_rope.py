"""Rotary positions: what config.json and a file say, and the angles that follow."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools import archs
from gguf_tools.archs.architecture import ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    UnsupportedModelError,
)
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.config import RopeScaling, read_config
from runtime.decoders import build_program
from runtime.program import Rope, RopeTable
from runtime.rope import rope_table
from tests.architectures import converted
from tests.checkpoints import llama_config
from tests.tiny import llama_file

SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
}


def facts_of(**changes: Any) -> ModelFacts:
    config = HFConfig(llama_config(**changes), "config.json")
    return archs.find(config).read_facts(config)


def generated(facts: ModelFacts, name: str) -> dict[str, Any]:
    """The tensors that are computed from the configuration."""
    architecture = next(a for a in archs.ARCHITECTURES if a.name == name)
    made = {tensor.name: tensor.make(facts) for tensor in architecture.generated}
    return {key: values for key, values in made.items() if values is not None}


def metadata_of(facts: ModelFacts) -> dict[str, Any]:
    return {key: value for key, _, value in facts.rope.metadata()}


# --- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_becomes_two_tensors(kind: str) -> None:
    facts = facts_of(**PHI3, rope_scaling={**LONGROPE, "rope_type": kind})
    assert metadata_of(facts) == {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": 32,
        "rope.scaling.attn_factor": pytest.approx(math.sqrt(1 + math.log(4) / math.log(32))),
        "rope.freq_base": 1e4,
    }
    tensors = generated(facts, "phi3")
    np.testing.assert_array_equal(tensors["rope_factors_short.weight"], np.float32(SHORT))
    np.testing.assert_array_equal(tensors["rope_factors_long.weight"], np.float32(LONG))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"factor": 8.0}, math.sqrt(1 + math.log(8) / math.log(32))),
        ({"attention_factor": 1.5}, 1.5),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_attention_factor_of_longrope(changes: dict[str, float], expected: float) -> None:
    facts = facts_of(**PHI3, rope_scaling={**LONGROPE, **changes})
    assert metadata_of(facts)["rope.scaling.attn_factor"] == pytest.approx(expected)


def test_llama_has_longrope_too() -> None:
    scaling = {**LONGROPE, "original_max_position_embeddings": 64}
    facts = facts_of(rope_scaling=scaling)
    assert metadata_of(facts)["rope.scaling.original_context_length"] == 64
    assert set(generated(facts, "llama")) == {
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }
    assert generated(facts_of(), "llama") == {}


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (None, "a list of 8 numbers, found nothing"),
        ("many", "a list of 8 numbers, found 'many'"),
        ([], "a list of 8 numbers, found 0"),
        (SHORT[:7], "a list of 8 numbers, found 7"),
        ([*SHORT, 1.0], "a list of 8 numbers, found 9"),
        ([*SHORT[:7], 0], r"\[7\]: expected a number from 0.001"),
        ([*SHORT[:7], -1.0], r"\[7\]: expected a number from 0.001"),
        ([math.nan, *SHORT[:7]], r"\[0\]: expected a number from 0.001"),
        ([math.inf, *SHORT[:7]], r"\[0\]: expected a number from 0.001"),
        ([*SHORT[:7], "1"], r"\[7\]: expected a number"),
        ([*SHORT[:7], True], r"\[7\]: expected a number"),
        ([*SHORT[:7], 10**4000], r"\[7\]: expected a number"),
    ],
)
def test_longrope_factors_are_checked(key: str, factors: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        facts_of(**PHI3, rope_scaling={**LONGROPE, key: factors})


@pytest.mark.parametrize("value", [0, 1, -4, "4k", 1e9, math.nan])
def test_original_context_is_checked(value: object) -> None:
    changes = {**PHI3, "original_max_position_embeddings": value}
    with pytest.raises(CheckpointError, match="original_max_position_embeddings"):
        facts_of(**changes, rope_scaling=LONGROPE)


@pytest.mark.parametrize(
    ("changes", "n_dims"),
    [({}, 16), ({"partial_rotary_factor": 0.75}, 12), ({"partial_rotary_factor": 0.3}, 4)],
)
def test_a_part_of_each_head_turns(changes: dict[str, float], n_dims: int) -> None:
    assert facts_of(**PHI3, **changes).more["rope_dims"] == n_dims
    parameters = {"rope_type": "default", "rope_theta": 5e5, **changes}
    facts = facts_of(**PHI3, rope_theta=..., rope_parameters=parameters)
    assert (facts.more["rope_dims"], facts.rope.base) == (n_dims, 5e5)


@pytest.mark.parametrize("part", [0.0, -0.5, 1.5, math.nan, 0.07, 0.2, "half"])
def test_parts_are_checked(part: object) -> None:
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        facts_of(**PHI3, partial_rotary_factor=part)


def test_gptneox_calls_them_otherwise() -> None:
    neox = {"architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": ..., "hidden_act": ...}
    facts = facts_of(**neox, rotary_pct=0.5, rotary_emb_base=25000)
    assert (facts.more["rope_dims"], facts.rope.base) == (8, 25000.0)
    assert facts_of(**neox).more["rope_dims"] == 4  # what transformers assumes
    with pytest.raises(CheckpointError, match="rotary_pct"):
        facts_of(**neox, rotary_pct=0.1)


def test_stablelm_had_other_names() -> None:
    stablelm = {"architectures": ["StableLMEpochForCausalLM"], "norm_eps": 1e-4}
    facts = facts_of(**stablelm, rope_pct=0.5)
    assert (facts.more["rope_dims"], facts.norm_epsilon) == (8, 1e-4)


@pytest.mark.parametrize(
    ("class_name", "kind"),
    [
        ("Phi3ForCausalLM", "yarn"),
        ("Phi3ForCausalLM", "llama3"),
        ("StableLmForCausalLM", "llama3"),
        ("StableLmForCausalLM", "longrope"),
        ("Starcoder2ForCausalLM", "longrope"),
        ("Qwen2ForCausalLM", "llama3"),
    ],
)
def test_kinds_that_a_file_has_no_place_for(class_name: str, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"scaling {kind} is not supported; known are"):
        facts_of(
            architectures=[class_name],
            hidden_act=...,
            rope_scaling={**LONGROPE, "rope_type": kind, "factor": 4.0},
        )


def test_mscale_of_0_says_nothing() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 0, "mscale_all_dim": 1.0}
    assert "rope.scaling.attn_factor" not in metadata_of(facts_of(rope_scaling=scaling))


# --- metadata of a file -----------------------------------------------------------------------


def scaling_of(path: Path, *entries: tuple[str, str, object], context: int = 512) -> RopeScaling:
    extra = {f"llama.{key}": Value(type_, value) for key, type_, value in entries}
    extra["llama.context_length"] = Value("u32", context)
    path = llama_file(path / "model.gguf", extra=extra)
    with GGUFFile(path) as file:
        found = read_config(file).rope_scaling
    path.unlink()
    return found


TYPE, FACTOR, OLD = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((), ("none", 1.0)),
        (((OLD, "f32", 4.0),), ("linear", 4.0)),
        (((OLD, "f32", 1.0),), ("none", 1.0)),
        (((OLD, "f32", 0.0),), ("none", 1.0)),
        (((FACTOR, "f32", 2.0),), ("linear", 2.0)),
        (((FACTOR, "f32", 2.0), (OLD, "f32", 4.0)), ("linear", 2.0)),
        (((FACTOR, "f32", 0.0), (OLD, "f32", 4.0)), ("none", 1.0)),
        (((TYPE, "str", "linear"), (OLD, "f32", 4.0)), ("linear", 4.0)),
        (((TYPE, "str", "none"), (FACTOR, "f32", 2.0)), ("none", 2.0)),
        (((TYPE, "str", "yarn"), (FACTOR, "f32", 2.0)), ("yarn", 2.0)),
        (((TYPE, "str", "longrope"),), ("longrope", 1.0)),
    ],
)
def test_scaling_as_llama_cpp_reads_it(
    tmp_path: Path, entries: tuple[tuple[str, str, object], ...], expected: tuple[str, float]
) -> None:
    found = scaling_of(tmp_path, *entries)
    assert (found.kind, found.factor) == expected


def test_attention_factor_of_yarn(tmp_path: Path) -> None:
    """What llama.cpp's converter copies from config.json counts, unless the file says more."""
    yarn = ((TYPE, "str", "yarn"), (FACTOR, "f32", 4.0))
    implied = 1 + 0.1 * math.log(4)
    whole = ("rope.scaling.yarn_attn_factor", "f32", 0.9)
    assert scaling_of(tmp_path, *yarn).attention_factor == 1.0
    assert scaling_of(tmp_path, *yarn, whole).attention_factor == pytest.approx(0.9 / implied)
    more = ("rope.scaling.attn_factor", "f32", 0.5)
    assert scaling_of(tmp_path, *yarn, whole, more).attention_factor == 0.5
    assert scaling_of(tmp_path, whole).attention_factor == 1.0


@pytest.mark.parametrize(
    ("key", "type_", "value"),
    [
        (FACTOR, "f32", -1.0),
        (FACTOR, "f32", math.nan),
        (FACTOR, "f32", math.inf),
        (FACTOR, "str", "4"),
        (OLD, "f32", -4.0),
        (OLD, "f32", math.nan),
        ("rope.scaling.attn_factor", "f32", 0.0),
        ("rope.scaling.attn_factor", "f32", math.nan),
        ("rope.scaling.original_context_length", "u32", 0),
        ("rope.scaling.yarn_beta_fast", "f32", -1.0),
        ("rope.scaling.yarn_beta_slow", "f32", math.nan),
        ("rope.scaling.yarn_truncate", "u32", 1),
        ("rope.freq_base", "f32", 0.0),
        ("rope.freq_base", "f32", math.nan),
        ("rope.dimension_count", "u32", 3),
        ("rope.dimension_count", "u32", 18),
        ("rope.dimension_count", "u32", 2**32 - 1),
    ],
)
def test_hostile_metadata_is_named(tmp_path: Path, key: str, type_: str, value: object) -> None:
    with pytest.raises(FormatError, match=key.replace(".", r"\.")):
        scaling_of(tmp_path, (key, type_, value))


# --- tensors of a file --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_divisors_are_checked(tmp_path: Path, value: float) -> None:
    path = llama_file(tmp_path / "model.gguf", rope_factors=True)
    divisors = np.linspace(1, 8, 8).astype("<f4")
    wrong = divisors.copy()
    wrong[5] = value
    data = path.read_bytes()
    assert data.count(divisors.tobytes()) == 1
    path.write_bytes(data.replace(divisors.tobytes(), wrong.tobytes()))
    with GGUFFile(path) as file, pytest.raises(FormatError, match=r"rope_freqs.weight: .*above 0"):
        build_program(file, read_config(file))


def test_divisors_of_another_number(tmp_path: Path) -> None:
    extra = {"llama.rope.dimension_count": Value("u32", 8)}
    path = llama_file(tmp_path / "model.gguf", rope_factors=True, extra=extra)
    with GGUFFile(path) as file, pytest.raises(MissingTensorError, match="is 8, expected 4"):
        build_program(file, read_config(file))


def table_of(path: Path, n_ctx: int) -> RopeTable:
    with GGUFFile(path) as file:
        steps = build_program(file, read_config(file), n_ctx=n_ctx).steps
        return next(step.table for step in steps if isinstance(step, Rope))


def test_the_allocated_context_chooses_the_divisors(tmp_path: Path) -> None:
    """As in llama.cpp: beyond the original context the long ones, for all positions."""
    path = converted("phi3-longrope", tmp_path)
    with GGUFFile(path) as file:
        long, short = (file.load(f"rope_factors_{name}.weight") for name in ("long", "short"))
        original = read_config(file).rope_scaling.original_context
    plain = 10000.0 ** (-np.arange(0, 2 * len(long), 2) / (2 * len(long)))
    for n_ctx, divisors in ((1, short), (original, short), (original + 1, long), (0, long)):
        np.testing.assert_allclose(table_of(path, n_ctx).frequencies, plain / divisors, rtol=1e-6)


# --- angles -------------------------------------------------------------------------------------


def yarn_frequencies(n_dims: int, base: float, factor: float, original: int, **options: Any) -> Any:
    """Written out as in transformers (modeling_rope_utils.py, _compute_yarn_parameters)."""
    fast, slow = options.get("beta_fast", 32.0), options.get("beta_slow", 1.0)
    bounds = [
        n_dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (fast, slow)
    ]
    if options.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], n_dims - 1)
    high += 0.001 if low == high else 0
    frequencies = []
    for i in range(n_dims // 2):
        ramp = min(max((i - low) / (high - low), 0), 1)
        plain = base ** (-2 * i / n_dims)
        frequencies.append(plain / factor * ramp + plain * (1 - ramp))
    return frequencies


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"truncate": False},
        {"truncate": False, "beta_fast": 16.0},
    ],
)
@pytest.mark.parametrize(("n_dims", "base"), [(64, 1e4), (128, 1e6), (48, 5e5)])
def test_yarn_is_that_of_transformers(
    tmp_path: Path, options: dict[str, Any], n_dims: int, base: float
) -> None:
    """From config.json through a file's metadata to the table."""
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    facts = facts_of(rope_theta=base, rope_scaling={**given, "attention_factor": 0.8, **options})
    extra = {f"llama.{key}": Value(type_, value) for key, type_, value in facts.rope.metadata()}
    extra["llama.rope.dimension_count"] = Value("u32", n_dims)
    path = llama_file(tmp_path / "model.gguf", key_dim=128, extra=extra)
    with GGUFFile(path) as file:
        table = rope_table(read_config(file), interleaved=True)
    expected = yarn_frequencies(n_dims, base, 4.0, 4096, **options)
    np.testing.assert_allclose(table.frequencies, expected, rtol=1e-6)
    assert table.scale == pytest.approx(0.8)


def test_no_dimension_turns(tmp_path: Path) -> None:
    extra = {"llama.rope.dimension_count": Value("u32", 0)}
    table = table_of(llama_file(tmp_path / "model.gguf", extra=extra), 8)
    assert (table.n_dims, len(table.frequencies)) == (0, 0)


YARN = (TYPE, "str", "yarn")


@pytest.mark.parametrize("base", [1.0, 1e12])
@pytest.mark.parametrize(
    "entries",
    [
        ((FACTOR, "f32", 1e-30),),
        (YARN, (FACTOR, "f32", 1e6), ("rope.scaling.yarn_beta_slow", "f32", 0.0)),
        (YARN, ("rope.scaling.original_context_length", "u32", 1)),
    ],
)
def test_extreme_numbers_give_finite_angles(
    tmp_path: Path, base: float, entries: tuple[tuple[str, str, object], ...]
) -> None:
    extra = {f"llama.{key}": Value(type_, value) for key, type_, value in entries}
    extra["llama.rope.freq_base"] = Value("f32", base)
    table = table_of(llama_file(tmp_path / "model.gguf", extra=extra), 8)
    for values in table.angles(np.array([0, 1, 1 << 30])):
        assert np.isfinite(values).all()


def test_gpt_oss_does_not_truncate_unless_it_says_so(tmp_path: Path) -> None:
    """The published models say not to; files by llama.cpp cannot say it."""
    path = converted("gptoss", tmp_path)  # it says to
    with GGUFFile(path) as file:
        assert file.metadata["gpt-oss.rope.scaling.yarn_truncate"] is True
    for truncate in (True, False):
        if not truncate:
            path.write_bytes(path.read_bytes().replace(b"yarn_truncate", b"yarn_trunkate"))
        expected = yarn_frequencies(32, 1e4, 4.0, 32, truncate=truncate)
        np.testing.assert_allclose(table_of(path, 128).frequencies, expected, rtol=1e-6)
