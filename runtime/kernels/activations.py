"""Activations as bytes: the quantisers that feed matvec kernels and the matrix tile.

A row of float32 becomes int8 with one scale per 32 values, rounded half to even:
q = round(x * 127 / max|x|), x ~ d * q with d = max|x| / 127. Behind the bytes are the scales, and
the sums that take zero points and minima out of a dot product.

ggml gives the K formats one scale per 256 activations (Q8_K). One per 32 costs a kernel nothing
and halves the error: SmolLM2's logits, Q4_K_M, at 512 positions of prose, agree with float32 by a
mean cosine of 0.9992 instead of 0.9988.

For one token (matvec), k values at xq. Formats with scales for 32 weights read

    q[k rounded up to 128] | (d, d * sum)[k/32] f32

and those with scales for 16 weights

    q[k] | d[k/16] f32, each twice | sum of 16[k/16] f32

The bytes are in the order in which a format's weights come out of their blocks, so that weights
need no shuffle:

    BYTES     as they are
    HALVES    in 128, the low halves of the four groups of 32, then their high halves
    NIBBLES   in 256, the low halves of groups 0 2 4 6, those of 1 3 5 7, then the high halves
    PAIRS     in 256, groups 0 4 1 5 2 6 3 7

Where k is no multiple of 128, the last four groups of 32 are in the place of the last 128 (BYTES
and HALVES), with pairs (0, 0) for those that the 128 before have already.
"""

from dataclasses import dataclass

from gguf_tools.jit import Kernel, jit, kernel
from gguf_tools.simd import (
    cvt_i8x16,
    cvt_i32x16,
    float32,
    hmax_abs,
    hsum,
    ld_f32x16,
    splat_f32x16,
    st,
    st_f32,
    vrint,
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
def inverse_of(largest):
    """127 / largest; 0 where that would be infinite."""
    inverse = float32(0.0)
    if largest > float32(1e-30):
        inverse = float32(127.0) / largest
    return inverse


_BYTES, _HALVES, _NIBBLES, _PAIRS = range(4)


@jit
def _place(order, i):
    """Where the low half of the i-th group of 32 lies, and how far behind it the high half."""
    if order == _HALVES:
        return 128 * (i >> 2) + 16 * (i & 3), 64
    if order == _NIBBLES:
        return 256 * (i >> 3) + 64 * (i & 1) + 8 * (i & 6), 128
    if order == _PAIRS:
        return 256 * (i >> 3) + 64 * (i & 3) + 8 * (i & 4), 16
    return 32 * i, 16


@jit
def quantise_group(x, low_place, high_place):
    """32 values: their bytes to two places; d and both halves as integers."""
    low = ld_f32x16(x)
    high = ld_f32x16(x + 64)
    largest = hmax_abs(low, high)
    inverse = splat_f32x16(inverse_of(largest))
    low_q = cvt_i32x16(vrint(low * inverse))
    high_q = cvt_i32x16(vrint(high * inverse))
    st(low_place, cvt_i8x16(low_q))
    st(high_place, cvt_i8x16(high_q))
    return largest / float32(127.0), low_q, high_q


@jit
def _quantise_32(x, xq, k, order):
    n_groups = k // 32
    pairs = xq + ((k + 127) & ~127)
    for four in range(0, n_groups, 4):
        first = max(0, min(four, n_groups - 4))
        for j in range(min(4, n_groups)):
            place, apart = _place(order, four + j)
            source = x + (first + j) * 128
            d, low, high = quantise_group(source, xq + place, xq + place + apart)
            if first + j < four:
                d = float32(0.0)
            st_f32(pairs + (four + j) * 8, d)
            st_f32(pairs + (four + j) * 8 + 4, d * float32(hsum(low + high)))


@jit
def _quantise_16(x, xq, k, order):
    scales = xq + k
    sums = scales + k // 4
    for i in range(k // 32):
        place, apart = _place(order, i)
        d, low, high = quantise_group(x + i * 128, xq + place, xq + place + apart)
        st_f32(scales + i * 8, d)
        st_f32(scales + i * 8 + 4, d)
        st_f32(sums + i * 8, float32(hsum(low)))
        st_f32(sums + i * 8 + 4, float32(hsum(high)))


@kernel("iii")
def quantise_bytes_32(x, xq, k):
    _quantise_32(x, xq, k, _BYTES)


@kernel("iii")
def quantise_halves_32(x, xq, k):
    _quantise_32(x, xq, k, _HALVES)


@kernel("iii")
def quantise_nibbles_32(x, xq, k):
    _quantise_32(x, xq, k, _NIBBLES)


@kernel("iii")
def quantise_bytes_16(x, xq, k):
    _quantise_16(x, xq, k, _BYTES)


@kernel("iii")
def quantise_pairs_16(x, xq, k):
    _quantise_16(x, xq, k, _PAIRS)


FLOATS = Activation("FLOATS", 1, None, 0)
BYTES_32 = Activation("BYTES_32", 32, quantise_bytes_32, 8)
HALVES_32 = Activation("HALVES_32", 32, quantise_halves_32, 8)
NIBBLES_32 = Activation("NIBBLES_32", 256, quantise_nibbles_32, 64)
BYTES_16 = Activation("BYTES_16", 256, quantise_bytes_16, 128)
PAIRS_16 = Activation("PAIRS_16", 256, quantise_pairs_16, 128)
