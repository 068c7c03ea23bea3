"""What a block format brings to the CPU backend."""

from dataclasses import dataclass

from gguf_tools.jit import Kernel
from runtime.kernels.activations import Activation


@dataclass(frozen=True, eq=False)
class FormatKernels:
    """The kernels of one block format; both read the blocks as they lie in the file.

    matvec(w, row_bytes, first, last, xq, y, k): y[first:last] = rows of w times the activation
    rows(p, q, scales, offsets, k): one row for the matrix tile: k unsigned bytes, and per `group`
        of weights a float32 scale and offset; weight = scale * (byte - bias) + offset.
        For float formats: (p, values, _, _, k), k float32 values.
    """

    matvec: Kernel
    activation: Activation
    rows: Kernel
    group: int = 0  # weights per scale; 0 for float formats
    bias: int = 0
    has_offset: bool = False
