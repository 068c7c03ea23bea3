"""Finding the fastest threads and layers by measuring: what `gguf tune` does.

First the numbers of threads are tried on the CPU alone, then a few numbers of layers on the GPUs
with the best of them. A line is drawn through the seconds that a token takes with 1, 2, 3... layers
there; with none it is what was measured, since nothing then crosses from one device to another.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from gguf_tools.cores import default_threads
from gguf_tools.errors import ContextFullError, GGUFError
from gguf_tools.reader import GGUFFile
from runtime.bench import Note, Step
from runtime.config import read_config
from runtime.model import BATCH, Model
from runtime.offload import Offload
from runtime.session import count

PROBE = 32  # tokens read to see how long it takes
MOST_DECODED = 64  # tokens written for one figure
MOST_SPLITS = 4  # numbers of layers that are tried, with none
GAIN = 0.03  # of the time: less than this is no reason to choose more threads or layers


@dataclass(frozen=True)
class Work:
    """What the machine is tuned for: an answer of so many tokens to a prompt of so many."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Timing:
    """Seconds per token with so many layers and threads."""

    gpu_layers: int
    threads: int
    prompt: float
    decode: float

    def seconds(self, work: Work) -> float:
        """What an answer takes."""
        return work.prompt * self.prompt + work.answer * self.decode


@dataclass(frozen=True)
class Line:
    """Seconds per token with n layers on GPUs: start + slope * n."""

    start: float
    slope: float

    def at(self, n: int) -> float:
        return max(self.start + self.slope * n, 0.0)


@dataclass(frozen=True)
class Advice:
    """The fastest settings found, and what an answer takes with them and on the CPU alone."""

    work: Work
    gpu_layers: int
    threads: int
    seconds: float
    cpu_seconds: float
    prompt_line: Line | None  # None: no layers on GPUs were tried
    decode_line: Line | None


def thread_counts() -> list[int]:
    """The numbers of threads worth trying, few first."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = default_threads()
    found = {physical, max(physical // 2, 1), max(physical * 3 // 4, 1), logical or physical}
    return sorted(found)


def layer_counts(fitting: int) -> list[int]:
    """Numbers of layers to try where so many fit, without 0."""
    steps = MOST_SPLITS - 1
    return sorted({max(round(fitting * i / steps), 1) for i in range(1, steps + 1) if fitting})


def measure(
    file: GGUFFile,
    work: Work,
    offload: Offload,
    *,
    threads: Sequence[int],
    seconds: float,
    kv_type: str = "f16",
) -> Iterator[Step | Note | Timing]:
    """Measure every number of threads, then a few numbers of layers, in about so many seconds.

    ContextFullError when the work does not fit the model's context.
    """
    config = read_config(file)
    n_ctx = work.prompt + work.answer
    if n_ctx > config.n_ctx_train:
        raise ContextFullError(
            f"a prompt of {work.prompt} tokens and an answer of {work.answer} need a context of "
            f"{n_ctx}, and the model was trained for {config.n_ctx_train}: choose less"
        )
    ids: list[int] = np.random.default_rng(0).integers(config.n_vocab, size=n_ctx).tolist()
    n_splits = MOST_SPLITS - 1 if offload.devices else 0
    total = len(threads) + n_splits
    each = seconds / total

    told: set[str] = set()

    def time_model(wanted: Offload, n_threads: int) -> Iterator[Note | Timing]:
        with Model.load(
            file, n_ctx=n_ctx, threads=n_threads, kv_type=kv_type, offload=wanted
        ) as model:
            yield from (Note(note) for note in model.notes if note not in told)
            told.update(model.notes)
            yield _time(model, work, ids, each)

    on_cpu: list[Timing] = []
    for done, n_threads in enumerate(threads):
        yield Step(f"the CPU alone, {count(n_threads, 'thread')}", done, total)
        for event in time_model(Offload(), n_threads):
            if isinstance(event, Timing):
                on_cpu.append(event)
            yield event
    best = fewest(on_cpu, work)
    if not offload.devices:
        return
    yield Step("as many layers on GPUs as fit", len(threads), total)
    fitting = 0
    for event in time_model(offload, best.threads):
        if isinstance(event, Timing):
            fitting = event.gpu_layers
        yield event
    for done, n in enumerate(layer_counts(fitting)[:-1], start=len(threads) + 1):
        yield Step(f"{n} layers on GPUs", done, total)
        wish = replace(offload.wish, gpu_layers=n, at_most=None)
        yield from time_model(replace(offload, wish=wish), best.threads)


def fewest(timings: Sequence[Timing], work: Work) -> Timing:
    """The fastest; or one with fewer threads that is nearly so."""
    least = min(timing.seconds(work) for timing in timings)
    good = [timing for timing in timings if timing.seconds(work) <= least * (1 + GAIN)]
    return min(good, key=lambda timing: timing.threads)


def advise(timings: Sequence[Timing], work: Work) -> Advice:
    """The number of layers and threads with which an answer takes least."""
    on_cpu = [timing for timing in timings if timing.gpu_layers == 0]
    if not on_cpu:
        raise GGUFError("nothing was measured on the CPU alone")
    best = fewest(on_cpu, work)
    cpu_seconds = best.seconds(work)
    on_gpu = [timing for timing in timings if timing.gpu_layers > 0]
    if not on_gpu:
        return Advice(work, 0, best.threads, cpu_seconds, cpu_seconds, None, None)
    counts = [timing.gpu_layers for timing in on_gpu]
    prompt = fit_line(counts, [timing.prompt for timing in on_gpu])
    decode = fit_line(counts, [timing.decode for timing in on_gpu])

    def seconds(n: int) -> float:
        return work.prompt * prompt.at(n) + work.answer * decode.at(n)

    n = min(range(min(counts), max(counts) + 1), key=seconds)
    if seconds(n) >= cpu_seconds * (1 - GAIN):
        n = 0
    taken = seconds(n) if n else cpu_seconds
    return Advice(work, n, best.threads, taken, cpu_seconds, prompt, decode)


def fit_line(counts: Sequence[int], seconds: Sequence[float]) -> Line:
    """The line with the least squares; of one point, a level one."""
    if len(set(counts)) < 2:
        return Line(statistics.fmean(seconds), 0.0)
    slope, start = statistics.linear_regression(counts, seconds)
    return Line(start, slope)


def to_json(advice: Advice, timings: Sequence[Timing]) -> dict[str, Any]:
    """The object that `gguf tune --json` prints."""
    return {**asdict(advice), "timings": [asdict(timing) for timing in timings]}


def describe(advice: Advice) -> Iterator[str]:
    """The advice in words."""
    work = advice.work
    yield (
        f"for an answer of {work.answer} tokens to a prompt of {work.prompt}: "
        f"--gpu-layers {advice.gpu_layers} --threads {advice.threads}, "
        f"{advice.seconds:.3g} seconds"
    )
    if advice.prompt_line is None or advice.decode_line is None:
        return
    for phase, line in (("read", advice.prompt_line), ("written", advice.decode_line)):
        change = "saves" if line.slope < 0 else "costs"
        yield (
            f"each layer on a GPU {change} {abs(line.slope) * 1e3:.3g} ms of every token {phase}"
        )
    if advice.gpu_layers:
        yield f"the CPU alone takes {advice.cpu_seconds:.3g} seconds"
    else:
        yield "the CPU alone is fastest: layers on a GPU gain nothing here"


def _time(model: Model, work: Work, ids: Sequence[int], seconds: float) -> Timing:
    """Measure reading and writing, about so many seconds together, after a warm-up."""
    model.forward(ids[:PROBE])
    model.forward(ids[:1])
    prompt = _time_prompt(model, ids[: work.prompt], seconds / 2)
    end = time.perf_counter() + seconds / 2
    steps = []
    for token in ids[work.prompt : work.prompt + MOST_DECODED]:
        start = time.perf_counter()
        model.forward([token])
        steps.append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return Timing(model.plan.gpu_layers, model.n_threads, prompt, statistics.median(steps))


def _time_prompt(model: Model, ids: Sequence[int], seconds: float) -> float:
    """Seconds per token of as much of a prompt as there is time for; all of it is held then."""
    n = min(PROBE, len(ids))
    taken = _read(model, ids[:n])
    more = min(len(ids), BATCH, int(n * seconds / max(taken, 1e-9)))
    if more > n:
        n = more
        model.truncate(0)
        taken = _read(model, ids[:n])
    return taken / n


def _read(model: Model, ids: Sequence[int]) -> float:
    start = time.perf_counter()
    model.truncate(0)
    model.forward(ids)
    return time.perf_counter() - start
