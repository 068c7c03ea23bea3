"""Tokens in, tokens out: reading a prompt, writing an answer, stopping.

Nothing here knows text, except `StopStrings`, which sees only text. Everything reports by yielding,
so a caller who wants to stop simply asks for no more: the model then holds what it has read.
"""

from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf_tools.errors import ContextFullError

StopReason = Literal["end of generation", "token limit", "context full"]

STEP = 256  # tokens read between two reports; an interruption waits for one step


class LanguageModel(Protocol):
    """What generation needs of a model; `runtime.model.Model` is one."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def tokens(self) -> list[int]:
        """What the KV cache holds, in order."""

    def forward(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids` to the cache; the logits that follow the last one  # (n_vocab,)"""

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""


class Chooser(Protocol):
    """What generation needs of a sampler; `runtime.sampling.Sampler` is one."""

    def pick(self, logits: NDArray[Any], previous: Sequence[int]) -> int: ...


def generate(
    model: LanguageModel,
    ids: Sequence[int],
    sampler: Chooser,
    *,
    stop_ids: Collection[int] = (),
    max_tokens: int | None = None,
) -> Generator[int, None, StopReason]:
    """The tokens that follow `ids`, one by one; returns why it stopped.

    A token of `stop_ids` ends it and is not yielded. `max_tokens` None means no limit but the
    context. What the cache already holds of `ids` is not read again.
    """
    reader = read_prompt(model, ids)
    while True:
        try:
            next(reader)
        except StopIteration as finished:
            logits = finished.value
            break
    return (yield from write(model, logits, sampler, stop_ids=stop_ids, max_tokens=max_tokens))


def n_reusable(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of `ids` the cache `held` spares; the last one is always read, for logits."""
    limit = min(len(held), len(ids) - 1)
    for i in range(limit):
        if held[i] != ids[i]:
            return i
    return max(limit, 0)


def read_prompt(
    model: LanguageModel, ids: Sequence[int], *, step: int = STEP
) -> Generator[int, None, NDArray[np.float32]]:
    """Make the cache hold exactly `ids`; returns the logits that follow.

    Yields the number of tokens read so far, before each step. ContextFullError when they don't
    fit; the cache is then as it was.
    """
    if not ids:
        raise ValueError("an empty prompt has no logits: give at least one token")
    if len(ids) > model.n_ctx:
        raise ContextFullError(
            f"the prompt has {len(ids)} tokens and the context holds {model.n_ctx}: "
            "shorten it, or give a larger --ctx"
        )
    kept = n_reusable(model.tokens, ids)
    model.truncate(kept)
    logits = np.empty(0, np.float32)
    for start in range(kept, len(ids), step):
        yield start - kept
        logits = model.forward(ids[start : start + step])
    return logits


def write(
    model: LanguageModel,
    logits: NDArray[np.float32],
    sampler: Chooser,
    *,
    stop_ids: Collection[int] = (),
    max_tokens: int | None = None,
) -> Generator[int, None, StopReason]:
    """Pick, yield, read what was picked, and so on, from the logits of the last token."""
    n_written = 0
    while max_tokens is None or n_written < max_tokens:
        token = sampler.pick(logits, model.tokens)
        if token in stop_ids:
            return "end of generation"
        yield token
        n_written += 1
        if n_written == max_tokens:
            break
        if len(model.tokens) >= model.n_ctx:
            return "context full"
        logits = model.forward([token])
    return "token limit"


class StopStrings:
    """Ends a stream of text at the first of some strings, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)
        if not all(self._strings):
            raise ValueError("a stop string cannot be empty")
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that may be shown now; nothing any more once a stop string was `found`."""
        if self.found is not None:
            return ""
        pending = self._held + text
        places = [(pending.find(s), s) for s in self._strings if s in pending]
        if places:
            place, self.found = min(places, key=lambda found: (found[0], -len(found[1])))
            self._held = ""
            return pending[:place]
        n_held = max((_overlap(pending, string) for string in self._strings), default=0)
        self._held = pending[len(pending) - n_held :]
        return pending[: len(pending) - n_held]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that begins `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
