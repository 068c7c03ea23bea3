"""The compiled loop that runs a program, and what every step of it can count on.

A table holds one operation per row of OP_BYTES:

    kernel address | barrier before it (0 or 1) | arguments (int64, or float32 in the low half)

Every thread runs the whole table; an operation's kernel (op, state, thread) does its share. The
state block tells the share and where scratch memory is. Where a thread needs what another one
wrote, the lowering has set the barrier flag; the threads meet once more at the end.
"""

from numba import int32

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    atomic_add,
    atomic_load,
    atomic_store,
    call3,
    ld_f32,
    ld_i64,
    pause,
    yield_core,
)

ARGUMENTS = 18
OP_BYTES = 8 * (2 + ARGUMENTS)

# The state block: int64 each.
N_TOKENS, POSITION, N_THREADS, BARRIER, SCRATCH, SCRATCH_BYTES = range(6)
STATE_FIELDS = 6

ROWS = 32  # matrix rows, and columns of their outputs, are shared out in groups of 32
SPINS = 2000  # before a waiting thread offers its core to others


@jit
def arg(op, i):
    return ld_i64(op + 16 + 8 * i)


@jit
def float_arg(op, i):
    return ld_f32(op + 16 + 8 * i)


@jit
def n_tokens(state):
    return ld_i64(state)


@jit
def position(state):
    return ld_i64(state + 8)


@jit
def n_threads(state):
    return ld_i64(state + 16)


@jit
def scratch(state, thread):
    return ld_i64(state + 32) + thread * ld_i64(state + 40)


@jit
def share(state, thread, count):
    """This thread's contiguous part of `count` items."""
    n = n_threads(state)
    return count * thread // n, count * (thread + 1) // n


@jit
def column_share(state, thread, width):
    """This thread's columns of a buffer: the same for every operation on that width."""
    first, last = share(state, thread, (width + ROWS - 1) // ROWS)
    return first * ROWS, min(width, last * ROWS)


@jit
def wait(barrier, count):
    """Meet the other threads: int32 arrivals at `barrier`, int32 generation 64 bytes on."""
    if count == int32(1):
        return
    generation = atomic_load(barrier + 64)
    if atomic_add(barrier, int32(1)) == count - int32(1):
        atomic_store(barrier, int32(0))
        atomic_store(barrier + 64, generation + int32(1))
    else:
        spins = 0
        while atomic_load(barrier + 64) == generation:
            pause()
            spins += 1
            if spins > SPINS:
                yield_core()


@kernel("iiii")
def run_table(table, count, state, thread):
    barrier = ld_i64(state + 24)
    threads = int32(n_threads(state))
    for i in range(count):
        op = table + i * OP_BYTES
        if ld_i64(op + 8) != 0:
            wait(barrier, threads)
        call3(ld_i64(op), op, state, thread)
    wait(barrier, threads)
