"""IQ2_S on the CPU: 82 bytes per 256 weights, f16 d | 32 low bytes of codes | 32 x 8 sign bits |
32 x 2 high bits of codes | 16 scales of 4 bits; weight = d * (2 * scale + 1) / 8 * grid[code], one
scale for 16 weights."""

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import ld_f16, ld_u64
from runtime.kernels.activations import BYTES_16
from runtime.kernels.decoded import SIGNED_BIAS, signed_loops
from runtime.kernels.formats import FormatKernels
from runtime.kernels.grids import byte, eight, iq2_s_grid
from runtime.kernels.iq2_xs import nibble_scales

BYTES = 82


@jit
def _scales(p):
    return nibble_scales(p + 74, ld_f16(p))


@jit
def _code(p, high, i):
    return byte(p + i) | ((high << (8 - 2 * (i & 3))) & 0x300)


@jit
def _magnitudes(p, j):
    low = p + 2 + j * 8
    h, g = byte(p + 66 + j * 2), byte(p + 67 + j * 2)
    return eight(
        iq2_s_grid(),
        *(_code(low, h, 0), _code(low, h, 1), _code(low, h, 2), _code(low, h, 3)),
        *(_code(low, g, 4), _code(low, g, 5), _code(low, g, 6), _code(low, g, 7)),
    )


@jit
def _signs(p, j):
    return ld_u64(p + 34 + j * 8)


_matvec, _rows = signed_loops(BYTES, 16, _scales, _magnitudes, _signs)


@kernel("iiiicci")
def matvec(w, row_bytes, first, last, xq, y, k):
    _matvec(w, row_bytes, first, last, xq, y, k)


@kernel("iiiii")
def rows(p, q, scales, offsets, k):
    _rows(p, q, scales, k)


KERNELS = FormatKernels(matvec, BYTES_16, rows, group=16, bias=SIGNED_BIAS)
