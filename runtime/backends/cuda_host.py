"""What passes between a GPU and the host: page-locked arrays that both can reach.

There are two ways. Copies take a call each; launches of `carry` let the GPU itself read and write
the host's arrays, and can be captured with the kernels of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import config, cuda

from runtime.backends.cuda_draft import Launch, threads_for
from runtime.backends.cuda_room import Array, Buffer, Room
from runtime.kernels.cuda.elementwise import carry
from runtime.program import Floats


class HostArrays:
    """The buffers that a stage is given and those that it gives, and where a step begins.

    A buffer that is both has an array for each: what was given is there until the next step.
    """

    def __init__(self, room: Room, given: Mapping[str, int], made: Mapping[str, int]) -> None:
        """Of the buffers of these names so many tokens."""
        self._given = {name: _Rows(room.buffers[name], n) for name, n in given.items()}
        self._made = {name: _Rows(room.buffers[name], n) for name, n in made.items()}
        self._state = room.state
        self._start = _shared(1, np.int32)

    def fill(self, values: Mapping[str, Floats], start: int) -> None:
        """Inputs of a step that begins at position `start`."""
        for name, rows in values.items():
            self._given[name].rows[: len(rows), : rows.shape[1]] = rows
        self._start[0] = start

    def rows(self, name: str, n: int, width: int) -> Floats:
        """A copy of what was fetched last."""
        return self._made[name].rows[:n, :width].copy()

    def clear(self, names: Iterable[str]) -> None:
        """Forget what was fetched."""
        for name in names:
            self._made[name].rows[:] = 0

    def send(self, names: Iterable[str], n: int) -> None:
        """Copy n tokens and their position to the GPU."""
        for name in names:
            on_gpu, on_host = self._given[name].first(n)
            on_gpu.copy_to_device(on_host)
        self._state.copy_to_device(np.asarray(self._start))

    def fetch(self, names: Iterable[str], n: int) -> None:
        """Copy the first n tokens of buffers from the GPU."""
        for name in names:
            on_gpu, on_host = self._made[name].first(n)
            on_gpu.copy_to_host(on_host)

    def sending(self, names: Iterable[str]) -> list[Launch]:
        """`send` of one token as launches."""
        pairs = [(self._given[name].shared, self._given[name].buffer) for name in names]
        carried = [_carry(shared, buffer.array, buffer.stride) for shared, buffer in pairs]
        return [*carried, _carry(self._start, self._state, 1)]

    def fetching(self, names: Iterable[str]) -> list[Launch]:
        """`fetch` of one token as launches; it is there once the GPU has done them."""
        pairs = [(self._made[name].shared, self._made[name].buffer) for name in names]
        return [_carry(buffer.array, shared, buffer.stride) for shared, buffer in pairs]


class _Rows:
    """Tokens of a buffer on the host."""

    def __init__(self, buffer: Buffer, n: int) -> None:
        self.buffer = buffer
        self.shared = _shared(n * buffer.stride, np.float32)
        # The same memory as NumPy knows it, which copies are made of.
        self.rows = np.asarray(self.shared).reshape(n, buffer.stride)

    def first(self, n: int) -> tuple[Array, Floats]:
        """The first n tokens on the GPU and here, flat."""
        return self.buffer.array[: n * self.buffer.stride], self.rows[:n].reshape(-1)


def _shared(size: int, dtype: npt.DTypeLike) -> Array:
    # The simulator's mapped arrays are none of NumPy's; it can do with any.
    make: Any = cuda.pinned_array if config.ENABLE_CUDASIM else cuda.mapped_array
    made: Array = make(size, dtype)
    made[:] = 0
    return made


def _carry(source: Array, target: Array, n: int) -> Launch:
    threads = threads_for(n)
    return Launch(carry, (-(-n // threads), 1, 1), (threads, 1), (source, target, n))
