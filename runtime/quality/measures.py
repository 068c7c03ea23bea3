"""Perplexity and the distance of two models' predictions, with the error of each figure.

The figures and their errors are those of llama.cpp's llama-perplexity (tools/perplexity), so that
they compare. Errors are one standard deviation of the mean over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError
from runtime.program import Floats

LARGEST_NLL = 300.0  # whose exp, and its square, are doubles

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model gave to the tokens that came; each array has one number per token."""

    nll: Doubles  # -ln of the probability of the token that came


@dataclass(frozen=True, eq=False)
class Differences:
    """How a candidate's predictions differ from a reference's; one number per token."""

    nll: Doubles
    reference_nll: Doubles
    kl: Doubles  # sum over the vocabulary of p ln(p / q), p of the reference
    same_top: npt.NDArray[np.bool_]  # whether both have the same most likely token


@dataclass(frozen=True)
class Distance:
    """How far a candidate is from the reference, over all tokens."""

    kl: Estimate
    kl_median: float
    kl_99: float  # 99 of 100 tokens have less
    kl_999: float
    kl_largest: float
    same_top: Estimate  # share of tokens
    probability_change: Estimate  # mean of q - p of the token that came
    probability_rms: Estimate  # root of the mean square of that
    perplexity_ratio: Estimate  # candidate's over reference's


def log_probabilities(logits: Floats) -> Floats:
    """The natural logarithms of softmax(logits) over the last axis, in the same memory."""
    with np.errstate(invalid="ignore"):  # of a damaged model
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if not np.isfinite(logits).all():
        raise FormatError(
            "a model answers with no number (NaN or infinity): its weights are damaged, or too "
            "large for this computation; see what `gguf verify FILE` finds"
        )
    return logits


def predict(log_q: Floats, tokens: npt.NDArray[np.int64]) -> Predictions:
    """What the rows of log-probabilities (n, n_vocab) give to the tokens (n,) that came."""
    return Predictions(-_of_tokens(log_q, tokens))


def differ(log_q: Floats, log_p: Floats, tokens: npt.NDArray[np.int64]) -> Differences:
    """How a candidate's log-probabilities differ from a reference's; both (n, n_vocab)."""
    terms = np.exp(log_p) * (log_p - log_q)
    return Differences(
        nll=-_of_tokens(log_q, tokens),
        reference_nll=-_of_tokens(log_p, tokens),
        kl=terms.sum(axis=-1, dtype=np.float64),
        same_top=log_q.argmax(axis=-1) == log_p.argmax(axis=-1),
    )


def perplexity(nll: Doubles) -> Estimate:
    """exp of the mean of -ln(probability); FormatError where that is beyond all numbers."""
    mean = mean_of(nll)
    if mean.value > LARGEST_NLL:
        raise FormatError(
            f"a model gives the text's tokens a probability of e^-{mean.value:.0f} in the mean: "
            "its weights are damaged; see what `gguf verify FILE` finds"
        )
    value = math.exp(mean.value)
    return Estimate(value, value * mean.error)


def distance(parts: Sequence[Differences]) -> Distance:
    """All parts together."""
    nll, reference = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("nll", "reference_nll")
    )
    kl = np.concatenate([part.kl for part in parts])
    same = mean_of(np.concatenate([part.same_top for part in parts]).astype(np.float64))
    change = np.exp(-nll) - np.exp(-reference)
    squares = mean_of(change**2)
    rms = math.sqrt(squares.value)
    log_ratio = mean_of(nll - reference)
    ratio = math.exp(log_ratio.value)
    return Distance(
        kl=mean_of(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_999=float(np.quantile(kl, 0.999)),
        kl_largest=float(kl.max()),
        same_top=same,
        probability_change=mean_of(change),
        probability_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        perplexity_ratio=Estimate(ratio, ratio * log_ratio.error),
    )


def mean_of(values: Doubles) -> Estimate:
    """The mean and its standard error."""
    n = len(values)
    error = math.sqrt(float(values.var()) / (n - 1)) if n > 1 else 0.0
    return Estimate(float(values.mean()), error)


def _of_tokens(log_p: Floats, tokens: npt.NDArray[np.int64]) -> Doubles:
    return log_p[np.arange(len(tokens)), tokens].astype(np.float64)
