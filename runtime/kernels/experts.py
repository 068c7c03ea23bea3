"""Mixtures of experts: routing, and products with the chosen experts' matrices.

One token: each of its slots is a matvec with one expert's matrix, found in a table of addresses.

Many tokens: pairs of a token and one of its slots are sorted by expert; their activations are
gathered in that order, and each expert's product is that of matmul.py on a run of columns. Its
results go to this thread's scratch, 32 rows at a time, and from there to where the pairs belong.
An expert with FEW pairs takes them one by one, as for one token: that costs less than a tile.

A row of routes is as program.Route says: n_used experts' numbers, then their weights. A buffer of
slots holds n_used rows of n_rows one after the other. Its columns are shared out either as those
of one wide row, or as the n_rows columns of all slots at once: the latter where the slots are
summed up next, which then needs no other thread's work.
"""

import numpy as np

from gguf_tools.control import call3, call5, call7
from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    float32,
    fma,
    ld_f32,
    ld_f32x16,
    ld_i64,
    splat_f32x16,
    st,
    st_f32,
    st_i64,
    zero_f32x16,
)
from runtime.kernels.functions import exp16, over_exp
from runtime.kernels.interpreter import (
    HEADER,
    N_TOKENS,
    OP_BYTES,
    ROWS,
    STATE_FIELDS,
    arg,
    float_arg,
    n_tokens,
    scratch,
)
from runtime.kernels.matmul import COLUMNS, quantise_column
from runtime.kernels.matmul import scratch_bytes as product_scratch_bytes

SOFTMAX, SIGMOID, CHOSEN = range(3)  # how scores become weights; CHOSEN: softmax of those chosen
GATINGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "chosen": CHOSEN}
FEW = 4  # pairs of an expert, at most: by measurement, of Q4_K and Q8_0
MAX_GROUPS = 32
OUTPUT_BYTES = ROWS * 4  # of one column's results in scratch


def route_scratch_bytes(n_experts: int) -> int:
    """Scratch per thread of `route`."""
    return 2 * (n_experts + 32) * 4 + 128


def scratch_bytes(k: int, n_tokens: int) -> int:
    """Scratch per thread of a product with rows of k weights."""
    own = OP_BYTES + STATE_FIELDS * 8 + (n_tokens + COLUMNS) * OUTPUT_BYTES + 128
    return product_scratch_bytes(k) + own


def sorted_bytes(n_experts: int, n_pairs: int) -> int:
    """Room for what `sort_pairs` makes."""
    return (n_experts + 1 + n_pairs) * 8


# --- routing ---------------------------------------------------------------------------------


@jit
def _softmax(x, n):
    """In place, over whole vectors: what follows the n numbers is overwritten."""
    most = ld_f32(x)
    for i in range(1, n):
        most = max(most, ld_f32(x + i * 4))
    for i in range(0, n, 16):
        st(x + i * 4, exp16(ld_f32x16(x + i * 4) - splat_f32x16(most)))
    total = _total(x, n)
    for i in range(n):
        st_f32(x + i * 4, ld_f32(x + i * 4) / total)


@jit
def _total(x, n):
    total = float32(0.0)
    for i in range(n):
        total += ld_f32(x + i * 4)
    return total


@jit
def _sigmoid(x, n):
    one = splat_f32x16(float32(1.0))
    for i in range(0, n, 16):
        st(x + i * 4, over_exp(one, ld_f32x16(x + i * 4)))


@jit
def _is_chosen(routes, count, expert):
    found = False
    for j in range(count):
        found = found or ld_f32(routes + j * 4) == float32(expert)
    return found


@jit
def _best(compared, n, routes, count):
    """The largest of n numbers that are not among the `count` chosen; NaN comes last."""
    best = -1
    for i in range(n):
        value = ld_f32(compared + i * 4)
        if best >= 0 and not value > ld_f32(compared + best * 4):
            continue
        if value == value and not _is_chosen(routes, count, i):
            best = i
    if best < 0:
        best = 0
        while _is_chosen(routes, count, best):
            best += 1
    return best


@jit
def _leave_groups(compared, size, n_groups, n_used, n_compared):
    """Only the n_used best groups of `size` numbers keep theirs; the lower of equal groups."""
    left = 0  # a bit for each group
    for group in range(n_groups):
        own = _worth(compared + group * size * 4, size, n_compared)
        better = 0
        for other in range(n_groups):
            worth = _worth(compared + other * size * 4, size, n_compared)
            if worth > own or (worth == own and other < group):
                better += 1
        if better >= n_used:
            left |= 1 << group
    for group in range(n_groups):
        if left >> group & 1:
            for i in range(size):
                st_f32(compared + (group * size + i) * 4, float32(-np.inf))


@jit
def _worth(values, size, n_compared):
    """The largest of `size` numbers, or the two largest added up."""
    first = second = float32(-np.inf)
    for i in range(size):
        value = ld_f32(values + i * 4)
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first + second if n_compared == 2 else first


@kernel("iiiii")
def route(op, state, thread, first, last):
    """scores 0-2, routes 3-5, experts 6, n_used 7, gating 8, normalize 9, factor 10, bias 11 (one
    per expert, or 0), groups 12, groups used 13, compared in each 14; unit: a token"""
    n = arg(op, 6)
    n_used = arg(op, 7)
    chances = (scratch(state, thread) + 63) & ~63
    compared = chances + ((n + 31) & ~15) * 4
    for t in range(first, last):
        scores = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        routes = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        weights = routes + n_used * 4
        for i in range(n):
            st_f32(chances + i * 4, ld_f32(scores + i * 4))
        if arg(op, 8) == SOFTMAX:
            _softmax(chances, n)
        elif arg(op, 8) == SIGMOID:
            _sigmoid(chances, n)
        for i in range(n):
            value = ld_f32(chances + i * 4)
            if arg(op, 11):
                value += ld_f32(arg(op, 11) + i * 4)
            st_f32(compared + i * 4, value)
        if arg(op, 12) > 1:
            _leave_groups(compared, n // arg(op, 12), arg(op, 12), arg(op, 13), arg(op, 14))
        for j in range(n_used):
            expert = _best(compared, n, routes, j)
            st_f32(routes + j * 4, float32(expert))
        for j in range(n_used):
            place = chances + _expert(routes, j) * 4
            st_f32(compared + j * 4, ld_f32(place))
        if arg(op, 8) == CHOSEN:
            _softmax(compared, n_used)
        total = float32(1.0)
        if arg(op, 9):
            total = _total(compared, n_used)
        for j in range(n_used):
            st_f32(weights + j * 4, ld_f32(compared + j * 4) / total * float_arg(op, 10))


@jit
def _expert(routes, slot):
    return int(ld_f32(routes + slot * 4))


@kernel("iiiii")
def sort_pairs(op, state, thread, first, last):
    """routes 0-2, experts 3, n_used 4, sorted 5: where each expert's pairs start (and the last
    one's end), then the pairs, token * n_used + slot, those of a token in order; one unit"""
    n_experts = arg(op, 3)
    n_used = arg(op, 4)
    starts = arg(op, 5)
    pairs = starts + (n_experts + 1) * 8
    for e in range(n_experts + 1):
        st_i64(starts + e * 8, 0)
    for t in range(n_tokens(state)):
        routes = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for slot in range(n_used):
            place = starts + (_expert(routes, slot) + 1) * 8
            st_i64(place, ld_i64(place) + 1)
    for e in range(n_experts):
        st_i64(starts + (e + 1) * 8, ld_i64(starts + (e + 1) * 8) + ld_i64(starts + e * 8))
    for t in range(n_tokens(state)):
        routes = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for slot in range(n_used):
            place = starts + _expert(routes, slot) * 8
            at = ld_i64(place)
            st_i64(pairs + at * 8, t * n_used + slot)
            st_i64(place, at + 1)
    # Each start has moved to its end: the start of the next.
    for e in range(n_experts, 0, -1):
        st_i64(starts + e * 8, ld_i64(starts + (e - 1) * 8))
    st_i64(starts, 0)


# --- one token -------------------------------------------------------------------------------


@kernel("iiiii")
def quantise_slots(op, state, thread, first, last):
    """The slots of one token for matvec: source 0-2, target 3-4, bytes per slot 5, quantiser 6,
    k 7, n_used 8; one unit"""
    source = arg(op, 0) + thread * arg(op, 1)
    target = arg(op, 3) + thread * arg(op, 4)
    for slot in range(arg(op, 8)):
        x = source + slot * arg(op, 7) * 4
        call3(arg(op, 6), x, target + slot * arg(op, 5), arg(op, 7))


@jit
def _slot_matvec(op, thread, slot, first, last):
    """Rows first to last of one slot, in order of expert_matvec's arguments."""
    expert = _expert(arg(op, 9) + thread * arg(op, 10), slot)
    x = arg(op, 5) + thread * arg(op, 6) + slot * arg(op, 7)
    y = arg(op, 8) + slot * arg(op, 2) * 4
    weights = ld_i64(arg(op, 0) + expert * 8)
    call7(arg(op, 4), weights, arg(op, 1), first, last, x, y, arg(op, 3))


@kernel("iiiii")
def expert_matvec(op, state, thread, first, last):
    """addresses of experts 0, bytes per row 1, rows 2, k 3, kernel 4, activation 5-6, its bytes
    per slot 7 (0: one for all), target 8, routes 9-10, n_used 11, slots as one wide row 12; unit:
    32 columns of that, or of all slots"""
    n_rows = arg(op, 2)
    n_used = arg(op, 11)
    if arg(op, 12):
        at = first * ROWS
        end = min(last * ROWS, n_used * n_rows)
        while at < end:
            slot = at // n_rows
            row = at - slot * n_rows
            count = min(n_rows - row, end - at)
            _slot_matvec(op, thread, slot, row, row + count)
            at += count
        return
    for slot in range(n_used):
        _slot_matvec(op, thread, slot, first * ROWS, min(last * ROWS, n_rows))


# --- many tokens -----------------------------------------------------------------------------


@jit
def _pair(op, i):
    """The i-th sorted pair's source: source 0-2, n_used 3, floats per slot 4, pairs 5."""
    pair = ld_i64(arg(op, 5) + i * 8)
    t = pair // arg(op, 3)
    return arg(op, 0) + t * arg(op, 2) + (pair - t * arg(op, 3)) * arg(op, 4) * 4


@jit
def _count(op, i):
    """How many pairs the expert of the i-th sorted pair has: n_used 3, pairs 5, starts 15, routes
    16, bytes per token 17"""
    pair = ld_i64(arg(op, 5) + i * 8)
    t = pair // arg(op, 3)
    expert = _expert(arg(op, 16) + t * arg(op, 17), pair - t * arg(op, 3))
    place = arg(op, 15) + expert * 8
    return ld_i64(place + 8) - ld_i64(place)


@kernel("iiiii")
def quantise_sorted(op, state, thread, first, last):
    """source 0-2, n_used 3, floats per slot 4 (0: one row for all), pairs 5, q 6, scales 7,
    corrections 8, sums 9, bytes per pair of q 10 and of the others 11, k 12, group 13, bias 14,
    starts 15, routes 16, bytes per token 17; for experts with few pairs: quantiser 18, target 19,
    bytes per pair 20; unit: a pair"""
    for i in range(first, last):
        if _count(op, i) <= FEW:
            call3(arg(op, 18), _pair(op, i), arg(op, 19) + i * arg(op, 20), arg(op, 12))
            continue
        meta = i * arg(op, 11)
        quantise_column(
            _pair(op, i),
            arg(op, 6) + i * arg(op, 10),
            arg(op, 7) + meta,
            arg(op, 8) + meta,
            arg(op, 9) + meta,
            arg(op, 12),
            arg(op, 13),
            arg(op, 14),
        )


@kernel("iiiii")
def gather_sorted(op, state, thread, first, last):
    """source 0-2, n_used 3, floats per slot 4 (0: one row for all), pairs 5, target 6, bytes per
    pair 7, k 8; unit: a pair"""
    for i in range(first, last):
        source = _pair(op, i)
        for j in range(0, arg(op, 8), 16):
            st(arg(op, 6) + i * arg(op, 7) + j * 4, ld_f32x16(source + j * 4))


@jit
def _set(op, i, value):
    st_i64(op + 8 * (HEADER + i), value)


@jit
def _move(x, y, n):
    """n floats, none beyond."""
    for i in range(0, n - 15, 16):
        st(y + i * 4, ld_f32x16(x + i * 4))
    for i in range(n & ~15, n):
        st_f32(y + i * 4, ld_f32(x + i * 4))


@jit
def _place(op, i):
    """Where the results of the i-th sorted pair belong, in order of expert_matmul's arguments."""
    pair = ld_i64(arg(op, 4) + (arg(op, 3) + 1 + i) * 8)
    t = pair // arg(op, 5)
    slot = pair - t * arg(op, 5)
    return arg(op, 8) + t * arg(op, 9) + slot * arg(op, 6) * 4


@kernel("iiiii")
def expert_matmul(op, state, thread, first, last):
    """product 0: an operation of matmul_bytes or matmul_floats, of which are set here: w, columns
    and target; kernel 1, addresses of experts 2, experts 3, sorted 4, n_used 5, rows 6, scratch
    of the product 7, target 8, bytes per token 9, number of the argument that holds the target
    10, of the first that counts columns 11, how many do 12, bytes per column of the first 13 and
    of the others 14; for experts with few pairs: kernel 15, activations 16, bytes per pair 17;
    unit: 32 columns of all slots"""
    mine = (scratch(state, thread) + arg(op, 7) + 63) & ~63
    own_state = mine + OP_BYTES
    out = (own_state + STATE_FIELDS * 8 + 63) & ~63
    for i in range(0, OP_BYTES, 8):
        st_i64(mine + i, ld_i64(arg(op, 0) + i))
    for i in range(STATE_FIELDS):
        st_i64(own_state + i * 8, ld_i64(state + i * 8))
    n_experts = arg(op, 3)
    n_rows = arg(op, 6)
    row_bytes = arg(mine, 1)
    k = arg(mine, 3)
    _set(mine, arg(op, 10) + 1, OUTPUT_BYTES)
    for unit in range(first, last):
        row = unit * ROWS
        n = min(ROWS, n_rows - row)
        _set(mine, arg(op, 10), out - row * 4)
        for e in range(n_experts):
            begin = ld_i64(arg(op, 4) + e * 8)
            count = ld_i64(arg(op, 4) + e * 8 + 8) - begin
            if count == 0:
                continue
            weights = ld_i64(arg(op, 2) + e * 8)
            if count <= FEW:
                for i in range(begin, begin + count):
                    x = arg(op, 16) + i * arg(op, 17)
                    y = _place(op, i)
                    call7(arg(op, 15), weights, row_bytes, row, row + n, x, y, k)
                continue
            st_i64(own_state + 8 * N_TOKENS, count)
            _set(mine, 0, weights)
            for i in range(arg(op, 12)):
                which = arg(op, 11) + i
                stride = arg(op, 14)
                if i == 0:
                    stride = arg(op, 13)
                _set(mine, which, arg(arg(op, 0), which) + begin * stride)
            call5(arg(op, 1), mine, own_state, thread, unit, unit + 1)
            for i in range(count):
                _move(out + i * OUTPUT_BYTES, _place(op, begin + i) + row * 4, n)


# --- one or many -----------------------------------------------------------------------------


@jit
def _add(x, y, n):
    """y += x; n floats, none beyond."""
    for i in range(0, n - 15, 16):
        st(y + i * 4, ld_f32x16(y + i * 4) + ld_f32x16(x + i * 4))
    for i in range(n & ~15, n):
        st_f32(y + i * 4, ld_f32(y + i * 4) + ld_f32(x + i * 4))


@kernel("iiiii")
def expert_bias(op, state, thread, first, last):
    """target 0-2, routes 3-5, n_used 6, biases 7 (a row per expert), rows 8, slots as one wide row
    9; unit: 32 columns of that, or of all slots"""
    n_used = arg(op, 6)
    n_rows = arg(op, 8)
    for t in range(n_tokens(state)):
        y = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        routes = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5)
        for slot in range(n_used):
            begin = first * ROWS
            end = last * ROWS
            if arg(op, 9):
                begin = max(begin - slot * n_rows, 0)
                end -= slot * n_rows
            end = min(end, n_rows)
            if begin < end:
                bias = arg(op, 7) + (_expert(routes, slot) * n_rows + begin) * 4
                _add(bias, y + (slot * n_rows + begin) * 4, end - begin)


@kernel("iiiii")
def expert_sum(op, state, thread, first, last):
    """source 0-2, routes 3-5, n_used 6, target 7-9, width 10; unit: 32 columns"""
    n_used = arg(op, 6)
    width = arg(op, 10)
    end = min(last * ROWS, width)
    for t in range(n_tokens(state)):
        x = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        weights = arg(op, 3) + thread * arg(op, 4) + t * arg(op, 5) + n_used * 4
        y = arg(op, 7) + thread * arg(op, 8) + t * arg(op, 9)
        for i in range(first * ROWS, end, 16):
            total = zero_f32x16()
            for slot in range(n_used):
                weight = splat_f32x16(ld_f32(weights + slot * 4))
                total = fma(weight, ld_f32x16(x + (slot * width + i) * 4), total)
            st(y + i * 4, total)
