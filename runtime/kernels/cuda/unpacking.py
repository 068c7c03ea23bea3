"""Helpers of the functions that unpack blocks (blocks_32.py, blocks_k.py), and what they promise.

On a GPU the fields of a matrix's blocks lie apart, in planes: the first field of all blocks, then
the next of all (`Unpacking.planes`). Blocks of 18, 34 or 210 bytes begin anywhere; fields by
themselves begin where 16, 8 or 4 bytes are loaded at once, and lanes that read neighbours read
neighbouring bytes. A plane has room for a multiple of 16 blocks.

A lane reads quantised weights in units of 32. `fetch(w, base, n, block, part)`, where the matrix
begins at byte `base` and has room for n blocks, reads unit `part` of a block as words; of these
`decode(raw, part)` gives twice 4 words, which are 16 bytes of weights, and of these runs of 16 the
two scales and the two offsets:

    weight = scale * byte + offset

The first is run `first_run(part)` of the block, the other lies `apart` runs further: one byte of a
packed format holds weights that lie apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import float32, int32

from gguf_tools.compiler import helper
from runtime.kernels.cuda.primitives import funnel, permute

BITS_4, BITS_2, BITS_1 = 0x0F0F0F0F, 0x03030303, 0x01010101  # of every byte


@dataclass(frozen=True, eq=False)
class Unpacking:
    """How a lane reads a format of blocks."""

    fetch: Any
    decode: Any
    planes: tuple[tuple[int, int], ...]  # first byte of each in a block, and how many
    size: int  # weights of a block
    apart: int  # from a unit's first run to its other
    has_offset: bool  # whether any offset may differ from 0
    per_scale: int = 32  # weights that share a scale and an offset: 32 or 16

    @property
    def block_bytes(self) -> int:
        return sum(width for _, width in self.planes)

    def places(self, n: int) -> Iterator[tuple[int, int, int]]:
        """Of each plane of n blocks: its first byte in a block, how many, and where it begins."""
        at = 0
        for first, width in self.planes:
            yield first, width, at
            at += n * width


@helper
def first_run(part, apart):
    """The run of 16 weights of a block that a unit begins with."""
    return part + (part & -apart)


@helper
def turned(word, shift):
    """A word shifted right by 0 to 31 bits, and its low bits above: for those that a mask keeps.

    numba shifts by what is not constant in 64 bits.
    """
    return funnel(word, word, shift)


@helper
def masked(q, shift, mask):
    """Bits of each byte of four words, from bit `shift` of the words."""
    return (
        turned(q[0], shift) & mask,
        turned(q[1], shift) & mask,
        turned(q[2], shift) & mask,
        turned(q[3], shift) & mask,
    )


@helper
def joined(q, higher, shift):
    """The bytes of four words, with others above bit `shift`."""
    return (
        q[0] | higher[0] << shift,
        q[1] | higher[1] << shift,
        q[2] | higher[2] << shift,
        q[3] | higher[3] << shift,
    )


@helper
def small(number):
    """A whole number of 32 bits as float32; of 64 bits, which numba makes of them, that is slow."""
    return float32(int32(number))


@helper
def fifth_bits(bits, first):
    """Bits `first` to `first` + 3, each as bit 4 of a byte."""
    return (((bits >> first) & 15) * 0x00204081 & BITS_1) << 4


@helper
def look_up(q, table):
    """The levels of 8 nibbles in a table of 16 int8: those of the low halves, of the high ones."""
    within, half = q & 0x77777777, turned(q, 1) & 0x44444444 | 0x32103210
    near = _look_up_4(within, half, table)
    far = _look_up_4(turned(within, 16), turned(half, 16), table)
    return permute(near, far, 0x6420), permute(near, far, 0x7531)


@helper
def _look_up_4(within, half, table):
    """The levels of four nibbles: places in both halves of the table, and whose of four pairs."""
    low = permute(table[0], table[1], within)
    high = permute(table[2], table[3], within)
    return permute(low, high, half)


def table_words(levels):
    """16 levels as the four words that `look_up` takes."""
    packed = np.asarray(levels, np.int8).view("<i4")
    return tuple(int(word) for word in packed)
