"""What a format's blocks can hold, for quantisers that choose scales and levels themselves.

    weight = scale * level - minimum

`scale` and `minimum` belong to a group of neighbouring weights. A block of one group stores them
as float16; in a block of several they are whole multiples of two float16 numbers of the block,
d and dmin. The formats' own files draw how all that is laid out in bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.quanttype import Array, Floats

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Parts:
    """The numbers that n blocks are made of."""

    d: Floats  # (n,); what float16 holds
    dmin: Floats  # (n,); zeros where the format has no minimum
    scales: Ints  # (n, n_groups) multiples of d; ones where a block is one group
    minima: Ints  # (n, n_groups) multiples of dmin
    levels: Ints  # (n, block_size)


@dataclass(frozen=True)
class Levels:
    """Which numbers a block is made of, and the function that makes it."""

    lowest: int  # levels
    highest: int
    pack: Callable[[Parts], Array]  # -> n blocks
    group: int = 32  # weights that share a scale
    n_groups: int = 1  # in a block
    has_minimum: bool = False
    lowest_scale: int = 1  # multiples of d
    highest_scale: int = 1
    values: tuple[int, ...] = ()  # levels in order, where they are not all whole numbers between

    @property
    def block_size(self) -> int:
        return self.group * self.n_groups
