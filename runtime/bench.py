"""Measuring a model: how many tokens a second it reads and writes, case by case.

The cases are measured in turn, round after round, so that whatever else the machine does meanwhile
falls on all of them alike. A case's speed is the median of its rounds. Decoding is held against
plain reading of memory just before and after it: how fast that is changes while others use the
machine.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gguf_tools.cores import default_threads
from gguf_tools.describe import count_parameters, short_count, short_size
from gguf_tools.errors import ContextFullError, GGUFError, printable
from gguf_tools.reader import GGUFFile
from runtime.bandwidth import MemoryReader
from runtime.config import ModelConfig, read_config
from runtime.decoders import build_program
from runtime.doctor import processor_name
from runtime.model import Model
from runtime.program import Attend, ExpertMatMul, Instruction, MatMul, Program
from runtime.session import count, main_type

PROMPT = "prompt"  # reading many tokens at a time
DECODE = "decode"  # one token after the other, as when writing an answer
DEFAULT_TOKENS = {PROMPT: 512, DECODE: 64}  # or the context, where it is smaller

BATCH = 512  # tokens of a prompt that are read together
MOST_THREADS = 1024
MOST_DIGITS = 9  # of a number on the command line

HEADER = ("phase", "tokens", "depth", "threads", "tokens/s", "spread", "read GB/s", "of bandwidth")


@dataclass(frozen=True)
class Case:
    """What is measured: `tokens` more after the `depth` that the cache holds already."""

    phase: str
    tokens: int
    depth: int
    threads: int

    def __str__(self) -> str:
        threads = count(self.threads, "thread")
        return f"{self.phase} {self.tokens} at depth {self.depth}, {threads}"


@dataclass(frozen=True)
class Measurement:
    """The result of a case. Every round was within `spread` of the median speed."""

    case: Case
    tokens_per_second: float
    spread: float  # tokens/s
    bytes_per_second: float
    read_bandwidth: float | None  # bytes/s that plain reading got beside it; None for prompts
    bandwidth_share: float | None  # of that, in the median round


@dataclass(frozen=True)
class Round:
    """A case measured once."""

    seconds: float
    bandwidth: float | None  # bytes/s of plain reading, just before and after


@dataclass(frozen=True)
class Step:
    """What is being done now."""

    text: str
    done: int  # steps before this one
    total: int


@dataclass(frozen=True)
class Note:
    """Something to tell the user."""

    text: str


def parse_counts(text: str, *, least: int = 1) -> tuple[int, ...]:
    """The numbers of a list such as `128,512`, each once; ValueError says what is wrong."""
    counts = []
    for part in text.split(","):
        word = part.strip()
        if not (word.isascii() and word.isdigit()):
            found = f"'{printable(word, limit=40)}'"
            raise ValueError(f"expected whole numbers such as 128,512, found {found}")
        if len(word) > MOST_DIGITS:
            raise ValueError(f"{word[:MOST_DIGITS]}... is too large")
        if int(word) < least:
            raise ValueError(f"the least is {least}, not {int(word)}")
        counts.append(int(word))
    return tuple(dict.fromkeys(counts))


def make_cases(
    config: ModelConfig,
    *,
    prompts: Sequence[int] | None = None,
    generated: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
) -> list[Case]:
    """Every combination asked for; GGUFError when one does not fit the context.

    None takes the default; an empty sequence of prompts or of generated leaves the phase out.
    """
    context = config.n_ctx_train
    depths = depths or (0,)
    room = max(1, context - max(depths))
    lengths = {PROMPT: prompts, DECODE: generated}
    cases = []
    for phase, chosen in lengths.items():
        for tokens in (min(DEFAULT_TOKENS[phase], room),) if chosen is None else chosen:
            for depth in depths:
                if depth + tokens > context:
                    raise ContextFullError(
                        f"{phase} of {tokens} tokens at depth {depth} needs a context of "
                        f"{depth + tokens}, and the model was trained for {context} tokens: "
                        "choose fewer tokens or a smaller --depth"
                    )
                for n_threads in threads or (default_threads(),):
                    if n_threads > MOST_THREADS:
                        raise GGUFError(f"--threads {n_threads}: at most {MOST_THREADS}")
                    cases.append(Case(phase, tokens, depth, n_threads))
    if not cases:
        raise GGUFError("nothing to measure: --prompt and --gen are both none")
    return cases


def measure(
    file: GGUFFile,
    cases: Sequence[Case],
    *,
    repeat: int,
    kv_type: str = "f16",
    in_memory: bool = False,
) -> Iterator[Step | Note | Measurement]:
    """Measure `cases` in `repeat` rounds; the measurements come at the end, in their order."""
    if repeat < 1:
        raise ValueError(f"repeat must be positive, not {repeat}")
    from gguf_tools.jit import compile_kernels
    from runtime.backends.needs import few_kernels
    from runtime.kernels.matmul import FEW_TOKENS

    config = read_config(file)
    program = build_program(file, config)
    # One text for all: what the cache holds of it serves every case that goes on from there.
    n_ctx = max(case.depth + case.tokens for case in cases)
    ids: list[int] = np.random.default_rng(0).integers(config.n_vocab, size=n_ctx).tolist()
    ordered = sorted(cases, key=lambda case: (case.threads, case.depth, case.tokens))
    thread_counts = sorted({case.threads for case in cases})
    total = len(thread_counts) + repeat * len(cases)
    rounds: dict[Case, list[Round]] = {case: [] for case in cases}
    memory = MemoryReader()
    if any(1 < case.tokens % BATCH <= FEW_TOKENS for case in cases if case.phase == PROMPT):
        for _ in compile_kernels(few_kernels(program)):
            pass
    with ExitStack() as stack:
        models = {}
        for done, threads in enumerate(thread_counts):
            yield Step("loading and warming up", done, total)
            model = Model.load(
                file,
                n_ctx=n_ctx,
                threads=threads,
                n_batch=BATCH,
                kv_type=kv_type,
                in_memory=in_memory,
            )
            models[threads] = stack.enter_context(model)
            if done == 0:
                yield from map(Note, model.notes)
            _warm_up(model, ids)
        for turn in range(repeat):
            for index, case in enumerate(ordered):
                done = len(thread_counts) + turn * len(cases) + index
                yield Step(f"round {turn + 1} of {repeat}: {case}", done, total)
                rounds[case].append(_measure_once(models[case.threads], case, ids, memory))
    for case in cases:
        yield summarise(case, rounds[case], bytes_read(program, case, kv_type))


def summarise(case: Case, rounds: Sequence[Round], n_bytes: int) -> Measurement:
    """Medians of `rounds`, of a case that reads n_bytes."""
    speeds = [case.tokens / max(each.seconds, 1e-9) for each in rounds]
    speed = statistics.median(speeds)
    spread = max(abs(each - speed) for each in speeds)
    beside = [each.bandwidth for each in rounds if each.bandwidth is not None]
    bandwidth = share = None
    if beside:
        bandwidth = statistics.median(beside)
        reads = [n_bytes / case.tokens * each for each in speeds]
        share = statistics.median(a / b for a, b in zip(reads, beside, strict=True))
    return Measurement(case, speed, spread, n_bytes * speed / case.tokens, bandwidth, share)


def bytes_read(program: Program, case: Case, kv_type: str = "f16") -> int:
    """Bytes that must come from memory in a case: the weights and the KV cache.

    Weights are read once for every batch, which for decoding is one token; of a mixture, as many
    experts as the batch's tokens can choose at most.
    """
    from runtime.kernels.kv_cache import KV_TYPES, POSITIONS

    batch = BATCH if case.phase == PROMPT else 1
    windows = [s.window for layer in program.layers for s in layer if isinstance(s, Attend)]
    block_bytes = KV_TYPES[kv_type].block_bytes
    position_bytes = [
        shape.n_kv_heads * (block_bytes(shape.key_dim) + block_bytes(shape.value_dim)) // POSITIONS
        for shape in program.caches
    ]
    total = 0
    for first in range(case.depth, case.depth + case.tokens, batch):
        size = min(batch, case.depth + case.tokens - first)
        total += sum(_weight_bytes(step, size) for step in program.steps)
        for width, window in zip(position_bytes, windows, strict=True):
            total += width * min(first + size, window + size - 1 if window else first + size)
    return total


def _weight_bytes(step: Instruction, n_tokens: int) -> int:
    if isinstance(step, MatMul):
        return step.matrix.data.nbytes
    if isinstance(step, ExpertMatMul):
        return min(len(step.experts), n_tokens * step.n_used) * step.experts[0].data.nbytes
    return 0


def to_json(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """The list that `gguf bench --json` prints."""
    return [
        {
            **asdict(measurement.case),
            "tokens_per_second": measurement.tokens_per_second,
            "spread": measurement.spread,
            "bytes_per_second": measurement.bytes_per_second,
        }
        for measurement in measurements
    ]


def describe(file: GGUFFile, measurements: Iterable[Measurement]) -> Iterator[str]:
    """What is measured and on what: the lines above a table."""
    weights = short_count(count_parameters(file))
    size = short_size(file.file_size)
    yield f"{printable(file.path.name)}: {weights} parameters, {main_type(file)}, {size}"
    name = printable(processor_name())
    bandwidths: dict[int, list[float]] = {}
    for measurement in measurements:
        if measurement.read_bandwidth is not None:
            bandwidths.setdefault(measurement.case.threads, []).append(measurement.read_bandwidth)
    reads = ", ".join(
        f"{statistics.median(speeds) / 1e9:.1f} GB/s with {count(threads, 'thread')}"
        for threads, speeds in sorted(bandwidths.items())
    )
    yield f"{name}: reads memory at {reads}" if reads else name


def table_rows(measurements: Iterable[Measurement]) -> Iterator[tuple[str, ...]]:
    """One row of texts under HEADER for each measurement.

    Only decoding is held against plain reading: reading a prompt is bound by arithmetic.
    """
    for measurement in measurements:
        case, read, share = measurement.case, "", ""
        if measurement.bandwidth_share is not None:
            read = f"{measurement.bytes_per_second / 1e9:.1f}"
            share = f"{measurement.bandwidth_share:.0%}"
        speeds = f"{measurement.tokens_per_second:.1f}", f"{measurement.spread:.1f}"
        numbers = (str(n) for n in (case.tokens, case.depth, case.threads))
        yield case.phase, *numbers, *speeds, read, share


def markdown(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> Iterator[str]:
    """The lines of a markdown table; all columns but the first are numbers."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _warm_up(model: Model, ids: list[int]) -> None:
    """Touch the weights, the whole cache and both ways to read tokens."""
    if len(ids) > 1:
        model.forward(ids[:-1])
    model.forward(ids[-1:])


def time_case(model: Model, case: Case, ids: list[int]) -> float:
    """Seconds that a case takes, without filling the cache to its depth."""
    held = len(model.tokens)
    if held < case.depth:
        model.forward(ids[held : case.depth])
    else:
        model.truncate(case.depth)
    new = ids[case.depth : case.depth + case.tokens]
    start = time.perf_counter()
    if case.phase == PROMPT:
        model.forward(new)
    else:
        for token in new:
            model.forward([token])
    return time.perf_counter() - start


def _measure_once(model: Model, case: Case, ids: list[int], memory: MemoryReader) -> Round:
    if case.phase == PROMPT:
        return Round(time_case(model, case, ids), None)
    before = memory.speed(case.threads)
    seconds = time_case(model, case, ids)
    return Round(seconds, (before + memory.speed(case.threads)) / 2)
