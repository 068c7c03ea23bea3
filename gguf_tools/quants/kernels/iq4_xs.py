"""IQ4_XS: two blocks at once, which are 16 groups of 32."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.iq4 import fit_scale, store_levels
from gguf_tools.quants.kernels.lanes import inverse, round_level, turn
from gguf_tools.quants.kernels.search import square_weights
from gguf_tools.simd import (
    concat,
    cvt_i32x16,
    f32_to_f16,
    float32,
    int64,
    ld_f32,
    ld_f32x16,
    ld_i32,
    splat_f32x8,
    splat_f32x16,
    st,
    st_u8,
)

GROUP = 2
SCRATCH = 4096 + 2 * 64  # the weights and their squares, then scales and steps


WEIGHTED_GROUP, WEIGHTED_SCRATCH = GROUP, SCRATCH


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    for first in range(0, n_blocks, 2):
        turn(x + first * 1024, 128, 32, scratch)
        square_weights(scratch, 32)
        _quantize_two(x + first * 1024, data + first * 136, scratch)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    for first in range(0, n_blocks, 2):
        turn(x + first * 1024, 128, 32, scratch)
        turn(weights + first * 1024, 128, 32, scratch + 2048)
        _quantize_two(x + first * 1024, data + first * 136, scratch)


@jit
def _quantize_two(blocks, y, scratch):
    found, steps = scratch + 4096, scratch + 4096 + 64
    st(found, fit_scale(scratch))
    _round_scales(found, steps, y)
    for block in range(2):
        _pack_scales(steps + block * 32, y + block * 136 + 2)
        for g in range(8):
            group_inverse = ld_f32(found + block * 32 + g * 4)
            at = block * 1024 + g * 128
            store_levels(blocks + at, group_inverse, y + block * 136 + 8 + g * 16)


@jit
def _round_scales(found, steps, y):
    """The 6-bit scales of two blocks at `steps`, the inverse of what they now are at `found`."""
    d_a = _largest(found) / float32(-32.0)
    d_b = _largest(found + 32) / float32(-32.0)
    f32_to_f16(y, d_a)
    f32_to_f16(y + 136, d_b)
    d = concat(splat_f32x8(d_a), splat_f32x8(d_b))  # not as rounded to halves
    least, most = splat_f32x16(float32(-32.0)), splat_f32x16(float32(31.0))
    step = round_level(inverse(d) * ld_f32x16(found), least, most)
    st(steps, cvt_i32x16(step - least))
    st(found, inverse(d * step))


@jit
def _largest(found):
    """The first of 8 scales with the largest magnitude."""
    largest = magnitude = float32(0.0)
    for g in range(8):
        scale = ld_f32(found + g * 4)
        if abs(scale) > magnitude:
            magnitude = abs(scale)
            largest = scale
    return largest


@jit
def _pack_scales(steps, y):
    """8 scales: two bits each in a word, then four bits each in four bytes."""
    high = int64(0)
    for g in range(8):
        high |= int64(ld_i32(steps + g * 4) >> 4) << (2 * g)
    st_u8(y, high)
    st_u8(y + 1, high >> 8)
    for j in range(4):
        low = int64(ld_i32(steps + j * 8) & 15) | (int64(ld_i32(steps + j * 8 + 4) & 15) << 4)
        st_u8(y + 2 + j, low)
