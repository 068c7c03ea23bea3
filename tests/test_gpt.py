"""What the older families have of their own: GPT-2, GPT-NeoX, StarCoder2, StableLM, and Phi."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools import archs, views
from gguf_tools.archs.architecture import ModelFacts
from gguf_tools.archs.config import HFConfig
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import (
    CheckpointError,
    ContextFullError,
    FormatError,
    GGUFError,
    MissingTensorError,
    UnsupportedModelError,
)
from gguf_tools.plan import Plan
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.safetensors_file import LazyTensor
from gguf_tools.values import Value
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.model import Model
from runtime.program import Activate, AddBias, Attend
from tests.architectures import FOLDER, converted

F32 = find_file_type("F32")


def copied(name: str, target: Path, **changes: Any) -> Path:
    """A checkpoint with its config.json changed; ... takes a key away."""
    folder = target / name
    shutil.copytree(FOLDER / name, folder, ignore=shutil.ignore_patterns("answers.npz"))
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def rename_tensors(folder: Path, name_of: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    renamed = {name_of(name): entry for name, entry in header.items()}
    text = json.dumps(renamed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@cache
def plan_of(name: str) -> Plan:
    return plan_conversion(FOLDER / name, F32)


def made(
    name: str, target: Path, metadata: dict[str, Value | None] | None = None, without: str = ""
) -> Path:
    """A file with some metadata changed or taken away, and without tensors called so."""
    plan = plan_of(name)
    changed = {**plan.metadata, **(metadata or {})}
    kept = {key: value for key, value in changed.items() if value is not None}
    tensors = tuple(t for t in plan.tensors if not without or without not in t.name)
    path = target / f"{name}.gguf"
    for _ in convert(replace(plan, metadata=kept, tensors=tensors), path, threads=1):
        pass
    return path


def facts_of(name: str, **changes: Any) -> ModelFacts:
    config = json.loads((FOLDER / name / "config.json").read_text()) | changes
    values = {key: value for key, value in config.items() if value is not ...}
    read = HFConfig(values, "config.json")
    return archs.find(read).read_facts(read)


def steps_of(path: Path, kind: type, n_ctx: int = 0) -> list[Any]:
    with GGUFFile(path) as file:
        program = build_program(file, read_config(file), n_ctx=n_ctx)
        return [step for step in program.steps if isinstance(step, kind)]


# --- what is written ------------------------------------------------------------------------------

COMMON = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
}
LAYER_NORM = COMMON | {"attention.layer_norm_epsilon"}
GROUPED = {"attention.head_count_kv", "rope.freq_base"}
KEYS = {  # those of llama.cpp's converter; * are ours, which llama.cpp leaves unread
    "phi3": COMMON
    | GROUPED
    | {
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.scaling.original_context_length",
    },
    "gpt2": LAYER_NORM,
    "starcoder2": LAYER_NORM | GROUPED | {"attention.sliding_window"},  # *
    "starcoder2-tied": LAYER_NORM | GROUPED,
    "stablelm": LAYER_NORM | GROUPED | {"rope.dimension_count", "use_parallel_residual"},
    "gptneox": LAYER_NORM | {"rope.freq_base", "rope.dimension_count", "use_parallel_residual"},
}


@pytest.mark.parametrize("name", KEYS)
def test_metadata_is_that_of_llama_cpp(name: str) -> None:
    metadata = plan_of(name).metadata
    prefix = str(metadata["general.architecture"].value) + "."
    assert {key.removeprefix(prefix) for key in metadata if key.startswith(prefix)} == KEYS[name]


def tensors_of(name: str) -> dict[str, tuple[int, ...]]:
    plan = plan_of(name)
    return {tensor.name: tensor.shape for tensor in plan.tensors}


def test_fused_tensors_stay_fused() -> None:
    phi3 = tensors_of("phi3")
    facts = facts_of("phi3")
    rows = (facts.n_heads + 2 * facts.n_kv_heads) * facts.head_dim
    assert phi3["blk.0.attn_qkv.weight"] == (rows, facts.dim)
    assert phi3["blk.0.ffn_up.weight"] == (2 * facts.ffn_dim, facts.dim)
    assert not [name for name in phi3 if "attn_q." in name or "ffn_gate" in name]


def test_norms_of_heads_are_stacked() -> None:
    parallel, facts = tensors_of("stablelm-parallel"), facts_of("stablelm-parallel")
    assert parallel["blk.1.attn_q_norm.weight"] == (facts.n_heads, facts.head_dim)
    assert parallel["blk.1.attn_k_norm.weight"] == (facts.n_kv_heads, facts.head_dim)
    assert not [name for name in parallel if "ffn_norm" in name]


def test_learned_positions_are_never_quantised() -> None:
    plan = plan_conversion(FOLDER / "gpt2", find_file_type("Q8_0"))
    types = {tensor.name: tensor.quant.name for tensor in plan.tensors}
    assert types["position_embd.weight"] == "F32"
    assert types["blk.0.attn_qkv.weight"] == "Q8_0"
    assert types["blk.0.attn_qkv.bias"] == "F32"


def test_gpt2_by_its_other_names(tmp_path: Path) -> None:
    """As openai-community/gpt2 has them, with the buffers that old checkpoints carry."""
    folder = copied("gpt2", tmp_path / "bare")
    rename_tensors(folder, lambda name: name.removeprefix("transformer."))
    bare = plan_conversion(folder, F32)
    full = plan_of("gpt2")
    assert [t.spec for t in bare.tensors] == [t.spec for t in full.tensors]
    for one, other in zip(bare.tensors, full.tensors, strict=True):
        n = one.source.n_rows
        np.testing.assert_array_equal(one.source.load(0, n), other.source.load(0, n))


def test_gpt2_may_say_its_context_in_another_key(tmp_path: Path) -> None:
    changes = {"n_positions": ..., "n_ctx": 128}
    assert facts_of("gpt2", **changes).n_ctx == 128
    assert facts_of("gpt2", n_positions=..., n_ctx=...).n_ctx == 1024


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("gpt2", {"activation_function": "relu"}, UnsupportedModelError, "expected gelu"),
        ("gpt2", {"scale_attn_weights": False}, CheckpointError, "scale_attn_weights: .*true"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, CheckpointError, "inverse.*: .*false"),
        ("gpt2", {"add_cross_attention": True}, CheckpointError, "add_cross_attention"),
        ("gpt2", {"n_head": 5}, CheckpointError, "a divisor of n_embd"),
        ("gpt2", {"n_positions": 0}, CheckpointError, "n_positions"),
        ("gpt2", {"n_positions": 10**9}, CheckpointError, "n_positions"),
        ("gpt2", {"n_inner": -1}, CheckpointError, "n_inner"),
        ("gptneox", {"hidden_act": "silu"}, UnsupportedModelError, "expected gelu, found silu"),
        ("gptneox", {"attention_bias": False}, CheckpointError, "attention_bias"),
        ("gptneox", {"head_dim": 8}, CheckpointError, "head_dim"),
        ("gptneox", {"num_key_value_heads": 2}, CheckpointError, "num_key_value_heads"),
        ("gptneox", {"use_parallel_residual": 1}, CheckpointError, "true or false"),
        ("starcoder2", {"hidden_act": "silu"}, UnsupportedModelError, "expected gelu"),
        ("starcoder2", {"head_dim": 32}, CheckpointError, "head_dim"),
        ("starcoder2", {"sliding_window": -1}, CheckpointError, "sliding_window"),
        ("stablelm", {"hidden_act": "gelu"}, UnsupportedModelError, "expected silu"),
        ("stablelm", {"head_dim": 32}, CheckpointError, "head_dim"),
        ("phi3", {"hidden_act": "gelu"}, UnsupportedModelError, "expected silu"),
        ("phi3", {"head_dim": 32}, CheckpointError, "head_dim"),
        ("phi3", {"sliding_window": "4k"}, CheckpointError, "sliding_window"),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    name: str, changes: dict[str, Any], error: type[GGUFError], words: str
) -> None:
    with pytest.raises(error, match=words):
        facts_of(name, **changes)


def test_a_checkpoint_that_is_not_what_it_says(tmp_path: Path) -> None:
    folder = copied("stablelm-parallel", tmp_path, use_parallel_residual=False)
    with pytest.raises(MissingTensorError, match=r"missing: .*post_attention_layernorm"):
        plan_conversion(folder, F32)
    folder = copied("stablelm", tmp_path, qk_layernorm=True)
    with pytest.raises(MissingTensorError, match=r"missing: .*q_layernorm\.norms\.0"):
        plan_conversion(folder, F32)
    folder = copied("gpt2", tmp_path, n_positions=64)
    with pytest.raises(MissingTensorError, match=r"wpe.weight is \(128, .*\(64, "):
        plan_conversion(folder, F32)


# --- regrouped rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_parts", "height"), [(4, 3, 5), (1, 3, 2), (3, 1, 4)])
def test_regrouped_rows(n_groups: int, n_parts: int, height: int) -> None:
    n_rows = n_groups * n_parts * height
    rows = np.arange(n_rows * 7, dtype=np.float32).reshape(n_rows, 7)
    expected = rows.reshape(n_groups, n_parts, height, 7).swapaxes(0, 1).reshape(n_rows, 7)
    matrix = LazyTensor("qkv", rows.shape, "F32", lambda first, last: rows[first:last])
    view = views.regrouped(matrix, n_groups, n_parts)
    for step in (1, 3, 4, n_rows):
        bands = [view.load(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]
        np.testing.assert_array_equal(np.concatenate(bands), expected)
    vector = LazyTensor("bias", (n_rows,), "F32", lambda _first, _last: rows[None, :, 0])
    found = views.regrouped(vector, n_groups, n_parts).load(0, 1)
    np.testing.assert_array_equal(found, expected[None, :, 0])


# --- what is run ----------------------------------------------------------------------------------


def test_no_more_context_than_learned_positions(tmp_path: Path) -> None:
    path = converted("gpt2", tmp_path)
    with GGUFFile(path) as file:
        with Model.load(file, backend="reference", threads=1) as model:
            assert model.n_ctx == 128
        with pytest.raises(ContextFullError, match=r"learned 128 positions.*129.*--ctx 128"):
            Model.load(file, n_ctx=129, backend="reference", threads=1)


def test_positions_are_as_many_as_the_file_says(tmp_path: Path) -> None:
    path = made("gpt2", tmp_path, {"gpt2.context_length": Value("u32", 1 << 30)})
    with (
        GGUFFile(path) as file,
        pytest.raises(MissingTensorError, match=r"position_embd\.weight"),
    ):
        Model.load(file, backend="reference", threads=1)


ACTIVATION_CASES = [
    ("gpt2", "activation_function", "gelu_new", None, "gelu"),
    ("gpt2", "activation_function", "gelu", "gelu", "gelu_erf"),
    ("starcoder2", "hidden_act", "gelu_pytorch_tanh", None, "gelu"),
    ("starcoder2", "hidden_act", "gelu", "gelu", "gelu_erf"),
    ("gptneox", "hidden_act", "gelu", None, "gelu_erf"),
    ("gptneox", "hidden_act", "gelu_fast", "gelu_fast", "gelu"),
]


@pytest.mark.parametrize(("name", "key", "given", "written", "run"), ACTIVATION_CASES)
def test_the_form_of_gelu(
    tmp_path: Path, name: str, key: str, given: str, written: str | None, run: str
) -> None:
    """From config.json, by a key of the file if it is not the usual one, to the program."""
    facts = facts_of(name, **{key: given})
    assert facts.value("hidden_activation") == written
    value = None if written is None else Value("str", written)
    path = made(name, tmp_path, {f"{name}.hidden_activation": value})
    assert {step.activation for step in steps_of(path, Activate)} == {run}


HOSTILE = [
    ("gpt2", "hidden_activation", Value("str", "spiral"), "hidden_activation.*gelu_new.*spiral"),
    ("gpt2", "hidden_activation", Value("u32", 1), "hidden_activation.*a text"),
    ("gptneox", "use_parallel_residual", Value("u32", 1), "use_parallel_residual.*true or false"),
    ("gptneox", "rope.dimension_count", Value("u32", 5), "rope.dimension_count"),
    ("stablelm", "rope.dimension_count", Value("u32", 64), "rope.dimension_count"),
    ("phi3", "attention.sliding_window", Value("i32", -1), "sliding_window"),
    ("gpt2", "attention.layer_norm_epsilon", None, "epsilon.*no such key"),
    ("gpt2", "feed_forward_length", None, "feed_forward_length.*no such key"),
]


@pytest.mark.parametrize(("name", "key", "value", "words"), HOSTILE)
def test_hostile_metadata_is_named(
    tmp_path: Path, name: str, key: str, value: Value | None, words: str
) -> None:
    path = made(name, tmp_path, {f"{name}.{key}": value})
    with GGUFFile(path) as file, pytest.raises(FormatError, match=words):
        build_program(file, read_config(file))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("phi3", "blk.1.attn_qkv.weight"),
        ("phi3", "blk.1.ffn_up.weight"),
        ("gpt2", "position_embd"),
        ("gpt2", "blk.0.attn_norm.weight"),
        ("gptneox", "blk.0.ffn_norm.weight"),
        ("starcoder2", "blk.0.attn_v.weight"),
        ("stablelm", "blk.0.ffn_down.weight"),
    ],
)
def test_missing_tensors_are_named(tmp_path: Path, name: str, without: str) -> None:
    path = made(name, tmp_path, without=without)
    words = without.replace("attn_qkv", "attn_q")  # it may be in three
    with GGUFFile(path) as file, pytest.raises(MissingTensorError, match=words):
        build_program(file, read_config(file))


def test_biases_of_fused_rows_may_lie_apart(tmp_path: Path) -> None:
    """As in some older files; llama.cpp reads them, too (create_tensor_qkv)."""
    plan, path = plan_of("phi3"), tmp_path / "model.gguf"
    norm = next(tensor for tensor in plan.tensors if tensor.name == "blk.0.attn_norm.weight")
    bias = replace(norm, name="blk.0.attn_q.bias")  # of as many numbers
    for _ in convert(replace(plan, tensors=(*plan.tensors, bias)), path, threads=1):
        pass
    (found,) = steps_of(path, AddBias)
    assert found.target == "q"
    with GGUFFile(path) as file:
        np.testing.assert_array_equal(found.bias, file.load("blk.0.attn_norm.weight"))


def test_windows_are_those_of_the_file(tmp_path: Path) -> None:
    """0, or no key, is no window: Phi-4, and files by llama.cpp."""
    for name in ("phi3", "starcoder2", "mistral"):
        arch = "llama" if name == "mistral" else name
        for value, expected in ((Value("u32", 16), 16), (Value("u32", 0), 0), (None, 0)):
            path = made(name, tmp_path, {f"{arch}.attention.sliding_window": value})
            assert {step.window for step in steps_of(path, Attend)} == {expected}
            path.unlink()
