"""How fast this machine reads memory: what the speed of a decode step is held against."""

import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import psutil

from runtime.kernels.bandwidth import read_memory

SECONDS = 0.4  # one measurement
PASSES = 4  # over the buffer, for one figure
PIECE = 4 << 20  # bytes that a thread reads at a time
CACHES = 4  # the buffer is this many times the last-level caches
SMALLEST, LARGEST = 256 << 20, 1 << 30  # bytes
UNKNOWN_CACHE = 64 << 20


class MemoryReader:
    """Memory well beyond the caches, for threads to read together."""

    def __init__(self) -> None:
        self._buffer = np.empty(buffer_size() // PIECE * PIECE, np.uint8)
        # Memory never written to is one page of zeros that stays in the cache.
        self._buffer[:] = 1
        read_memory(self._buffer.ctypes.data, 0, np.empty(8, np.int64).ctypes.data)  # compiles it

    def speed(self, n_threads: int) -> float:
        """Bytes per second that n_threads read together, in PASSES passes.

        They take pieces in turn, as they take parts of a product: one that a busy machine holds
        up leaves more to the others.
        """
        pieces = PASSES * len(self._buffer) // PIECE
        claims = count()
        results = np.empty((n_threads, 16), np.int64)

        def read(i: int) -> None:
            while (piece := next(claims)) < pieces:
                address = self._buffer.ctypes.data + piece * PIECE % len(self._buffer)
                read_memory(address, PIECE, results[i].ctypes.data)

        return pieces * PIECE / _run_together(read, n_threads)


def measure_bandwidth(n_threads: int) -> float:
    """Bytes per second that n_threads read together from memory: the best of a short time."""
    reader = MemoryReader()
    end = time.perf_counter() + SECONDS
    best = reader.speed(n_threads)
    while time.perf_counter() < end:
        best = max(best, reader.speed(n_threads))
    return best


def buffer_size() -> int:
    """Bytes to read: well above the last-level caches, within the memory there is."""
    wanted = min(max(SMALLEST, CACHES * last_level_cache()), LARGEST)
    return max(SMALLEST // 8, min(wanted, int(psutil.virtual_memory().available) // 4))


def last_level_cache() -> int:
    """Bytes of all last-level caches together, or a guess where the system does not say."""
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = (
                (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
            sizes[int(level), shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue  # a cache that the system describes in part is not counted
    if not sizes:
        return UNKNOWN_CACHE
    last = max(level for level, _ in sizes)
    return sum(size for (level, _), size in sizes.items() if level == last)


def _run_together(work: Callable[[int], None], n_threads: int) -> float:
    """Seconds from the first start of work(i) to the last end, on n_threads at once."""
    spans: list[tuple[float, float]] = []
    gate = threading.Barrier(n_threads)

    def run(i: int) -> None:
        gate.wait()
        start = time.perf_counter()
        work(i)
        spans.append((start, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)
