"""The KV cache: how the keys and values of past tokens lie in memory, and how they get there.

The positions of a kv head are in blocks of 64. In a block, keys are turned, so that the scores of
64 positions are sums of whole vectors, and no sum across a vector is ever needed:

    f16    keys     [dim][64] f16
           values   [64][dim] f16
    q8_0   keys     [dim][64] int8, then scales [dim/32][64] f16
           values   [64][dim] int8, then scales [dim/32][64] f16

q8_0 keeps 32 numbers of a key or value as int8 with one scale, largest / 127. Dimensions are
padded with zeros to a multiple of 16 (f16) or 32 (q8_0).
"""

from dataclasses import dataclass

from gguf_tools.control import call7
from gguf_tools.jit import Kernel, jit, kernel
from gguf_tools.simd import (
    cvt_f16x16,
    cvt_f32x16,
    cvt_i8x16,
    cvt_i32x16,
    f16_splat16,
    f32_to_f16,
    float32,
    fma,
    hmax,
    ld_f16x16,
    ld_f32,
    ld_f32x16,
    ld_i8,
    ld_i8x16,
    ld_u16,
    splat_f32x16,
    st,
    st_f32,
    st_i16,
    st_u8,
    vfabs,
    vmax,
    vmin,
    vrint,
    zero_f32x16,
)
from gguf_tools.tiles import float_tile
from runtime.kernels.interpreter import arg, position, scratch

POSITIONS = 64  # in a block


@dataclass(frozen=True, eq=False)
class KVType:
    """A way to keep keys and values."""

    name: str
    step: int  # dimensions are padded to a multiple
    dim_bytes: float  # bytes per padded dimension of a position, scales included
    store: Kernel  # (source, dim, padded dim, block, place, room, turned)
    score: Kernel  # (rows, queries, dim, block, scores, bytes between, room, ahead)
    mix: (
        Kernel  # (rows, weights, bytes between, block, n, outputs, bytes between, dim, room, ahead)
    )
    key_halves: Kernel | None  # (block, dim, target); None: they are f16 already
    value_halves: Kernel | None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        each = (self.score, self.mix, self.store, self.key_halves, self.value_halves)
        return tuple(kernel for kernel in each if kernel is not None)

    def padded(self, dim: int) -> int:
        """Dimensions of one key or value in the cache."""
        return (dim + self.step - 1) // self.step * self.step

    def block_bytes(self, dim: int) -> int:
        """Bytes of the keys, or values, of POSITIONS positions."""
        return int(self.padded(dim) * POSITIONS * self.dim_bytes)


@jit
def zero(place, n):
    """n floats, a multiple of 16."""
    for i in range(0, n, 16):
        st(place + i * 4, zero_f32x16())


@jit
def copy_scaled(source, target, dim, full, scale):
    """dim floats times scale, zeros up to `full` (a multiple of 16)."""
    s = splat_f32x16(scale)
    for i in range(0, dim - 15, 16):
        st(target + i * 4, ld_f32x16(source + i * 4) * s)
    for i in range(dim & ~15, full):
        value = float32(0.0)
        if i < dim:
            value = ld_f32(source + i * 4) * scale
        st_f32(target + i * 4, value)


@kernel("iiiiiii")
def store_f16(source, dim, full, block, place, room, turned):
    copy_scaled(source, room, dim, full, float32(1.0))
    if not turned:
        for i in range(0, full, 16):
            st(block + (place * full + i) * 2, cvt_f16x16(ld_f32x16(room + i * 4)))
        return
    for i in range(0, full, 16):
        st(room, cvt_f16x16(ld_f32x16(room + i * 4)))
        for j in range(16):
            st_i16(block + ((i + j) * POSITIONS + place) * 2, ld_u16(room + j * 2))


@kernel("iiiiiii")
def store_q8_0(source, dim, full, block, place, room, turned):
    copy_scaled(source, room, dim, full, float32(1.0))
    for b in range(full // 32):
        low = ld_f32x16(room + b * 128)
        high = ld_f32x16(room + b * 128 + 64)
        largest = hmax(vmax(vfabs(low), vfabs(high)))
        at = block + full * POSITIONS + (b * POSITIONS + place) * 2
        d = f32_to_f16(at, min(largest / float32(127.0), float32(65504.0)))
        inverse = float32(0.0)
        if d > float32(0.0):
            inverse = float32(1.0) / d
        _store_bytes(low, inverse, full, block, place, b * 32, room, turned)
        _store_bytes(high, inverse, full, block, place, b * 32 + 16, room, turned)


@jit
def _store_bytes(x, inverse, full, block, place, i, room, turned):
    """16 numbers from dimension i on; `room` for 16 bytes that are not needed any more."""
    # The scale is a rounded one: where it is tiny, x may be a little more than 127 times it.
    most = splat_f32x16(float32(127.0))
    q = vrint(x * splat_f32x16(inverse))
    q = vmax(vmin(q, most), splat_f32x16(float32(-127.0)))
    q = cvt_i8x16(cvt_i32x16(q))
    if not turned:
        st(block + place * full + i, q)
        return
    st(room, q)
    for j in range(16):
        st_u8(block + (i + j) * POSITIONS + place, ld_i8(room + j))


@kernel("iiiii")
def store_kv(op, state, thread, first, last):
    """keys 0-2, values 3-5, key cache 6, value cache 7, kv heads 8, key_dim 9, value_dim 10,
    padded key_dim 11, padded value_dim 12, bytes per block of keys 13, of values 14, cache
    positions 15, kernel that stores one 16; unit: a kv head of a token"""
    heads = arg(op, 8)
    room = scratch(state, thread)
    for item in range(first, last):
        t = item // heads
        h = item - t * heads
        here = position(state) + t
        block = h * (arg(op, 15) // POSITIONS) + here // POSITIONS
        place = here % POSITIONS
        source = arg(op, 0) + t * arg(op, 2) + h * arg(op, 9) * 4
        target = arg(op, 6) + block * arg(op, 13)
        call7(arg(op, 16), source, arg(op, 9), arg(op, 11), target, place, room, 1)
        source = arg(op, 3) + t * arg(op, 5) + h * arg(op, 10) * 4
        target = arg(op, 7) + block * arg(op, 14)
        call7(arg(op, 16), source, arg(op, 10), arg(op, 12), target, place, room, 0)


# --- reading, decode: the cache as it lies ---------------------------------------------------


@jit
def _tiles_64_f16(rows, x, xs, w, ws, y, ys, n, ahead):
    """`rows` columns of x times n rows of w, 64 wide: up to 4 columns share the reading of w."""
    while rows >= 4:
        float_tile(4, 4, 2, False, x, xs, w, ws, y, ys, n, ahead)
        rows, x, y = rows - 4, x + 4 * xs, y + 4 * ys
    if rows == 3:
        float_tile(3, 4, 2, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 2:
        float_tile(2, 4, 2, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 1:
        float_tile(1, 4, 2, False, x, xs, w, ws, y, ys, n, ahead)


@jit
def _tiles_16_f16(rows, x, xs, w, ws, y, ys, n, ahead):
    while rows >= 4:
        float_tile(4, 1, 2, False, x, xs, w, ws, y, ys, n, ahead)
        rows, x, y = rows - 4, x + 4 * xs, y + 4 * ys
    while rows >= 1:
        float_tile(1, 1, 2, False, x, xs, w, ws, y, ys, n, ahead)
        rows, x, y = rows - 1, x + xs, y + ys


@jit
def _tiles_64_i8(rows, x, xs, w, ws, y, ys, n, ahead):
    while rows >= 4:
        float_tile(4, 4, 1, False, x, xs, w, ws, y, ys, n, ahead)
        rows, x, y = rows - 4, x + 4 * xs, y + 4 * ys
    if rows == 3:
        float_tile(3, 4, 1, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 2:
        float_tile(2, 4, 1, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 1:
        float_tile(1, 4, 1, False, x, xs, w, ws, y, ys, n, ahead)


@jit
def _tiles_32_i8(rows, x, xs, w, ws, y, ys, n, ahead):
    while rows >= 4:
        float_tile(4, 2, 1, False, x, xs, w, ws, y, ys, n, ahead)
        rows, x, y = rows - 4, x + 4 * xs, y + 4 * ys
    if rows == 3:
        float_tile(3, 2, 1, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 2:
        float_tile(2, 2, 1, False, x, xs, w, ws, y, ys, n, ahead)
    elif rows == 1:
        float_tile(1, 2, 1, False, x, xs, w, ws, y, ys, n, ahead)


@kernel("iiiiiiii")
def score_f16(rows, queries, dim, block, scores, stride, room, ahead):
    """Add the products of `rows` queries with the keys of a block to scores, `stride` apart.

    Memory is asked for what lies `ahead` bytes further.
    """
    _tiles_64_f16(rows, queries, dim * 4, block, POSITIONS * 2, scores, stride, dim, ahead)


@kernel("iiiiiiiiii")
def mix_f16(rows, weights, stride, block, n, outputs, output_stride, dim, room, ahead):
    """Add the first n values of a block, weighted, to `rows` outputs."""
    i = 0
    while i + 64 <= dim:
        values, out = block + i * 2, outputs + i * 4
        _tiles_64_f16(rows, weights, stride, values, dim * 2, out, output_stride, n, ahead)
        i += 64
    while i < dim:
        values, out = block + i * 2, outputs + i * 4
        _tiles_16_f16(rows, weights, stride, values, dim * 2, out, output_stride, n, ahead)
        i += 16


@kernel("iiiiiiii")
def score_q8_0(rows, queries, dim, block, scores, stride, room, ahead):
    scales = block + dim * POSITIONS
    for b in range(dim // 32):
        zero(room, rows * POSITIONS)
        keys = block + b * 32 * POSITIONS
        _tiles_64_i8(
            rows, queries + b * 128, dim * 4, keys, POSITIONS, room, POSITIONS * 4, 32, ahead
        )
        for i in range(0, POSITIONS, 16):
            scale = cvt_f32x16(ld_f16x16(scales + (b * POSITIONS + i) * 2))
            for r in range(rows):
                at = scores + r * stride + i * 4
                products = ld_f32x16(room + (r * POSITIONS + i) * 4)
                st(at, fma(products, scale, ld_f32x16(at)))


@kernel("iiiiiiiiii")
def mix_q8_0(rows, weights, stride, block, n, outputs, output_stride, dim, room, ahead):
    scales = block + dim * POSITIONS
    for b in range(dim // 32):
        for i in range(0, POSITIONS, 16):
            scale = cvt_f32x16(ld_f16x16(scales + (b * POSITIONS + i) * 2))
            for r in range(rows):
                weight = ld_f32x16(weights + r * stride + i * 4)
                st(room + (r * POSITIONS + i) * 4, weight * scale)
        values, out = block + b * 32, outputs + b * 128
        _tiles_32_i8(rows, room, POSITIONS * 4, values, dim, out, output_stride, n, ahead)


# --- reading, prompt: turned to f16 once for many rows ----------------------------------------


@kernel("iii")
def key_halves_q8_0(block, dim, target):
    """A block of keys as f16, as it would lie in an f16 cache."""
    scales = block + dim * POSITIONS
    for i in range(dim):
        for p in range(0, POSITIONS, 16):
            s = cvt_f32x16(ld_f16x16(scales + ((i // 32) * POSITIONS + p) * 2))
            place = i * POSITIONS + p
            st(target + place * 2, cvt_f16x16(cvt_f32x16(ld_i8x16(block + place)) * s))


@kernel("iii")
def value_halves_q8_0(block, dim, target):
    """As key_halves_q8_0, of values."""
    scales = block + dim * POSITIONS
    for b in range(dim // 32):
        for p in range(POSITIONS):
            s = f16_splat16(scales + (b * POSITIONS + p) * 2)
            for place in range(p * dim + b * 32, p * dim + b * 32 + 32, 16):
                st(target + place * 2, cvt_f16x16(cvt_f32x16(ld_i8x16(block + place)) * s))


F16 = KVType("f16", 16, 2.0, store_f16, score_f16, mix_f16, None, None)
Q8_0 = KVType(
    "q8_0",
    32,
    1.0 + 2 / 32,
    store_q8_0,
    score_q8_0,
    mix_q8_0,
    key_halves_q8_0,
    value_halves_q8_0,
)
KV_TYPES = {kv.name: kv for kv in (F16, Q8_0)}
