"""Rotary positions: what config.json says about them, and how GGUF says it."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import MAX_CONTEXT, HFConfig
from gguf_tools.errors import UnsupportedModelError, printable

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
ALIASES = {"su": "longrope"}  # what the first Phi-3 called it
DEFAULT_BASE = 10000.0


@dataclass(frozen=True)
class Rotary:
    """What rotary positions an architecture has, and what its config.json calls them.

    llama3 and longrope need tensors that llama.cpp reads for some architectures only.
    """

    kinds: tuple[str, ...] = ("default", "linear", "yarn", "dynamic")
    part: float | None = None  # of each head turns, if config.json is silent; None: always all
    part_key: str = "partial_rotary_factor"
    base: float = DEFAULT_BASE  # if config.json is silent
    base_key: str = "rope_theta"
    original_context: int | None = None  # if config.json is silent; None: the context


PLAIN = Rotary()
LLAMA = Rotary(kinds=KINDS)


@dataclass(frozen=True)
class Rope:
    """The base, and how positions are stretched."""

    base: float = DEFAULT_BASE
    kind: str = "default"  # one of KINDS, or none: positions do not turn anything
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0  # llama3
    high_frequency: float = 4.0  # llama3
    truncate: bool | None = None  # yarn, if config.json says it
    attention_factor: float | None = None  # yarn (None = what follows from the factor), longrope
    yarn: dict[str, float] = field(default_factory=dict)  # further keys of rope.scaling
    short_factors: tuple[float, ...] = ()  # longrope: divisors within the original context
    long_factors: tuple[float, ...] = ()  # and beyond it
    n_dims: int = 0  # the first dimensions of a head that turn; 0 if the head's size was not said
    notes: tuple[str, ...] = ()

    def metadata(self) -> list[tuple[str, str, str | float | int]]:
        """(key after `ARCHITECTURE.`, type, value) for the file."""
        entries: list[tuple[str, str, str | float | int]] = []
        if self.kind == "none":
            return entries
        if self.kind in ("linear", "yarn"):
            entries += [
                ("rope.scaling.type", "str", self.kind),
                ("rope.scaling.factor", "f32", self.factor),
            ]
        if self.kind == "longrope":
            entries += [
                ("rope.scaling.type", "str", self.kind),
                ("rope.scaling.original_context_length", "u32", self.original_context),
                ("rope.scaling.attn_factor", "f32", self.attention_factor or 1.0),
            ]
        if self.kind == "yarn":
            entries.append(("rope.scaling.original_context_length", "u32", self.original_context))
            entries += [(f"rope.scaling.{key}", "f32", value) for key, value in self.yarn.items()]
            if self.truncate is not None:  # a key of ours
                entries.append(("rope.scaling.yarn_truncate", "bool", self.truncate))
            if self.attention_factor is not None:
                # llama.cpp computes 1 + 0.1 ln(factor) itself and multiplies it with this key.
                implied = 1 + 0.1 * math.log(max(self.factor, 1.0))
                relative = self.attention_factor / implied
                if not math.isclose(relative, 1.0, rel_tol=1e-6):
                    entries.append(("rope.scaling.attn_factor", "f32", relative))
        entries.append(("rope.freq_base", "f32", self.base))
        return entries


NO_ROPE = Rope(kind="none")


def read_rope(
    config: HFConfig, *, n_ctx: int, head_dim: int | None = None, rotary: Rotary = LLAMA
) -> Rope:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` before it.

    `head_dim` is needed where a part of a head may turn, and for longrope.
    """
    scaling = config.nested("rope_parameters") or config.nested("rope_scaling")
    if scaling is not None:
        scaling = scaling.nested("full_attention") or scaling
    base = rotary.base
    for source, key in ((scaling, "rope_theta"), (config, rotary.base_key)):
        if source is not None and source.has(key):
            base = source.real(key, low=1.0, high=1e12)
            break
    n_dims = _dimensions(config, scaling, head_dim, rotary)
    kind = "default"
    if scaling is not None:
        kind = scaling.text("rope_type", default=scaling.text("type", default="default")).lower()
        kind = ALIASES.get(kind, kind)
    if scaling is None or kind == "default":
        return Rope(base, n_dims=n_dims)
    if kind not in rotary.kinds:
        raise UnsupportedModelError(
            f"{scaling.where}: rotary scaling {printable(kind)} is not supported; known are "
            f"{', '.join(rotary.kinds)}"
        )
    if kind == "dynamic":
        note = (
            f"rotary scaling 'dynamic' is not stored in GGUF: the file is exact up to {n_ctx:,} "
            "tokens of context"
        )
        return Rope(base, n_dims=n_dims, notes=(note,))
    original = _original_context(config, scaling) or rotary.original_context
    if kind == "linear":
        factor = scaling.real("factor", low=1e-3, high=1e6)
        return Rope(base, kind, factor=factor, n_dims=n_dims)
    if kind == "llama3":
        rope = _read_llama3(scaling, base, original or 8192)
    elif kind == "longrope":
        rope = _read_longrope(scaling, base, original or n_ctx, n_ctx, n_dims)
    else:
        rope = _read_yarn(scaling, base, original, n_ctx)
    return replace(rope, n_dims=n_dims)


def short_factors(rope: Rope) -> npt.NDArray[np.float32] | None:
    """What longrope divides each pair's frequency by within the original context."""
    return np.array(rope.short_factors, np.float32) if rope.short_factors else None


def long_factors(rope: Rope) -> npt.NDArray[np.float32] | None:
    """What longrope divides each pair's frequency by beyond the original context."""
    return np.array(rope.long_factors, np.float32) if rope.long_factors else None


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


def _dimensions(
    config: HFConfig, scaling: HFConfig | None, head_dim: int | None, rotary: Rotary
) -> int:
    """How many dimensions of a head turn."""
    part, source, key = rotary.part, config, rotary.part_key
    for source, key in ((scaling or config, "partial_rotary_factor"), (config, rotary.part_key)):
        if source.has(key):
            part = source.real(key, low=0.0, high=1.0)
            break
    if rotary.part is None and part not in (None, 1.0):
        raise source.refuse(key, "1 for this architecture", part)
    if head_dim is None:
        return 0
    n_dims = head_dim if part is None else int(head_dim * part)
    if n_dims < 2 or n_dims % 2:
        raise source.refuse(key, f"an even number of the {head_dim} dimensions of a head", part)
    return n_dims


def _original_context(config: HFConfig, scaling: HFConfig) -> int | None:
    for source in (config, scaling):  # in the order of transformers
        if source.has("original_max_position_embeddings"):
            return source.integer("original_max_position_embeddings", low=2, high=MAX_CONTEXT)
    return None


def _read_longrope(scaling: HFConfig, base: float, original: int, n_ctx: int, n_dims: int) -> Rope:
    """arXiv 2402.13753, as transformers has it (modeling_rope_utils.py)."""
    factor = scaling.real("factor", low=1e-3, high=1e6, default=n_ctx / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        base,
        "longrope",
        factor=factor,
        original_context=original,
        attention_factor=scaling.real("attention_factor", low=1e-3, high=1e3, default=grown),
        short_factors=scaling.reals("short_factor", n_dims // 2, low=1e-3, high=1e6),
        long_factors=scaling.reals("long_factor", n_dims // 2, low=1e-3, high=1e6),
    )


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
    elif _mscale_given(scaling):
        attention = _mscale(scaling, "mscale", factor) / _mscale(scaling, "mscale_all_dim", factor)
    truncate = scaling.flag("truncate", default=None)
    notes: tuple[str, ...] = ()
    if truncate is False:
        notes = (
            "rotary scaling: llama.cpp cannot be told `truncate: false`, so that the model's "
            "answers differ a little there",
        )
    return Rope(
        base,
        "yarn",
        factor=factor,
        original_context=original or n_ctx,
        truncate=truncate,
        attention_factor=attention,
        yarn=extra,
        notes=notes,
    )


def _mscale_given(scaling: HFConfig) -> bool:
    """Whether both are there and not 0, which says nothing to transformers."""
    return all(
        scaling.real(key, low=0.0, high=1e3, default=0.0) for key in ("mscale", "mscale_all_dim")
    )


def _mscale(scaling: HFConfig, key: str, factor: float) -> float:
    weight = scaling.real(key, low=0.0, high=1e3)
    return 1 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0
