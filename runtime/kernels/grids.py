"""What the IQ1, IQ2 and IQ3 formats share: code tables, and signs of 7 bits for 8 weights."""

from gguf_tools.jit import jit
from gguf_tools.quants.grids import read_grid
from gguf_tools.simd import bits_i8x8, concat, int64, ld_i8x8, ld_u8, ld_u32, make_table, uint64

ONES = 0x0101010101010101


@jit
def eight(table, a, b, c, d, e, f, g, h):
    """The entries of 8 weights with these codes, as 64 bytes."""
    ab = concat(ld_i8x8(table + 8 * a), ld_i8x8(table + 8 * b))
    cd = concat(ld_i8x8(table + 8 * c), ld_i8x8(table + 8 * d))
    ef = concat(ld_i8x8(table + 8 * e), ld_i8x8(table + 8 * f))
    gh = concat(ld_i8x8(table + 8 * g), ld_i8x8(table + 8 * h))
    return concat(concat(ab, cd), concat(ef, gh))


@jit
def two_fours(table, a, b):
    """Two entries of 4 weights."""
    low = uint64(ld_u32(table + 4 * a))
    return bits_i8x8(low | (uint64(ld_u32(table + 4 * b)) << uint64(32)))


@jit
def byte(p):
    """The byte at p as a code: int64, which numba needs to stay with integers."""
    return int64(ld_u8(p))


@jit
def unfold_signs(words):
    """The signs of 64 weights: in each half of `words`, four times 7 bits from the lowest on.

    The eighth of 8 signs is not stored: the number of minus signs is even.
    """
    twice_14 = uint64(0x00003FFF00003FFF)
    words = (words & twice_14) | ((words << uint64(2)) & (twice_14 << uint64(16)))
    sevens = uint64(0x007F007F007F007F)
    words = (words & sevens) | ((words << uint64(1)) & (sevens << uint64(8)))
    odd = words ^ (words >> uint64(4))
    odd ^= odd >> uint64(2)
    odd ^= odd >> uint64(1)
    return words | ((odd & uint64(ONES)) << uint64(7))


iq2_xxs_grid = make_table("iq2_xxs_grid", lambda: read_grid("IQ2_XXS").tobytes())
iq2_xs_grid = make_table("iq2_xs_grid", lambda: read_grid("IQ2_XS").tobytes())
iq2_s_grid = make_table("iq2_s_grid", lambda: read_grid("IQ2_S").tobytes())
iq3_xxs_grid = make_table("iq3_xxs_grid", lambda: read_grid("IQ3_XXS").tobytes())
iq3_s_grid = make_table("iq3_s_grid", lambda: read_grid("IQ3_S").tobytes())
