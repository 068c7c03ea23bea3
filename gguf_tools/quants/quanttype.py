"""What the rest of the program knows of a block format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import UnsupportedQuantError

if TYPE_CHECKING:
    from gguf_tools.quants.levels import Levels
    from gguf_tools.quants.multiples import Multiples

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[Any]


class Quantize(Protocol):
    """From rows of weights to rows of bytes.

    `importance` says how much an error counts: (k,) float32, finite and not negative, one number
    for each column; the formats then search with ggml's other routine, made for it. F32, F16,
    BF16 and Q8_0 have nothing to weigh and give the same bytes with it.
    """

    def __call__(self, weights: Floats, importance: Floats | None = None) -> Bytes: ...


@dataclass(frozen=True)
class QuantType:
    """One of ggml's types: its numbers and its functions between weights and bytes.

    The functions take and give whole rows: weights (n_rows, k) float32, bytes (n_rows, row_bytes)
    uint8. They refuse rows that are not whole blocks with UnsupportedQuantError.
    """

    name: str  # as ggml calls it: "Q4_K"
    type_id: int  # its number in a GGUF file
    block_size: int  # weights in a block
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]  # vectorised NumPy: the definition of the format
    quantize_reference: Quantize | None  # NumPy, step for step as ggml
    quantize: Quantize | None  # the same bytes, fast; threads may share it
    multiples: "Multiples | None" = None  # of types that are scale * k and no more
    levels: "Levels | None" = None  # of types that error feedback can quantise to

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights."""
        if k % self.block_size:
            raise UnsupportedQuantError(
                f"a row of {k} weights cannot be stored as {self.name}: expected a multiple of "
                f"{self.block_size}; choose another type for this tensor"
            )
        return k // self.block_size * self.block_bytes
