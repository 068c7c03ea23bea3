"""Asking memory for weights before they are needed.

A matvec reads its weights once and in order. The processor's own prefetchers stay close behind,
which is enough for plain reading and not for a kernel that computes: on a Zen 5, kernels that get
through 40-55 GB/s of weights in the cache got 80-85 % of the speed of plain reading from memory,
88 % when they asked for lines 2 kB ahead, and all of it 8 kB ahead.
"""

from gguf_tools.jit import jit
from gguf_tools.simd import prefetch

AHEAD = 8192  # bytes: well below a first-level cache, beyond the end of most rows


@jit
def ask_ahead(p, n_bytes):
    """Ask for the lines AHEAD of the n_bytes at p; there need be nothing there."""
    for i in range(0, n_bytes, 64):
        prefetch(p + AHEAD + i)
