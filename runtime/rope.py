"""Rotary position tables: plain, linear, YaRN, and the divisors of llama3 and longrope."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError, printable
from runtime.config import ModelConfig, RopeScaling, yarn_magnitude
from runtime.program import Floats, RopeTable
from runtime.weights import Weights

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def rope_factors(weights: Weights, config: ModelConfig, n_ctx: int) -> Floats | None:
    """What the file divides each pair's frequency by, (rope_dims / 2,), if it does.

    llama3 has one set. longrope has two: the long one counts when the context that is allocated,
    `n_ctx`, exceeds the original one, as in llama.cpp (src/llama-model.cpp, get_rope_factors), so
    that a conversation does not change sets half way. FormatError if one is not positive.
    """
    sets = {name: _divisors(weights, name, config.rope_dims // 2) for name in (LONG, SHORT)}
    chosen = LONG if n_ctx > config.rope_scaling.original_context else SHORT
    only = _divisors(weights, FREQUENCIES, config.rope_dims // 2)
    return sets[chosen] if only is None else only


def rope_table(
    config: ModelConfig,
    *,
    interleaved: bool,
    factors: Floats | None = None,
    base: float | None = None,
    scaling: RopeScaling | None = None,
) -> RopeTable:
    """The table of a model; `factors` are what `rope_factors` gives.

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
        scale *= yarn_magnitude(scaling.factor)
    return RopeTable(n_dims, interleaved, frequencies, scale)


def _divisors(weights: Weights, name: str, size: int) -> Floats | None:
    divisors = weights.optional_vector(name, size)
    if divisors is None or tuple(weights.file.tensors[name].shape) != (size,):
        return None  # the latter is among what `weights` complains of
    wrong = divisors[~(np.isfinite(divisors) & (divisors > 0))]
    if len(wrong):
        raise FormatError(
            f"{printable(weights.file.path)}: tensor {name}: expected divisors of frequencies, "
            f"all above 0, found {wrong[0]:g}"
        )
    return divisors


def _yarn_kept(scaling: RopeScaling, n_dims: int, base: float) -> npt.NDArray[np.float64]:
    """How much of each pair's frequency YaRN leaves as it was, 0 to 1."""

    def pair_of(turns: float) -> float:
        """The pair that turns `turns` times within the original context."""
        ratio = scaling.original_context / (max(turns, 1e-9) * 2 * math.pi)
        return n_dims * math.log(ratio) / (2 * math.log(max(base, 1.0 + 1e-9)))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(n_dims - 1, high)
    ramp = (np.arange(n_dims // 2) - low) / max(0.001, high - low)
    kept: npt.NDArray[np.float64] = 1 - np.clip(ramp, 0, 1)
    return kept
