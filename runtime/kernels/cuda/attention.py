"""Causal attention with an online softmax over the cache (positions.py).

`attend`: a block has QUERIES queries that read the same keys: heads of one KV head, or of several
tokens where a KV head has fewer. It goes through a range of positions, CHUNK at a time: scores in
shared memory, then the values they weigh, and whenever the largest score grows, what was mixed
before shrinks. A range leaves its mix, its largest score and its sum; `combine` makes one of them
all, counts the sinks, and makes int8 of what it gives if `quantises` (quantising.py).

Loads do not depend on what is there: behind the end of a range its last position is read, and not
counted. So those of a chunk are all under way together.
"""

import math

import numpy as np
from numba import cuda, types
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import half, load2, load4, load8, load16, place
from runtime.kernels.cuda.quantising import quantise_32
from runtime.kernels.cuda.warps import eighth_sum, warp_max, warp_sum

THREADS = 128
N_WARPS = THREADS // 32
QUERIES = N_WARPS  # of a block; a warp each makes weights of scores
CHUNK = 64  # positions
AT_ONCE = THREADS // 8  # positions that scores are made of, 8 lanes for each
EACH = CHUNK // N_WARPS  # positions whose values a warp mixes
MOST_RANGES = 64  # that `combine` makes one of
REGISTERS = 144  # of a thread, at most (products.py)
LOWEST = np.float32(-3.0e38)  # the largest score of no positions


def shared_bytes(key_padded: int, value_padded: int) -> int:
    """Shared memory of a block of `attend`."""
    numbers = key_padded + N_WARPS * value_padded + CHUNK + 1
    return 4 * QUERIES * numbers


def heads_of_block(group: int) -> int:
    """log2 of the heads of one KV head that a block has queries of; more tokens make up for few."""
    return min(QUERIES.bit_length() - 1, (group - 1).bit_length())


@helper
def positions_of(first_token, n_each, n_tokens, start, window, n_ranges):
    """What `n_each` tokens from a first one on see together: first position, the one after the
    last, and how many positions each range has; whole chunks."""
    first = start + first_token
    after = start + min(first_token + n_each, n_tokens)
    begin = max(0, first - window + 1) if window > 0 else 0
    n_chunks = (after - begin + CHUNK - 1) // CHUNK
    return begin, after, (n_chunks + n_ranges - 1) // n_ranges * CHUNK


@helper
def eight_f16(numbers, scales, at):
    """Eight numbers of the cache, from one that is a multiple of 8."""
    a, b, c, d = load16(numbers, 2 * at)
    return (
        half(a),
        half(a >> 16),
        half(b),
        half(b >> 16),
        half(c),
        half(c >> 16),
        half(d),
        half(d >> 16),
    )


@helper
def two_f16(numbers, scales, at):
    """Two numbers of the cache, from an even one."""
    pair = load4(numbers, 2 * at)
    return half(pair), half(pair >> 16)


@helper
def eight_q8_0(numbers, scales, at):
    d = half(load2(scales, 2 * (at >> 5)))
    a, b = load8(numbers, at)
    return (
        d * signed(a),
        d * signed(a >> 8),
        d * signed(a >> 16),
        d * signed(a >> 24),
        d * signed(b),
        d * signed(b >> 8),
        d * signed(b >> 16),
        d * signed(b >> 24),
    )


@helper
def two_q8_0(numbers, scales, at):
    d = half(load2(scales, 2 * (at >> 5)))
    pair = load2(numbers, at)
    return d * signed(pair), d * signed(pair >> 8)


@helper
def signed(word):
    """The int8 in the low byte."""
    return float32(int32(((word & 255) ^ 128) - 128))


@helper
def lesser(a, b):
    """The lesser of two positions, in 32 bits."""
    return min(int32(a), int32(b))


@helper
def dot_8(a, b):
    """The sum of eight products."""
    total = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
    return total + a[4] * b[4] + a[5] * b[5] + a[6] * b[6] + a[7] * b[7]


@cuda.jit(device=True)
def _eight_of(numbers, at):
    """Eight neighbours in shared memory."""
    return (
        numbers[place(at)],
        numbers[place(at + 1)],
        numbers[place(at + 2)],
        numbers[place(at + 3)],
        numbers[place(at + 4)],
        numbers[place(at + 5)],
        numbers[place(at + 6)],
        numbers[place(at + 7)],
    )


def _make_attend(name, eight, two):
    @kernel(f"{name}_attend", registers=REGISTERS)
    def attend(
        q,
        q_stride,
        keys,
        key_scales,
        values,
        value_scales,
        mixes,  # [token][head][range][value_dim]
        extremes,  # [token][head][range][largest score, sum]
        state,
        n_tokens,
        n_heads,
        group,  # query heads for each KV head
        log_heads,  # log2 of the heads of a block (heads_of_block)
        key_dim,
        key_padded,
        value_dim,
        value_padded,
        n_ctx,
        scale,
        window,
        cap,
    ):
        shared = cuda.shared.array(0, types.float32)
        mix_at = QUERIES * key_padded  # [warp][query][value]
        score_at = mix_at + N_WARPS * QUERIES * value_padded  # [position][query], then weights
        shrink_at = score_at + CHUNK * QUERIES
        heads_each, tokens_each = 1 << log_heads, QUERIES >> log_heads
        blocks_each = (group + heads_each - 1) >> log_heads  # for the queries of a KV head
        kv_head = cuda.blockIdx.x // blocks_each
        first_head = (cuda.blockIdx.x - kv_head * blocks_each) << log_heads
        first_token = cuda.blockIdx.y * tokens_each
        n_ranges, here = cuda.gridDim.z, cuda.blockIdx.z
        thread = cuda.threadIdx.x
        warp, lane = thread // 32, thread % 32
        # Queries that are not there are zeros, and not stored.
        for query in range(QUERIES):
            head, token = (
                first_head + (query & (heads_each - 1)),
                first_token + (query >> log_heads),
            )
            source = token * q_stride + (kv_head * group + head) * key_dim
            is_there = head < group and token < n_tokens
            for i in range(thread, key_padded, THREADS):
                value = float32(0)
                if i < key_dim and is_there:
                    value = q[place(source + i)] * scale
                shared[place(query * key_padded + i)] = value
        for i in range(thread, N_WARPS * QUERIES * value_padded, THREADS):
            shared[place(mix_at + i)] = float32(0)
        cuda.syncthreads()

        start = state[0]
        begin, after, each = positions_of(
            first_token, tokens_each, n_tokens, start, window, n_ranges
        )
        begin += here * each
        end = min(begin + each, after)
        # The query whose scores this warp makes weights of: what it sees.
        my_head, my_token = (
            first_head + (warp & (heads_each - 1)),
            first_token + (warp >> log_heads),
        )
        last = start + my_token
        first = max(0, last - window + 1) if window > 0 else 0
        is_mine = my_head < group and my_token < n_tokens
        largest, total = LOWEST, float32(0)
        first_key, first_value = kv_head * n_ctx * key_padded, kv_head * n_ctx * value_padded
        scores = cuda.local.array((4, QUERIES), types.float32)
        mixed = cuda.local.array((QUERIES, 2), types.float32)
        for chunk in range(begin, end, CHUNK):
            # Scores: 8 lanes for each position, four of them in turn.
            at = chunk + thread // 8
            key_0 = first_key + lesser(at, end - 1) * key_padded
            key_1 = first_key + lesser(at + AT_ONCE, end - 1) * key_padded
            key_2 = first_key + lesser(at + 2 * AT_ONCE, end - 1) * key_padded
            key_3 = first_key + lesser(at + 3 * AT_ONCE, end - 1) * key_padded
            for i in range(4):
                for query in range(QUERIES):
                    scores[i, query] = float32(0)
            for i in range(thread % 8 * 8, key_padded, 64):
                a, b = eight(keys, key_scales, key_0 + i), eight(keys, key_scales, key_1 + i)
                c, d = eight(keys, key_scales, key_2 + i), eight(keys, key_scales, key_3 + i)
                for query in range(QUERIES):
                    e = _eight_of(shared, query * key_padded + i)
                    scores[0, query] += dot_8(a, e)
                    scores[1, query] += dot_8(b, e)
                    scores[2, query] += dot_8(c, e)
                    scores[3, query] += dot_8(d, e)
            for i in range(4):
                for query in range(QUERIES):
                    score = eighth_sum(scores[i, query])
                    if thread % 8 == 0:
                        at = (thread // 8 + i * AT_ONCE) * QUERIES + query
                        shared[place(score_at + at)] = score
            cuda.syncthreads()
            # Weights: a warp for each query, two positions for each lane.
            at = score_at + lane * QUERIES + warp
            one, two_ = _seen(shared[place(at)], cap), _seen(shared[place(at + 32 * QUERIES)], cap)
            position = chunk + lane
            if not (is_mine and first <= position <= last and position < end):
                one = LOWEST
            position += 32
            if not (is_mine and first <= position <= last and position < end):
                two_ = LOWEST
            before = largest
            largest = max(largest, warp_max(max(one, two_)))
            one = math.exp(one - largest) if one > LOWEST else float32(0)
            two_ = math.exp(two_ - largest) if two_ > LOWEST else float32(0)
            shrink = math.exp(before - largest)
            total = total * shrink + warp_sum(one + two_)
            shared[place(at)] = one
            shared[place(at + 32 * QUERIES)] = two_
            if lane == 0:
                shared[place(shrink_at + warp)] = shrink
            cuda.syncthreads()
            # Values: every fourth position for each warp, two dimensions for each lane.
            for i in range(2 * lane, value_padded, 64):
                for query in range(QUERIES):
                    shrink = shared[place(shrink_at + query)]
                    at = mix_at + (warp * QUERIES + query) * value_padded + i
                    mixed[query, 0] = shared[place(at)] * shrink
                    mixed[query, 1] = shared[place(at + 1)] * shrink
                at = (chunk + warp) * value_padded + i
                end_at = (end - 1) * value_padded + i
                for j in range(EACH):
                    a, b = two(values, value_scales, first_value + lesser(at, end_at))
                    at += N_WARPS * value_padded
                    for query in range(QUERIES):
                        position = warp + N_WARPS * j
                        weight = shared[place(score_at + position * QUERIES + query)]
                        mixed[query, 0] += weight * a
                        mixed[query, 1] += weight * b
                for query in range(QUERIES):
                    at = mix_at + (warp * QUERIES + query) * value_padded + i
                    shared[place(at)] = mixed[query, 0]
                    shared[place(at + 1)] = mixed[query, 1]
            cuda.syncthreads()

        if begin < end:
            for query in range(QUERIES):
                head = first_head + (query & (heads_each - 1))
                token = first_token + (query >> log_heads)
                if head < group and token < n_tokens:
                    out = (token * n_heads + kv_head * group + head) * n_ranges + here
                    for i in range(thread, value_dim, THREADS):
                        at = mix_at + query * value_padded + i
                        value = shared[place(at)]
                        for w in range(1, N_WARPS):
                            value += shared[place(at + w * QUERIES * value_padded)]
                        mixes[place(out * value_dim + i)] = value
            if is_mine and lane == 0:
                out = 2 * ((my_token * n_heads + kv_head * group + my_head) * n_ranges + here)
                extremes[place(out)] = largest
                extremes[place(out + 1)] = total

    return attend


@helper
def _seen(score, cap):
    """A score, below its cap if there is one."""
    return cap * math.tanh(score / cap) if cap > float32(0) else score


ATTEND = {
    "f16": _make_attend("f16", eight_f16, two_f16),
    "q8_0": _make_attend("q8_0", eight_q8_0, two_q8_0),
}


@kernel("combine")
def combine(
    mixes,
    extremes,
    n_ranges,
    state,
    n_tokens,
    tokens_each,
    window,
    sinks,
    has_sinks,
    y,
    y_stride,
    value_dim,
    xq,
    xd,
    xs,
    quantises,
):
    """The ranges of one head of one token as one, for each block."""
    shares = cuda.shared.array(MOST_RANGES, types.float32)
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    lane = cuda.threadIdx.x % 32
    first_token = token // tokens_each * tokens_each
    begin, after, each = positions_of(
        first_token, tokens_each, n_tokens, state[0], window, n_ranges
    )
    n_used = (after - begin + each - 1) // each
    first = (token * cuda.gridDim.x + head) * n_ranges
    largest = sinks[head] if has_sinks else LOWEST
    for i in range(lane, n_used, 32):
        largest = max(largest, extremes[place(2 * (first + i))])
    largest = warp_max(largest)
    total = float32(0)
    for i in range(lane, n_used, 32):
        share = math.exp(extremes[place(2 * (first + i))] - largest)
        total += share * extremes[place(2 * (first + i) + 1)]
        shares[place(i)] = share  # every warp's are the same
    total = warp_sum(total)
    if has_sinks:
        total += math.exp(sinks[head] - largest)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, value_dim, cuda.blockDim.x):
        mixed = float32(0)
        for j in range(n_used):
            mixed += shares[place(j)] * mixes[place((first + j) * value_dim + i)]
        value = mixed / total
        y[token * y_stride + head * value_dim + i] = value
        if quantises:
            at = (token * cuda.gridDim.x + head) * value_dim + i
            quantise_32(value, at, xq, xd, xs)
