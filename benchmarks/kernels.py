"""How fast each format's kernels are: bytes of weights for one token, operations for a prompt.

    python benchmarks/kernels.py [--formats Q4_K,Q6_K] [--lengths 576,2048] [--tokens 512,16]
                                 [--rounds 15] [--megabytes 128] [--markdown]

Decode: GB/s of weights that a format's matvec gets through, for rows of several lengths, from
memory and from this core's cache, next to plain reading of the same memory. Prompt: the product of
1024 rows with many tokens, in GOPS (two operations a weight and token).

One thread. All are measured in turn, round after round; numbers are medians. Time is that of the
thread's own processor, which stands still while a neighbour has the core; memory is shared all
the same, so compare with the reading in the same table.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from gguf_tools.jit import Kernel
from gguf_tools.quants import by_name
from runtime.backends.memory import Arena
from runtime.kernels import matmul
from runtime.kernels.bandwidth import read_memory
from runtime.kernels.interpreter import (
    HEADER,
    N_TOKENS,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_FIELDS,
)
from runtime.kernels.table import FORMATS

LENGTHS = (576, 1536, 2048, 4096, 11008)
CACHED = 384 << 10  # bytes that stay in a core's cache between two passes
PROMPT_ROWS = 1024
SHORTEST = 500_000  # ns that a measurement lasts at least

Work = Callable[[], None]
Speeds = dict[tuple[str, str, int], float]


class Bench:
    """Memory that all measurements share: any bytes do, if no scale becomes a denormal."""

    def __init__(self, n_bytes: int) -> None:
        self.arena = Arena()
        rng = np.random.default_rng(0)
        some = rng.integers(32, 60, 1 << 20, dtype=np.uint8)
        values = np.resize(some, max(n_bytes, 64 << 20) + 4096)
        base = self.arena.hold(values)
        self.weights = (base + 63) // 64 * 64 + 32  # tensors lie at multiples of 32 in a file
        self.x = self.arena.hold(rng.normal(size=1 << 20).astype(np.float32))

    def reading(self, n_bytes: int) -> tuple[Work, float]:
        """Plain reading, and the bytes that it reads."""
        result = self.arena.zeros(64)
        n_bytes = n_bytes // 256 * 256

        def work() -> None:
            read_memory(self.weights, n_bytes, result)

        return work, n_bytes

    def matvec(self, name: str, k: int, n_bytes: int) -> tuple[Work, float]:
        """A matvec of about n_bytes of weights, and the bytes that it reads."""
        kernels = FORMATS[name]
        row_bytes = by_name(name).row_bytes(k)
        n_rows = n_bytes // row_bytes
        target = self.arena.zeros(n_rows * 4)
        source = self.x
        if kernels.activation.quantise is not None:
            source = self.arena.zeros(kernels.activation.size(k))
            kernels.activation.quantise(self.x, source, k)

        def work() -> None:
            kernels.matvec(self.weights, row_bytes, 0, n_rows, source, target, k)

        return work, n_rows * row_bytes

    def prompt(self, name: str, k: int, n_tokens: int) -> tuple[Work, float]:
        """The product of a prompt, quantising of activations included, and its operations."""
        kernels, quant = FORMATS[name], by_name(name)
        room = -(-n_tokens // matmul.COLUMNS) * matmul.COLUMNS
        x_stride, y_stride = k * 4 + 192, PROMPT_ROWS * 4 + 192
        source, target = self.arena.zeros(room * x_stride), self.arena.zeros(room * y_stride)
        matrix = (self.weights, quant.row_bytes(k), PROMPT_ROWS, k, kernels.rows.address)
        state = np.zeros(STATE_FIELDS, np.int64)
        state[N_TOKENS] = n_tokens
        state[SCRATCH_BYTES] = matmul.scratch_bytes(k)
        state[SCRATCH] = self.arena.zeros(int(state[SCRATCH_BYTES]))
        steps: list[tuple[Kernel, npt.NDArray[np.int64], int]] = []
        if kernels.group:
            strides = (k + 64, k // kernels.group * 4 + 64)
            metas = [self.arena.zeros(room * strides[1]) for _ in range(3)]
            form = (self.arena.zeros(room * strides[0]), *metas, *strides)
            shape = (k, kernels.group, kernels.bias)
            quantising = _operation(source, 0, x_stride, *form, *shape)
            steps.append((matmul.quantise_columns, quantising, n_tokens))
            tile = matmul.tile_for(kernels).address
            place = (target, y_stride, kernels.group, int(kernels.has_offset))
            product = _operation(*matrix, tile, *form, *place)
            steps.append((matmul.matmul_bytes, product, PROMPT_ROWS // ROWS))
        else:
            tile = matmul.tile_floats.address
            floats = (quant.block_bytes, source, 0, x_stride, target, y_stride)
            product = _operation(*matrix, tile, *floats)
            steps.append((matmul.matmul_floats, product, PROMPT_ROWS // ROWS))

        def work() -> None:
            for step, operation, units in steps:
                step(operation.ctypes.data, state.ctypes.data, 0, 0, units)

        return work, 2.0 * PROMPT_ROWS * k * n_tokens


def _operation(*arguments: int) -> npt.NDArray[np.int64]:
    return np.array([0] * HEADER + list(arguments), np.int64)


def measure(works: dict[tuple[str, str, int], tuple[Work, float]], rounds: int) -> Speeds:
    """Units per nanosecond of each piece of work, done in turn: medians over the rounds."""
    for work, _ in works.values():
        work()  # compiles it
    repeats = dict.fromkeys(works, 1)
    speeds: dict[tuple[str, str, int], list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, (work, units) in works.items():
            while True:
                start = time.thread_time_ns()
                for _ in range(repeats[key]):
                    work()
                spent = time.thread_time_ns() - start
                if spent >= SHORTEST:
                    break
                repeats[key] *= 2
            speeds[key].append(units * repeats[key] / spent)
    return {key: statistics.median(values) for key, values in speeds.items()}


def decode_table(
    bench: Bench, names: Sequence[str], lengths: Sequence[int], n_bytes: int, rounds: int
) -> Table:
    works = {}
    for where, size in (("memory", n_bytes), ("cache", CACHED)):
        for k in lengths:
            works[where, "(reading)", k] = bench.reading(size)
            for name in names:
                if k % by_name(name).block_size == 0:
                    works[where, name, k] = bench.matvec(name, k, size)
    title = "Decode: GB/s of weights, one thread"
    rows = ["(reading)", *names]
    return table_of(title, measure(works, rounds), ("memory", "cache"), rows, lengths, "{:.1f}")


def prompt_table(
    bench: Bench,
    names: Sequence[str],
    lengths: Sequence[int],
    tokens: Sequence[int],
    rounds: int,
) -> Table:
    works = {}
    for n in tokens:
        for k in lengths:
            for name in names:
                if k % by_name(name).block_size == 0:
                    works[f"{n} tokens", name, k] = bench.prompt(name, k, n)
    columns = [f"{n} tokens" for n in tokens]
    title = "Prompt: GOPS, one thread"
    return table_of(title, measure(works, rounds), columns, names, lengths, "{:.0f}")


def table_of(
    title: str,
    speeds: Speeds,
    groups: Sequence[str],
    names: Sequence[str],
    lengths: Sequence[int],
    style: str,
) -> Table:
    table = Table("format", title=title)
    for group in groups:
        for k in lengths:
            table.add_column(f"{group} {k}", justify="right", min_width=5)
    for name in names:
        keys = [(group, name, k) for group in groups for k in lengths]
        cells = [style.format(speeds[key]) if key in speeds else "-" for key in keys]
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="names, with commas")
    parser.add_argument("--lengths", default=",".join(str(k) for k in LENGTHS))
    parser.add_argument("--tokens", default="512,16", help="of prompts; '' leaves them out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=128, help="several times the caches")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = options.formats.split(",")
    lengths = [int(k) for k in options.lengths.split(",")]
    tokens = [int(n) for n in options.tokens.split(",") if n]
    n_bytes = options.megabytes << 20
    bench = Bench(n_bytes)
    tables = [decode_table(bench, names, lengths, n_bytes, options.rounds)]
    if tokens:
        tables.append(prompt_table(bench, names, lengths, tokens, max(3, options.rounds // 5)))
    console = Console(width=150)
    for table in tables:
        if options.markdown:
            table.box = box.MARKDOWN
        console.print(table)


if __name__ == "__main__":
    main()
