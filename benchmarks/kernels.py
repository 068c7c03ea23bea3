"""How fast each format's kernels are: bytes read for one token, operations for a prompt.

    python benchmarks/kernels.py [--formats Q4_K,Q6_K] [--lengths 576,2048] [--rounds 15]
                                 [--tokens 512] [--megabytes 128] [--markdown]

Decode: GB/s of weights that a format's matvec gets through with one thread, for rows of several
lengths, from memory and from this core's cache, next to plain reading of the same memory. Prompt:
the product of 1024 rows with many tokens, in GOPS (two operations a weight and token), its tile
alone, and decoding the rows alone.

All are measured in turn, round after round; numbers are medians. Time is that of the thread's own
processor, so that it stands still while a neighbour has the core.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
from rich.console import Console
from rich.table import Table as Print

from gguf_tools.quants import QuantType, by_name
from runtime.backends.lowering import Arena, Table
from runtime.kernels import matmul
from runtime.kernels.bandwidth import read_memory
from runtime.kernels.interpreter import (
    BARRIER,
    N_THREADS,
    N_TOKENS,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_FIELDS,
    run_table,
)
from runtime.kernels.table import FORMATS

LENGTHS = (576, 1536, 2048, 4096, 11008)
CACHED = 384 << 10  # bytes that stay in a core's cache between two passes
PROMPT_ROWS = 1024
READING = "(reading)"

Work = Callable[[], None]


class Bench:
    """Memory that all measurements share: any bytes do, if no scale becomes a denormal."""

    def __init__(self, n_bytes: int) -> None:
        self.arena = Arena()
        rng = np.random.default_rng(0)
        self.weights = np.resize(rng.integers(32, 60, 1 << 20, dtype=np.uint8), n_bytes)
        self.x = rng.normal(size=1 << 20).astype(np.float32)

    def reading(self, n_bytes: int) -> tuple[Work, float]:
        """Plain reading, and the bytes that it reads."""
        result = self.arena.zeros(64)
        n_bytes = n_bytes // 256 * 256

        def work() -> None:
            read_memory(self.weights.ctypes.data, n_bytes, result)

        return work, n_bytes

    def matvec(self, name: str, k: int, n_bytes: int) -> tuple[Work, float]:
        """A matvec of about n_bytes of weights, and the bytes that it reads."""
        kernels = FORMATS[name]
        row_bytes = by_name(name).row_bytes(k)
        n_rows = n_bytes // row_bytes
        target = self.arena.zeros(n_rows * 4)
        source = self.x.ctypes.data
        if kernels.activation.quantise is not None:
            source = self.arena.zeros(kernels.activation.size(k))
            kernels.activation.quantise(self.x.ctypes.data, source, k)

        def work() -> None:
            kernels.matvec(self.weights.ctypes.data, row_bytes, 0, n_rows, source, target, k)

        return work, n_rows * row_bytes

    def rows(self, name: str, k: int) -> tuple[Work, float]:
        """The row decoder on all rows of the prompt's matrix, and the weights it decodes."""
        kernels, row_bytes = FORMATS[name], by_name(name).row_bytes(k)
        address = self.weights.ctypes.data
        q, scales, offsets = (self.arena.zeros(k * 4 + 256) for _ in range(3))

        def work() -> None:
            for row in range(PROMPT_ROWS):
                kernels.rows(address + row * row_bytes, q, scales, offsets, k)

        return work, PROMPT_ROWS * k

    def prompt(self, name: str, k: int, n_tokens: int) -> tuple[Work, float]:
        """The whole product of a prompt, and its operations."""
        kernels, row_bytes = FORMATS[name], by_name(name).row_bytes(k)
        room = (n_tokens + matmul.COLUMNS - 1) // matmul.COLUMNS * matmul.COLUMNS
        x_stride, y_stride = k * 4 + 192, PROMPT_ROWS * 4 + 192
        source, target = self.arena.zeros(room * x_stride), self.arena.zeros(room * y_stride)
        matrix = (self.weights.ctypes.data, row_bytes, PROMPT_ROWS, k)
        table = Table()
        if kernels.group:
            q_stride, meta_stride = k + 64, k // kernels.group * 4 + 64
            form = [self.arena.zeros(room * q_stride)]
            form += [self.arena.zeros(room * meta_stride) for _ in range(3)]
            form += [q_stride, meta_stride]
            shape = (k, kernels.group, kernels.span, kernels.bias)
            table.add(matmul.quantise_columns, (source, 0, x_stride, *form, *shape), [])
            tile = matmul.TILES[kernels.group, kernels.has_offset].address
            place = (target, y_stride, kernels.group, int(kernels.has_offset))
            arguments = (*matrix, kernels.rows.address, tile, *form, *place)
            table.add(matmul.matmul_bytes, arguments, [])
        else:
            block_bytes = by_name(name).block_bytes
            tile = matmul.tile_floats.address
            place = (source, 0, x_stride, target, y_stride)
            arguments = (*matrix, kernels.rows.address, tile, block_bytes, *place)
            table.add(matmul.matmul_floats, arguments, [])
        state = np.zeros(STATE_FIELDS, np.int64)
        state[N_TOKENS], state[N_THREADS] = n_tokens, 1
        state[BARRIER] = self.arena.zeros(128)
        state[SCRATCH_BYTES] = matmul.scratch_bytes(k)
        state[SCRATCH] = self.arena.zeros(int(state[SCRATCH_BYTES]))
        steps = table.array()

        def work() -> None:
            run_table(steps.ctypes.data, len(steps), state.ctypes.data, 0)

        return work, 2.0 * PROMPT_ROWS * k * n_tokens


def measure(
    works: dict[tuple[str, ...], tuple[Work, float]], rounds: int
) -> dict[tuple[str, ...], float]:
    """Units per nanosecond of each piece of work, done in turn: medians over the rounds."""
    for work, _ in works.values():
        work()  # compiles it
    times: dict[tuple[str, ...], list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, (work, units) in works.items():
            repeats = 1
            while True:
                start = time.thread_time_ns()
                for _ in range(repeats):
                    work()
                spent = time.thread_time_ns() - start
                if spent > 500_000:
                    break
                repeats *= 4
            times[key].append(units * repeats / spent)
    return {key: statistics.median(speeds) for key, speeds in times.items()}


def fits(quant: QuantType, k: int) -> bool:
    return k % quant.block_size == 0


def decode_table(
    bench: Bench, names: Iterable[str], lengths: tuple[int, ...], n_bytes: int, rounds: int
) -> Print:
    works: dict[tuple[str, ...], tuple[Work, float]] = {}
    for where, size in (("memory", n_bytes), ("cache", CACHED)):
        works[where, READING] = bench.reading(size)
        for name in names:
            for k in lengths:
                if fits(by_name(name), k):
                    works[where, name, str(k)] = bench.matvec(name, k, size)
    speeds = measure(works, rounds)
    table = Print(title="Decode: GB/s of weights, one thread")
    table.add_column("format")
    for where in ("memory", "cache"):
        for k in lengths:
            table.add_column(f"{where}\n{k}", justify="right")
    for name in (READING, *names):
        cells = []
        for where in ("memory", "cache"):
            for k in lengths:
                key = (where, name) if name == READING else (where, name, str(k))
                cells.append(f"{speeds[key]:.1f}" if key in speeds else "-")
        table.add_row(name, *cells)
    return table


def prompt_table(
    bench: Bench, names: Iterable[str], lengths: tuple[int, ...], n_tokens: int, rounds: int
) -> Print:
    works: dict[tuple[str, ...], tuple[Work, float]] = {}
    for name in names:
        for k in lengths:
            if fits(by_name(name), k):
                works["prompt", name, str(k)] = bench.prompt(name, k, n_tokens)
                works["rows", name, str(k)] = bench.rows(name, k)
    speeds = measure(works, rounds)
    table = Print(title=f"Prompt of {n_tokens}: GOPS of the product | G weights/s of decoding rows")
    table.add_column("format")
    for k in lengths:
        table.add_column(str(k), justify="right")
    for name in names:
        cells = []
        for k in lengths:
            product, rows = (speeds.get((what, name, str(k))) for what in ("prompt", "rows"))
            cells.append("-" if product is None else f"{product:.0f} | {rows:.1f}")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="names, with commas")
    parser.add_argument("--lengths", default=",".join(str(k) for k in LENGTHS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt; 0 leaves it out")
    parser.add_argument("--megabytes", type=int, default=128, help="above the caches' size")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = options.formats.split(",")
    lengths = tuple(int(k) for k in options.lengths.split(","))
    bench = Bench(options.megabytes << 20)
    tables = [decode_table(bench, names, lengths, options.megabytes << 20, options.rounds)]
    if options.tokens:
        rounds = max(3, options.rounds // 5)
        tables.append(prompt_table(bench, names, lengths, options.tokens, rounds))
    console = Console(width=150)
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    main()
