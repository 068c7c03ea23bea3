"""C's arithmetic in NumPy, where the two differ and a bit depends on it."""

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.quanttype import Array, Floats

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: a float this large has no fraction


def to_half(x: Floats) -> npt.NDArray[np.float16]:
    """float16, rounded half to even; too large is infinity, a NaN keeps only its sign."""
    half = x.astype(np.float16)
    bits = half.view(np.uint16)
    bits[np.isnan(half)] &= 0xFE00
    return half


def settle_nan(x: Floats) -> Floats:
    """x, with the sign set where it is no number.

    An undefined operation gives that on x86, where ggml's recorded answers come from, and a NaN
    without a sign on ARM: files must not depend on the processor.
    """
    return np.where(np.isnan(x), np.copysign(np.float32(np.nan), np.float32(-1)), x)


def nearest_int(x: Floats) -> npt.NDArray[np.int32]:
    """ggml's rounding of the K formats: half to even, by adding a magic number.

    Beyond 2^22 the bits of the sum are garbage, and the same garbage as ggml's: NaN gives 0,
    infinity -2^22.
    """
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def round_half_away(x: Floats) -> Floats:
    """C's roundf."""
    whole: Floats = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(np.float32(1), x), whole)


def low_byte(x: Floats) -> npt.NDArray[np.int32]:
    """(uint8_t) x of a float: towards zero; what an int cannot hold becomes 0."""
    fits = np.abs(x) < np.float32(2**31)
    return np.where(fits, x, np.float32(0)).astype(np.int32) & 0xFF


def ordered_sum(terms: Floats) -> Floats:
    """Sums along the last axis, added from left to right as a C loop does that starts with 0."""
    total: Floats = np.add.accumulate(terms, axis=-1)[..., -1] + np.float32(0)  # never -0
    return total


def first_largest(x: Floats) -> Floats:
    """The value of largest magnitude in each block (last axis), the first of equals, signed."""
    largest = magnitude = np.zeros(x.shape[:-1], np.float32)
    for column in np.moveaxis(x, -1, 0):
        larger = np.abs(column) > magnitude
        magnitude = np.where(larger, np.abs(column), magnitude)
        largest = np.where(larger, column, largest)
    return largest


def range_of(x: Floats) -> tuple[Floats, Floats]:
    """The smallest and the largest of each block (last axis), the first of equals (-0 and 0)."""
    low, high = x[..., 0], x[..., 0]
    for column in np.moveaxis(x, -1, 0)[1:]:
        low = np.where(column < low, column, low)
        high = np.where(column > high, column, high)
    return low, high


def inverse(x: Floats) -> Floats:
    """1 / x, and 0 for 0."""
    return np.where(x != 0, np.float32(1) / x, np.float32(0))


def join_nibbles(low: Array, high: Array) -> npt.NDArray[np.uint8]:
    """low | high << 4, as bytes."""
    joined: npt.NDArray[np.uint8] = (low | (high << 4)).astype(np.uint8)
    return joined
