"""From scores to a token: pure functions (logits, value) -> logits, and their chain.

The order is llama.cpp's: repeat penalty, top-k, top-p, min-p, temperature, draw. A function never
changes its argument; a token it rules out gets -inf. Top-k comes before everything that needs
softmax, and the chain goes on with the survivors alone, so a vocabulary of 150,000 costs a
selection (0.1 ms) and not a sort.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_tools.errors import GGUFError, printable

FloatArray = NDArray[np.floating[Any]]

_LARGEST = float(np.finfo(np.float32).max)
_FIRST_GUESS = 256  # tokens that top-p looks at first; eight times more until they are enough

METADATA_KEYS = {
    "temp": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. A value out of range is a ValueError that says the range."""

    temp: float = 0.8  # 0: always the likeliest token
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # 0: off, -1: the whole context
    seed: int | None = None  # None: another one each time

    def __post_init__(self) -> None:
        for field in fields(self):
            check_option(field.name, getattr(self, field.name))

    def with_metadata(self, metadata: Mapping[str, Any]) -> tuple["SamplingOptions", list[str]]:
        """These options with the file's `general.sampling.*`, and a note per unusable value."""
        options, notes = self, []
        for name, key in METADATA_KEYS.items():
            if key not in metadata:
                continue
            value = metadata[key]
            if name == "top_k" and isinstance(value, int) and value == -1:  # off, by Hugging Face
                value = 0
            try:
                options = replace(options, **{name: value})
            except ValueError as error:
                notes.append(f"{key} of the file is ignored: {error}")
        return options, notes


# name -> (whole number?, lowest, highest, may be the lowest itself?)
_RANGES: dict[str, tuple[bool, float, float, bool]] = {
    "temp": (False, 0.0, math.inf, True),
    "top_k": (True, 0, math.inf, True),
    "top_p": (False, 0.0, 1.0, True),
    "min_p": (False, 0.0, 1.0, True),
    "repeat_penalty": (False, 0.0, math.inf, False),
    "repeat_last_n": (True, -1, math.inf, True),
    "seed": (True, 0, math.inf, True),
}


def check_option(name: str, value: Any) -> None:
    """ValueError, with the range in words, when option `name` can't have `value`."""
    whole, low, high, closed = _RANGES[name]
    if name == "seed" and value is None:
        return
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if good and (low <= value <= high) and (closed or value > low):
        return
    expected = "a whole number" if whole else "a number"
    if math.isfinite(high):
        expected += f" from {low:g} to {high:g}"
    else:
        expected += f" {'not below' if closed else 'above'} {low:g}"
    raise ValueError(f"{name.replace('_', '-')} is {expected}, not {printable(value, 40)}")


class Sampler:
    """Draws tokens by `options`; its only state is the random generator.

    Ids from `n_tokens` on, rows of a padded embedding that are no token, are never drawn.
    """

    def __init__(self, options: SamplingOptions, *, n_tokens: int | None = None) -> None:
        self.options = options
        self._n_tokens = n_tokens
        self._random = np.random.default_rng(options.seed)

    def pick(self, logits: FloatArray, previous: Sequence[int]) -> int:
        """The next token after `previous` (the whole context) from logits  # (n_vocab,)

        GGUFError when no token has a usable score.
        """
        options = self.options
        scores = usable(logits[: self._n_tokens])
        if options.repeat_penalty != 1.0:
            window = last(previous, options.repeat_last_n)
            scores = penalise_repeats(scores, window, penalty=options.repeat_penalty)
        if options.temp == 0.0:
            return int(np.argmax(scores))
        scores = top_k(scores, options.top_k)
        ids = np.flatnonzero(scores > -np.inf)
        scores = scores[ids].astype(np.float64)
        scores = top_p(scores, options.top_p)
        scores = min_p(scores, options.min_p)
        scores = temperature(scores, options.temp)
        return int(ids[draw(scores, self._random)])


def usable(logits: FloatArray) -> FloatArray:
    """A copy without NaN (now -inf) and infinity (now the largest float32)."""
    scores = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    np.minimum(scores, np.float32(_LARGEST), out=scores)
    if not (scores > -np.inf).any():
        raise GGUFError(
            "the model gave no token a usable score (all are NaN or minus infinity): "
            "its weights are damaged, or its type cannot hold them; convert it again"
        )
    return scores


def last(tokens: Sequence[int], count: int) -> Sequence[int]:
    """The last `count` tokens; all of them for -1."""
    return tokens if count < 0 else tokens[max(len(tokens) - count, 0) :]


def penalise_repeats(logits: FloatArray, window: Sequence[int], *, penalty: float) -> FloatArray:
    """Make each token of `window` less likely, once however often it stands there.

    A positive logit is divided by the penalty and another one multiplied, as llama.cpp does.
    """
    result = logits.copy()
    seen = np.unique(np.asarray(window, np.int64))
    seen = seen[(seen >= 0) & (seen < len(logits))]
    scores = logits[seen].astype(np.float64)
    scores = np.where(scores <= 0, scores * penalty, scores / penalty)
    floor = np.where(np.isneginf(scores), -np.inf, -_LARGEST)
    result[seen] = np.clip(scores, floor, _LARGEST)
    return result


def top_k(logits: FloatArray, k: int) -> FloatArray:
    """Keep the k likeliest tokens, of equal ones the first; 0 keeps all."""
    if k <= 0 or k >= len(logits):
        return logits
    smallest_kept = np.partition(logits, len(logits) - k)[len(logits) - k]
    kept = logits > smallest_kept
    ties = np.flatnonzero(logits == smallest_kept)
    kept[ties[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, -np.inf)


def top_p(logits: FloatArray, p: float) -> FloatArray:
    """Keep the likeliest tokens that together reach probability p; at least one, 1 keeps all."""
    if p >= 1.0:
        return logits
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    wanted = p * weights.sum()
    count = min(_FIRST_GUESS, len(logits))
    while True:
        order = likeliest(logits, count)
        reached = np.cumsum(weights[order])
        if reached[-1] >= wanted or count == len(logits):
            break
        count = min(count * 8, len(logits))
    n_kept = int(np.searchsorted(reached, wanted)) + 1
    result = np.full_like(logits, -np.inf)
    result[order[:n_kept]] = logits[order[:n_kept]]
    return result


def min_p(logits: FloatArray, p: float) -> FloatArray:
    """Keep tokens at least p times as likely as the likeliest one; 0 keeps all."""
    if p <= 0.0:
        return logits
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def temperature(logits: FloatArray, temp: float) -> FloatArray:
    """Divide by `temp` (> 0): below 1 sharper, above 1 flatter. The largest logit becomes 0."""
    with np.errstate(over="ignore"):
        result: FloatArray = (logits - logits.max()) / temp
    return result


def draw(logits: FloatArray, random: np.random.Generator) -> int:
    """A position, drawn by the softmax of `logits`."""
    reached = np.cumsum(np.exp(logits - logits.max(), dtype=np.float64))
    chosen = int(np.searchsorted(reached, random.random() * reached[-1], side="right"))
    return chosen if chosen < len(logits) else int(np.argmax(logits))


def likeliest(logits: FloatArray, count: int) -> NDArray[np.intp]:
    """Positions of the `count` largest, in falling order, of equal ones the first first."""
    if count < len(logits):
        positions = np.flatnonzero(top_k(logits, count) > -np.inf)
    else:
        positions = np.arange(len(logits))
    return positions[np.argsort(-logits[positions], kind="stable")]
