"""Rotary position tables: plain, linear, YaRN, and llama3's divisors."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from runtime.config import ModelConfig, RopeScaling
from runtime.program import Floats, RopeTable


def rope_table(
    config: ModelConfig,
    *,
    interleaved: bool,
    factors: Floats | None = None,
    base: float | None = None,
    scaling: RopeScaling | None = None,
) -> RopeTable:
    """The table of a model; `factors` are the divisors of `rope_freqs.weight`, if present.

    Layers with positions of their own give `base` and `scaling`; else they are the model's.

    As ggml does it (ggml-cpu/ops.cpp, rope_yarn and ggml_rope_yarn_corr_dims): a pair's frequency
    is base^(-2i/n), divided by its factor, then interpolated; YaRN also scales the magnitude.
    """
    n_dims, base = config.rope_dims, base or config.rope_base
    scaling = scaling or config.rope_scaling
    frequencies = base ** (-np.arange(0, n_dims, 2, dtype=np.float64) / max(n_dims, 1))
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    scale = scaling.attention_factor
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "yarn":
        kept = _yarn_kept(scaling, n_dims, base)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
        scale *= 1 + 0.1 * math.log(max(scaling.factor, 1.0))
    return RopeTable(n_dims, interleaved, frequencies, scale)


def _yarn_kept(scaling: RopeScaling, n_dims: int, base: float) -> npt.NDArray[np.float64]:
    """How much of each pair's frequency YaRN leaves as it was, 0 to 1."""

    def pair_of(turns: float) -> float:
        """The pair that turns `turns` times within the original context."""
        ratio = scaling.original_context / (max(turns, 1e-9) * 2 * math.pi)
        return n_dims * math.log(ratio) / (2 * math.log(max(base, 1.0 + 1e-9)))

    low = max(0, math.floor(pair_of(scaling.beta_fast)))
    high = min(n_dims - 1, math.ceil(pair_of(scaling.beta_slow)))
    ramp = (np.arange(n_dims // 2) - low) / max(0.001, high - low)
    kept: npt.NDArray[np.float64] = 1 - np.clip(ramp, 0, 1)
    return kept
