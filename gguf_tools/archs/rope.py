"""Rotary positions: what config.json says about them, and how GGUF says it."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import MAX_CONTEXT, HFConfig
from gguf_tools.errors import UnsupportedModelError, printable

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")
DEFAULT_BASE = 10000.0


@dataclass(frozen=True)
class Rope:
    """The base, and how positions are stretched."""

    base: float = DEFAULT_BASE
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0  # llama3
    high_frequency: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None = what follows from the factor
    yarn: dict[str, float] = field(default_factory=dict)  # further keys of rope.scaling
    notes: tuple[str, ...] = ()

    def metadata(self) -> list[tuple[str, str, str | float | int]]:
        """(key after `ARCHITECTURE.`, type, value) for the file."""
        entries: list[tuple[str, str, str | float | int]] = []
        if self.kind in ("linear", "yarn"):
            entries += [
                ("rope.scaling.type", "str", self.kind),
                ("rope.scaling.factor", "f32", self.factor),
            ]
        if self.kind == "yarn":
            entries.append(("rope.scaling.original_context_length", "u32", self.original_context))
            entries += [(f"rope.scaling.{key}", "f32", value) for key, value in self.yarn.items()]
            if self.attention_factor is not None:
                # llama.cpp computes 1 + 0.1 ln(factor) itself and multiplies it with this key.
                implied = 1 + 0.1 * math.log(max(self.factor, 1.0))
                relative = self.attention_factor / implied
                if not math.isclose(relative, 1.0, rel_tol=1e-6):
                    entries.append(("rope.scaling.attn_factor", "f32", relative))
        entries.append(("rope.freq_base", "f32", self.base))
        return entries


def read_rope(config: HFConfig, *, n_ctx: int) -> Rope:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` before it."""
    scaling = config.nested("rope_parameters") or config.nested("rope_scaling")
    if scaling is not None:
        scaling = scaling.nested("full_attention") or scaling
    base = DEFAULT_BASE
    for source in (scaling, config):
        if source is not None and source.has("rope_theta"):
            base = source.real("rope_theta", low=1.0, high=1e12)
            break
    _refuse_partial(config, scaling)
    kind = "default"
    if scaling is not None:
        kind = scaling.text("rope_type", default=scaling.text("type", default="default")).lower()
    if scaling is None or kind == "default":
        return Rope(base)
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{scaling.where}: rotary scaling {printable(kind)} is not supported; known are "
            f"{', '.join(KINDS)}"
        )
    if kind == "dynamic":
        note = (
            f"rotary scaling 'dynamic' is not stored in GGUF: the file is exact up to {n_ctx:,} "
            "tokens of context"
        )
        return Rope(base, notes=(note,))
    original = _original_context(config, scaling)
    if kind == "linear":
        return Rope(base, kind, factor=scaling.real("factor", low=1e-3, high=1e6))
    if kind == "llama3":
        return _read_llama3(scaling, base, original or 8192)
    return _read_yarn(scaling, base, original, n_ctx)


def llama3_divisors(rope: Rope, head_dim: int) -> npt.NDArray[np.float32] | None:
    """What llama3 scaling divides the frequency of each pair by: the tensor rope_freqs.weight."""
    if rope.kind != "llama3":
        return None
    wavelengths = 2 * np.pi * rope.base ** (np.arange(0, head_dim, 2) / head_dim)
    longest = rope.original_context / rope.low_frequency
    shortest = rope.original_context / rope.high_frequency
    smooth = (rope.original_context / wavelengths - rope.low_frequency) / (
        rope.high_frequency - rope.low_frequency
    )
    between = 1 / ((1 - smooth) / rope.factor + smooth)
    divisors = np.where(wavelengths > longest, rope.factor, between)
    return np.where(wavelengths < shortest, 1.0, divisors).astype(np.float32)


def _refuse_partial(config: HFConfig, scaling: HFConfig | None) -> None:
    for source in (scaling, config):
        if source is not None and source.has("partial_rotary_factor"):
            part = source.real("partial_rotary_factor", low=0.0, high=1.0)
            if part != 1.0:
                raise source.refuse("partial_rotary_factor", "1 for this architecture", part)


def _original_context(config: HFConfig, scaling: HFConfig) -> int | None:
    for source in (scaling, config):
        if source.has("original_max_position_embeddings"):
            return source.integer("original_max_position_embeddings", high=MAX_CONTEXT)
    return None


def _read_llama3(scaling: HFConfig, base: float, original: int) -> Rope:
    low = scaling.real("low_freq_factor", low=1e-6, high=1e6, default=1.0)
    high = scaling.real("high_freq_factor", low=1e-6, high=1e6, default=4.0)
    if high <= low:
        raise scaling.refuse("high_freq_factor", f"more than low_freq_factor {low:g}", high)
    return Rope(
        base,
        "llama3",
        factor=scaling.real("factor", low=1e-3, high=1e6, default=8.0),
        original_context=original,
        low_frequency=low,
        high_frequency=high,
    )


def _read_yarn(scaling: HFConfig, base: float, original: int | None, n_ctx: int) -> Rope:
    implied = n_ctx / original if original else None
    factor = scaling.real("factor", low=1e-3, high=1e6, default=implied)
    attention = None
    for key in ("attention_factor", "attn_factor"):
        if attention is None and scaling.has(key):
            attention = scaling.real(key, low=1e-3, high=1e3)
    extra = {}
    for key, name, high in (
        ("extrapolation_factor", "yarn_ext_factor", 1.0),
        ("beta_fast", "yarn_beta_fast", 1e6),
        ("beta_slow", "yarn_beta_slow", 1e6),
    ):
        if scaling.has(key):
            extra[name] = scaling.real(key, low=0.0, high=high)
    if attention is not None:
        extra["yarn_attn_factor"] = attention
    elif scaling.has("mscale") and scaling.has("mscale_all_dim"):
        attention = _mscale(scaling, "mscale", factor) / _mscale(scaling, "mscale_all_dim", factor)
    notes: tuple[str, ...] = ()
    if scaling.flag("truncate", default=True) is False:
        notes = ("rotary scaling: GGUF cannot say `truncate: false`; positions differ slightly",)
    return Rope(
        base,
        "yarn",
        factor=factor,
        original_context=original or n_ctx,
        attention_factor=attention,
        yarn=extra,
        notes=notes,
    )


def _mscale(scaling: HFConfig, key: str, factor: float) -> float:
    weight = scaling.real(key, low=0.0, high=1e3)
    return 1 + 0.1 * weight * math.log(factor) if factor > 1 and weight else 1.0
