"""How fast each of several loaded models reads and writes, measured briefly.

All are asked the same, in turn, round after round, as `gguf bench` does it: whatever else the
machine does meanwhile falls on all alike. How many tokens that are follows from what the slowest
of them does in SECONDS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gguf_tools.errors import printable
from runtime.bench import DECODE, DEFAULT_TOKENS, PROMPT, Case, Round, summarise, time_case
from runtime.doctor import processor_name
from runtime.model import Model
from runtime.quality.measures import Estimate
from runtime.session import count

ROUNDS = 3
SECONDS = 1.5  # at most, about, that one measurement takes
LEAST = {PROMPT: 32, DECODE: 4}  # tokens, which are also the warm-up


@dataclass(frozen=True)
class Speed:
    """Tokens per second: medians, and how far from them the rounds were at most."""

    prompt: Estimate
    decode: Estimate
    prompt_tokens: int
    decode_tokens: int
    threads: int


@dataclass(frozen=True)
class Timed:
    """A model was measured once."""

    done: int
    total: int


def machine(threads: int) -> str:
    """Where speeds are measured, in words."""
    return f"{printable(processor_name())}, {count(threads, 'thread')}"


def measure_speeds(models: Sequence[Model]) -> Iterator[Timed | Speed]:
    """Measure the models; their speeds come at the end, in their order. Forgets what they hold."""
    tokens = {phase: _tokens(models, phase) for phase in (PROMPT, DECODE)}
    cases = [
        [Case(phase, n, 0, model.n_threads) for phase, n in tokens.items()] for model in models
    ]
    rounds: dict[tuple[int, str], list[Round]] = {}
    for turn in range(ROUNDS):
        for i, model in enumerate(models):
            for case in cases[i]:
                seconds = time_case(model, case, _ids(model, case.tokens))
                rounds.setdefault((i, case.phase), []).append(Round(seconds, None))
            yield Timed(turn * len(models) + i + 1, ROUNDS * len(models))
    for i in range(len(models)):
        found = {case.phase: summarise(case, rounds[i, case.phase], 0) for case in cases[i]}
        prompt, decode = (
            Estimate(found[phase].tokens_per_second, found[phase].spread)
            for phase in (PROMPT, DECODE)
        )
        yield Speed(prompt, decode, tokens[PROMPT], tokens[DECODE], models[i].n_threads)


def _tokens(models: Sequence[Model], phase: str) -> int:
    """How many tokens the slowest of the models does in SECONDS: LEAST times a power of 2."""
    least = min(LEAST[phase], *(model.n_ctx for model in models))
    most = min(DEFAULT_TOKENS[phase], *(model.n_ctx for model in models))
    slowest = 0.0
    for model in models:
        case, ids = Case(phase, least, 0, model.n_threads), _ids(model, least)
        time_case(model, case, ids)  # compiles what is not yet, and touches the weights
        slowest = max(slowest, time_case(model, case, ids))
    n = least
    while 2 * n <= most and slowest * 2 * n / least <= SECONDS:
        n *= 2
    return n


def _ids(model: Model, n: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(model.config.n_vocab, size=n).tolist()
    return ids
