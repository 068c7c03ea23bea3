"""Q3_K: a block is 16 groups of 16, one in each lane."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.lanes import pack_two_bits, round_level, round_to_byte, turn
from gguf_tools.quants.kernels.search import TINY, fit_scale, fit_scale_by_turns
from gguf_tools.simd import (
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    float32,
    int8,
    int64,
    ld_f32,
    ld_f32x16,
    ld_i8x32,
    ld_i32,
    sel_lt,
    splat_f32x16,
    splat_i8x32,
    st,
    st_u8,
    transpose16,
    vfabs,
    zero_f32x16,
    zero_i8x32,
)

GROUP = 1
LEVELS_TURNED = 3 * 1024  # after the weights, their squares and their cubes
RESULT = LEVELS_TURNED + 1024
LEVELS = RESULT + 2 * 64
SCRATCH = LEVELS + 1024 + 256
WEIGHTED_GROUP = 16
OF_SIXTEEN = SCRATCH  # scales, inverse scales, weights, steps of the scales of 16 blocks
WEIGHTED_SCRATCH = OF_SIXTEEN + 4 * 1024


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    found, result = scratch + LEVELS_TURNED, scratch + RESULT
    of_search, levels = scratch + LEVELS, scratch + LEVELS + 1024
    for b in range(n_blocks):
        block, y = x + b * 1024, data + b * 110
        turn(block, 64, 16, scratch)
        fit_scale_by_turns(scratch, found, result, 16, 4)
        transpose16(found, 64, of_search, 64)
        _store_scales(result, result + 64, y)
        _make_levels(block, result + 64, of_search, levels)
        _pack(levels, y)


@kernel("iiiii")
def quantize_weighted(x, weights, data, n_blocks, scratch):
    result, rounded = scratch + RESULT, scratch + RESULT + 64
    of_search, levels = scratch + LEVELS, scratch + LEVELS + 1024
    scales = scratch + OF_SIXTEEN
    inverses, totals, steps = scales + 1024, scales + 2048, scales + 3072
    least, most = splat_f32x16(float32(-32.0)), splat_f32x16(float32(31.0))
    for first in range(0, n_blocks, 16):
        for b in range(16):
            turn(x + (first + b) * 1024, 64, 16, scratch)
            turn(weights + (first + b) * 1024, 64, 16, scratch + 1024)
            fit_scale(scratch, result, 16, 4, False)
            total = zero_f32x16()
            for i in range(16):
                total += ld_f32x16(scratch + 1024 + i * 64)
            st(scales + b * 64, ld_f32x16(result))
            st(inverses + b * 64, ld_f32x16(result + 64))
            st(totals + b * 64, total)
        transpose16(scales, 64, scratch, 64)
        transpose16(totals, 64, scratch + 1024, 64)
        fit_scale(scratch, result, 16, 32, True)
        inverse = ld_f32x16(result + 64)
        magnitude = zero_f32x16()
        for i in range(16):
            v = vfabs(ld_f32x16(scratch + i * 64))
            magnitude = sel_lt(magnitude, v, v, magnitude)
        for i in range(16):
            step = round_level(inverse * ld_f32x16(scratch + i * 64), least, most)
            step = sel_lt(magnitude, splat_f32x16(TINY), least, step)  # of zeros
            st(scratch + 2048 + i * 64, step)
        transpose16(scratch + 2048, 64, steps, 64)
        st(totals, ld_f32x16(result))
        for b in range(16):
            block, y = x + (first + b) * 1024, data + (first + b) * 110
            d = f32_to_f16(y + 108, ld_f32(totals + b * 4))
            step = ld_f32x16(steps + b * 64)
            st(rounded, cvt_i32x16(step - least))
            _pack_scales(rounded, y + 96)
            st(rounded, splat_f32x16(d) * step)
            _levels_of_search(block, inverses + b * 64, of_search)
            _make_levels(block, rounded, of_search, levels)
            _pack(levels, y)


@jit
def _levels_of_search(block, inverses, of_search):
    least, most = splat_f32x16(float32(-4.0)), splat_f32x16(float32(3.0))
    for g in range(16):
        inverse = ld_f32(inverses + g * 4)
        level = least  # of zeros
        if inverse != float32(0.0):
            level = round_level(ld_f32x16(block + g * 64) * splat_f32x16(inverse), least, most)
        st(of_search + g * 64, level)


@jit
def _pack(levels, y):
    """The third bits, then the other two."""
    third = zero_i8x32()
    for i in range(8):
        third |= ((ld_i8x32(levels + i * 32) >> 2) & splat_i8x32(int8(1))) << i
    st(y, third)
    pack_two_bits(levels, y + 32)


@jit
def _store_scales(result, rounded, y):
    """Round 16 scales to 6 bits of a half; put what they now are at `rounded`."""
    largest = magnitude = float32(0.0)
    for g in range(16):
        scale = ld_f32(result + g * 4)
        if abs(scale) > magnitude:
            magnitude = abs(scale)
            largest = scale
    low, high = splat_f32x16(float32(-32.0)), splat_f32x16(float32(31.0))
    if largest != float32(0.0):
        inverse = float32(-32.0) / largest
        d = f32_to_f16(y + 108, float32(1.0) / inverse)
        # Through an int8, as in ggml.
        steps = cvt_i8x16(round_to_byte(splat_f32x16(inverse) * ld_f32x16(result)))
        steps = round_level(cvt_f32x16(steps), low, high)
    else:
        d = f32_to_f16(y + 108, float32(0.0))
        steps = low
    st(rounded, cvt_i32x16(steps - low))
    _pack_scales(rounded, y + 96)
    st(rounded, splat_f32x16(d) * steps)


@jit
def _pack_scales(rounded, y):
    """16 numbers of 6 bits into 12 bytes."""
    for j in range(8):
        first, second = ld_i32(rounded + j * 4), ld_i32(rounded + 32 + j * 4)
        st_u8(y + j, int64(first & 15) | (int64(second & 15) << 4))
    for j in range(4):
        bits = int64(0)
        for part in range(4):
            bits |= int64(ld_i32(rounded + part * 16 + j * 4) >> 4) << (2 * part)
        st_u8(y + 8 + j, bits)


@jit
def _make_levels(block, scales, of_search, levels):
    """256 levels of 0 to 7, bytes."""
    least, most = splat_f32x16(float32(-4.0)), splat_f32x16(float32(3.0))
    for g in range(16):
        scale = ld_f32(scales + g * 4)
        if scale != float32(0.0):
            level = round_level(ld_f32x16(block + g * 64) / splat_f32x16(scale), least, most)
        else:
            level = ld_f32x16(of_search + g * 64)
        st(levels + g * 16, cvt_i8x16(cvt_i32x16(level - least)))
