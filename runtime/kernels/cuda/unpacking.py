"""Helpers of the functions that unpack blocks (blocks_32.py, blocks_k.py), and what they promise.

A lane reads quantised weights in units of 32: `unpack(w, row, unit)`, where the row begins at byte
`row`, gives twice 4 words, which are 16 bytes of weights, and of these runs of 16 the two scales
and the two offsets:

    weight = scale * byte + offset

The first is run `first_run(unit)` of the row, the other lies `apart` runs further: one byte of a
packed format holds weights that lie apart.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_tools.compiler import helper
from runtime.kernels.cuda.primitives import funnel, load1, load4, permute

BITS_4, BITS_2, BITS_1 = 0x0F0F0F0F, 0x03030303, 0x01010101  # of every byte


@dataclass(frozen=True, eq=False)
class Unpacking:
    """How a lane reads a format of blocks."""

    unpack: Any
    apart: int  # from a unit's first run to its other
    has_offset: bool  # whether any offset may differ from 0
    per_scale: int = 32  # weights that share a scale and an offset: 32 or 16


@helper
def first_run(unit, apart):
    """The run of 16 weights that a unit begins with."""
    return unit + (unit & -apart)


@helper
def words(w, at):
    """Four words from any byte; up to 4 bytes behind them are read, too."""
    start = at & -4
    shift = 8 * (at & 3)
    a, b, c = load4(w, start), load4(w, start + 4), load4(w, start + 8)
    d, e = load4(w, start + 12), load4(w, start + 16)
    return funnel(a, b, shift), funnel(b, c, shift), funnel(c, d, shift), funnel(d, e, shift)


@helper
def signed_byte(w, at):
    """The int8 at a byte."""
    byte = load1(w, at)
    return byte - 256 if byte > 127 else byte


@helper
def fifth_bits(bits, first):
    """Bits `first` to `first` + 3, each as bit 4 of a byte."""
    return (((bits >> first) & 15) * 0x00204081 & BITS_1) << 4


@helper
def look_up(q, table):
    """The levels of 8 nibbles in a table of 16 int8: those of the low halves, of the high ones."""
    near = _look_up_4(q, table)
    far = _look_up_4(q >> 16, table)
    return permute(near, far, 0x6420), permute(near, far, 0x7531)


@helper
def _look_up_4(q, table):
    """The levels of four nibbles; a selector has three bits, the fourth chooses the half."""
    low = permute(table[0], table[1], q & 0x7777)
    high = permute(table[2], table[3], q & 0x7777)
    return permute(low, high, 0x3210 | (q & 0x8888) >> 1)


def table_words(levels):
    """16 levels as the four words that `look_up` takes."""
    packed = np.asarray(levels, np.int8).view("<i4")
    return tuple(int(word) for word in packed)
