"""The compiled loop that runs a program, and what every step of it can count on.

A table holds one operation per row of OP_BYTES: a header and arguments (int64, or float32 in the
low half). Every thread runs the whole table. The work of an operation is a number of *units*
(groups of 32 columns, heads, blocks of queries); threads claim parts of them from an atomic
counter until none is left. Operations in a row whose units are the same columns form a group and
are claimed together: a sum or gate follows the product on the same columns at once.

What one operation needs from another thread's earlier work it waits for: until all units since a
named operation are done. So a thread is waited for only while it works on a part it has claimed.
One that a busy machine has put aside between parts, or has not woken yet, costs the others
nothing: they do its share. It finds nothing left to claim and catches up.

Operations without parts are done by every thread for itself, in memory of its own.

Such a late thread may still run through a table when the next step begins on the same table.
Claims carry the step's number (its epoch): a late thread sees a newer epoch and leaves. What it
reads meanwhile may be half-changed, but lands in its own memory only.
"""

from gguf_tools.control import atomic_load64, call5, compare_exchange64, pause, yield_core
from gguf_tools.jit import jit, kernel
from gguf_tools.simd import ld_f32, ld_i64

# The header of an operation: int64 each.
KERNEL = 0  # address of kernel(op, state, thread, first unit, last unit)
WAIT_SINCE = 1  # wait until all units from this operation on are done; -1: no need to wait
GROUP = 2  # operations claimed together from here on; 0 in those that follow the first
UNITS, UNITS_PER_TOKEN, UNITS_PER_CHUNK = 3, 4, 5  # units = sum of these times 1, tokens, chunks
PARTS = 6  # about how many parts to claim; 0: every thread does all of it for itself
HEADER = 8

ARGUMENTS = 24
OP_BYTES = 8 * (HEADER + ARGUMENTS)

# The state block: int64 each.
N_TOKENS, POSITION, N_THREADS, EPOCH, SCRATCH, SCRATCH_BYTES, N_CHUNKS = range(7)
STATE_FIELDS = 8

# Per operation: (epoch << 32) + units claimed, then (epoch << 32) + units done; a cache line each.
PROGRESS_BYTES = 64

ROWS = 32  # matrix rows, and columns of their outputs, per unit
SPINS = 2000  # before a waiting thread offers its core to others


@jit
def arg(op, i):
    return ld_i64(op + 8 * (HEADER + i))


@jit
def float_arg(op, i):
    return ld_f32(op + 8 * (HEADER + i))


@jit
def n_tokens(state):
    return ld_i64(state + 8 * N_TOKENS)


@jit
def position(state):
    return ld_i64(state + 8 * POSITION)


@jit
def scratch(state, thread):
    return ld_i64(state + 8 * SCRATCH) + thread * ld_i64(state + 8 * SCRATCH_BYTES)


@jit
def units_of(op, state):
    units = ld_i64(op + 8 * UNITS)
    units += ld_i64(op + 8 * UNITS_PER_TOKEN) * ld_i64(state + 8 * N_TOKENS)
    return units + ld_i64(op + 8 * UNITS_PER_CHUNK) * ld_i64(state + 8 * N_CHUNKS)


@jit
def _add(place, epoch, count, limit):
    """Add up to `count` to the counter at `place`, not beyond `limit`.

    Gives the count before, or -1 when the counter belongs to a later epoch.
    """
    while True:
        found = atomic_load64(place)
        before = 0
        if (found >> 32) == epoch:
            before = found & 0xFFFFFFFF
        elif (found >> 32) > epoch:
            return -1
        if before >= limit:
            return before
        after = (epoch << 32) + min(before + count, limit)
        if compare_exchange64(place, found, after) == found:
            return before


@jit
def _wait(table, progress, since, until, state):
    """Wait until all units of operations since..until are done; False when a later epoch began."""
    epoch = ld_i64(state + 8 * EPOCH)
    for i in range(since, until):
        op = table + i * OP_BYTES
        if ld_i64(op + 8 * PARTS) == 0 or ld_i64(op + 8 * GROUP) == 0:
            continue
        target = (epoch << 32) + units_of(op, state)
        place = progress + i * PROGRESS_BYTES + 8
        spins = 0
        while True:
            found = atomic_load64(place)
            if found == target:
                break
            if (found >> 32) > epoch:
                return False
            pause()
            spins += 1
            if spins > SPINS:
                yield_core()
    return True


@jit
def _run_group(op, state, thread, first, last):
    for j in range(ld_i64(op + 8 * GROUP)):
        each = op + j * OP_BYTES
        call5(ld_i64(each), each, state, thread, first, last)


@kernel("iiiii")
def run_table(table, count, progress, state, thread):
    """Run `count` operations; the caller returns when all is done, others when nothing is left."""
    alone = ld_i64(state + 8 * N_THREADS) == 1
    epoch = ld_i64(state + 8 * EPOCH)
    since = 0
    for i in range(count):
        op = table + i * OP_BYTES
        if ld_i64(op + 8 * GROUP) == 0:
            continue
        units = units_of(op, state)
        parts = ld_i64(op + 8 * PARTS)
        if alone:
            _run_group(op, state, thread, 0, units)
            continue
        if ld_i64(op + 8 * WAIT_SINCE) >= 0:
            if not _wait(table, progress, ld_i64(op + 8 * WAIT_SINCE), i, state):
                return
            since = i
        if parts == 0:
            _run_group(op, state, thread, 0, units)
            continue
        part = max(1, (units + parts - 1) // parts)
        place = progress + i * PROGRESS_BYTES
        while True:
            first = _add(place, epoch, part, units)
            if first < 0:
                return
            if first >= units:
                break
            last = min(first + part, units)
            _run_group(op, state, thread, first, last)
            _add(place + 8, epoch, last - first, units)
    if thread == 0 and not alone:
        _wait(table, progress, since, count, state)
