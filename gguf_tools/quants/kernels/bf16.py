"""BF16: the upper half of a float32, rounded half to even; a NaN gets its quiet bit."""

from gguf_tools.jit import kernel
from gguf_tools.simd import cvt_i16x16, int32, ld_i32x16, splat_i32x16, st

GROUP = 16
SCRATCH = 0


@kernel("iiii")
def quantize(x, data, n_blocks, scratch):
    infinity = splat_i32x16(int32(0x7F800000))
    magnitude = splat_i32x16(int32(0x7FFFFFFF))
    half = splat_i32x16(int32(0x7FFF))
    one = splat_i32x16(int32(1))
    for i in range(0, n_blocks, 16):
        bits = ld_i32x16(x + i * 4)
        is_nan = (infinity - (bits & magnitude)) >> 31  # 1 or 0
        carry = (half + ((bits >> 16) & one)) & (is_nan - one)
        rounded = ((bits + carry) >> 16) | (is_nan << 6)
        st(data + i * 2, cvt_i16x16(rounded))
