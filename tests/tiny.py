"""Small GGUF files of the llama architecture with random weights of any format."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gguf_tools.quants import by_name
from gguf_tools.values import MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec
from tests.kernels.blocks import random_rows


def llama_file(
    path: Path,
    *,
    quant: str = "F32",
    n_layers: int = 2,
    dim: int = 64,
    ffn_dim: int = 96,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    key_dim: int | None = None,
    n_vocab: int = 70,
    biases: bool = False,
    tied: bool = True,
    extra: Mapping[str, MetadataValue] | None = None,
    drop: tuple[str, ...] = (),
    rope_factors: bool = False,
    seed: int = 0,
) -> Path:
    """A model whose matrices are of type `quant`, its norms F32."""
    rng = np.random.default_rng(seed)
    head = key_dim or dim // n_heads
    metadata: dict[str, MetadataValue] = {
        "general.architecture": Value("str", "llama"),
        "llama.context_length": Value("u32", 512),
        "llama.embedding_length": Value("u32", dim),
        "llama.block_count": Value("u32", n_layers),
        "llama.feed_forward_length": Value("u32", ffn_dim),
        "llama.attention.head_count": Value("u32", n_heads),
        "llama.attention.head_count_kv": Value("u32", n_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": Value("f32", 1e-5),
        "llama.attention.key_length": Value("u32", head),
        "llama.attention.value_length": Value("u32", head),
        "llama.rope.dimension_count": Value("u32", head),
    }
    metadata.update(extra or {})
    tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = {}

    def vector(name: str, size: int, middle: float, spread: float) -> None:
        values = (middle + spread * rng.normal(size=size)).astype(np.float32)
        tensors[name] = ("F32", (size,), values.view(np.uint8))

    def matrix(name: str, n_rows: int, k: int, bias: bool = True) -> None:
        rows = random_rows(quant, n_rows, k, rng, spread=float(1 / np.sqrt(k)))
        tensors[f"{name}.weight"] = (quant, (n_rows, k), rows)
        if biases and bias:
            vector(f"{name}.bias", n_rows, 0.0, 0.3)

    matrix("token_embd", n_vocab, dim, bias=False)
    for i in range(n_layers):
        block = f"blk.{i}"
        vector(f"{block}.attn_norm.weight", dim, 1.0, 0.1)
        matrix(f"{block}.attn_q", n_heads * head, dim)
        matrix(f"{block}.attn_k", n_kv_heads * head, dim)
        matrix(f"{block}.attn_v", n_kv_heads * head, dim)
        matrix(f"{block}.attn_output", dim, n_heads * head)
        vector(f"{block}.ffn_norm.weight", dim, 1.0, 0.1)
        matrix(f"{block}.ffn_gate", ffn_dim, dim)
        matrix(f"{block}.ffn_up", ffn_dim, dim)
        matrix(f"{block}.ffn_down", dim, ffn_dim)
    vector("output_norm.weight", dim, 1.0, 0.1)
    if not tied:
        matrix("output", n_vocab, dim, bias=False)
    if rope_factors:
        factors = np.linspace(1, 8, head // 2).astype(np.float32)
        tensors["rope_freqs.weight"] = ("F32", (head // 2,), factors.view(np.uint8))
    kept = {name: entry for name, entry in tensors.items() if name not in drop}
    specs = [TensorSpec(name, by_name(kind), shape) for name, (kind, shape, _) in kept.items()]
    with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
        for name, (_, _, data) in kept.items():
            writer.write(name, data)
    return path
