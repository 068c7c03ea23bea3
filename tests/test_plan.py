"""Plans: which tensors, under which names, in which types; what does not fit is one error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.conversion import plan_conversion
from gguf_tools.errors import CheckpointError, MissingTensorError
from gguf_tools.naming import NameParts, model_id, name_parts, output_name, size_label, title
from gguf_tools.plan import Plan
from gguf_tools.recipes import find_file_type
from tests.checkpoints import STORIES, llama_config, llama_tensors, make_llama, pack, safetensors

LAYER_NAMES = {
    "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
    "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
}  # fmt: skip


def plan_of(folder: Path, file_type: str = "F32") -> Plan:
    return plan_conversion(folder, find_file_type(file_type))


def names_of(plan: Plan) -> set[str]:
    return {tensor.name for tensor in plan.tensors}


def values_of(plan: Plan) -> dict[str, Any]:
    return {
        key: getattr(entry, "value", None)
        for key, entry in plan.metadata.items()
        if not key.startswith("tokenizer.")
    }


def refusal(folder: Path, kind: type[Exception] = MissingTensorError) -> str:
    with pytest.raises(kind) as caught:
        plan_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_and_metadata(tmp_path: Path) -> None:
    make_llama(tmp_path / "tiny")
    plan = plan_of(tmp_path / "tiny", "Q8_0")
    layers = {f"blk.{layer}.{name}" for layer in range(2) for name in LAYER_NAMES}
    assert names_of(plan) == layers | {
        "token_embd.weight", "output_norm.weight", "output.weight"
    }  # fmt: skip
    assert plan.notes == ()
    found = values_of(plan)
    assert found["general.quantization_version"] == 2
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "general.size_label": "127K",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 512,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "general.file_type": 7,
        "general.quantization_version": 2,
    }
    types = {key: entry.type for key, entry in plan.metadata.items()}
    assert types["llama.block_count"] == "u32"
    assert types["llama.rope.freq_base"] == "f32"


def test_biases_when_config_has_them(tmp_path: Path) -> None:
    make_llama(tmp_path, attention_bias=True, mlp_bias=True)
    names = names_of(plan_of(tmp_path))
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            assert f"blk.{layer}.{part}.bias" in names


def test_explicit_head_size(tmp_path: Path) -> None:
    make_llama(tmp_path, head_dim=24)
    found = values_of(plan_of(tmp_path))
    assert found["llama.attention.key_length"] == 24
    assert found["llama.attention.value_length"] == 24
    assert found["llama.rope.dimension_count"] == 24


def test_mistral(tmp_path: Path) -> None:
    make_llama(
        tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64
    )
    found = values_of(plan_of(tmp_path))
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.sliding_window"] == 64


def test_llama3_scaling_is_a_tensor(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    make_llama(tmp_path, rope_scaling=scaling)
    tensors = {tensor.name: tensor for tensor in plan_of(tmp_path, "Q4_K_M").tensors}
    factors = tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors.quant.name == "F32"


def test_head_stored_only_as_the_head(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    make_llama(tmp_path, tensors=tensors, tie_word_embeddings=True)
    plan = plan_of(tmp_path)
    assert "output.weight" not in names_of(plan)
    embedding = next(tensor for tensor in plan.tensors if tensor.name == "token_embd.weight")
    assert embedding.source.name == "lm_head.weight"


def test_copies_of_a_tied_head_are_left_out(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    make_llama(tmp_path / "tied", tensors=tensors, tie_word_embeddings=True)
    plan = plan_of(tmp_path / "tied")
    assert "output.weight" not in names_of(plan)
    assert "lm_head.weight is left out" in plan.notes[0]
    # Not tied: two tensors that happen to be equal are two tensors.
    make_llama(tmp_path / "separate", tensors=tensors)
    assert "output.weight" in names_of(plan_of(tmp_path / "separate"))


def test_a_tied_head_that_differs_is_kept_and_said(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    make_llama(tmp_path, tensors={**tensors, "lm_head.weight": head}, tie_word_embeddings=True)
    plan = plan_of(tmp_path)
    assert "output.weight" in names_of(plan)
    assert "differ" in plan.notes[0]


def test_a_missing_head(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    del tensors["lm_head.weight"]
    make_llama(tmp_path / "untied", tensors=tensors)
    assert "missing: lm_head.weight" in refusal(tmp_path / "untied")
    make_llama(tmp_path / "silent", tensors=tensors, tie_word_embeddings=...)
    plan = plan_of(tmp_path / "silent")
    assert "output.weight" not in names_of(plan)
    assert "taken as the head" in plan.notes[0]
    make_llama(tmp_path / "tied", tensors=tensors, tie_word_embeddings=True)
    assert plan_of(tmp_path / "tied").notes == ()


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((64, 32), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
    tensors["model.layers.7.input_layernorm.weight"] = np.zeros(64, np.float32)
    make_llama(tmp_path, tensors=tensors)
    message = refusal(tmp_path)
    assert "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight" in message
    assert "model.layers.0.self_attn.q_norm.weight" in message
    assert "model.layers.7.input_layernorm.weight" in message
    assert (
        "model.layers.0.self_attn.k_proj.weight is (64, 32) where config.json gives (32, 64)"
        in message
    )


def test_very_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    make_llama(tmp_path, tensors=llama_tensors(llama_config()))
    (tmp_path / "config.json").write_text(json.dumps(llama_config(num_hidden_layers=2000)))
    message = refusal(tmp_path)
    assert "more" in message
    assert len(message) < 3000


def test_biases_that_config_does_not_promise_are_unexpected(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config(attention_bias=True))
    make_llama(tmp_path, tensors=tensors)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in refusal(tmp_path)


def test_buffers_are_passed_over(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    make_llama(tmp_path, tensors=tensors)
    assert len(plan_of(tmp_path).tensors) == 21


def test_dtypes_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    make_llama(tmp_path)
    header = {
        name: {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, 0]}
        for name, values in llama_tensors(llama_config()).items()
    }
    size = 0
    for name, entry in header.items():
        eight_bit = name.endswith("up_proj.weight")
        entry["dtype"] = "F8_E4M3" if eight_bit else "BF16"
        n_bytes = int(np.prod(entry["shape"])) * (1 if eight_bit else 2)
        entry["data_offsets"] = [size, size := size + n_bytes]
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, bytes(size)))
    message = refusal(tmp_path, CheckpointError)
    assert "model.layers.0.mlp.up_proj.weight is F8_E4M3" in message
    assert "1 more" in message


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0", "Q4_K_M"])
def test_sizes_add_up(file_type: str) -> None:
    plan = plan_of(STORIES, file_type)
    assert plan.n_parameters == 260_032
    data = sum(tensor.nbytes for tensor in plan.tensors)
    assert data < plan.total_size < data + 40_000
    assert plan.bits_per_weight == pytest.approx(8 * data / 260_032)
    assert sum(plan.types.values()) == len(plan.tensors) == 47


def test_fallbacks_are_grouped() -> None:
    plan = plan_of(STORIES, "Q4_K_M")
    found = {f.pattern: (f.count, f.type) for f in plan.fallbacks}
    assert found["token_embd.weight"] == (1, "Q8_0")
    assert found["blk.*.attn_q.weight"] == (5, "Q5_0")
    assert found["blk.*.ffn_down.weight"] in ((2, "F16"), (3, "F16"))
    assert plan_of(STORIES, "F16").fallbacks == []


def test_model_card(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-127K-Instruct-v0.2"
    make_llama(folder)
    (folder / "README.md").write_text(
        "---\n"
        "license: apache-2.0\n"
        "language:\n- en\n- 'no'\n"
        'tags: [one, "two"]\n'
        "pipeline_tag: text-generation\n"
        "base_model: some-org/Base-1B\n"
        "metrics:\n  nested: {a: b}\n"
        "widget:\n  - text: |\n      ignored\n"
        "---\n# Tiny\nlicense: other\n"
    )
    plan = plan_of(folder)
    found = values_of(plan)
    assert found["general.name"] == "Tiny 127K Instruct v0.2"
    assert found["general.basename"] == "Tiny"
    assert found["general.finetune"] == "Instruct"
    assert found["general.version"] == "v0.2"
    assert found["general.size_label"] == "127K"
    assert found["general.license"] == "apache-2.0"
    assert found["general.base_model.0.name"] == "Base 1B"
    assert found["general.base_model.0.organization"] == "Some Org"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/some-org/Base-1B"
    assert list(plan.metadata["general.tags"].values) == ["one", "two", "text-generation"]
    assert list(plan.metadata["general.languages"].values) == ["en", "no"]


@pytest.mark.parametrize(
    "text", [b"", b"---", b"---\nlicense: mit\n", b"\xff\xfe---\n---\n", b"---\n: :\n- x\n---\n"]
)
def test_broken_model_cards_do_not_matter(tmp_path: Path, text: bytes) -> None:
    make_llama(tmp_path)
    (tmp_path / "README.md").write_bytes(text)
    assert "general.license" not in plan_of(tmp_path).metadata


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("models/stories260k", "stories260k-Q8_0.gguf"),
        ("/a/SmolLM2-135M-Instruct/", "SmolLM2-135M-Instruct-Q8_0.gguf"),
        ("My Model (v2)", "My-Model-(v2)-Q8_0.gguf"),
        ("/hub/models--org--Name-1B/snapshots/0123abc", "Name-1B-Q8_0.gguf"),
        ("/", "model-Q8_0.gguf"),
        ("/a/\x1b[2J", "[2J-Q8_0.gguf"),
    ],
)
def test_output_names(path: str, expected: str) -> None:
    assert output_name(Path(path), "Q8_0") == expected


def test_output_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert output_name(Path("."), "F16") == "here-F16.gguf"
    assert model_id(Path("../here")) == "here"


@pytest.mark.parametrize(
    ("name", "n_parameters", "expected"),
    [
        ("SmolLM2-135M-Instruct", 134_515_008, NameParts("SmolLM2", "135M", "Instruct")),
        ("Llama-3.1-8B-Instruct", 8_030_261_248, NameParts("Llama-3.1", "8B", "Instruct")),
        ("Mistral-7B-v0.1", 7_241_732_096, NameParts("Mistral", "7B", "", "v0.1")),
        ("Mixtral-8x7B-v0.1", 46_702_792_704, NameParts("Mixtral", "8x7B", "", "v0.1")),
        ("bloom-7b1", 7_069_016_064, NameParts("bloom", "7.1B")),
        ("Yi-34B-200k", 34_388_917_248, NameParts("Yi", "34B", "200k")),
        ("stories260k", 260_032, NameParts()),
        ("a name of words", 10, NameParts()),
    ],
)
def test_parts_of_names(name: str, n_parameters: int, expected: NameParts) -> None:
    assert name_parts(name, n_parameters) == expected


def test_parts_of_names_are_gguf_pys() -> None:
    gguf = pytest.importorskip("gguf")
    names = (
        "Qwen2.5-0.5B-Instruct", "TinyLlama-1.1B-Chat-v1.0", "CodeLlama-7b-Python-hf", "gpt2-xl",
        "llama-2-7b-chat-q4_0", "phi-3-mini-4k-instruct", "Meta-Llama-3-8B", "x", "--", "v1-7B",
        "model-small-tuned", "Nous-Hermes-2-Mixtral-8x7B-DPO",
    )  # fmt: skip
    for name in names:
        for n_parameters in (0, 500_000_000, 7_000_000_000):
            parts = name_parts(name, n_parameters)
            *_, base, fine_tune, version, size = gguf.Metadata.get_model_id_components(
                name, n_parameters
            )
            assert (parts.base, parts.fine_tune, parts.version, parts.size) == (
                base or "", fine_tune or "", version or "", size or ""
            ), name  # fmt: skip


def test_titles_and_sizes_are_gguf_pys() -> None:
    gguf = pytest.importorskip("gguf")
    for name in ("smollm2-135m", "stories260k", "Llama-3.1-8B", "v1.2-x", "7b-y", "a--b"):
        assert title(name) == gguf.Metadata.id_to_title(name)
    for n in (1, 950, 12_345, 260_032, 999_999, 1_000_000, 1_000_001, 134_515_008, 8_030_261_248,
              70_553_706_496, 3 * 10**12):  # fmt: skip
        assert size_label(n) == gguf.size_label(n, 0, 0, 0)


def test_pack_is_readable() -> None:
    """The helper of these tests writes what the safetensors library reads."""
    from safetensors.numpy import load

    values = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    for name, found in load(pack(values)).items():
        np.testing.assert_array_equal(found, values[name])
