"""Tables of operations: which are claimed together, and which wait for which.

Each operation says which buffers it reads and writes and how it is shared out. `Table.add` compares
that with what came since the last wait: an operation that is shared out as the one before it and
touches nothing that another thread may be using joins that one's group (a sum or gate after its
product: the thread that claims columns does both); one that may meet another thread's work waits
for it to be done; else it is claimed on its own, without waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gguf_tools.jit import Kernel
from runtime.kernels.interpreter import ARGUMENTS, HEADER

# How an operation's work on a buffer is shared out. Two operations of a group that share a buffer
# out in the same way touch the same part of it. WHOLE: any unit may touch any part.
WHOLE = "whole"


@dataclass(frozen=True)
class Access:
    buffer: str
    sharing: str
    writes: bool


def reads(buffer: str, sharing: str = WHOLE) -> Access:
    return Access(buffer, sharing, writes=False)


def writes(buffer: str, sharing: str) -> Access:
    return Access(buffer, sharing, writes=True)


def columns(width: int) -> str:
    return f"columns of {width}"


def items(per_token: int) -> str:
    return f"{per_token} items a token"


@dataclass(frozen=True)
class Units:
    """How an operation's work is cut: its number of units, and about how many parts are claimed.

    There are fixed + per_token * tokens + per_chunk * chunks units, where chunks are attention's
    pieces of a KV head's work. With no parts every thread does all of it, in memory of its own.
    """

    fixed: int = 0
    per_token: int = 0
    per_chunk: int = 0
    parts: int = 0


@dataclass
class Table:
    """Operations for `run_table`, grouped, with waits where they are needed."""

    rows: list[list[int]] = field(default_factory=list)
    _pending: list[tuple[int, Access]] = field(default_factory=list)  # with its group's leader
    _since: int = 0  # where what is pending begins
    _leader: int = -1  # the operation whose group the next may join
    _sharing: str = ""  # of that group

    def add(
        self,
        kernel: Kernel,
        arguments: Iterable[int | float],
        accesses: Iterable[Access],
        units: Units,
        sharing: str = "",
    ) -> None:
        """Append an operation; those in a row with the same `sharing` may be claimed together."""
        accesses = list(accesses)
        joins = bool(sharing) and sharing == self._sharing and self._leader >= self._since
        if any(self._meets(access, joins=joins) for access in accesses):
            wait, joins = self._since, False
            self._pending.clear()
            self._since = len(self.rows)
        else:
            wait = -1
        leader = self._leader if joins else len(self.rows)
        self._pending.extend((leader, access) for access in accesses)
        if joins:
            self.rows[self._leader][2] += 1
        else:
            self._leader, self._sharing = len(self.rows), sharing
        cut = (units.fixed, units.per_token, units.per_chunk, units.parts)
        header = [kernel.address, wait, 0 if joins else 1, *cut, 0]
        row = [*header, *(_word(a) for a in arguments)]
        self.rows.append(row + [0] * (HEADER + ARGUMENTS - len(row)))

    def _meets(self, new: Access, *, joins: bool) -> bool:
        """Whether an access may meet another thread's that is not waited for yet."""
        for leader, old in self._pending:
            if old.buffer != new.buffer or not (old.writes or new.writes):
                continue
            same_part = old.sharing == new.sharing != WHOLE
            if not (joins and leader == self._leader and same_part):
                return True
        return False

    def array(self) -> npt.NDArray[np.int64]:
        return np.array(self.rows, np.int64).reshape(-1, HEADER + ARGUMENTS)


def _word(argument: int | float) -> int:
    """An argument as the interpreter finds it: int64, or float32 bits in the low half."""
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.uint32))
    return int(argument)
