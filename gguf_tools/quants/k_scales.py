"""The scales of Q4_K and Q5_K: 8 groups of 32, a scale and a minimum of 6 bits each, in 12 bytes.

    byte      7 6                 5 4 3 2 1 0
     0 ..  3  scale j + 4, top 2  scale j            j = 0 to 3
     4 ..  7  min   j + 4, top 2  min   j
     8 .. 11  min j + 4, low 4 bits | scale j + 4, low 4 bits

They count in steps of two float16 of the block: scale = d * 6 bits, minimum = dmin * 6 bits.
"""

import numpy as np

from gguf_tools.quants.arithmetic import nearest_int, ordered_sum, to_half
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import Fit, fit_scale_and_minimum, fit_steps


def unpack_scales(packed: Array) -> tuple[Array, Array]:
    """The scales and minima, (n_blocks, 8) of 0 to 63, from (n_blocks, 12) bytes."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def pack_scales(scales: Array, minima: Array) -> Array:
    """(n_blocks, 12) bytes."""
    high_scales, high_minima = scales[:, 4:], minima[:, 4:]
    first = scales[:, :4] | high_scales >> 4 << 6
    second = minima[:, :4] | high_minima >> 4 << 6
    return np.concatenate([first, second, high_scales & 15 | (high_minima & 15) << 4], axis=1)


def scales_and_minima(blocks: Array) -> tuple[Floats, Floats]:
    """What the levels of each group are multiplied with and what is taken off, (n_blocks, 8, 1)."""
    scales, minima = unpack_scales(blocks["scales"])
    d = blocks["d"].astype(np.float32)[:, None] * scales.astype(np.float32)
    dmin = blocks["dmin"].astype(np.float32)[:, None] * minima.astype(np.float32)
    return d[:, :, None], dmin[:, :, None]


def group_weights(x: Floats) -> Floats:
    """How much an error counts: the magnitude, and the root mean square of the group."""
    squares = np.add.accumulate(x * x, axis=-1)[..., -1:]
    mean: Floats = np.sqrt(squares / np.float32(32))
    return mean + np.abs(x)


def store_levels(blocks: Array, x: Floats, fit: Fit, top: int) -> Array:
    """Set the scales of the blocks; give the levels (n_blocks, 256) that go with them.

    The scales are rounded to 6 bits first, the levels are then made for the rounded scales; a
    group whose scale became 0 keeps the levels of the search.
    """
    blocks["d"], scales = _six_bits(fit.scale.reshape(-1, 8))
    blocks["dmin"], minima = _six_bits(fit.minimum.reshape(-1, 8))
    blocks["scales"] = pack_scales(scales, minima)
    return _levels(blocks, x, fit, top)


def store_weighted_levels(blocks: Array, x: Floats, weights: Floats, top: int) -> Array:
    """The same with weights given: the scales of a block are fitted, too, not only rounded."""
    groups = weights.reshape(-1, 32)
    fit = fit_scale_and_minimum(
        x.reshape(-1, 32), groups, top=top, first=-0.9, step=0.05, n_trials=37
    )
    totals = ordered_sum(groups).reshape(-1, 8)
    d, scales = fit_steps(fit.scale.reshape(-1, 8), totals, top=63)
    dmin, minima = fit_steps(fit.minimum.reshape(-1, 8), totals, top=63)
    if top == 31:  # in Q4_K ggml lets what is left of a negative scale run into the next
        scales, minima = np.minimum(63, scales), np.minimum(63, minima)
    blocks["d"], blocks["dmin"] = to_half(d), to_half(dmin)
    blocks["scales"] = pack_scales(scales, minima)
    return _levels(blocks, x, fit, top)


def _levels(blocks: Array, x: Floats, fit: Fit, top: int) -> Array:
    d, dmin = scales_and_minima(blocks)
    levels = nearest_int((x.reshape(-1, 8, 32) + dmin) / d).clip(0, top)
    return np.where(d != 0, levels, fit.levels.reshape(-1, 8, 32)).reshape(-1, 256)


def _six_bits(scales: Floats) -> tuple[Array, Array]:
    """One step as float16 (n_blocks,), and how many steps each scale is (n_blocks, 8)."""
    largest = np.zeros(len(scales), np.float32)
    for column in scales.T:
        largest = np.where(column > largest, column, largest)
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    steps = np.minimum(63, nearest_int(inverse[:, None] * scales) & 0xFF)
    return to_half(largest / np.float32(63)), steps
