"""Q2_K: a block is 16 groups of 16, one in each lane."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.lanes import pack_two_bits, round_level, round_to_byte, turn
from gguf_tools.quants.kernels.search import fit_scale_and_minimum, fit_steps
from gguf_tools.simd import (
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    float32,
    int32,
    int64,
    ld_f32,
    ld_f32x16,
    ld_i32x16,
    splat_f32x16,
    splat_i32x16,
    st,
    transpose16,
    vfabs,
    zero_f32x16,
)

GROUP = 1
RESULT = 3 * 1024  # after the weights, their magnitudes and the levels tried
LEVELS = RESULT + 8 * 64
SCRATCH = LEVELS + 256
WEIGHTED_GROUP = 16
OF_SIXTEEN = SCRATCH + 2048  # scales, minima, inverse scales, lowest values, weights of 16 blocks
WEIGHTED_SCRATCH = OF_SIXTEEN + 5 * 1024


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    weights, work, result = scratch + 1024, scratch + 2048, scratch + RESULT
    for b in range(n_blocks):
        block, y = x + b * 1024, data + b * 84
        turn(block, 64, 16, scratch)
        for i in range(16):
            st(weights + i * 64, vfabs(ld_f32x16(scratch + i * 64)))
        fit_scale_and_minimum(scratch, weights, work, result, 16, 3, -0.5, 0.1, 16, True)
        d = _store_scales(result, result + 256, y + 80)
        dmin = _store_scales(result + 64, result + 320, y + 82)
        _finish(block, y, d, dmin, result, scratch + LEVELS)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    turned, turned_weights, work = scratch, scratch + 1024, scratch + 2048
    result, kept = scratch + RESULT, scratch + OF_SIXTEEN
    steps, more_steps = scratch + SCRATCH, scratch + SCRATCH + 1024
    for first in range(0, n_blocks, 16):
        for b in range(16):
            turn(x + (first + b) * 1024, 64, 16, turned)
            turn(weights + (first + b) * 1024, 64, 16, turned_weights)
            fit_scale_and_minimum(
                turned, turned_weights, work, result, 16, 3, -0.9, 0.05, 37, False
            )
            total = zero_f32x16()
            for i in range(16):
                total += ld_f32x16(turned_weights + i * 64)
            for i in range(4):
                st(kept + i * 1024 + b * 64, ld_f32x16(result + i * 64))
            st(kept + 4096 + b * 64, total)
        transpose16(kept + 4096, 64, turned_weights, 64)
        step_d = _fit_steps(kept, turned_weights, turned, work, steps)
        step_dmin = _fit_steps(kept + 1024, turned_weights, turned, work, more_steps)
        st(kept, step_d)
        st(kept + 64, step_dmin)
        for b in range(16):
            block, y = x + (first + b) * 1024, data + (first + b) * 84
            d = f32_to_f16(y + 80, ld_f32(kept + b * 4))
            dmin = f32_to_f16(y + 82, ld_f32(kept + 64 + b * 4))
            st(result + 128, ld_f32x16(kept + 2048 + b * 64))
            st(result + 192, ld_f32x16(kept + 3072 + b * 64))
            st(result + 256, cvt_i32x16(ld_f32x16(steps + b * 64)))
            st(result + 320, cvt_i32x16(ld_f32x16(more_steps + b * 64)))
            _finish(block, y, d, dmin, result, scratch + LEVELS)


@jit
def _fit_steps(found, turned_weights, turned, work, steps):
    """One step for the 16 scales of each of 16 blocks; their numbers, block by block, at `steps`"""
    transpose16(found, 64, turned, 64)
    step = fit_steps(turned, turned_weights, work, 16, 15)
    transpose16(work, 64, steps, 64)
    return step


@jit
def _finish(block, y, d, dmin, result, levels):
    """Store the scales, whose numbers are in the result, and the levels that go with them."""
    nibble = splat_i32x16(int32(15))
    packed = ld_i32x16(result + 256) | (ld_i32x16(result + 320) << 4)
    st(y, cvt_i8x16(packed))
    st(result + 256, splat_f32x16(d) * cvt_f32x16(packed & nibble))
    st(result + 320, splat_f32x16(dmin) * cvt_f32x16((packed >> 4) & nibble))
    _make_levels(block, result, levels)
    pack_two_bits(levels, y + 16)


@jit
def _store_scales(found, steps, y):
    """Round 16 scales to 4 bits of a half, which is stored at y and returned."""
    largest = float32(0.0)
    for g in range(16):
        scale = ld_f32(found + g * 4)
        if scale > largest:
            largest = scale
    inverse = float32(0.0)
    if largest > float32(0.0):
        inverse = float32(15.0) / largest
    st(steps, round_to_byte(splat_f32x16(inverse) * ld_f32x16(found)))
    return f32_to_f16(y, largest / float32(15.0))


@jit
def _make_levels(block, result, levels):
    """256 levels of 0 to 3, bytes."""
    zero, most = zero_f32x16(), splat_f32x16(float32(3.0))
    for g in range(16):
        at = int64(result + g * 4)
        v = ld_f32x16(block + g * 64)
        scale = ld_f32(at + 256)
        if scale != float32(0.0):
            level = (v + splat_f32x16(ld_f32(at + 320))) / splat_f32x16(scale)
        else:  # the levels of the search
            level = splat_f32x16(ld_f32(at + 128)) * (v - splat_f32x16(ld_f32(at + 192)))
        st(levels + g * 16, cvt_i8x16(cvt_i32x16(round_level(level, zero, most))))
