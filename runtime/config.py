"""What a model is, read from a GGUF file's metadata and checked before anything is built on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.errors import FormatError, printable
from gguf_tools.reader import GGUFFile

MAX_LAYERS = 2048
MAX_SIZE = 1 << 24  # rows, columns and heads of any model that exists are far below
MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched; `kind` is none, linear or yarn (arXiv 2309.00071)."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder; sizes in elements."""

    architecture: str
    name: str
    n_layers: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    key_dim: int  # per head
    value_dim: int  # per head
    n_vocab: int
    n_ctx_train: int
    norm_epsilon: float
    rope_dims: int
    rope_base: float
    rope_scaling: RopeScaling
    sliding_window: int  # tokens each token sees; 0 = all


class Metadata:
    """Typed, bounded look-ups that name the key when they fail."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def refuse(self, key: str, expected: str, found: object) -> FormatError:
        return FormatError(
            f"{printable(self.path)}: metadata {printable(key)}: expected {expected}, "
            f"found {printable(found)}"
        )

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None:
            raise self.refuse(key, "an integer", "no such key")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise self.refuse(key, f"an integer from {low} to {high}", value)
        return int(value)

    def real(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if value is None:
            raise self.refuse(key, "a number", "no such key")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise self.refuse(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "a text", "no such key" if value is None else value)
        return value


def read_config(file: GGUFFile) -> ModelConfig:
    """The decoder's configuration; FormatError names the key that is missing or contradicts."""
    meta = Metadata(file.path, file.metadata)
    arch = meta.text("general.architecture")

    def size(key: str, default: int | None = None, low: int = 1) -> int:
        return meta.integer(f"{arch}.{key}", low=low, high=MAX_SIZE, default=default)

    dim = size("embedding_length")
    n_layers = meta.integer(f"{arch}.block_count", low=1, high=MAX_LAYERS)
    n_heads = size("attention.head_count")
    n_kv_heads = size("attention.head_count_kv", n_heads)
    if n_kv_heads > n_heads or n_heads % n_kv_heads:
        key = f"{arch}.attention.head_count_kv"
        raise meta.refuse(key, f"a divisor of the {n_heads} heads", n_kv_heads)
    derived = dim // n_heads if dim % n_heads == 0 else None
    key_dim = size("attention.key_length", derived)
    value_dim = size("attention.value_length", derived)
    rope_dims = size("rope.dimension_count", key_dim, low=0)
    if rope_dims > key_dim or rope_dims % 2:
        expected = f"an even number up to the key length {key_dim}"
        raise meta.refuse(f"{arch}.rope.dimension_count", expected, rope_dims)
    n_ctx_train = meta.integer(f"{arch}.context_length", low=1, high=MAX_CONTEXT)
    embedding = file.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
    return ModelConfig(
        architecture=arch,
        name=meta.text("general.name", default=file.path.stem),
        n_layers=n_layers,
        dim=dim,
        ffn_dim=size("feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        norm_epsilon=meta.real(f"{arch}.attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        rope_dims=rope_dims,
        rope_base=meta.real(f"{arch}.rope.freq_base", low=1.0, high=1e12, default=10000.0),
        rope_scaling=_read_rope_scaling(meta, arch, n_ctx_train),
        sliding_window=meta.integer(
            f"{arch}.attention.sliding_window", low=0, high=2**32 - 1, default=0
        ),
    )


def _read_rope_scaling(meta: Metadata, arch: str, n_ctx_train: int) -> RopeScaling:
    prefix = f"{arch}.rope.scaling"
    kind = meta.text(f"{prefix}.type", default="none")
    old = meta.values.get(f"{arch}.rope.scale_linear")  # files written before August 2023
    if old is not None and f"{prefix}.type" not in meta.values:
        factor = meta.real(f"{arch}.rope.scale_linear", low=1e-3, high=1e6)
        return RopeScaling("linear" if factor != 1.0 else "none", factor)
    if kind not in ("none", "linear", "yarn"):
        raise meta.refuse(f"{prefix}.type", "none, linear or yarn", kind)
    # A factor of 0 stands for "not scaled" in files made by llama.cpp.
    factor = meta.real(f"{prefix}.factor", low=0.0, high=1e6, default=0.0) or 1.0
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=meta.integer(
            f"{prefix}.original_context_length", low=1, high=MAX_CONTEXT, default=n_ctx_train
        ),
        attention_factor=meta.real(f"{prefix}.attn_factor", low=1e-3, high=1e3, default=1.0),
        beta_fast=meta.real(f"{prefix}.yarn_beta_fast", low=0.0, high=1e6, default=32.0),
        beta_slow=meta.real(f"{prefix}.yarn_beta_slow", low=0.0, high=1e6, default=1.0),
    )
