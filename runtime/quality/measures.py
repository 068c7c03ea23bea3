"""Perplexity and the distance of two models' predictions, with the error of each figure.

The figures and their errors are those of llama.cpp's llama-perplexity (tools/perplexity), so that
they compare. Errors are one standard deviation of the mean over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError
from runtime.program import Floats

ROWS_BYTES = 8 << 20  # of the rows of a vocabulary that are computed with at a time
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
    """The natural logarithms of softmax(logits), for each of the rows, in the same memory."""
    for rows in _few_rows(logits):
        part = logits[rows]
        with np.errstate(invalid="ignore"):  # of a damaged model
            part -= part.max(axis=-1, keepdims=True)
            part -= np.log(np.exp(part).sum(axis=-1, keepdims=True))
        if not np.isfinite(part).all():
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
    return Differences(
        nll=-_of_tokens(log_q, tokens),
        reference_nll=-_of_tokens(log_p, tokens),
        kl=divergences(log_q, log_p),
        same_top=log_q.argmax(axis=-1) == log_p.argmax(axis=-1),
    )


def divergences(log_q: Floats, log_p: Floats) -> Doubles:
    """The KL divergence of each row from the reference's, nats."""
    kl = np.empty(len(log_p))
    for rows in _few_rows(log_p):
        p, q = log_p[rows], log_q[rows]
        kl[rows] = (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64)
    return kl


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


def _few_rows(array: Floats) -> Iterator[slice]:
    """Some of the rows after the other: what is made of them stays in the cache, or nearly."""
    step = max(1, ROWS_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        yield slice(first, first + step)


def _of_tokens(log_p: Floats, tokens: npt.NDArray[np.int64]) -> Doubles:
    return log_p[np.arange(len(tokens)), tokens].astype(np.float64)
