"""Q2_K: 256 weights in 84 bytes (2.625 bits each).

scales          qs              d      dmin
|16 x (4+4) bits 16||256 x 2 bits 64||f16 2||f16 2|
                                scales byte g: scale of group g in the low half, minimum in
                                the high
                                of each half h = 0, 1 (128 weights), for j = 0 to 31:
                                qs byte 32 h + j: two bits each of weights j, 32 + j, 64 + j,
                                96 + j, from the lowest on

weight = d * scale[g] * q - dmin * minimum[g]        g = one of 16 groups of 16
"""

import numpy as np

from gguf_tools.quants.arithmetic import join_nibbles, nearest_int, ordered_sum, to_half
from gguf_tools.quants.blocks import Spread, block_quant
from gguf_tools.quants.levels import Levels, Parts
from gguf_tools.quants.quanttype import Array, Floats
from gguf_tools.quants.search import Fit, fit_scale_and_minimum, fit_steps

BLOCK = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
assert BLOCK.itemsize == 84


def dequantize(blocks: Array) -> Floats:
    d, dmin = _scales_and_minima(blocks)
    q = split_two_bits(blocks["qs"]).reshape(-1, 16, 16)
    weights: Floats = d * q.astype(np.float32) - dmin
    return weights.reshape(-1, 256)


def quantize_reference(x: Floats) -> Array:
    groups = x.reshape(-1, 16)
    fit = fit_scale_and_minimum(
        groups, np.abs(groups), top=3, first=-0.5, n_trials=16, absolute=True
    )
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"], scales = _four_bits(fit.scale.reshape(-1, 16))
    blocks["dmin"], minima = _four_bits(fit.minimum.reshape(-1, 16))
    _store(blocks, x, scales, minima, fit)
    return blocks


def quantize_weighted_reference(x: Floats, weights: Floats) -> Array:
    groups = weights.reshape(-1, 16)
    fit = fit_scale_and_minimum(
        x.reshape(-1, 16), groups, top=3, first=-0.9, step=0.05, n_trials=37
    )
    totals = ordered_sum(groups).reshape(-1, 16)
    d, scales = fit_steps(fit.scale.reshape(-1, 16), totals, top=15)
    dmin, minima = fit_steps(fit.minimum.reshape(-1, 16), totals, top=15)
    blocks = np.zeros(len(x), BLOCK)
    blocks["d"], blocks["dmin"] = to_half(d), to_half(dmin)
    _store(blocks, x, scales, minima, fit)
    return blocks


def _store(blocks: Array, x: Floats, scales: Array, minima: Array, fit: Fit) -> None:
    """Set the scales, and the levels that go with them; a scale of 0 keeps those of the search."""
    blocks["scales"] = join_nibbles(scales, minima)
    d, dmin = _scales_and_minima(blocks)
    levels = nearest_int((x.reshape(-1, 16, 16) + dmin) / d).clip(0, 3)
    levels = np.where(d != 0, levels, fit.levels.reshape(-1, 16, 16))
    blocks["qs"] = join_two_bits(levels)


def pack(parts: Parts) -> Array:
    blocks = np.zeros(len(parts.d), BLOCK)
    blocks["d"], blocks["dmin"] = parts.d, parts.dmin
    blocks["scales"] = join_nibbles(parts.scales, parts.minima)
    blocks["qs"] = join_two_bits(parts.levels)
    return blocks


def split_two_bits(qs: Array) -> Array:
    """(n_blocks, 64) bytes to (n_blocks, 256) numbers of 0 to 3; also of Q3_K."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (qs.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def join_two_bits(q: Array) -> Array:
    """The other way round; for any shape of 256 numbers a block."""
    q = q.reshape(-1, 2, 4, 32)
    joined = q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6
    qs: Array = joined.reshape(-1, 64)
    return qs


def _scales_and_minima(blocks: Array) -> tuple[Floats, Floats]:
    """What the levels of each group are multiplied with and what is taken off: (n, 16, 1)."""
    scales, minima = blocks["scales"] & 15, blocks["scales"] >> 4
    d = blocks["d"].astype(np.float32)[:, None] * scales.astype(np.float32)
    dmin = blocks["dmin"].astype(np.float32)[:, None] * minima.astype(np.float32)
    return d[:, :, None], dmin[:, :, None]


def _four_bits(scales: Floats) -> tuple[Array, Array]:
    """One step as float16 (n_blocks,), and how many steps each scale is (n_blocks, 16)."""
    largest = np.zeros(len(scales), np.float32)
    for column in scales.T:
        largest = np.where(column > largest, column, largest)
    inverse = np.where(largest > 0, np.float32(15) / largest, np.float32(0))
    return to_half(largest / np.float32(15)), nearest_int(inverse[:, None] * scales) & 0xFF


Q2_K = block_quant(
    "Q2_K",
    10,
    block_size=256,
    block=BLOCK,
    dequantize=dequantize,
    quantize_reference=quantize_reference,
    quantize_weighted_reference=quantize_weighted_reference,
    spread=Spread(span=256, over=256),
    levels=Levels(0, 3, pack, 16, 16, True, 0, 15),
)
