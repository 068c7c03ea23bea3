"""Reading memory as fast as it comes: the speed limit of a decode step."""

from gguf_tools.jit import kernel
from gguf_tools.simd import ld_i64x8, st, zero_i64x8

STEP = 256  # four streams of 64 bytes; sizes are multiples of this


@kernel("iii")
def read_memory(address, n_bytes, result):
    """Read n_bytes, a multiple of STEP; the exclusive or of all goes to 64 bytes at result."""
    part = n_bytes // 4
    a = zero_i64x8()
    b = zero_i64x8()
    c = zero_i64x8()
    d = zero_i64x8()
    for p in range(address, address + part, 64):
        a = a ^ ld_i64x8(p)
        b = b ^ ld_i64x8(p + part)
        c = c ^ ld_i64x8(p + 2 * part)
        d = d ^ ld_i64x8(p + 3 * part)
    st(result, (a ^ b) ^ (c ^ d))
