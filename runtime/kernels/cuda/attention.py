"""Causal attention with an online softmax over a float16 cache (positions.py).

`attend`: a block for each query head of each token and each of n_splits ranges of positions. It
takes CHUNK positions at a time: scores in shared memory, then the values they weigh, and whenever
the largest score grows, what was mixed before shrinks. A range leaves its mix, its largest score
and its sum; `combine` makes one of them all, and counts the sinks.
"""

import math

import numpy as np
from numba import cuda, types
from numpy import float32

from runtime.kernels.cuda.primitives import half, load4, load16
from runtime.kernels.cuda.warps import block_max, block_sum, eighth_sum

THREADS = 128
N_WARPS = THREADS // 32
CHUNK = THREADS  # positions whose scores are in shared memory, one for each thread
LOWEST = np.float32(-3.0e38)  # the largest score of no positions


def shared_bytes(key_padded: int, value_padded: int) -> int:
    """Shared memory of a block of `attend`."""
    return 4 * (key_padded + N_WARPS * value_padded + CHUNK + 32)


@cuda.jit
def attend(
    q,
    q_stride,
    keys,
    values,
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
                    a, b, c, d = load16(keys, 2 * (row + i))
                    score += half(a) * query[i] + half(a >> 16) * query[i + 1]
                    score += half(b) * query[i + 2] + half(b >> 16) * query[i + 3]
                    score += half(c) * query[i + 4] + half(c >> 16) * query[i + 5]
                    score += half(d) * query[i + 6] + half(d >> 16) * query[i + 7]
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
                pair = load4(values, 2 * ((rows + start + j) * value_padded + i))
                weight = shared[score_at + j]
                a += weight * half(pair)
                b += weight * half(pair >> 16)
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


@cuda.jit
def combine(mixes, extremes, n_splits, sinks, has_sinks, y, y_stride, value_dim):
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
        y[token * y_stride + head * value_dim + i] = mixed / total
