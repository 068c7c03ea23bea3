"""What a model is, read from a GGUF file's metadata and checked before anything is built on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.errors import FormatError, printable
from runtime.sources import Source

MAX_LAYERS = 2048
MAX_SIZE = 1 << 24  # rows, columns and heads of any model that exists are far below
MAX_CONTEXT = 1 << 30

SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched; yarn is arXiv 2309.00071, longrope 2402.13753."""

    kind: str = "none"  # one of SCALINGS
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0  # cosines and sines are multiplied with it, and YaRN's own
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs


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
    own: Metadata  # the keys `ARCHITECTURE.*`, for what only some decoders know


class Metadata:
    """Typed, bounded look-ups that name the key when they fail."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def under(self, prefix: str) -> Metadata:
        """Look-ups of the keys that start with `prefix`, named without it."""
        return Metadata(self.path, self.values, self.prefix + prefix)

    def has(self, key: str) -> bool:
        return self.prefix + key in self.values

    def refuse(self, key: str, expected: str, found: object) -> FormatError:
        name = printable(self.prefix + key)
        return FormatError(
            f"{printable(self.path)}: metadata {name}: expected {expected}, "
            f"found {printable(found)}"
        )

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(self.prefix + key, default)
        if value is None:
            raise self.refuse(key, "an integer", "no such key")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise self.refuse(key, f"an integer from {low} to {high}", value)
        return int(value)

    def real(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(self.prefix + key, default)
        if value is None:
            raise self.refuse(key, "a number", "no such key")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise self.refuse(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        value = self.values.get(self.prefix + key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false", "no such key" if value is None else value)
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.values.get(self.prefix + key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "a text", "no such key" if value is None else value)
        return value


def read_config(file: Source) -> ModelConfig:
    """The decoder's configuration; FormatError names the key that is missing or contradicts."""
    meta = Metadata(file.path, file.metadata)
    arch = meta.text("general.architecture")
    own = meta.under(f"{arch}.")

    def size(key: str, default: int | None = None, low: int = 1) -> int:
        return own.integer(key, low=low, high=MAX_SIZE, default=default)

    dim = size("embedding_length")
    n_layers = own.integer("block_count", low=1, high=MAX_LAYERS)
    n_heads = size("attention.head_count")
    n_kv_heads = size("attention.head_count_kv", n_heads)
    if n_kv_heads > n_heads or n_heads % n_kv_heads:
        key = "attention.head_count_kv"
        raise own.refuse(key, f"a divisor of the {n_heads} heads", n_kv_heads)
    derived = dim // n_heads if dim % n_heads == 0 else None
    key_dim = size("attention.key_length", derived)
    value_dim = size("attention.value_length", derived)
    rope_dims = size("rope.dimension_count", key_dim, low=0)
    if rope_dims > key_dim or rope_dims % 2:
        expected = f"an even number up to the key length {key_dim}"
        raise own.refuse("rope.dimension_count", expected, rope_dims)
    n_ctx_train = own.integer("context_length", low=1, high=MAX_CONTEXT)
    embedding = file.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
    kind = "" if own.has("attention.layer_norm_epsilon") else "rms_"
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
        norm_epsilon=own.real(f"attention.layer_norm_{kind}epsilon", low=0.0, high=1.0),
        rope_dims=rope_dims,
        rope_base=own.real("rope.freq_base", low=1.0, high=1e12, default=10000.0),
        rope_scaling=_read_rope_scaling(own, n_ctx_train),
        sliding_window=own.integer("attention.sliding_window", low=0, high=2**32 - 1, default=0),
        own=own,
    )


def _read_rope_scaling(own: Metadata, n_ctx_train: int) -> RopeScaling:
    scaling = own.under("rope.scaling.")
    kind = scaling.text("type", default="linear")
    if kind not in SCALINGS:
        raise scaling.refuse("type", f"one of {', '.join(SCALINGS)}", kind)
    # A factor of 0 stands for "not scaled" in files made by llama.cpp.
    if scaling.has("factor"):
        factor = scaling.real("factor", low=0.0, high=1e6) or 1.0
    else:  # before August 2023
        factor = own.real("rope.scale_linear", low=0.0, high=1e6, default=0.0) or 1.0
    if kind == "linear" and factor == 1.0:
        kind = "none"
    attention = scaling.real("attn_factor", low=1e-3, high=1e3, default=1.0)
    if kind == "yarn" and scaling.has("yarn_attn_factor") and not scaling.has("attn_factor"):
        # llama.cpp's converter keeps config.json's attention_factor here, which its runtime does
        # not read: it stands for the whole of YaRN's own.
        whole = scaling.real("yarn_attn_factor", low=1e-3, high=1e3)
        attention = whole / yarn_magnitude(factor)
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=scaling.integer(
            "original_context_length", low=1, high=MAX_CONTEXT, default=n_ctx_train
        ),
        attention_factor=attention,
        beta_fast=scaling.real("yarn_beta_fast", low=0.0, high=1e6, default=32.0),
        beta_slow=scaling.real("yarn_beta_slow", low=0.0, high=1e6, default=1.0),
        truncate=scaling.flag("yarn_truncate", default=True),
    )


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies cosines and sines with, of itself."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
