"""Q4_K and Q5_K up to their levels: two blocks at once, which are 16 groups of 32.

With weights it is 16 blocks, for their scales are fitted once more, a block in each lane.
"""

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.lanes import round_level, round_to_byte, turn
from gguf_tools.quants.kernels.search import fit_scale_and_minimum, fit_steps
from gguf_tools.simd import (
    concat,
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    float32,
    int64,
    ld_f32,
    ld_f32x16,
    ld_i32,
    ld_u8,
    sel_lt,
    splat_f32x8,
    splat_f32x16,
    st,
    st_u8,
    transpose16,
    vfabs,
    vsqrt,
    zero_f32x16,
)

GROUP = 2
LEVELS = 3 * 2048 + 8 * 64  # where in the scratch memory the levels of both blocks begin, bytes
SCRATCH = LEVELS + 512
WEIGHTED_GROUP = 16
WEIGHTED_LEVELS = 6144 + 256 + 5 * 576 + 64
WEIGHTED_SCRATCH = WEIGHTED_LEVELS + 16 * 256


@jit
def fit_two(x, y, block_bytes, scratch, top, first, n_trials):
    """Store d, dmin and the scales of two blocks; leave their levels at scratch + LEVELS."""
    turned, weights, work = scratch, scratch + 2048, scratch + 4096
    result = scratch + 6144  # scale, minimum, inverse scale, lowest value of each group
    d, dmin = result + 256, result + 320  # what the levels of each group are multiplied with
    steps = result + 384  # scales, then minima, as whole numbers of 6 bits
    zero = zero_f32x16()
    turn(x, 128, 32, turned)
    squares = zero
    for i in range(32):
        v = ld_f32x16(turned + i * 64)
        squares += v * v
    mean = vsqrt(squares / splat_f32x16(float32(32.0)))
    for i in range(32):
        st(weights + i * 64, mean + vfabs(ld_f32x16(turned + i * 64)))
    fit_scale_and_minimum(turned, weights, work, result, 32, top, first, 0.1, n_trials, False)
    _store_scales(result, d, steps, y, block_bytes)
    _store_scales(result + 64, dmin, steps + 64, y + 2, block_bytes)
    _pack_scales(steps, y + 4)
    _pack_scales(steps + 32, y + block_bytes + 4)
    for g in range(16):
        inverse, lowest = ld_f32(result + 128 + g * 4), ld_f32(result + 192 + g * 4)
        scale, minimum = ld_f32(d + g * 4), ld_f32(dmin + g * 4)
        _make_levels(x + g * 128, scale, minimum, inverse, lowest, top, scratch + LEVELS + g * 32)


@jit
def fit_sixteen(x, weights, y, block_bytes, scratch, top):
    """The same of sixteen blocks with weights for errors; levels at scratch + WEIGHTED_LEVELS."""
    turned, turned_weights, work = scratch, scratch + 2048, scratch + 4096
    result = scratch + 6144
    scales = result + 256  # (16 blocks, 8 groups) of each, and half as many to be read in vain
    minima, inverses, lowest, totals = scales + 576, scales + 1152, scales + 1728, scales + 2304
    for pair in range(8):
        turn(x + pair * 2048, 128, 32, turned)
        turn(weights + pair * 2048, 128, 32, turned_weights)
        fit_scale_and_minimum(turned, turned_weights, work, result, 32, top, -0.9, 0.05, 37, False)
        total = zero_f32x16()
        for i in range(32):
            total += ld_f32x16(turned_weights + i * 64)
        st(scales + pair * 64, ld_f32x16(result))
        st(minima + pair * 64, ld_f32x16(result + 64))
        st(inverses + pair * 64, ld_f32x16(result + 128))
        st(lowest + pair * 64, ld_f32x16(result + 192))
        st(totals + pair * 64, total)
    transpose16(totals, 32, turned_weights, 64)
    step_d = _fit_steps(scales, turned_weights, scratch, top)
    st(result, step_d)
    step_dmin = _fit_steps(minima, turned_weights, scratch + 4096, top)
    st(result + 64, step_dmin)
    for block in range(16):
        at = y + block * block_bytes
        d = f32_to_f16(at, ld_f32(result + block * 4))
        dmin = f32_to_f16(at + 2, ld_f32(result + 64 + block * 4))
        steps = result + 128
        st(steps, cvt_i32x16(ld_f32x16(scratch + block * 64)))
        st(steps + 64, cvt_i32x16(ld_f32x16(scratch + 4096 + block * 64)))
        _pack_scales(steps, at + 4)
        for g in range(8):
            scale, minimum = _unpack_scale(at + 4, g)
            group = block * 8 + g
            _make_levels(
                x + group * 128,
                d * float32(scale),
                dmin * float32(minimum),
                ld_f32(inverses + group * 4),
                ld_f32(lowest + group * 4),
                top,
                scratch + WEIGHTED_LEVELS + group * 32,
            )


@jit
def _fit_steps(found, turned_weights, work, top):
    """One step for the 8 scales of each of 16 blocks; their numbers, block by block, at `work`."""
    turned = turned_weights + 1024
    transpose16(found, 32, turned, 64)
    step = fit_steps(turned, turned_weights, work + 1024, 8, 63)
    if top == 31:  # in Q4_K ggml lets what is left of a negative scale run into the next
        most = splat_f32x16(float32(63.0))
        for j in range(8):
            level = ld_f32x16(work + 1024 + j * 64)
            st(work + 1024 + j * 64, sel_lt(level, most, level, most))
    transpose16(work + 1024, 64, work, 64)
    return step


@jit
def _make_levels(x, scale, minimum, inverse, lowest, top, levels):
    """The levels of a group, bytes, for its rounded scale; of the search where that is 0."""
    zero, most = zero_f32x16(), splat_f32x16(float32(top))
    for half in range(2):
        v = ld_f32x16(x + half * 64)
        if scale != float32(0.0):
            level = (v + splat_f32x16(minimum)) / splat_f32x16(scale)
        else:
            level = splat_f32x16(inverse) * (v - splat_f32x16(lowest))
        st(levels + half * 16, cvt_i8x16(cvt_i32x16(round_level(level, zero, most))))


@jit
def _store_scales(found, rounded, steps, y, block_bytes):
    """Round 8 scales of each of two blocks to 6 bits of a half, which is stored at y."""
    largest_a = largest_b = float32(0.0)
    for j in range(8):
        a, b = ld_f32(found + j * 4), ld_f32(found + 32 + j * 4)
        if a > largest_a:
            largest_a = a
        if b > largest_b:
            largest_b = b
    inverse_a = inverse_b = float32(0.0)
    if largest_a > float32(0.0):
        inverse_a = float32(63.0) / largest_a
    if largest_b > float32(0.0):
        inverse_b = float32(63.0) / largest_b
    d_a = f32_to_f16(y, largest_a / float32(63.0))
    d_b = f32_to_f16(y + block_bytes, largest_b / float32(63.0))
    most = splat_f32x16(float32(63.0))
    step = cvt_f32x16(
        round_to_byte(concat(splat_f32x8(inverse_a), splat_f32x8(inverse_b)) * ld_f32x16(found))
    )
    step = sel_lt(step, most, step, most)
    st(steps, cvt_i32x16(step))
    st(rounded, concat(splat_f32x8(d_a), splat_f32x8(d_b)) * step)


@jit
def _pack_scales(steps, y):
    """Scales and minima of a block into 12 bytes; drawn in gguf_tools/quants/k_scales.py."""
    for j in range(4):
        low_scale, high_scale = int64(ld_i32(steps + j * 4)), int64(ld_i32(steps + 16 + j * 4))
        low_minimum = int64(ld_i32(steps + 64 + j * 4))
        high_minimum = int64(ld_i32(steps + 80 + j * 4))
        st_u8(y + j, low_scale | (high_scale >> 4 << 6))
        st_u8(y + 4 + j, low_minimum | (high_minimum >> 4 << 6))
        st_u8(y + 8 + j, (high_scale & 15) | ((high_minimum & 15) << 4))


@jit
def _unpack_scale(packed, g):
    """Scale and minimum of group g as they are read: whole numbers of 6 bits."""
    if g < 4:
        return int64(ld_u8(packed + g)) & 63, int64(ld_u8(packed + 4 + g)) & 63
    low = int64(ld_u8(packed + 4 + g))
    scale = (low & 15) | ((int64(ld_u8(packed + g - 4)) >> 6) << 4)
    return scale, (low >> 4) | ((int64(ld_u8(packed + g)) >> 6) << 4)
