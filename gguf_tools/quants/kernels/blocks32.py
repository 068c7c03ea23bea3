"""Q4_0, Q4_1, Q5_0 and Q5_1: 32 weights, 4 or 5 bits each, with or without a minimum.

The scales of 16 blocks are found in the 16 lanes; the levels are then made block by block. With
weights the scales come from the searches of the K formats.
"""

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.lanes import inverse, only_small, round_level, store_halves, turn
from gguf_tools.quants.kernels.search import fit_scale, fit_scale_and_minimum
from gguf_tools.simd import (
    cvt_i8x16,
    cvt_i32x16,
    float32,
    hsum,
    int32,
    int64,
    ld_f32,
    ld_f32x16,
    ld_i32x16,
    sel_lt,
    splat_f32x16,
    splat_i32x16,
    st,
    st_i32,
    vfabs,
    zero_f32x16,
    zero_i32x16,
)

GROUP = 16
SCRATCH = 2048 + 4 * 64  # the weights turned around, then four vectors
WEIGHTED_GROUP = 16
WEIGHTED_SCRATCH = 3 * 2048 + 6 * 64  # weights, their weights, levels, then six vectors


@jit
def from_largest(x, data, n_blocks, scratch, n_levels, block_bytes):
    """Q4_0 and Q5_0: the weight of largest magnitude is level 0, zero is n_levels / 2."""
    found = scratch + 2048
    middle = float32(n_levels // 2)
    _prepare(found + 192)
    for first in range(0, n_blocks, 16):
        blocks, y = x + first * 128, data + first * block_bytes
        turn(blocks, 128, 32, scratch)
        largest = zero_f32x16()
        magnitude = zero_f32x16()
        for i in range(32):
            v = ld_f32x16(scratch + i * 64)
            largest = sel_lt(magnitude, vfabs(v), v, largest)
            magnitude = sel_lt(magnitude, vfabs(v), vfabs(v), magnitude)
        d = largest / splat_f32x16(-middle)
        store_halves(d, y, block_bytes, found + 128)
        st(found, inverse(d))
        for b in range(16):
            scale = splat_f32x16(ld_f32(found + b * 4))
            at = blocks + b * 128
            low = ld_f32x16(at) * scale + splat_f32x16(middle + float32(0.5))
            high = ld_f32x16(at + 64) * scale + splat_f32x16(middle + float32(0.5))
            _store_levels(low, high, y + b * block_bytes + 2, n_levels, found + 192)


@jit
def from_smallest(x, data, n_blocks, scratch, n_levels, block_bytes):
    """Q4_1 and Q5_1: the smallest weight is level 0, the largest the last level."""
    found = scratch + 2048
    _prepare(found + 192)
    for first in range(0, n_blocks, 16):
        blocks, y = x + first * 128, data + first * block_bytes
        turn(blocks, 128, 32, scratch)
        smallest = largest = ld_f32x16(scratch)
        for i in range(1, 32):
            v = ld_f32x16(scratch + i * 64)
            smallest = sel_lt(v, smallest, v, smallest)
            largest = sel_lt(largest, v, v, largest)
        d = (largest - smallest) / splat_f32x16(float32(n_levels - 1))
        store_halves(d, y, block_bytes, found + 128)
        store_halves(smallest, y + 2, block_bytes, found + 128)
        st(found, inverse(d))
        st(found + 64, smallest)
        for b in range(16):
            scale = splat_f32x16(ld_f32(found + b * 4))
            base = splat_f32x16(ld_f32(found + 64 + b * 4))
            at = blocks + b * 128
            low = (ld_f32x16(at) - base) * scale + splat_f32x16(float32(0.5))
            high = (ld_f32x16(at + 64) - base) * scale + splat_f32x16(float32(0.5))
            _store_levels(low, high, y + b * block_bytes + 4, n_levels, found + 192)


@jit
def weighted_from_largest(x, weights, data, n_blocks, scratch, n_levels, block_bytes):
    """Q4_0 and Q5_0 with weights for errors."""
    found = scratch + 3 * 2048  # scale and inverse scale
    half = float32(n_levels // 2)
    least, most = splat_f32x16(-half), splat_f32x16(half - float32(1.0))
    _prepare(found + 320)
    for first in range(0, n_blocks, 16):
        blocks, y = x + first * 128, data + first * block_bytes
        turn(blocks, 128, 32, scratch)
        turn(weights + first * 128, 128, 32, scratch + 2048)
        fit_scale(scratch, found, 32, n_levels // 2, False)
        store_halves(ld_f32x16(found), y, block_bytes, found + 256)
        for b in range(16):
            inverse_scale = ld_f32(found + 64 + b * 4)
            low = high = least  # of zeros
            if inverse_scale != float32(0.0):
                scale = splat_f32x16(inverse_scale)
                low = round_level(ld_f32x16(blocks + b * 128) * scale, least, most)
                high = round_level(ld_f32x16(blocks + b * 128 + 64) * scale, least, most)
            _store_levels(low - least, high - least, y + b * block_bytes + 2, n_levels, found + 320)


@jit
def weighted_from_smallest(x, weights, data, n_blocks, scratch, n_levels, block_bytes):
    """Q4_1 and Q5_1 with weights for errors."""
    found = scratch + 3 * 2048  # scale, minimum, inverse scale and lowest value
    zero, most = zero_f32x16(), splat_f32x16(float32(n_levels - 1))
    _prepare(found + 320)
    for first in range(0, n_blocks, 16):
        blocks, y = x + first * 128, data + first * block_bytes
        turn(blocks, 128, 32, scratch)
        turn(weights + first * 128, 128, 32, scratch + 2048)
        levels = scratch + 2 * 2048
        fit_scale_and_minimum(
            scratch, scratch + 2048, levels, found, 32, n_levels - 1, -0.9, 0.05, 37, False
        )
        store_halves(ld_f32x16(found), y, block_bytes, found + 256)
        store_halves(
            ld_f32x16(found + 64) * splat_f32x16(float32(-1.0)), y + 2, block_bytes, found + 256
        )
        for b in range(16):
            scale = splat_f32x16(ld_f32(found + 128 + b * 4))
            base = splat_f32x16(ld_f32(found + 192 + b * 4))
            low = round_level(scale * (ld_f32x16(blocks + b * 128) - base), zero, most)
            high = round_level(scale * (ld_f32x16(blocks + b * 128 + 64) - base), zero, most)
            _store_levels(low, high, y + b * block_bytes + 4, n_levels, found + 320)


@jit
def _prepare(powers):
    """The powers of two that lanes weigh when their bits are collected."""
    for i in range(16):
        st_i32(powers + i * 4, int64(1) << i)


@jit
def _store_levels(low, high, y, n_levels, powers):
    """Cut two vectors to levels and store them: fifth bits, if any, then nibbles."""
    top = splat_f32x16(float32(n_levels - 1))
    low, high = only_small(low), only_small(high)
    low, high = sel_lt(low, top, low, top), sel_lt(high, top, high, top)
    if n_levels == 32:
        sixteen = splat_f32x16(float32(16.0))
        bits = ld_i32x16(powers)
        first = hsum(sel_lt(low, sixteen, zero_i32x16(), bits))
        second = hsum(sel_lt(high, sixteen, zero_i32x16(), bits))
        st_i32(y, int64(first) | (int64(second) << 16))
        y += 4
    mask = splat_i32x16(int32(15))
    st(y, cvt_i8x16((cvt_i32x16(low) & mask) | ((cvt_i32x16(high) & mask) << 4)))
