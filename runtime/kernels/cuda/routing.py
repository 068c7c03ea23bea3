"""Which experts a token goes to: a warp for each token."""

import math

import numpy as np
from numba import cuda, types
from numpy import float32, int32

from runtime.kernels.cuda.elementwise import sigmoid
from runtime.kernels.cuda.kept import kernel
from runtime.kernels.cuda.warps import warp_max, warp_sum

SOFTMAX, SIGMOID, CHOSEN = range(3)
GATINGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "chosen": CHOSEN}
NONE = 1 << 30  # no expert
LOWEST = np.float32(-np.inf)


def shared_bytes(n_experts: int, n_groups: int) -> int:
    """Shared memory of a block of `route`."""
    return 4 * (3 * n_experts + n_groups + 32)


@cuda.jit(device=True)
def _best(values, taken, first, n, lane):
    """The number of the largest value not taken, the lowest where several are; of n from first."""
    best, which = LOWEST, NONE
    for i in range(first + lane, first + n, 32):
        if taken[i] == float32(0) and (which == NONE or values[i] > best):
            best, which = values[i], i
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, best, step)
        where = cuda.shfl_xor_sync(0xFFFFFFFF, which, step)
        if where != NONE and (which == NONE or other > best or (other == best and where < which)):
            best, which = other, where
    return which


@kernel("route")
def route(
    scores,
    scores_stride,
    routes,
    routes_stride,
    n_experts,
    n_used,
    gating,
    normalize,
    factor,
    bias,
    has_bias,
    n_groups,
    n_groups_used,
    n_compared,
):
    """runtime.program.Route."""
    shared = cuda.shared.array(0, types.float32)
    chances = shared
    compared = shared[n_experts:]
    taken = shared[2 * n_experts :]
    groups = shared[3 * n_experts :]
    token, lane = cuda.blockIdx.x, cuda.threadIdx.x
    source = token * scores_stride
    largest, total = LOWEST, float32(0)
    for i in range(lane, n_experts, 32):
        largest = max(largest, scores[source + i])
    largest = warp_max(largest)
    for i in range(lane, n_experts, 32):
        chance = scores[source + i]
        if gating == SIGMOID:
            chance = sigmoid(chance)
        elif gating == SOFTMAX:
            chance = math.exp(chance - largest)
            total += chance
        chances[i] = chance
    total = warp_sum(total)
    for i in range(lane, n_experts, 32):
        if gating == SOFTMAX:
            chances[i] /= total
        compared[i] = chances[i] + bias[i] if has_bias else chances[i]
        taken[i] = float32(0)
    cuda.syncthreads()
    if n_groups > 1:
        _keep_best_groups(compared, taken, groups, n_experts, n_groups, n_groups_used, n_compared)
    target = token * routes_stride
    for slot in range(n_used):
        expert = _best(compared, taken, 0, n_experts, lane)
        if lane == 0:
            taken[expert] = float32(1)
            routes[target + slot] = float32(int32(expert))
            routes[target + n_used + slot] = chances[expert]
        cuda.syncthreads()
    if lane == 0:
        _weigh(routes, target + n_used, n_used, gating, normalize, factor)


@cuda.jit(device=True)
def _keep_best_groups(compared, taken, groups, n_experts, n_groups, n_groups_used, n_compared):
    """The other groups' experts are worth -inf."""
    lane = cuda.threadIdx.x
    size = n_experts // n_groups
    for g in range(n_groups):
        best = _best(compared, taken, g * size, size, lane)
        value = compared[best]
        if n_compared > 1:
            if lane == 0:
                taken[best] = float32(1)
            cuda.syncthreads()
            value += compared[_best(compared, taken, g * size, size, lane)]
            cuda.syncthreads()
            if lane == 0:
                taken[best] = float32(0)
        if lane == 0:
            groups[g] = value
        cuda.syncthreads()
    # A group stays when fewer than n_groups_used are better, or as good and before it.
    for i in range(lane, n_experts, 32):
        g = i // size
        better = 0
        for other in range(n_groups):
            if groups[other] > groups[g] or (groups[other] == groups[g] and other < g):
                better += 1
        if better >= n_groups_used:
            compared[i] = LOWEST
    cuda.syncthreads()


@cuda.jit(device=True)
def _weigh(routes, at, n_used, gating, normalize, factor):
    """The weights of the chosen: one thread's work."""
    if gating == CHOSEN:
        largest, total = routes[at], float32(0)
        for slot in range(1, n_used):
            largest = max(largest, routes[at + slot])
        for slot in range(n_used):
            routes[at + slot] = math.exp(routes[at + slot] - largest)
            total += routes[at + slot]
        for slot in range(n_used):
            routes[at + slot] /= total
    if normalize:
        total = float32(0)
        for slot in range(n_used):
            total += routes[at + slot]
        for slot in range(n_used):
            routes[at + slot] /= total
    for slot in range(n_used):
        routes[at + slot] *= factor
