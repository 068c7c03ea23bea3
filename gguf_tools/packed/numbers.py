"""Numbers of few bits: small floats by table, and integers packed one behind the other."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gguf_tools.safetensors_file import Bytes, Floats, LazyTensor

INTEGERS = {"I8": "<i1", "U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
FLOATS = ("F32", "F16", "BF16")


def _small_floats(n_mantissa: int, bias: int) -> Floats:
    """All 256 floats of a sign, an exponent and n_mantissa bits, as if none were special."""
    codes = np.arange(256)
    exponents = codes >> n_mantissa & (1 << (7 - n_mantissa)) - 1
    fractions = (codes & (1 << n_mantissa) - 1) / (1 << n_mantissa)
    magnitudes = np.where(
        exponents == 0,
        np.ldexp(fractions, 1 - bias),
        np.ldexp(1 + fractions, exponents - bias),
    )
    return np.where(codes < 128, magnitudes, -magnitudes).astype(np.float32)


def _e4m3() -> Floats:
    """Without infinities: only the largest magnitude is no number (OCP 8-bit floats, E4M3)."""
    table = _small_floats(3, 7)
    table[[0x7F, 0xFF]] = np.nan
    return table


def _e5m2() -> Floats:
    table = _small_floats(2, 15)
    table[[0x7C, 0xFC]] = np.inf, -np.inf
    table[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return table


def _e8m0() -> Floats:
    """Powers of two from 2^-127 (OCP microscaling formats)."""
    table = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    table[255] = np.nan
    return table


with np.errstate(over="ignore"):
    TABLES = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2(), "F8_E8M0": _e8m0()}
_HALVES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([_HALVES, -_HALVES])  # by code


def unpack_integers(data: Bytes, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` integers of each row: element i is the bits from i * bits on.

    `data` (n, n_bytes) are little-endian words of any size, `bits` is from 1 to 8.
    """
    n = len(data)
    mask = np.uint8((1 << bits) - 1)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (data[:, :, None] >> shifts & mask).reshape(n, -1)[:, :count]
    short = -data.shape[1] % bits
    if short:
        data = np.pad(data, ((0, 0), (0, short)))
    eights = np.zeros((n, data.shape[1] // bits), np.uint64)  # eight integers are `bits` bytes
    for i in range(bits):
        eights |= data[:, i::bits].astype(np.uint64) << np.uint64(8 * i)
    shifts_wide = np.arange(0, 8 * bits, bits, dtype=np.uint64)
    return (eights[:, :, None] >> shifts_wide).astype(np.uint8).reshape(n, -1)[:, :count] & mask


def read_integers(tensor: LazyTensor, first: int, last: int) -> npt.NDArray[np.int64]:
    """Rows of a tensor of whole numbers, small enough to be widened: (n, row_length)."""
    return read_words(tensor, first, last).astype(np.int64)


def read_words(tensor: LazyTensor, first: int, last: int) -> npt.NDArray[np.generic]:
    """Rows of a tensor of whole numbers in its own type."""
    assert tensor.raw is not None
    words: npt.NDArray[np.generic] = tensor.raw(first, last).view(INTEGERS[tensor.dtype])
    return words


def as_floats(tensor: LazyTensor) -> LazyTensor:
    """A tensor of integers, of small floats or of floats: its numbers as float32."""
    if tensor.dtype in FLOATS:
        return tensor
    load: Callable[[int, int], Floats]
    if tensor.dtype in TABLES:
        table = TABLES[tensor.dtype]

        def load(first: int, last: int) -> Floats:
            assert tensor.raw is not None
            return table[tensor.raw(first, last)]
    else:

        def load(first: int, last: int) -> Floats:
            return read_words(tensor, first, last).astype(np.float32)

    return LazyTensor(tensor.name, tensor.shape, "F32", load)
