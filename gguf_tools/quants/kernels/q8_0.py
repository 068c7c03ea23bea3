"""Q8_0, block by block: the largest magnitude needs no order."""

from gguf_tools.jit import jit, kernel
from gguf_tools.quants.kernels.lanes import only_small
from gguf_tools.simd import (
    bits_f32x16,
    bits_i32x16,
    cvt_i8x16,
    cvt_i32x16,
    f32_to_f16,
    float32,
    hmax,
    int32,
    ld_f32x16,
    sel_lt,
    splat_f32x16,
    splat_i32x16,
    st,
    vfabs,
    vtrunc,
    zero_f32x16,
)

GROUP = 1
SCRATCH = 0


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    for b in range(n_blocks):
        low, high = ld_f32x16(x + b * 128), ld_f32x16(x + b * 128 + 64)
        a, c = vfabs(low), vfabs(high)
        d = hmax(sel_lt(a, c, c, a)) / float32(127.0)
        inverse = float32(0.0)
        if d != float32(0.0):
            inverse = float32(1.0) / d
        y = data + b * 34
        f32_to_f16(y, d)
        st(y + 2, round_half_away(low * splat_f32x16(inverse)))
        st(y + 18, round_half_away(high * splat_f32x16(inverse)))


@jit
def round_half_away(x):
    """C's roundf, as bytes."""
    whole = vtrunc(x)
    sign = bits_i32x16(x) & splat_i32x16(int32(-2147483648))
    one = bits_f32x16(bits_i32x16(splat_f32x16(float32(1.0))) | sign)
    half = splat_f32x16(float32(0.5))
    whole = whole + sel_lt(vfabs(x - whole), half, zero_f32x16(), one)
    return cvt_i8x16(cvt_i32x16(only_small(whole)))
