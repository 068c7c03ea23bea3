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
    _check_finite(logits)
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


class BandwiseDifferences:
    """What `differ` gives, of logits that come a band of the vocabulary at a time."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        """The tokens (n,) that came."""
        self._p, self._q = _Sums(tokens), _Sums(tokens)
        self._apart = np.zeros(len(tokens))  # sum of exp(p - the largest) (p - q)

    def add(self, q: Floats, p: Floats) -> None:
        """The next band of a candidate's logits and of a reference's; both (n, width)."""
        with np.errstate(invalid="ignore"):  # of a damaged model
            self._q.add(q)
            parts, shrunk = self._p.add(p)
            parts *= p - q
            self._apart = self._apart * shrunk + parts.sum(axis=-1, dtype=np.float64)

    def result(self) -> Differences:
        """Of all bands; FormatError where an answer was no number."""
        log_p, log_q = self._p.log_total(), self._q.log_total()
        kl = self._apart / self._p.total - log_p + log_q
        _check_finite(kl)
        return Differences(
            nll=log_q - self._q.came,
            reference_nll=log_p - self._p.came,
            kl=kl,
            same_top=self._p.best == self._q.best,
        )


class _Sums:
    """The softmax of logits that come band by band, without its terms."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        n = len(tokens)
        self.total = np.zeros(n)  # sum of exp(logit - the largest)
        self.best = np.full(n, -1, np.int64)  # the token of the largest
        self.came = np.full(n, np.nan)  # the logit of the token that came
        self._tokens = tokens
        self._largest = np.full(n, -np.inf, np.float32)
        self._n_seen = 0  # tokens of the vocabulary so far

    def add(self, logits: Floats) -> tuple[Floats, Doubles]:
        """exp(logits - the largest so far), and what sums of the bands before shrink by."""
        rows = np.arange(len(logits))
        best = logits.argmax(axis=-1)
        largest = np.maximum(self._largest, logits[rows, best])
        self.best = np.where(logits[rows, best] > self._largest, self._n_seen + best, self.best)
        shrunk = np.exp((self._largest - largest).astype(np.float64))
        parts: Floats = np.exp(logits - largest[:, None])
        self.total = self.total * shrunk + parts.sum(axis=-1, dtype=np.float64)
        self._largest = largest
        at = self._tokens - self._n_seen
        here = (at >= 0) & (at < logits.shape[1])
        self.came[here] = logits[here, at[here]]
        self._n_seen += logits.shape[1]
        return parts, shrunk

    def log_total(self) -> Doubles:
        """The logarithm of the sum of exp(logit)."""
        total: Doubles = np.log(self.total) + self._largest
        _check_finite(total)
        return total


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


def _check_finite(numbers: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(numbers).all():
        raise FormatError(
            "a model answers with no number (NaN or infinity): its weights are damaged, or too "
            "large for this computation; see what `gguf verify FILE` finds"
        )


def _of_tokens(log_p: Floats, tokens: npt.NDArray[np.int64]) -> Doubles:
    return log_p[np.arange(len(tokens)), tokens].astype(np.float64)
