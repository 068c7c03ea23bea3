"""Q4_K and Q5_K up to their levels: two blocks at once, which are 16 groups of 32."""

from numba import float32, int64

from gguf_tools.jit import jit
from gguf_tools.quants.kernels.lanes import round_level, round_to_byte, turn
from gguf_tools.quants.kernels.search import fit_scale_and_minimum
from gguf_tools.simd import (
    concat,
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    ld_f32,
    ld_f32x16,
    ld_i32,
    sel_lt,
    splat_f32x8,
    splat_f32x16,
    st,
    st_u8,
    vfabs,
    vsqrt,
    zero_f32x16,
)

GROUP = 2
LEVELS = 3 * 2048 + 8 * 64  # where in the scratch memory the levels of both blocks begin, bytes
SCRATCH = LEVELS + 512


@jit
def fit_two(x, y, block_bytes, scratch, top, first, n_trials):
    """Store d, dmin and the scales of two blocks; leave their levels at scratch + LEVELS."""
    turned, weights, work = scratch, scratch + 2048, scratch + 4096
    result = scratch + 6144  # scale, minimum, inverse scale, lowest value of each group
    d, dmin = result + 256, result + 320  # what the levels of each group are multiplied with
    steps = result + 384  # scales, then minima, as whole numbers of 6 bits
    zero, most = zero_f32x16(), splat_f32x16(float32(top))
    turn(x, 128, 32, turned)
    squares = zero
    for i in range(32):
        v = ld_f32x16(turned + i * 64)
        squares += v * v
    mean = vsqrt(squares / splat_f32x16(float32(32.0)))
    for i in range(32):
        st(weights + i * 64, mean + vfabs(ld_f32x16(turned + i * 64)))
    fit_scale_and_minimum(turned, weights, work, result, 32, top, first, n_trials, False)
    _store_scales(result, d, steps, y, block_bytes)
    _store_scales(result + 64, dmin, steps + 64, y + 2, block_bytes)
    _pack_scales(steps, y + 4)
    _pack_scales(steps + 32, y + block_bytes + 4)
    for g in range(16):
        scale, minimum = ld_f32(d + g * 4), splat_f32x16(ld_f32(dmin + g * 4))
        for half in range(2):
            v = ld_f32x16(x + g * 128 + half * 64)
            if scale != float32(0.0):
                level = (v + minimum) / splat_f32x16(scale)
            else:  # the levels of the search
                lowest = splat_f32x16(ld_f32(result + 192 + g * 4))
                level = splat_f32x16(ld_f32(result + 128 + g * 4)) * (v - lowest)
            level = round_level(level, zero, most)
            st(scratch + LEVELS + g * 32 + half * 16, cvt_i8x16(cvt_i32x16(level)))


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
