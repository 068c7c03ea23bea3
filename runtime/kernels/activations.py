"""Activations as bytes: the quantisers that feed matvec kernels and the matrix tile.

A row of float32 becomes int8 with one scale per 32 values, rounded half to even:
q = round(x * 127 / max|x|), x ~ d * q with d = max|x| / 127. What a kernel needs besides (sums
that cancel zero points and minima) is stored behind the bytes. Some kernels want the bytes in
another order, so that nibbles need no shuffle.

ggml gives the K formats one scale per 256 activations (Q8_K). One per 32 costs a kernel nothing
and halves the error: SmolLM2's logits, Q4_K_M, at 512 positions of prose, agree with float32 by a
mean cosine of 0.9992 instead of 0.9988.

For one token (matvec), k values at xq:

    BYTES_32      q[k] | d[k/32] f32 | corr[k/32][8] i32: -128 * sum of 4 bytes | (d, d*sum)[k/32]
    NIBBLES_32    q[k] | (d, d*sum)[k/32] f32
    BYTES_256     q[k] | d[k/32] f32 | sums of 32: [k/32] f32 | sums of 16: [k/16] f32
    NIBBLES_256   as BYTES_256, and so are HALVES_256 and PAIRS_256

k is rounded up to 128 for the bytes of the 32-kinds. NIBBLES_32 and HALVES_256 store the low
halves of four groups of 32, then their high halves; NIBBLES_256 stores the groups of 32 in the
order 0 2 1 3, 4 6 5 7; PAIRS_256 in the order 0 4 1 5 2 6 3 7.
"""

from dataclasses import dataclass

from numba import float32, int8, int32

from gguf_tools.jit import Kernel, jit, kernel
from gguf_tools.simd import (
    concat,
    cvt_i8x16,
    cvt_i32x16,
    dpbusd,
    hmax,
    hsum,
    ld_f32x16,
    splat_f32x16,
    splat_i8x32,
    splat_i32x8,
    st,
    st_f32,
    vfabs,
    vmax,
    vrint,
    zero_f32x16,
    zero_i32x8,
)


@dataclass(frozen=True, eq=False)
class Activation:
    """A form of the activations for matvec kernels."""

    name: str
    block: int  # k must be a multiple
    quantise: Kernel | None  # (x, xq, k); None: the kernel reads the float32 row itself
    bytes_per_block: int  # at least; see `size`

    def size(self, k: int) -> int:
        """Bytes for k values, with room for whole vectors past the end."""
        return (k + 255) // 256 * 256 + (k // self.block + 1) * self.bytes_per_block + 128


@jit
def _scale(x, n):
    """max|x| of n values (a multiple of 32)."""
    largest = zero_f32x16()
    for i in range(0, n, 16):
        largest = vmax(largest, vfabs(ld_f32x16(x + i * 4)))
    return hmax(largest)


@jit
def inverse_of(largest):
    """127 / largest; 0 where that would be infinite."""
    inverse = float32(0.0)
    if largest > float32(1e-30):
        inverse = float32(127.0) / largest
    return inverse


@kernel("iii")
def quantise_bytes_32(x, xq, k):
    n_blocks = k // 32
    scales = xq + ((k + 127) & ~127)
    corrections = scales + n_blocks * 4
    pairs = corrections + n_blocks * 32
    for b in range(n_blocks):
        largest = _scale(x + b * 128, 32)
        inverse = splat_f32x16(inverse_of(largest))
        d = largest / float32(127.0)
        low = cvt_i32x16(vrint(ld_f32x16(x + b * 128) * inverse))
        high = cvt_i32x16(vrint(ld_f32x16(x + b * 128 + 64) * inverse))
        q = concat(cvt_i8x16(low), cvt_i8x16(high))
        st(xq + b * 32, q)
        fours = dpbusd(zero_i32x8(), splat_i8x32(int8(1)), q)
        st(corrections + b * 32, fours * splat_i32x8(int32(-128)))
        st_f32(scales + b * 4, d)
        st_f32(pairs + b * 8, d)
        st_f32(pairs + b * 8 + 4, d * float32(hsum(low + high)))


@kernel("iii")
def quantise_nibbles_32(x, xq, k):
    pairs = xq + ((k + 127) & ~127)
    for b in range(k // 32):
        largest = _scale(x + b * 128, 32)
        inverse = splat_f32x16(inverse_of(largest))
        d = largest / float32(127.0)
        low = cvt_i32x16(vrint(ld_f32x16(x + b * 128) * inverse))
        high = cvt_i32x16(vrint(ld_f32x16(x + b * 128 + 64) * inverse))
        place = xq + (b // 4) * 128 + (b % 4) * 16
        st(place, cvt_i8x16(low))
        st(place + 64, cvt_i8x16(high))
        st_f32(pairs + b * 8, d)
        st_f32(pairs + b * 8 + 4, d * float32(hsum(low + high)))


_NATURAL, _NIBBLES, _HALVES, _PAIRS = range(4)


@jit
def _place(order, j):
    """Where in its block the low half of group j lies, and how far behind it the high half."""
    if order == _NIBBLES:
        return 32 * ((j & 4) | ((j & 1) << 1) | ((j >> 1) & 1)), 16
    if order == _HALVES:
        return 128 * (j >> 2) + 16 * (j & 3), 64
    if order == _PAIRS:
        return 32 * (2 * (j & 3) | (j >> 2)), 16
    return 32 * j, 16


@jit
def _quantise_256(x, xq, k, order):
    scales = xq + k
    sums32 = scales + k // 8
    sums16 = sums32 + k // 8
    for b in range(k // 256):
        for j in range(8):
            group = b * 8 + j
            source = x + group * 128
            largest = _scale(source, 32)
            inverse = splat_f32x16(inverse_of(largest))
            low = cvt_i32x16(vrint(ld_f32x16(source) * inverse))
            high = cvt_i32x16(vrint(ld_f32x16(source + 64) * inverse))
            low_sum = float32(hsum(low))
            high_sum = float32(hsum(high))
            st_f32(scales + group * 4, largest / float32(127.0))
            st_f32(sums32 + group * 4, low_sum + high_sum)
            st_f32(sums16 + group * 8, low_sum)
            st_f32(sums16 + group * 8 + 4, high_sum)
            place, apart = _place(order, j)
            st(xq + b * 256 + place, cvt_i8x16(low))
            st(xq + b * 256 + place + apart, cvt_i8x16(high))


@kernel("iii")
def quantise_bytes_256(x, xq, k):
    _quantise_256(x, xq, k, _NATURAL)


@kernel("iii")
def quantise_nibbles_256(x, xq, k):
    _quantise_256(x, xq, k, _NIBBLES)


@kernel("iii")
def quantise_halves_256(x, xq, k):
    _quantise_256(x, xq, k, _HALVES)


@kernel("iii")
def quantise_pairs_256(x, xq, k):
    _quantise_256(x, xq, k, _PAIRS)


FLOATS = Activation("FLOATS", 1, None, 0)
BYTES_32 = Activation("BYTES_32", 32, quantise_bytes_32, 4 + 32 + 8)
NIBBLES_32 = Activation("NIBBLES_32", 32, quantise_nibbles_32, 8)
BYTES_256 = Activation("BYTES_256", 256, quantise_bytes_256, 32 + 32 + 64)
NIBBLES_256 = Activation("NIBBLES_256", 256, quantise_nibbles_256, 32 + 32 + 64)
HALVES_256 = Activation("HALVES_256", 256, quantise_halves_256, 32 + 32 + 64)
PAIRS_256 = Activation("PAIRS_256", 256, quantise_pairs_256, 32 + 32 + 64)
