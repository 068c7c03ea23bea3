"""F16: IEEE halves, rounded half to even; a NaN keeps only its sign."""

from gguf_tools.jit import kernel
from gguf_tools.simd import (
    bits_i16x16,
    bits_i32x16,
    cvt_f16x16,
    cvt_i16x16,
    int16,
    int32,
    ld_f32x16,
    splat_i16x16,
    splat_i32x16,
    st,
    zero_i32x16,
)

GROUP = 16
SCRATCH = 0


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    infinity = splat_i32x16(int32(0x7F800000))
    magnitude = splat_i32x16(int32(0x7FFFFFFF))
    payload = splat_i16x16(int16(0x01FF))
    ones = splat_i16x16(int16(-1))
    for i in range(0, n_blocks, 16):
        weights = ld_f32x16(x + i * 4)
        above = (infinity - (bits_i32x16(weights) & magnitude)) >> 31  # 1 for a NaN
        erase = cvt_i16x16(zero_i32x16() - above) & payload
        half = bits_i16x16(cvt_f16x16(weights))
        st(data + i * 2, half & (erase ^ ones))
