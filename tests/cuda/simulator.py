"""Runs the simulator's blocks as greenlets, one for each CUDA thread; importing it is enough.

numba-cuda's simulator takes a thread of the system for each CUDA thread, and knows no shuffles.
Here lanes run one after the other up to the next exchange, warps up to the next barrier: 40 times
as fast, and a barrier that only a part of a block or warp reaches is an error. They run in an order
that is drawn anew each time, the same in every process: what one writes and another reads without a
barrier between is there sometimes, and sometimes not. Memory that nobody has written yet is full of
NaN. Needs NUMBA_ENABLE_CUDASIM=1.
"""

import random
import sys
from contextlib import contextmanager

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda.simulator import kernel, kernelapi

WARP = 32
DRAWN = random.Random(0)
EXCHANGE, BARRIER = "exchange", "barrier"


class Thread(greenlet):
    """One CUDA thread: what it waits for, and what it brings to an exchange."""

    def __init__(self, function, number, place, block):
        super().__init__(function)
        self.number, self.threadIdx, self.blockIdx = number, place, block
        self.waits_for = None
        self.value = None
        self.values = {}


class Block:
    """Stands in for the simulator's BlockManager."""

    def __init__(self, function, grid_dim, block_dim, debug):
        self._function = function
        self._shape = (*block_dim, 1, 1)[:3]

    def run(self, grid_point, *arguments):
        width, height, depth = self._shape
        arguments = [plain(argument) for argument in arguments]
        block = kernelapi.Dim3(*grid_point)
        threads = []
        for z in range(depth):
            for y in range(height):
                for x in range(width):
                    place = kernelapi.Dim3(x, y, z)
                    threads.append(Thread(self._function, len(threads), place, block))
        warps = [threads[i : i + WARP] for i in range(0, len(threads), WARP)]
        for warp in drawn(warps):
            advance(warp, *arguments)
        while any(not thread.dead for thread in threads):
            if any(thread.dead for thread in threads) or not waiting(threads, BARRIER):
                where = {(t.number // WARP, t.waits_for or "returned") for t in threads}
                raise RuntimeError(f"a barrier that not all threads reach: {sorted(where)}")
            for warp in drawn(warps):
                advance(warp)


def advance(warp, *arguments):
    """Let a warp go on as far as it gets without the others."""
    for thread in drawn(warp):
        thread.switch(*arguments)
    while exchange(warp):
        pass


def exchange(warp):
    """Let a warp go on whose lanes all wait for an exchange."""
    if any(thread.dead for thread in warp) or not waiting(warp, EXCHANGE):
        return False
    values = {thread.number % WARP: thread.value for thread in warp}
    for thread in warp:
        thread.values = values
    for thread in drawn(warp):
        thread.switch()
    return True


def drawn(items):
    """The items in another order."""
    return DRAWN.sample(items, len(items))


def waiting(threads, reason):
    return all(thread.waits_for == reason for thread in threads)


def plain(argument):
    """The NumPy array that the simulator's wrappers hold."""
    while hasattr(argument, "_item") or hasattr(argument, "_ary"):
        argument = argument._item if hasattr(argument, "_item") else argument._ary
    return argument


def wait(reason, value=None):
    thread = getcurrent()
    thread.waits_for, thread.value = reason, value
    thread.parent.switch()
    thread.waits_for = None
    return thread


def shfl_xor_sync(module, mask, value, lanes):
    thread = wait(EXCHANGE, value)
    return thread.values[thread.number % WARP ^ lanes]


def shfl_sync(module, mask, value, lane):
    return wait(EXCHANGE, value).values[lane]


def shared_array(module, shape, dtype, alignment=None):
    """As the simulator's, where a line of source tells arrays apart, without reading the source."""
    if shape == 0:
        dtype = np.dtype(str(dtype))
        return np.frombuffer(module._dynshared.data, dtype)
    frame = sys._getframe(1)
    line = frame.f_code.co_filename, frame.f_lineno
    if line not in module._allocations:
        array = np.zeros(shape, str(dtype))
        array[...] = np.nan if array.dtype.kind == "f" else 0x55
        module._allocations[line] = array
    return module._allocations[line]


@contextmanager
def swapped_cuda_module(function, module):
    """Kernels see `module` as cuda; it is left there, since only kernels look."""
    function.__globals__["cuda"] = module
    yield


def called(kernel_or_function, *arguments):
    """A device function called by a kernel; else a launch."""
    context = kernel._get_kernel_context()
    if context is None:
        return launch(kernel_or_function, *arguments)
    function = kernel_or_function.fn
    function.__globals__["cuda"] = context
    return function(*arguments)


launch = kernel.FakeCUDAKernel.__call__
kernel.FakeCUDAKernel.__call__ = called
kernel.swapped_cuda_module = swapped_cuda_module
kernel.BlockManager = Block
fake = kernelapi.FakeCUDAModule
fake.threadIdx = property(lambda module: getcurrent().threadIdx)
fake.blockIdx = property(lambda module: getcurrent().blockIdx)
fake.syncthreads = lambda module: (wait(BARRIER), None)[1]
fake.shfl_xor_sync = shfl_xor_sync
fake.shfl_sync = shfl_sync
kernelapi.FakeCUDAShared.array = shared_array
