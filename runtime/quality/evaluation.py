"""Models side by side on a text: perplexity, and distance from a reference.

The text is cut as llama.cpp's llama-perplexity does it: windows of n_ctx tokens, each read from an
empty cache, its first token replaced by bos where the model asks for one; the tokens after the
first half of each window are scored. All models read a window before the next one begins, a few
rows of logits at a time, so that no logits are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import GGUFError, printable
from runtime.layerwise import LayerwiseModel
from runtime.model import Model
from runtime.program import Floats
from runtime.quality.measures import (
    Differences,
    Distance,
    Estimate,
    Predictions,
    differ,
    distance,
    log_probabilities,
    perplexity,
    predict,
)
from runtime.tokenizer import Tokenizer

LOGITS_BYTES = 48 << 20  # of the rows of logits that a model gives at a time, about
LEAST_ROWS = 16
HIDDEN_BYTES = (
    64 << 20
)  # of hidden states of windows that go through a checkpoint's layers together
SHORTEST = 8  # tokens in a window

Ids = npt.NDArray[np.int64]


class Scorer(Protocol):
    """A model that reads windows."""

    @property
    def n_vocab(self) -> int: ...

    def logits(self, window: Ids, first: int, rows: int) -> Iterator[Floats]:
        """The logits at positions first, first + 1... but the last, up to `rows` at a time."""
        ...


@dataclass(frozen=True)
class Window:
    """A window was read by all models."""

    done: int
    total: int


@dataclass(frozen=True)
class Evaluation:
    """The result for one model."""

    tokens: int  # that were scored
    perplexity: Estimate
    distance: Distance | None  # from the reference, where there is one


class ModelScorer:
    """A loaded model as a scorer."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.n_vocab = model.config.n_vocab

    def logits(self, window: Ids, first: int, rows: int) -> Iterator[Floats]:
        self._model.truncate(0)
        if first:
            self._model.forward(window[:first].tolist())
        for start in range(first, len(window) - 1, rows):
            part = window[start : min(start + rows, len(window) - 1)]
            yield self._model.forward(part.tolist(), all_logits=True)


class CheckpointScorer:
    """A checkpoint's own weights as a scorer, layer by layer for many windows at a time."""

    def __init__(self, model: LayerwiseModel, windows: Ids, bos: int | None) -> None:
        """`windows` are those that will be asked for, in this order, once each."""
        self._model = model
        self._coming = deque(windows)
        self._bos = bos
        self._hidden: deque[Floats] = deque()  # of the next windows, after the last layer
        self.n_vocab = model.config.n_vocab

    def logits(self, window: Ids, first: int, rows: int) -> Iterator[Floats]:
        if not self._hidden:
            self._read_on()
        hidden = self._hidden.popleft()
        for start in range(first, len(window) - 1, rows):
            yield self._model.head(hidden[start : min(start + rows, len(window) - 1)])

    def _read_on(self) -> None:
        """Run the layers for as many windows as there is room for."""
        n_ctx = len(self._coming[0])
        room = max(1, HIDDEN_BYTES // (4 * n_ctx * self._model.config.dim))
        windows = [self._coming.popleft() for _ in range(min(room, len(self._coming)))]
        hidden = [self._model.embed(with_bos(window, self._bos).tolist()) for window in windows]
        for layer in range(len(self._model.program.layers)):
            hidden = [self._model.layer(layer, x) for x in hidden]
        self._hidden.extend(hidden)


def with_bos(window: Ids, bos: int | None) -> Ids:
    """A window as it is read: its first token replaced, unless bos is None."""
    return window if bos is None else np.concatenate([[bos], window[1:]])


def cut_windows(
    tokenizer: Tokenizer,
    text: str,
    n_ctx: int,
    limit: int | None = None,
    *,
    parse_special: bool = False,
) -> Ids:
    """The text's windows, (n_windows, n_ctx); GGUFError when it does not fill one."""
    if n_ctx < SHORTEST:
        raise GGUFError(f"a window of {n_ctx} tokens is too short: the least is {SHORTEST}")
    ids = np.asarray(tokenizer.encode(text, parse_special=parse_special), np.int64)
    n_windows = len(ids) // n_ctx
    if n_windows == 0:
        raise GGUFError(
            f"the text has {len(ids)} tokens and a window holds {n_ctx}: give a longer text, or a "
            "smaller --ctx"
        )
    return ids[: n_windows * n_ctx].reshape(n_windows, n_ctx)[:limit]


def scored(n_ctx: int) -> int:
    """How many tokens of a window are scored: those after the first half but for the last."""
    return n_ctx - 1 - n_ctx // 2


def evaluate(
    candidates: Sequence[Scorer],
    windows: Ids,
    *,
    reference: Scorer | None = None,
    bos: int | None = None,
) -> Iterator[Window | Evaluation]:
    """Read `windows` with all models; the evaluations come at the end, in the candidates' order.

    The reference's own comes first, where there is one. `bos` replaces the first token of each
    window, unless it is None.
    """
    first = windows.shape[1] // 2
    scorers = [*([] if reference is None else [reference]), *candidates]
    n_vocab = min(scorer.n_vocab for scorer in scorers)  # they may be padded differently
    if windows.max() >= n_vocab:
        raise GGUFError(f"the text has token {windows.max()} and a model knows {n_vocab} tokens")
    rows = max(LEAST_ROWS, LOGITS_BYTES // (4 * n_vocab))
    predictions: list[list[Predictions]] = [[] for _ in scorers]
    differences: list[list[Differences]] = [[] for _ in scorers]
    for done, window in enumerate(windows, 1):
        read = with_bos(window, bos)
        streams = [scorer.logits(read, first, rows) for scorer in scorers]
        at = first + 1
        for logits in zip(*streams, strict=True):
            tokens = window[at : at + len(logits[0])]
            at += len(tokens)
            base = log_probabilities(logits[0][:, :n_vocab])
            predictions[0].append(predict(base, tokens))
            for i, each in enumerate(logits[1:], 1):
                log_q = log_probabilities(each[:, :n_vocab])
                predictions[i].append(predict(log_q, tokens))
                if reference is not None:
                    differences[i].append(differ(log_q, base, tokens))
        yield Window(done, len(windows))
    for said, apart in zip(predictions, differences, strict=True):
        nll = np.concatenate([part.nll for part in said])
        yield Evaluation(len(nll), perplexity(nll), distance(apart) if apart else None)


def check_vocabularies(names: Sequence[str], tokenizers: Sequence[Tokenizer], text: str) -> None:
    """GGUFError unless all cut `text` into the same tokens as the first."""
    expected = tokenizers[0].encode(text)
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if tokenizer.encode(text) != expected:
            raise GGUFError(
                f"{printable(name)} cuts the text into other tokens than {printable(names[0])}: "
                "only files of one model can be held against each other"
            )
