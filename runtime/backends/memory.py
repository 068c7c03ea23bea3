"""Memory that kernels address: buffers, KV caches, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.kernels.kv_cache import POSITIONS, KVType
from runtime.program import Floats, KVShape


class Arena:
    """Zeroed memory that kernels address; lives as long as the arena."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.generic]] = []
        self.size = 0  # bytes given out by `zeros`

    def zeros(self, n_bytes: int) -> int:
        """The address of n_bytes zero bytes, 64-byte aligned; costs memory only when touched."""
        block = np.zeros(n_bytes + 64, np.uint8)
        self._blocks.append(block)
        self.size += n_bytes
        return (block.ctypes.data + 63) // 64 * 64

    def hold(self, array: npt.NDArray[np.generic]) -> int:
        """The address of an array that is kept alive from now on."""
        if not array.flags.c_contiguous:
            raise ValueError("kernels address contiguous arrays only")
        self._blocks.append(array)
        return array.ctypes.data

    def rows(self, n_rows: int, width: int) -> tuple[Floats, Place]:
        """Rows with room for whole groups of 32 and one cache line more, against aliasing."""
        stride = (width + 31) // 32 * 32 + 48
        block = np.zeros((n_rows, stride), np.float32)
        return block, Place(self.hold(block), 0, stride * 4)

    def padded(self, values: Floats) -> int:
        """A copy of a vector with room for whole groups of 32."""
        copy = np.zeros((len(values) + 63) // 32 * 32, np.float32)
        copy[: len(values)] = values
        return self.hold(copy)


@dataclass(frozen=True)
class Place:
    """Where a buffer lies: base + thread * thread_stride + token * token_stride, in bytes."""

    base: int
    thread_stride: int
    token_stride: int

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.base, self.thread_stride, self.token_stride


@dataclass(frozen=True)
class Cache:
    """The KV cache of one layer: addresses of [kv head][block] (runtime/kernels/kv_cache.py)."""

    shape: KVShape
    keys: int
    values: int


def make_caches(
    arena: Arena, shapes: Iterable[KVShape], kv: KVType, n_positions: int
) -> tuple[Cache, ...]:
    """Empty caches with room for n_positions, a multiple of POSITIONS."""

    def room(shape: KVShape, dim: int) -> int:
        return shape.n_kv_heads * n_positions // POSITIONS * kv.block_bytes(dim)

    return tuple(
        Cache(
            shape,
            arena.zeros(room(shape, shape.key_dim)),
            arena.zeros(room(shape, shape.value_dim)),
        )
        for shape in shapes
    )


@dataclass(frozen=True)
class Memory:
    """What both lowerings of a program share."""

    arena: Arena
    shared: dict[str, Place]  # every buffer, with room for all tokens of a batch
    caches: tuple[Cache, ...]
    kv: KVType
    n_positions: int  # positions the caches have room for
    n_threads: int
    n_batch: int  # tokens there is room for, a multiple of matmul.COLUMNS
