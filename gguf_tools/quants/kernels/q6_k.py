"""Q6_K: a block is 16 groups of 16, one in each lane."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.lanes import round_level, turn
from gguf_tools.quants.kernels.search import TINY, fit_scale, square_weights
from gguf_tools.simd import (
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    float32,
    int8,
    ld_f32,
    ld_f32x16,
    ld_i8x32,
    splat_f32x16,
    splat_i8x32,
    st,
    st_u8,
)

GROUP = 1
RESULT = 3 * 1024  # where scales begin, after the weights, their squares and their cubes
SCRATCH = RESULT + 3 * 64 + 256
WEIGHTED_GROUP, WEIGHTED_SCRATCH = GROUP, SCRATCH


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    for b in range(n_blocks):
        turn(x + b * 1024, 64, 16, scratch)
        square_weights(scratch, 16)
        _quantize_one(x + b * 1024, data + b * 210, scratch)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    for b in range(n_blocks):
        turn(x + b * 1024, 64, 16, scratch)
        turn(weights + b * 1024, 64, 16, scratch + 1024)
        _quantize_one(x + b * 1024, data + b * 210, scratch)


@jit
def _quantize_one(block, y, scratch):
    """A block, whose weights and their weights are turned around already."""
    result, levels = scratch + RESULT, scratch + RESULT + 3 * 64
    fit_scale(scratch, result, 16, 32, False)
    largest = magnitude = float32(0.0)
    for g in range(16):
        scale = ld_f32(result + g * 4)
        if abs(scale) > magnitude:
            magnitude = abs(scale)
            largest = scale
    if magnitude < TINY:
        for i in range(210):
            st_u8(y + i, 0)
        return
    _store_scales(y, result, largest)
    _make_levels(block, result, levels)
    _pack(levels, y)


@jit
def _store_scales(y, result, largest):
    """Round the scales to int8 steps of a half; put what they now are after the result."""
    inverse = float32(-128.0) / largest
    d = f32_to_f16(y + 208, float32(1.0) / inverse)
    lowest, most = splat_f32x16(float32(-4194304.0)), splat_f32x16(float32(127.0))
    steps = round_level(splat_f32x16(inverse) * ld_f32x16(result), lowest, most)
    steps = cvt_i8x16(cvt_i32x16(steps))
    st(y + 192, steps)
    st(result + 128, splat_f32x16(d) * cvt_f32x16(steps))


@jit
def _make_levels(block, result, levels):
    """256 levels of 0 to 63, bytes."""
    least, most = splat_f32x16(float32(-32.0)), splat_f32x16(float32(31.0))
    for g in range(16):
        v = ld_f32x16(block + g * 64)
        scale, inverse = ld_f32(result + 128 + g * 4), ld_f32(result + 64 + g * 4)
        if scale != float32(0.0):
            level = round_level(v / splat_f32x16(scale), least, most)
        elif inverse != float32(0.0):  # the levels of the search
            level = round_level(v * splat_f32x16(inverse), least, most)
        else:  # a group of zeros
            level = least
        st(levels + g * 16, cvt_i8x16(cvt_i32x16(level - least)))


@jit
def _pack(levels, y):
    nibble = splat_i8x32(int8(15))
    for h in range(2):
        at = levels + h * 128
        a, b, c, d = ld_i8x32(at), ld_i8x32(at + 32), ld_i8x32(at + 64), ld_i8x32(at + 96)
        st(y + h * 64, (a & nibble) | (c << 4))
        st(y + h * 64 + 32, (b & nibble) | (d << 4))
        high = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
        st(y + 128 + h * 32, high)
