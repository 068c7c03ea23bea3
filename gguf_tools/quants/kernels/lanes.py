"""What the quantisers share: 16 blocks or groups in the 16 lanes of a vector."""

import numpy as np

from gguf_tools.jit import jit
from gguf_tools.simd import (
    bits_f32x16,
    bits_i32x16,
    cvt_f16x16,
    float32,
    int8,
    int32,
    int64,
    ld_i8x32,
    ld_u16,
    sel_lt,
    splat_f32x16,
    splat_i8x32,
    splat_i32x16,
    st,
    st_i16,
    transpose16,
    vfabs,
    zero_f32x16,
)

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23


@jit
def round_level(x, low, high):
    """x rounded half to even as ggml does it (by adding MAGIC), held between two splats.

    Where x is beyond 2^22, infinite or not a number, the low 23 bits of the sum are garbage, and
    so they are in ggml; the upper bits are set to what they are for ordinary x.
    """
    magic = splat_f32x16(MAGIC)
    fraction = bits_i32x16(x + magic) & splat_i32x16(int32(0x7FFFFF))
    whole = bits_f32x16(fraction | splat_i32x16(int32(0x4B000000))) - magic
    return clamp(whole, low, high)


@jit
def round_small(x, low, high):
    """The same between two whole numbers, for x known to be below 2^22."""
    magic = splat_f32x16(MAGIC)
    low, high = splat_f32x16(MAGIC + float32(low)), splat_f32x16(MAGIC + float32(high))
    return clamp(x + magic, low, high) - magic


@jit
def clamp(x, low, high):
    """x of no NaN between two splats (one instruction each, which vmin and vmax are not)."""
    x = sel_lt(x, high, x, high)
    return sel_lt(low, x, x, low)


@jit
def round_to_byte(x):
    """The low byte of x rounded the same way, as lanes of int32."""
    # The whole number is the low 23 bits less 2^22, which changes nothing below bit 22.
    return bits_i32x16(x + splat_f32x16(MAGIC)) & splat_i32x16(int32(0xFF))


@jit
def only_small(x):
    """x, and 0 where a C cast to int would be undefined."""
    return sel_lt(vfabs(x), splat_f32x16(float32(2147483648.0)), x, zero_f32x16())


@jit
def settle_nan(x):
    """x, with the sign set where it is no number: the same on every processor."""
    bits = bits_i32x16(x)
    magnitude = bits & splat_i32x16(int32(0x7FFFFFFF))
    is_nan = splat_i32x16(int32(0x7F800000)) - magnitude  # negative for NaN
    return bits_f32x16(bits | (is_nan & splat_i32x16(int32(-0x80000000))))


@jit
def inverse(x):
    """1 / x, and 0 for 0."""
    return sel_lt(zero_f32x16(), vfabs(x), splat_f32x16(float32(1.0)) / x, x)


@jit
def turn(x, stride, n, turned):
    """Turn 16 groups of n weights, `stride` bytes apart, around: weight i of all at turned[i]."""
    for i in range(0, n, 16):
        transpose16(x + i * 4, stride, turned + i * 64, 64)


@jit
def store_halves(values, address, stride, scratch):
    """The 16 lanes as float16, `stride` bytes apart; uses 32 bytes of scratch."""
    st(scratch, cvt_f16x16(values))
    for i in range(16):
        st_i16(address + i * stride, int64(ld_u16(scratch + i * 2)))


@jit
def pack_two_bits(levels, y):
    """The low two bits of 256 bytes into 64, as Q2_K and Q3_K lay them out."""
    mask = splat_i8x32(int8(3))
    for h in range(2):
        at = levels + h * 128
        packed = ld_i8x32(at) & mask
        for part in range(1, 4):
            packed |= (ld_i8x32(at + part * 32) & mask) << (2 * part)
        st(y + h * 32, packed)
