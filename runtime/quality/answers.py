"""A model's answers, kept to hold others against them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError
from runtime.program import Floats

ROWS = 32  # compared at a time: a row of 150k float32 is 600 kB
LARGEST = 80.0  # exp of more is beyond float32

Doubles = npt.NDArray[np.float64]


class Answers:
    """The next-token distributions of a reference for some tokens."""

    def __init__(self, logits: Floats) -> None:
        """`logits` (n_tokens, n_vocab) are kept."""
        self.logits = logits
        with np.errstate(invalid="ignore"):
            self._p = np.exp(logits - logits.max(axis=1, keepdims=True))
            self._p /= self._p.sum(axis=1, keepdims=True)
        _check(self._p)

    def divergences(self, logits: Floats) -> Doubles:
        """Kullback-Leibler divergence of other logits from the reference's, for each token, nats.

        With d the difference of the logits and m its mean under p it is ln of the mean of
        e^(d - m): no difference of large numbers, so that small ones are right, too.
        """
        found = []
        for first in range(0, len(logits), ROWS):
            p, rows = self._p[first : first + ROWS], slice(first, first + ROWS)
            with np.errstate(invalid="ignore", over="ignore"):
                d = logits[rows] - self.logits[rows]
                d -= np.einsum("ij,ij->i", p, d)[:, None]
                largest = d.max(axis=1).astype(np.float64)
                # Beyond float32's range as if all were less by the same; 0 for the rest.
                excess = np.maximum(largest - LARGEST, 0.0)
                d -= excess.astype(np.float32)[:, None]
                mean = np.einsum("ij,ij->i", p, np.expm1(d, out=d)).astype(np.float64)
            found.append(np.log1p(mean) + excess)
        kl: Doubles = np.maximum(np.concatenate(found), 0.0)
        _check(kl)
        return kl


def _check(numbers: Floats | Doubles) -> None:
    if not np.isfinite(numbers).all():
        raise FormatError(
            "the model answers with no number (NaN or infinity): its weights are damaged, or too "
            "large for this computation; see what `gguf verify FILE` finds"
        )
