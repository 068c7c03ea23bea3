"""The 16 levels of IQ4_NL and IQ4_XS, and their search: levels that lie closer around zero."""

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.arithmetic import first_largest, ordered_sum
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import TINY

LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
VALUES = tuple(int(level) for level in LEVELS)
N_TRIALS = 7  # on either side


def nearest_level(x: Floats) -> npt.NDArray[np.intp]:
    """Index of the nearest level; ggml's way of comparing decides between two equally near."""
    above = np.searchsorted(LEVELS, x, side="right").clip(1, 15)
    nearer_below = x - LEVELS[above - 1] < LEVELS[above] - x
    return np.where(x <= LEVELS[0], 0, np.where(nearer_below, above - 1, above))


def fit_scale(x: Floats, weights: Floats) -> Floats:
    """The scale of each group (n_groups, 32).

    The weight of largest magnitude is tried at level 127, then around -127 in steps of 1.
    """
    largest = first_largest(x)

    def sums_of(inverse_scale: Floats) -> tuple[Floats, Floats]:
        level = LEVELS[nearest_level(inverse_scale[:, None] * x)]
        return ordered_sum(weights * level * x), ordered_sum(weights * level * level)

    sum_xl, sum_l2 = sums_of(np.float32(1) / (-largest / LEVELS[0]))
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, np.float32(0))
    best = scale * sum_xl
    for trial in range(-N_TRIALS, N_TRIALS + 1):
        sum_xl, sum_l2 = sums_of((LEVELS[0] + np.float32(trial)) / largest)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = np.where(better, sum_xl / sum_l2, scale)
        best = np.where(better, scale * sum_xl, best)
    return np.where(np.abs(largest) < TINY, np.float32(0), scale)


def indices_of(levels: Array) -> Array:
    """Which of LEVELS each is, of levels that are."""
    indices = np.zeros(256, np.uint8)
    indices[LEVELS.astype(int) + 128] = np.arange(16)
    found: Array = indices[levels.astype(np.int16) + 128]
    return found


def split_nibbles(qs: Array) -> Array:
    """(n, 16) bytes to the (n, 32) indices of a group."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)
