"""Causal attention with an online softmax over the cache (positions.py).

`attend`: a block for each query head of each token and each of n_splits ranges of positions. It
takes CHUNK positions at a time: scores in shared memory, then the values they weigh, and whenever
the largest score grows, what was mixed before shrinks. A range leaves its mix, its largest score
and its sum; `combine` makes one of them all, counts the sinks, and makes int8 of what it gives if
`quantises` (quantising.py).
"""

import math

import numpy as np
from numba import cuda, types
from numpy import float32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.primitives import half, load2, load4, load8, load16
from runtime.kernels.cuda.quantising import quantise_32
from runtime.kernels.cuda.warps import block_max, block_sum, eighth_sum

THREADS = 128
N_WARPS = THREADS // 32
CHUNK = THREADS  # positions whose scores are in shared memory, one for each thread
LOWEST = np.float32(-3.0e38)  # the largest score of no positions


def shared_bytes(key_padded: int, value_padded: int) -> int:
    """Shared memory of a block of `attend`."""
    return 4 * (key_padded + N_WARPS * value_padded + CHUNK + 32)


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
    return float32(((word & 255) ^ 128) - 128)


def _make_attend(name, eight, two):
    @kernel(f"{name}_attend")
    def attend(
        q,
        q_stride,
        keys,
        key_scales,
        values,
        value_scales,
        mixes,  # [token][head][split][value_dim]
        extremes,  # [token][head][split][largest score, sum]
        state,
        group,  # query heads for each KV head
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
        query = shared
        mix_at = key_padded  # a mix for each warp
        score_at = mix_at + N_WARPS * value_padded
        sums = shared[score_at + CHUNK :]
        head, token, split = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        thread = cuda.threadIdx.x
        warp, lane = thread // 32, thread % 32
        source = token * q_stride + head * key_dim
        for i in range(thread, key_padded, THREADS):
            query[i] = q[source + i] * scale if i < key_dim else float32(0)
        for i in range(thread, N_WARPS * value_padded, THREADS):
            shared[mix_at + i] = float32(0)
        cuda.syncthreads()

        here = state[0] + token
        first = max(0, here - window + 1) if window > 0 else 0
        each = (here + 1 - first + cuda.gridDim.z - 1) // cuda.gridDim.z
        begin = first + split * each
        end = min(begin + each, here + 1)
        largest, total = LOWEST, float32(0)
        rows = (head // group) * n_ctx
        for start in range(begin, end, CHUNK):
            n = min(CHUNK, end - start)
            # Scores: 8 lanes for each position, 16 positions at a time.
            for j in range(thread // 8, (n + 15) // 16 * 16, THREADS // 8):
                score = float32(0)
                if j < n:
                    row = (rows + start + j) * key_padded
                    for i in range(thread % 8 * 8, key_padded, 64):
                        a, b, c, d, e, f, g, h = eight(keys, key_scales, row + i)
                        score += a * query[i] + b * query[i + 1]
                        score += c * query[i + 2] + d * query[i + 3]
                        score += e * query[i + 4] + f * query[i + 5]
                        score += g * query[i + 6] + h * query[i + 7]
                score = eighth_sum(score)
                if cap > float32(0):
                    score = cap * math.tanh(score / cap)
                if thread % 8 == 0:
                    shared[score_at + j] = score
            cuda.syncthreads()
            score = shared[score_at + thread] if thread < n else LOWEST
            before = largest
            largest = max(largest, block_max(score, sums))
            weight = math.exp(score - largest) if thread < n else float32(0)
            shrink = math.exp(before - largest)
            shared[score_at + thread] = weight
            total = total * shrink + block_sum(weight, sums)
            # Values: every fourth position for each warp, two dimensions for each lane.
            for i in range(2 * lane, value_padded, 64):
                at = mix_at + warp * value_padded + i
                a, b = shared[at] * shrink, shared[at + 1] * shrink
                for j in range(warp, n, N_WARPS):
                    at_value = (rows + start + j) * value_padded + i
                    first_value, second_value = two(values, value_scales, at_value)
                    weight = shared[score_at + j]
                    a += weight * first_value
                    b += weight * second_value
                shared[at], shared[at + 1] = a, b
            cuda.syncthreads()

        out = (token * cuda.gridDim.x + head) * cuda.gridDim.z + split
        for i in range(thread, value_dim, THREADS):
            mixed = float32(0)
            for w in range(N_WARPS):
                mixed += shared[mix_at + w * value_padded + i]
            mixes[out * value_dim + i] = mixed
        if thread == 0:
            extremes[2 * out] = largest
            extremes[2 * out + 1] = total

    return attend


ATTEND = {
    "f16": _make_attend("f16", eight_f16, two_f16),
    "q8_0": _make_attend("q8_0", eight_q8_0, two_q8_0),
}


@kernel("combine")
def combine(
    mixes, extremes, n_splits, sinks, has_sinks, y, y_stride, value_dim, xq, xd, xs, quantises
):
    """The ranges of one head of one token as one, for each block."""
    head, token = cuda.blockIdx.x, cuda.blockIdx.y
    first = (token * cuda.gridDim.x + head) * n_splits
    largest = sinks[head] if has_sinks else LOWEST
    for split in range(n_splits):
        largest = max(largest, extremes[2 * (first + split)])
    total = math.exp(sinks[head] - largest) if has_sinks else float32(0)
    for split in range(n_splits):
        share = math.exp(extremes[2 * (first + split)] - largest)
        total += share * extremes[2 * (first + split) + 1]
    for i in range(cuda.threadIdx.x, value_dim, cuda.blockDim.x):
        mixed = float32(0)
        for split in range(n_splits):
            share = math.exp(extremes[2 * (first + split)] - largest)
            mixed += share * mixes[(first + split) * value_dim + i]
        value = mixed / total
        y[token * y_stride + head * value_dim + i] = value
        if quantises:
            at = (token * cuda.gridDim.x + head) * value_dim + i
            quantise_32(value, at, xq, xd, xs)
