"""A run of launches in the making: what they are made over, and those made so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.cuda_room import Array, Buffer, Memory, Room
from runtime.backends.flow import width_written, written_by
from runtime.program import Floats, Instruction, Matrix, RopeTable

THREADS, MOST_THREADS = 256, 1024  # of a block; where a token has but one block


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with its grid and arguments."""

    kernel: Any
    grid: tuple[int, int, int]
    block: tuple[int, int]
    arguments: tuple[Any, ...]
    shared: int = 0  # bytes that the kernel divides up itself

    def __call__(self, stream: Any = 0) -> None:
        self.kernel[self.grid, self.block, stream, self.shared](*self.arguments)


class Constants:
    """Arrays of a model on the GPU; they go there when first needed."""

    def __init__(self, room: Room, memory: Memory) -> None:
        self._room = room
        self._memory = memory
        self._angles: dict[int, tuple[RopeTable, Array, Array]] = {}

    def vector(self, values: Floats | None) -> Array:
        """A vector; for none, one that is not read."""
        return self._room.nothing if values is None else self._memory.hold(values)

    def weights(self, *matrices: Matrix) -> Array:
        """Matrices one after the other."""
        return self._memory.weights(matrices)

    def angles(self, table: RopeTable) -> tuple[Array, Array]:
        """Cosines and sines of all positions, (n_ctx * n_dims / 2)."""
        if table.n_dims < 2:
            return self._room.nothing, self._room.nothing
        known = self._angles.get(id(table))
        if known is None:
            cosines, sines = table.angles(np.arange(self._room.n_ctx))
            known = (table, self._memory.hold(cosines), self._memory.hold(sines))
            self._angles[id(table)] = known
        return known[1:]


class Draft:
    """Launches for n tokens, and what buffers hold at each step."""

    def __init__(
        self, room: Room, buffers: Mapping[str, Buffer], n: int, holding: Mapping[str, int]
    ) -> None:
        self.made: list[Launch] = []
        self.room = room
        self.n = n
        self.shapes = [cache.shape for cache in room.caches]
        self._buffers = buffers
        self._widths = dict(holding)

    def width(self, name: str) -> int:
        """Numbers per token in a buffer."""
        return self._widths.get(name, self.room.widths[name])

    def note(self, step: Instruction) -> None:
        """The launches for a step are there."""
        target, width = written_by(step), width_written(step, self.width, self.shapes)
        if target is not None and width is not None:
            self._widths[target] = width

    def buffer(self, name: str) -> Buffer:
        return self._buffers[name]

    def places(self, *names: str) -> tuple[Any, ...]:
        """Array and stride of each buffer."""
        found = (self._buffers[name] for name in names)
        return tuple(value for buffer in found for value in (buffer.array, buffer.stride))

    def total(self, name: str | None) -> tuple[Any, ...]:
        """Array and stride of a buffer that a kernel may add to, and whether it does."""
        return (self.room.nothing, 0, False) if name is None else (*self.places(name), True)

    def add(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int],
        arguments: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        self.made.append(Launch(kernel, grid, block, arguments, shared))

    def columns(self, kernel: Any, width: int, *arguments: Any) -> None:
        """A thread for each of `width` columns of each token; the kernel's last argument."""
        threads = threads_for(width)
        grid = (-(-width // threads), self.n, 1)
        self.add(kernel, grid, (threads, 1), (*arguments, width))


def threads_for(size: int, most: int = THREADS) -> int:
    """Threads of a block that shares `size` numbers out: whole warps."""
    return min(-(-size // 32) * 32, most)
