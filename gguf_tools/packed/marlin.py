"""Marlin, the layout of a kernel: symmetric 4 bits, as AutoGPTQ and AutoAWQ can write them.

X.B or X.qweight  I32  (in / 16, out * 2)  codes of tiles of 16 inputs and 16 outputs
X.s or X.scales   F16  (groups, out)       one group, or as many inputs in each

weight[out, in] = (code - 8) * scale[in / group_size, out]

Four tiles are stored together, their 1024 codes in the order in which the 32 lanes of a GPU's warp
need them (github.com/IST-DASLab/marlin); scales of 64 outputs, or of 32 where there is one group,
are shuffled likewise.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.packed.columns import Columns
from gguf_tools.packed.grid import group_size
from gguf_tools.packed.numbers import FLOATS, unpack_integers
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

Array: TypeAlias = npt.NDArray[Any]

BITS = 4
TILE = 16
TOGETHER = 64  # outputs of four tiles
UNUSED = (".workspace",)  # the kernel's


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights of a checkpoint with the names that AutoGPTQ gives."""
    if config.has("bits") and config.integer("bits") != BITS:
        raise config.refuse("bits", f"{BITS}, as Marlin's layout has", config.values["bits"])
    columns = Columns()
    for module in parts.modules(".B"):
        parts.add(weight(parts, module, config, columns, names=("B", "s")))
    parts.drop(UNUSED)


def describe(config: HFConfig) -> str:
    return f"Marlin, {BITS} bits"


def weight(
    parts: Parts, module: str, config: HFConfig, columns: Columns, *, names: tuple[str, str]
) -> LazyTensor:
    """The weight of a module whose codes and scales have these names."""
    stored = parts.take(f"{module}.{names[0]}", ("I32",))
    factors = parts.take(f"{module}.{names[1]}", FLOATS)
    n_tiles, n_words = stored.shape
    width, height = n_tiles * TILE, n_words // 2
    n_groups = width // group_size(config, width)
    if n_words % (2 * TOGETHER):
        raise parts.refuse(stored, f"outputs in whole {TOGETHER}s", stored.shape)
    parts.expect(factors, (n_groups, height))
    factor_order = _ORDER_OF_ONE if n_groups == 1 else _ORDER_OF_GROUPS

    def load(first: int, last: int) -> Floats:
        begin, end = first // TOGETHER, -(-last // TOGETHER)
        words = columns.words(stored, begin * 2 * TOGETHER, end * 2 * TOGETHER)
        data = np.ascontiguousarray(words, "<i4").view(np.uint8)
        shuffled = unpack_integers(data, BITS, 8 * words.shape[1])
        tiles = _in_order(shuffled, _ORDER_OF_CODES).reshape(n_tiles, -1, TILE, TILE)
        by_rows = tiles.transpose(1, 3, 0, 2).reshape(-1, width)
        found = columns.floats(factors, begin * TOGETHER, end * TOGETHER)
        scale: Floats = _in_order(found, factor_order).T[:, :, None]
        weights = by_rows.astype(np.float32).reshape(len(by_rows), n_groups, -1)
        weights -= np.float32(1 << (BITS - 1))
        weights *= scale
        at = begin * TOGETHER
        return np.ascontiguousarray(weights.reshape(-1, width)[first - at : last - at])

    return LazyTensor(f"{module}.weight", (height, width), "F32", load)


def _in_order(shuffled: Array, order: npt.NDArray[np.int64]) -> Array:
    """Rows whose pieces hold element order[i] of the original at i."""
    pieces = shuffled.reshape(len(shuffled), -1, len(order))
    original = np.empty_like(pieces)
    original[:, :, order] = pieces
    return original.reshape(shuffled.shape)


def _order_of_codes() -> npt.NDArray[np.int64]:
    """For each of 1024 codes its tile * 256 + input * 16 + output."""
    lane = np.arange(32).reshape(32, 1, 1, 1)
    tile = np.arange(4).reshape(1, 4, 1, 1)
    half = np.arange(2).reshape(1, 1, 2, 1)
    of_lane = np.array([0, 1, 8, 9])  # inputs
    order = 256 * tile + 16 * (2 * (lane % 4) + of_lane) + lane // 4 + 8 * half
    interleaved = order.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    return np.asarray(interleaved, np.int64).reshape(-1)


_ORDER_OF_CODES = _order_of_codes()
_ORDER_OF_GROUPS = np.arange(64).reshape(8, 8).T.reshape(-1)
_ORDER_OF_ONE = np.add.outer(2 * np.arange(4), [0, 1, 8, 9, 16, 17, 24, 25]).reshape(-1)
