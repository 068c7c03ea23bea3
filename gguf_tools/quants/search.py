"""The searches for a group's scale that the K formats share, step for step as ggml makes them.

All take groups of weights (n_groups, n) and try a handful of scales; each trial is a weighted
least-squares fit for fixed levels, kept where it is better than the best so far.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.arithmetic import first_largest, nearest_int, ordered_sum, range_of
from gguf_tools.quants.quanttype import Floats

TINY = np.float32(1e-15)
"""Groups whose largest magnitude is below count as zeros."""


@dataclass
class Fit:
    """weight = scale * level - minimum, for each group."""

    scale: Floats  # (n_groups,)
    minimum: Floats  # (n_groups,); zeros where the format has none
    levels: npt.NDArray[np.int32]  # (n_groups, n)


def fit_scale_and_minimum(
    x: Floats,
    weights: Floats,
    *,
    top: int,
    first: float,
    step: float = 0.1,
    n_trials: int,
    absolute: bool = False,
) -> Fit:
    """Levels 0 to `top` above a minimum that is at most 0 (ggml: make_qkx2_quants,
    make_qkx3_quants).

    After the plain grid from minimum to maximum, trial i stretches the grid to
    top + first + i * step levels. The error is the weighted sum of squares, or of magnitudes when
    `absolute`. The grid starts from the best minimum so far, which the trials move.
    """
    low, high = range_of(x)
    low = np.where(low > 0, np.float32(0), low)
    flat = high == low
    flat_low = low

    sum_w = ordered_sum(weights)
    sum_x = ordered_sum(weights * x)

    def levels_of(inverse_scale: Floats) -> npt.NDArray[np.int32]:
        return nearest_int(inverse_scale[:, None] * (x - low[:, None])).clip(0, top)

    def error_of(scale: Floats, low: Floats, levels: npt.NDArray[np.int32]) -> Floats:
        distance = scale[:, None] * levels.astype(np.float32) + low[:, None] - x
        distance = np.abs(distance) if absolute else distance * distance
        return ordered_sum(weights * distance)

    inverse_scale: Floats = np.float32(top) / (high - low)
    scale: Floats = np.float32(1) / inverse_scale
    best_levels = levels_of(inverse_scale)
    best_error = error_of(scale, low, best_levels)
    for trial in range(n_trials):
        stretch = np.float32(first) + np.float32(step) * np.float32(trial) + np.float32(top)
        levels = levels_of(stretch / (high - low))
        level = levels.astype(np.float32)
        sum_l = ordered_sum(weights * level)
        sum_l2 = ordered_sum(weights * level * level)
        sum_xl = ordered_sum(weights * level * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = new_low > 0
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        new_low = np.where(above, np.float32(0), new_low)
        error = error_of(new_scale, new_low, levels)
        better = (determinant > 0) & (error < best_error)
        best_levels = np.where(better[:, None], levels, best_levels)
        best_error = np.where(better, error, best_error)
        scale = np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)

    scale = np.where(flat, np.float32(0), scale)
    low = np.where(flat, flat_low, low)
    return Fit(scale, -low, np.where(flat[:, None], 0, best_levels))


def fit_scale(x: Floats, weights: Floats, *, top: int) -> Fit:
    """Levels -top to top - 1 (ggml: make_qx_quants).

    The weight of largest magnitude starts at level -top; 18 trials move it by up to 0.9.
    """
    largest = first_largest(x)

    def levels_of(stretch: np.float32) -> npt.NDArray[np.int32]:
        inverse_scale = -stretch / largest
        return nearest_int(inverse_scale[:, None] * x).clip(-top, top - 1)

    def sums_of(levels: npt.NDArray[np.int32]) -> tuple[Floats, Floats]:
        level = levels.astype(np.float32)
        return ordered_sum(weights * x * level), ordered_sum(weights * level * level)

    best_levels = levels_of(np.float32(top))
    sum_xl, sum_l2 = sums_of(best_levels)
    scale = np.where(sum_l2 != 0, sum_xl / sum_l2, np.float32(0))
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        levels = levels_of(np.float32(top) + np.float32(0.1) * np.float32(step))
        sum_xl, sum_l2 = sums_of(levels)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        best_levels = np.where(better[:, None], levels, best_levels)
        scale = np.where(better, sum_xl / sum_l2, scale)
        best = np.where(better, scale * sum_xl, best)

    zeros = np.abs(largest) < TINY
    scale = np.where(zeros, np.float32(0), scale)
    # ggml leaves the stored level of a group of zeros at 0, which stands for -top.
    best_levels = np.where(zeros[:, None], -top, best_levels)
    return Fit(scale, np.zeros_like(scale), best_levels)


def fit_scale_by_turns(x: Floats, *, top: int) -> Fit:
    """Levels -top to top - 1, weighted by the squares of x (ggml: make_q3_quants).

    The weight of largest magnitude starts at level -top; then the weights change their levels in
    turn wherever that makes the fit better, five times over.
    """
    largest = first_largest(x)
    weights = x * x
    inverse_scale = np.float32(-top) / largest
    levels = nearest_int(inverse_scale[:, None] * x).clip(-top, top - 1).astype(np.float32)
    sum_xl = ordered_sum(weights * x * levels)
    sum_l2 = ordered_sum(weights * levels * levels)
    for _ in range(5):  # ggml stops after a round without change: so does the result
        for i in range(x.shape[1]):
            w, v, level = weights[:, i], x[:, i], levels[:, i]
            new_xl = sum_xl - w * v * level
            new_l2 = sum_l2 - w * level * level
            quotient: Floats = np.divide(v * new_l2, new_xl)
            new = nearest_int(quotient).clip(-top, top - 1).astype(np.float32)
            change = (new_xl > 0) & (new != level)
            new_xl = new_xl + w * v * new
            new_l2 = new_l2 + w * new * new
            better = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            change &= (new_l2 > 0) & better
            levels[:, i] = np.where(change, new, level)
            sum_xl = np.where(change, new_xl, sum_xl)
            sum_l2 = np.where(change, new_l2, sum_l2)

    zeros = np.abs(largest) < TINY
    scale = np.where((sum_l2 > 0) & ~zeros, sum_xl / sum_l2, np.float32(0))
    # ggml leaves the stored level of a group of zeros at 0, which stands for -top.
    whole = np.where(zeros[:, None], -top, levels).astype(np.int32)
    return Fit(scale, np.zeros_like(scale), whole)


def fit_steps(x: Floats, weights: Floats, *, top: int) -> tuple[Floats, npt.NDArray[np.int32]]:
    """One step for scales that are not negative, and how many each is (ggml: make_qp_quants).

    The best of nine grids around 0 to `top` steps up to the largest is taken; then the scales
    change their numbers in turn wherever that makes the fit better, five times over. ggml keeps
    the numbers in bytes, which shows where rounding left a scale below zero.
    """
    largest = np.zeros(len(x), np.float32)
    for column in x.T:
        largest = np.where(largest > column, largest, column)

    def steps_of(inverse: Floats) -> Floats:
        return np.minimum(top, nearest_int(inverse[:, None] * x)).astype(np.float32)

    def error_of(inverse: Floats, steps: Floats) -> Floats:
        distance = x - (np.float32(1) / inverse)[:, None] * steps
        return ordered_sum(weights * distance * distance)

    inverse: Floats = np.float32(top) / largest
    best_error = error_of(inverse, low_bytes(nearest_int(inverse[:, None] * x)))
    for trial in (*range(-4, 0), *range(1, 5)):
        stretch = np.float32(0.1) * np.float32(trial) + np.float32(top)
        tried: Floats = stretch / largest
        error = error_of(tried, steps_of(tried))
        better = error < best_error
        best_error = np.where(better, error, best_error)
        inverse = np.where(better, tried, inverse)

    steps = steps_of(inverse)
    sum_xl = ordered_sum(weights * x * steps)
    sum_l2 = ordered_sum(weights * steps * steps)
    steps = low_bytes(steps.astype(np.int32))
    for _ in range(5):  # ggml stops after a round without change: so does the result
        for i in range(x.shape[1]):
            w, v, level = weights[:, i], x[:, i], steps[:, i]
            new_xl = sum_xl - w * v * level
            new_l2 = sum_l2 - w * level * level
            quotient: Floats = np.divide(v * new_l2, new_xl)
            new = np.minimum(top, nearest_int(quotient)).astype(np.float32)
            change = (new_xl > 0) & (new_l2 > 0) & (new != level)
            new_xl = new_xl + w * v * new
            new_l2 = new_l2 + w * new * new
            change &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            steps[:, i] = np.where(change, low_bytes(new.astype(np.int32)), level)
            sum_xl = np.where(change, new_xl, sum_xl)
            sum_l2 = np.where(change, new_l2, sum_l2)

    zeros = largest < TINY
    scale = np.where((sum_l2 > 0) & ~zeros, sum_xl / sum_l2, np.float32(0))
    return scale, np.where(zeros[:, None], 0, steps).astype(np.int32)


def low_bytes(x: npt.NDArray[np.int32]) -> Floats:
    """What is left of whole numbers in a byte, 0 to 255."""
    return (x & 0xFF).astype(np.float32)
