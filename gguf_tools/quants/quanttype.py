"""What is known of one block format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf_tools.errors import UnsupportedQuantError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QuantType:
    """A block format; rows of k weights are k / block_size blocks of block_bytes each.

    dequantize: (n_rows, row_bytes) uint8 -> (n_rows, k) float32; the definition of the format
    quantize_reference: (n_rows, k) float32 -> (n_rows, row_bytes); NumPy, step for step as ggml
    quantize: the same, fast and equal to the bit; may be called from several threads at once
    """

    name: str  # ggml's, such as Q4_K
    type_id: int  # ggml's number
    block_size: int
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]
    quantize_reference: Callable[[Floats], Bytes] | None = None
    quantize: Callable[[Floats], Bytes] | None = None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; UnsupportedQuantError when blocks do not fill it."""
        if k % self.block_size:
            raise UnsupportedQuantError(
                f"{self.name} holds rows in blocks of {self.block_size} weights: a row of {k} "
                "does not fit; choose another type for it"
            )
        return k // self.block_size * self.block_bytes
