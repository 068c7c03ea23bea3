"""Blocks on their way to the GPU: each field of them goes to a plane of its own (unpacking.py)."""

from numba import cuda

from runtime.kernels.cuda.kept import kernel

THREADS = 128


@kernel("spread")
def spread(blocks, n, block_bytes, first, width, planes, at):
    """Bytes `first` to `first` + width of n blocks, one after the other, to byte `at` of planes.

    A thread for each block.
    """
    block = cuda.grid(1)
    if block < n:
        source, target = block * block_bytes + first, at + block * width
        for i in range(width):
            planes[target + i] = blocks[source + i]
