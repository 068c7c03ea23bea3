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
from runtime.backends.cuda_room import Array, Room
from runtime.kernels.cuda.elementwise import carry
from runtime.program import Floats


class HostArrays:
    """The buffers that a stage is given and gives, and where a step begins, on the host."""

    def __init__(self, room: Room, n_rows: Mapping[str, int]) -> None:
        """`n_rows` tokens of the buffers of these names."""
        self._buffers = {name: room.buffers[name] for name in n_rows}
        self._state = room.state
        self._shared = {
            name: _shared(rows * room.buffers[name].stride, np.float32)
            for name, rows in n_rows.items()
        }
        self._shared_start = _shared(1, np.int32)
        # The same memory as NumPy knows it, which copies are made of.
        self._flat = {name: np.asarray(shared) for name, shared in self._shared.items()}
        self._start = np.asarray(self._shared_start)
        self._rows = {name: flat.reshape(n_rows[name], -1) for name, flat in self._flat.items()}

    def fill(self, values: Mapping[str, Floats], start: int) -> None:
        """Inputs of a step that begins at position `start`."""
        for name, rows in values.items():
            self._rows[name][: len(rows), : rows.shape[1]] = rows
        self._start[0] = start

    def rows(self, name: str, n: int, width: int) -> Floats:
        """A copy of what was fetched last."""
        return self._rows[name][:n, :width].copy()

    def clear(self, names: Iterable[str]) -> None:
        """Forget what was fetched."""
        for name in names:
            self._rows[name][:] = 0

    def send(self, names: Iterable[str], n: int) -> None:
        """Copy n tokens and their position to the GPU."""
        for name in names:
            size = n * self._buffers[name].stride
            self._buffers[name].array[:size].copy_to_device(self._flat[name][:size])
        self._state.copy_to_device(self._start)

    def fetch(self, names: Iterable[str], n: int) -> None:
        """Copy the first n tokens of buffers from the GPU."""
        for name in names:
            size = n * self._buffers[name].stride
            self._buffers[name].array[:size].copy_to_host(self._flat[name][:size])

    def sending(self, names: Iterable[str]) -> list[Launch]:
        """`send` of one token as launches."""
        carried = [
            _carry(self._shared[name], self._buffers[name].array, self._buffers[name].stride)
            for name in names
        ]
        return [*carried, _carry(self._shared_start, self._state, 1)]

    def fetching(self, names: Iterable[str]) -> list[Launch]:
        """`fetch` of one token as launches; it is there once the GPU has done them."""
        return [
            _carry(self._buffers[name].array, self._shared[name], self._buffers[name].stride)
            for name in names
        ]


def _shared(size: int, dtype: npt.DTypeLike) -> Array:
    # The simulator's mapped arrays are none of NumPy's; it can do with any.
    make: Any = cuda.pinned_array if config.ENABLE_CUDASIM else cuda.mapped_array
    made: Array = make(size, dtype)
    made[:] = 0
    return made


def _carry(source: Array, target: Array, n: int) -> Launch:
    threads = threads_for(n)
    return Launch(carry, (-(-n // threads), 1, 1), (threads, 1), (source, target, n))
