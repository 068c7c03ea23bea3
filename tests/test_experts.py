"""Mixtures of experts: both layouts of checkpoints, older files, and numbers that do not fit."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import CheckpointError, FormatError, MissingTensorError
from gguf_tools.plan import Plan
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec
from runtime.model import Model
from tests.architectures import FOLDER, converted, disagreement, prompts
from tests.checkpoints import pack

Tensors = dict[str, np.ndarray]
MIXTURES = ("mixtral", "qwen2moe", "qwen3moe", "gptoss", "deepseek2", "deepseek3")


def plan_of(folder: Path, file_type: str = "F32") -> Plan:
    return plan_conversion(folder, find_file_type(file_type))


def tensors_of(folder: Path) -> Tensors:
    tensors = open_checkpoint(folder).tensors
    return {name: t.load(0, t.n_rows).reshape(t.shape) for name, t in tensors.items()}


def changed(
    name: str,
    target: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """A checkpoint of the tests with another configuration or other tensors."""
    folder = target / name
    shutil.copytree(FOLDER / name, folder)
    values = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        (folder / "model.safetensors").write_bytes(pack(tensors(tensors_of(folder))))
    return folder


def write(plan: Plan, path: Path) -> Path:
    for _ in convert(plan, path, threads=1, force=True):
        pass
    return path


def with_metadata(name: str, path: Path, **changes: MetadataValue | None) -> Path:
    """The checkpoint as a file, some of whose keys are changed; None leaves one out."""
    plan = plan_of(FOLDER / name)
    prefix = plan.metadata["general.architecture"].value
    named = {f"{prefix}.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {k: v for k, v in {**plan.metadata, **named}.items() if v is not None}
    return write(replace(plan, metadata=metadata), path)


def refusal(path: Path, kind: type[Exception] = FormatError) -> str:
    with GGUFFile(path) as file, pytest.raises(kind) as caught:
        Model.load(file, backend="reference")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- checkpoints --------------------------------------------------------------------------------


def stack(tensors: Tensors) -> Tensors:
    """As transformers 5 has it in memory: an axis of experts, gate and up in one."""
    result: Tensors = {}
    experts: dict[str, dict[str, list[np.ndarray]]] = {}
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, values in sorted(tensors.items(), key=lambda item: _numbers(item[0])):
        if ".experts." not in name:
            result[name.replace("block_sparse_moe", "mlp")] = values
            continue
        stem, rest = name.replace("block_sparse_moe", "mlp").split(".experts.")
        part = rest.split(".")[1]
        layer = experts.setdefault(stem, {})
        layer.setdefault(parts.get(part, part), []).append(values)
    for stem, layer in experts.items():
        gate, up = np.stack(layer["gate_proj"]), np.stack(layer["up_proj"])
        result[f"{stem}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[f"{stem}.experts.down_proj"] = np.stack(layer["down_proj"])
    return result


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe", "deepseek2"])
def test_stacked_and_separate_experts_give_the_same_file(name: str, tmp_path: Path) -> None:
    stacked = write(plan_of(changed(name, tmp_path, tensors=stack)), tmp_path / "stacked.gguf")
    with GGUFFile(converted(name, tmp_path)) as one, GGUFFile(stacked) as other:
        assert set(one.tensors) == set(other.tensors)
        for tensor in one.tensors:
            assert np.array_equal(one.load(tensor), other.load(tensor)), tensor


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("qwen2moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("qwen2moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("gptoss", "model.layers.1.mlp.experts.gate_up_proj_bias"),
        ("deepseek3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_missing_experts_are_named(name: str, lost: str, tmp_path: Path) -> None:
    folder = changed(
        name, tmp_path, tensors=lambda all_: {k: v for k, v in all_.items() if k != lost}
    )
    with pytest.raises(MissingTensorError, match="missing: .*" + lost.replace(".", r"\.")):
        plan_of(folder)


def test_more_and_fewer_experts_than_promised(tmp_path: Path) -> None:
    n = json.loads((FOLDER / "qwen3moe" / "config.json").read_text())["num_experts"]
    with pytest.raises(MissingTensorError, match=rf"missing: .*experts\.{n}\.gate_proj"):
        plan_of(changed("qwen3moe", tmp_path / "more", {"num_experts": n + 1}))
    with pytest.raises(MissingTensorError, match=rf"unexpected: .*experts\.{n - 1}\.\w+_proj"):
        plan_of(changed("qwen3moe", tmp_path / "fewer", {"num_experts": n - 1}))
    stacked = changed("mixtral", tmp_path / "stacked", {"num_local_experts": 3}, stack)
    with pytest.raises(MissingTensorError, match=r"wrong shape: .*config\.json gives \(3, "):
        plan_of(stacked)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok: expected a whole number"),
        ("mixtral", {"num_experts_per_tok": 9}, "at most the 8 experts, found 9"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: expected a whole number"),
        ("mixtral", {"num_local_experts": 10**12}, "num_local_experts"),
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 1024, "num_hidden_layers": 2048}, "at most 131,072"),
        ("qwen2moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: .*all have experts, found \[0\]"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: .*all layers have experts"),
        ("qwen3moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3moe", {"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ("gptoss", {"swiglu_limit": 5.0}, "swiglu_limit: expected 7"),
        ("gptoss", {"attention_bias": False}, "attention_bias: expected true"),
        ("gptoss", {"sliding_window": None}, "sliding_window: expected a number of tokens"),
        ("deepseek2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek3", {"scoring_func": "tanh"}, "scoring_func: expected softmax or sigmoid"),
        ("deepseek3", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        (
            "deepseek3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "mscale_all_dim: expected the same number as mscale",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    name: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        plan_of(changed(name, tmp_path, config))
    assert len(str(caught.value)) < 500


def test_normalising_otherwise_than_llama_cpp_is_kept_and_said(tmp_path: Path) -> None:
    for name, usual in (("qwen2moe", False), ("qwen3moe", True)):
        plain = plan_of(changed(name, tmp_path / "usual", {"norm_topk_prob": usual}))
        assert f"{name}.expert_weights_norm" not in plain.metadata
        assert not plain.notes
        other = plan_of(changed(name, tmp_path / "other", {"norm_topk_prob": not usual}))
        assert other.metadata[f"{name}.expert_weights_norm"].value is not usual
        assert "llama.cpp knows this architecture otherwise" in other.notes[0]


def test_windows_of_gpt_oss(tmp_path: Path) -> None:
    key = "gpt-oss.attention.sliding_window_pattern"
    assert key not in plan_of(FOLDER / "gptoss").metadata
    types = ["full_attention", "sliding_attention"]
    plan = plan_of(changed("gptoss", tmp_path, {"layer_types": types}))
    assert plan.metadata[key] == Array("bool", (False, True))


def test_layers_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> Tensors:
        last = max(_numbers(name)[0] for name in tensors if ".layers." in name)
        old = f"model.layers.{last}."
        ahead = {k.replace(old, f"model.layers.{last + 1}."): v for k, v in tensors.items()}
        return {**ahead, **tensors}

    plan = plan_of(changed("deepseek3", tmp_path, tensors=add))
    assert {t.name for t in plan.tensors} == {t.name for t in plan_of(FOLDER / "deepseek3").tensors}
    assert "predict further tokens are left out" in plan.notes[0]
    unexpected = changed("qwen3moe", tmp_path, tensors=add)
    with pytest.raises(MissingTensorError, match="unexpected"):
        plan_of(unexpected)


def test_recipes_know_how_many_experts_there_are() -> None:
    """Exactly eight get the exceptions that llama.cpp has for Mixtral."""
    for name, attention in (("mixtral", "Q8_0"), ("mixtral-4-experts", "Q5_0")):
        types = {t.name: t.quant.name for t in plan_of(FOLDER / name, "Q4_K_M").tensors}
        assert types["blk.0.attn_k.weight"] == attention
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_size_labels_count_experts() -> None:
    labels = {n: plan_of(FOLDER / n).metadata["general.size_label"].value for n in MIXTURES}
    assert str(labels["mixtral"]).startswith("8x")
    assert all("x" in str(label) for label in labels.values())


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def in_blocks(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """gpt-oss as OpenAI published it, its experts random MXFP4; and those as plain numbers."""
    rng = np.random.default_rng(5)
    published, plain = dict(tensors), dict(tensors)
    for name, weights in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        n_experts, n_inputs, n_outputs = weights.shape
        codes = rng.integers(0, 16, (n_experts, n_outputs, n_inputs // 32, 32))
        scales = rng.integers(120, 128, codes.shape[:-1])
        del published[name]
        published[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
        published[f"{name}_scales"] = scales.astype(np.uint8)
        values = CODES[codes] * np.exp2(scales[..., None] - 127.0)
        plain[name] = values.reshape(n_experts, n_outputs, n_inputs).swapaxes(1, 2)
    return published, plain


@pytest.mark.parametrize("file_type", ["F32", "Q4_K_M"])
def test_published_blocks_are_kept(file_type: str, tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    published = changed("gptoss", tmp_path / "a", quantised, lambda t: in_blocks(t)[0])
    plain = changed("gptoss", tmp_path / "b", tensors=lambda t: in_blocks(t)[1])
    kept = write(plan_of(published, file_type), tmp_path / "kept.gguf")
    with GGUFFile(kept) as file, GGUFFile(write(plan_of(plain), tmp_path / "plain.gguf")) as other:
        for name in other.tensors:
            if "_exps.weight" in name:
                assert file.tensors[name].quant.name == "MXFP4"
                assert np.array_equal(file.load(name), other.load(name)), name
            elif file_type == "F32":
                assert np.array_equal(file.raw(name), other.raw(name)), name


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def damage(lost: str) -> Callable[[Tensors], Tensors]:
        return lambda t: {k: v for k, v in in_blocks(t)[0].items() if k != lost}

    lost = "model.layers.1.mlp.experts.gate_up_proj_scales"
    with pytest.raises(MissingTensorError, match=f"missing: {lost}"):
        plan_of(changed("gptoss", tmp_path / "a", tensors=damage(lost)))
    with pytest.raises(MissingTensorError, match=r"wrong shape: .*_blocks is"):
        plan_of(changed("gptoss", tmp_path / "b", {"hidden_size": 48}, damage("")))

    def as_floats(tensors: Tensors) -> Tensors:
        return {name: values.astype("<f4") for name, values in in_blocks(tensors)[0].items()}

    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks is F32"):
        plan_of(changed("gptoss", tmp_path / "c", tensors=as_floats))


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe", "gptoss", "deepseek3"])
@pytest.mark.parametrize(
    "used",
    [Value("u32", 0), Value("u32", 99), Value("u32", 2**32 - 1), None, Array("u32", (2, 2))],
    ids=["0", "99", "2**32-1", "absent", "array"],
)
def test_how_many_are_used_is_checked(
    name: str, used: MetadataValue | None, tmp_path: Path
) -> None:
    path = with_metadata(name, tmp_path / "a.gguf", expert_used_count=used)
    assert "expert_used_count: expected an integer" in refusal(path)


@pytest.mark.parametrize("count", [5, 7, 4096])
def test_how_many_there_are_must_fit_the_tensors(count: int, tmp_path: Path) -> None:
    path = with_metadata("qwen3moe", tmp_path / "a.gguf", expert_count=Value("u32", count))
    assert f"expected {count} x " in refusal(path, MissingTensorError)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mixtral", "expert_count", Value("u32", 2**31)),
        ("qwen2moe", "expert_count", Value("u32", 0)),
        ("qwen3moe", "expert_count", None),
        ("qwen3moe", "expert_feed_forward_length", Value("u32", 0)),
        ("qwen2moe", "expert_shared_feed_forward_length", Value("u32", 2**30)),
        ("qwen3moe", "expert_weights_norm", Value("u32", 1)),
        ("deepseek3", "expert_gating_func", Value("u32", 4)),
        ("deepseek3", "expert_group_count", Value("u32", 5)),
        ("deepseek3", "expert_group_count", Value("u32", 2**31)),
        ("deepseek3", "expert_group_used_count", Value("u32", 2)),
        ("deepseek3", "expert_weights_scale", Value("f32", -1.0)),
        ("deepseek3", "leading_dense_block_count", Value("u32", 2**31)),
        ("deepseek3", "attention__kv_lora_rank", None),
        ("deepseek3", "attention__kv_lora_rank", Value("u32", 1 << 24)),
        ("deepseek3", "attention__temperature_scale", Value("f32", 0.5)),
        ("deepseek3", "rope__dimension_count", Value("u32", 0)),
        ("deepseek3", "rope__dimension_count", Value("u32", 24)),
        ("deepseek3", "attention__key_length_mla", Value("u32", 1)),
        ("deepseek3", "rope__scaling__yarn_log_multiplier", Value("f32", -1.0)),
    ],
)
def test_keys_that_contradict_are_named(
    name: str, key: str, value: MetadataValue | None, tmp_path: Path
) -> None:
    path = with_metadata(name, tmp_path / "a.gguf", **{key: value})
    found = refusal(path)
    assert key.split("__")[-1] in found or "dimension_count" in found


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3moe", "expert_feed_forward_length", 2**20),
        ("qwen2moe", "expert_shared_feed_forward_length", 8),
        ("deepseek3", "leading_dense_block_count", 0),
        ("deepseek3", "attention__kv_lora_rank", 16),
        ("deepseek3", "attention__value_length_mla", 8),
        ("deepseek3", "attention__q_lora_rank", 0),
        ("deepseek3", "expert_shared_count", 0),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, key: str, value: int, tmp_path: Path) -> None:
    path = with_metadata(name, tmp_path / "a.gguf", **{key: Value("u32", value)})
    assert "the tensors do not fit the architecture: blk." in refusal(path, MissingTensorError)


def rewritten(source: Path, path: Path, change: Callable[[Tensors], Tensors], **keys: Any) -> Path:
    """A file with other tensors, all F32."""
    with GGUFFile(source) as file:
        tensors = change({name: file.load(name) for name in file.tensors})
        metadata = {
            key: value
            for key, value in plan_of(FOLDER / source.stem).metadata.items()
            if keys.get(key.split(".", 1)[1], ...) is not None
        }
    prefix = metadata["general.architecture"].value
    metadata |= {f"{prefix}.{key}": Value("u32", v) for key, v in keys.items() if v is not None}
    specs = [TensorSpec(name, by_name("F32"), w.shape) for name, w in tensors.items()]
    with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
        for name, weights in tensors.items():
            rows = np.ascontiguousarray(weights, np.float32).reshape(-1, weights.shape[-1])
            writer.write(name, rows.view(np.uint8))
    return path


def test_files_with_fused_experts(tmp_path: Path) -> None:
    """llama.cpp's converter makes them with --fuse-gate-up-exps."""

    def fuse(tensors: Tensors) -> Tensors:
        result = dict(tensors)
        for layer in range(2):
            gate, up = (
                result.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")
            )
            result[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
        return result

    path = rewritten(converted("qwen2moe", tmp_path), tmp_path / "fused.gguf", fuse)
    for prompt in prompts("qwen2moe"):
        assert disagreement(path, prompt, "reference") < 1e-4


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_older_files_of_deepseek(name: str, tmp_path: Path) -> None:
    """Before April 2025: keys and values from one tensor, heads' sizes under the usual keys."""
    source = converted(name, tmp_path)
    with GGUFFile(source) as file:
        own = {key.split(".", 1)[1]: value for key, value in file.metadata.items()}
    key, value, heads = (
        own[f"attention.{part}"] for part in ("key_length_mla", "value_length_mla", "head_count")
    )

    def join(tensors: Tensors) -> Tensors:
        result = dict(tensors)
        for name in tensors:
            if "attn_k_b" in name:
                keys = result.pop(name).swapaxes(1, 2)
                values = result.pop(name.replace("attn_k_b", "attn_v_b"))
                both = np.concatenate([keys, values], axis=1)
                result[name.replace("attn_k_b", "attn_kv_b")] = both.reshape(-1, both.shape[-1])
        return result

    keys = {
        "attention.key_length": key,
        "attention.value_length": value,
        "attention.head_count_kv": heads,
        "attention.key_length_mla": None,
        "attention.value_length_mla": None,
    }
    path = rewritten(source, tmp_path / "older.gguf", join, **keys)
    for prompt in prompts(name):
        assert disagreement(path, prompt, "reference") < 1e-4
