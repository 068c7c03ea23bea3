"""Hugging Face checkpoints made for tests; safetensors files are put together byte by byte."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

MODELS = Path(__file__).parent.parent / "models"
STORIES = MODELS / "stories260k"  # its tokenizer, of 512 tokens, is what made checkpoints use

CODES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1"}


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":  # rounded towards zero: tests read back what they stored
        return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.asarray(values, CODES[dtype]).tobytes()


def safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pack(tensors: dict[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A safetensors file of these tensors; bytes stay bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        kind = "U8" if values.dtype == np.uint8 else dtype
        encoded = encode(values, kind)
        offsets = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": offsets}
        data += encoded
    return safetensors(header, data)


def llama_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of every tensor that the configuration promises."""
    rng = np.random.default_rng(seed)
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    head_dim = config.get("head_dim") or dim // heads
    q, kv = heads * head_dim, (kv_heads or heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], dim),
        "model.norm.weight": (dim,),
    }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    for layer in range(config["num_hidden_layers"]):
        matrices = {
            "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, q),
            "mlp.gate_proj": (ffn, dim),
            "mlp.up_proj": (ffn, dim),
            "mlp.down_proj": (dim, ffn),
        }
        for name, shape in matrices.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (dim,)
    return {name: rng.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}


def write_config(folder: Path, config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_llama(
    folder: Path,
    *,
    dtype: str = "F32",
    n_shards: int = 1,
    tensors: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """A whole checkpoint; the tensors that were written."""
    config = llama_config(**changes)
    write_config(folder, config)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(STORIES / name, folder / name)
    if tensors is None:
        tensors = llama_tensors(config)
    if n_shards == 1:
        (folder / "model.safetensors").write_bytes(pack(tensors, dtype))
        return tensors
    names = list(tensors)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[shard::n_shards]
        (folder / file).write_bytes(pack({name: tensors[name] for name in part}, dtype))
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
