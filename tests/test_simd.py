"""Every operation of the SIMD vocabulary against NumPy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.control import atomic_load64, compare_exchange64
from gguf_tools.jit import kernel
from gguf_tools.processor import ARM_DOTS, FEATURES, IS_ARM, X86_DOTS
from gguf_tools.simd import (
    bits_f32x16,
    bits_i8x32,
    bits_i8x64,
    bits_i16x16,
    bits_i16x32,
    bits_i32x16,
    concat,
    cvt_bf16x16,
    cvt_f16x16,
    cvt_f32x16,
    cvt_i8x16,
    cvt_i16x16,
    cvt_i32x16,
    dpbusd,
    dpbusd7,
    f16_splat16,
    f32_to_f16,
    first_lane,
    fma,
    hmax,
    hmax_abs,
    hsum,
    int8,
    keep,
    ld_bf16,
    ld_bf16x16,
    ld_f16,
    ld_f16x16,
    ld_f32,
    ld_f32x16,
    ld_i8,
    ld_i8x16,
    ld_i8x32,
    ld_i8x64,
    ld_i32,
    ld_i32x4,
    ld_i32x8,
    ld_i32x16,
    ld_i64,
    ld_u8,
    ld_u16,
    ld_u32,
    ld_u64,
    lookup16,
    make_constant,
    make_shuffle,
    prefetch,
    sel_bits,
    sel_lt,
    sel_test,
    splat_f32x16,
    splat_i8x64,
    st,
    st_f32,
    st_i16,
    st_i32,
    st_i64,
    st_u8,
    transpose16,
    ucvt_f32x16,
    ucvt_i16x16,
    ucvt_i32x16,
    vfabs,
    vmax,
    vmin,
    vrint,
    vsqrt,
    vtrunc,
    zero_f32x16,
    zero_i32x8,
    zero_i32x16,
)

RNG = np.random.default_rng(5)


@kernel("iiiii")
def float_operations(a, b, c, out, scalars):
    x = ld_f32x16(a)
    y = ld_f32x16(b)
    z = ld_f32x16(c)
    st(out, x + y)
    st(out + 64, x - y)
    st(out + 128, x * y)
    st(out + 192, x / y)
    st(out + 256, fma(x, y, z))
    st(out + 320, vmax(x, y))
    st(out + 384, vmin(x, y))
    st(out + 448, vfabs(x))
    st(out + 512, vsqrt(vfabs(x)))
    st(out + 576, vrint(x))
    st(out + 640, vtrunc(x))
    st(out + 704, sel_lt(x, y, z, splat_f32x16(ld_f32(a))))
    total = zero_f32x16()
    total += x
    st(out + 768, total)
    st_f32(scalars, hsum(x))
    st_f32(scalars + 4, hmax(x))
    st_f32(scalars + 8, first_lane(y))
    st_f32(scalars + 12, hmax_abs(x, y))
    prefetch(a)


def test_float_operations() -> None:
    a, b, c = (RNG.normal(size=16).astype(np.float32) * 10 for _ in range(3))
    a[:4] = [0.5, 1.5, -2.5, 2.5]  # halves round to even
    out, scalars = np.zeros((13, 16), np.float32), np.zeros(4, np.float32)
    float_operations(*(array.ctypes.data for array in (a, b, c, out, scalars)))
    exact = a.astype(np.float64) * b + c
    expected = [a + b, a - b, a * b, a / b, exact.astype(np.float32), np.maximum(a, b)]
    expected += [np.minimum(a, b), np.abs(a), np.sqrt(np.abs(a)), np.rint(a), np.trunc(a)]
    expected += [np.where(a < b, c, a[0]), a]
    assert np.array_equal(out, np.array(expected))
    largest = max(np.abs(a).max(), np.abs(b).max())
    assert np.allclose(scalars, [a.sum(), a.max(), b[0], largest], rtol=1e-6)
    a[3], b[7] = np.nan, -np.inf
    float_operations(*(array.ctypes.data for array in (a, b, c, out, scalars)))
    assert scalars[1] == np.nanmax(a) and np.isnan(scalars[3])
    assert np.array_equal(out[5], np.fmax(a, b)) and np.array_equal(out[6], np.fmin(a, b))


@kernel("iii")
def conversions(floats, ints, out):
    x = ld_f32x16(floats)
    st(out, cvt_i32x16(x))
    st(out + 64, cvt_f32x16(cvt_f16x16(x)))
    st(out + 128, cvt_f32x16(cvt_bf16x16(x)))
    n = ld_i8x16(ints)
    st(out + 192, cvt_f32x16(n))
    st(out + 256, ucvt_f32x16(n))
    st(out + 320, cvt_i32x16(n))
    st(out + 384, ucvt_i32x16(n))
    st(out + 448, cvt_i32x16(cvt_i16x16(n)))
    st(out + 512, cvt_i32x16(ucvt_i16x16(n)))
    st(out + 576, bits_i32x16(x))
    st(out + 640, bits_f32x16(bits_i32x16(x)))
    st(out + 704, cvt_i8x16(cvt_i32x16(n)))


def test_conversions() -> None:
    x = (RNG.normal(size=16) * 50).astype(np.float32)
    n = RNG.integers(-128, 128, 16).astype(np.int8)
    out = np.zeros((12, 16), np.int32)
    conversions(x.ctypes.data, n.ctypes.data, out.ctypes.data)
    floats = out.view(np.float32)
    assert np.array_equal(out[0], x.astype(np.int32))
    assert np.array_equal(floats[1], x.astype(np.float16).astype(np.float32))
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    assert np.array_equal(floats[2].view(np.uint32), rounded)
    assert np.array_equal(floats[3], n)
    assert np.array_equal(floats[4], n.view(np.uint8))
    for row, expected in ((5, n), (6, n.view(np.uint8)), (7, n), (8, n.view(np.uint8))):
        assert np.array_equal(out[row], expected.astype(np.int32))
    assert np.array_equal(floats[9], x) and np.array_equal(floats[10], x)
    assert np.array_equal(out[11].view(np.int8)[:16], n)


_constant = make_constant("_constant", range(-32, 32), "i8x64")


@kernel("iii")
def integer_operations(a, b, out):
    x = ld_i8x64(a)
    y = ld_i8x64(b)
    st(out, x & y)
    st(out + 64, x | y)
    st(out + 128, x ^ y)
    st(out + 192, x + y)
    st(out + 256, x - y)
    st(out + 320, bits_i8x64(bits_i16x32(x) >> 4))
    st(out + 384, bits_i8x64(bits_i16x32(x) << 3))
    st(out + 448, sel_bits(ld_u64(b), x, y))
    st(out + 512, concat(ld_i8x32(a), bits_i8x32(bits_i16x16(ld_i8x32(b)) >> 2)))
    st(out + 576, sel_test(x, y, keep(x), y))
    st(out + 640, _constant())


def test_integer_operations() -> None:
    a, b = RNG.integers(0, 256, (2, 64), dtype=np.uint8)
    out = np.zeros((11, 64), np.uint8)
    integer_operations(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    assert np.array_equal(out[:5], np.array([a & b, a | b, a ^ b, a + b, a - b]))
    assert np.array_equal(out[5], (a.view(np.uint16) >> 4).view(np.uint8))
    assert np.array_equal(out[6], (a.view(np.uint16) << 3).view(np.uint8))
    mask = np.unpackbits(b[:8], bitorder="little").astype(bool)
    assert np.array_equal(out[7], np.where(mask, a, b))
    shifted = (b[:32].view(np.uint16) >> 2).view(np.uint8)
    assert np.array_equal(out[8], np.concatenate([a[:32], shifted]))
    assert np.array_equal(out[9], np.where(a & b, a, b))
    assert np.array_equal(out[10].view(np.int8), np.arange(-32, 32))


@kernel("iii")
def dots(unsigned, signed, out):
    st(out, dpbusd(ld_i32x16(out), ld_i8x64(unsigned), ld_i8x64(signed)))
    st(out + 64, dpbusd(zero_i32x8(), ld_i8x32(unsigned), ld_i8x32(signed)))
    st(out + 96, dpbusd(ld_i32x4(out + 96), ld_i8x16(unsigned), ld_i8x16(signed)))
    st_i32(out + 112, hsum(ld_i32x8(out + 64)))
    low = ld_i8x64(unsigned) & splat_i8x64(int8(127))
    st(out + 116, dpbusd7(zero_i32x16(), low, ld_i8x64(signed)))


@kernel("iii")
def lookups(table, indices, out):
    st(out, lookup16(ld_i8x16(table), ld_i8x64(indices)))
    st(out + 64, lookup16(ld_i8x16(table), ld_i8x32(indices)))
    st(out + 96, lookup16(ld_i8x16(table), ld_i8x16(indices)))


def check_lookups() -> None:
    table = RNG.integers(-128, 128, 16).astype(np.int8)
    indices = RNG.permutation(np.arange(64) % 16).astype(np.int8)
    out = np.zeros(112, np.int8)
    lookups(table.ctypes.data, indices.ctypes.data, out.ctypes.data)
    for first, last in ((0, 64), (64, 96), (96, 112)):
        assert np.array_equal(out[first:last], table[indices[: last - first]])


def test_lookups() -> None:
    check_lookups()


def check_dots() -> None:
    for extreme in (False, True):
        unsigned = np.full(64, 255, np.uint8) if extreme else RNG.integers(0, 256, 64)
        signed = np.full(64, -128, np.int8) if extreme else RNG.integers(-128, 128, 64)
        unsigned, signed = unsigned.astype(np.uint8), signed.astype(np.int8)
        out = np.arange(64, dtype=np.int32)
        dots(unsigned.ctypes.data, signed.ctypes.data, out.ctypes.data)
        fours = (unsigned.astype(np.int32) * signed).reshape(16, 4).sum(1)
        assert np.array_equal(out[:16], np.arange(16) + fours)
        assert np.array_equal(out[16:24], fours[:8])
        assert np.array_equal(out[24:28], np.arange(24, 28) + fours[:4])
        assert out[28] == fours[:8].sum()
        low = ((unsigned & 127).astype(np.int32) * signed).reshape(16, 4).sum(1)
        assert np.array_equal(out[29:45], low)


def usable_dots() -> list[str]:
    """The byte dot products that this processor can run."""
    if IS_ARM:
        needs = {"i8mm": "i8mm", "neon": "dotprod"}
        return [d for d in ARM_DOTS if d == "armv8" or FEATURES.get(needs[d])] + ["portable"]
    return [dot for dot in X86_DOTS if FEATURES.get(dot)] + ["portable"]


def test_dots() -> None:
    check_dots()


@pytest.mark.parametrize("dot", [*X86_DOTS, *ARM_DOTS, "portable"])
def test_every_instruction_set_this_processor_has(dot: str) -> None:
    if dot not in usable_dots():
        pytest.skip(f"no {dot} here")
    environment = {**os.environ, "GGUF_TOOLS_DOT": dot, "GGUF_TOOLS_CACHE": "off"}
    code = "from tests.test_simd import check_dots, check_lookups; check_dots(); check_lookups()"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root)


_reversed = make_shuffle("_reversed", range(15, -1, -1), "f32x16")
_woven = make_shuffle("_woven", [i // 2 + 16 * (i % 2) for i in range(16)], "f32x16", two=True)


@kernel("iii")
def shuffles(a, b, out):
    st(out, _reversed(ld_f32x16(a)))
    st(out + 64, _woven(ld_f32x16(a), ld_f32x16(b)))
    transpose16(a, 72, out + 128, 64)


def test_shuffles() -> None:
    a, b = RNG.normal(size=(2, 16, 18)).astype(np.float32)
    out = np.zeros((18, 16), np.float32)
    shuffles(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    assert np.array_equal(out[0], a[0, :16][::-1])
    woven = np.stack([a[0, :8], b[0, :8]], 1).reshape(-1)
    assert np.array_equal(out[1], woven)
    assert np.array_equal(out[2:], a[:, :16].T)


@kernel("ii")
def scalars(source, out):
    st_i64(out, ld_u8(source))
    st_i64(out + 8, ld_i8(source))
    st_i64(out + 16, ld_u16(source))
    st_i64(out + 24, ld_u32(source))
    st_i64(out + 32, ld_i32(source))
    st_i64(out + 40, ld_i64(source))
    st_f32(out + 48, ld_f16(source))
    st_f32(out + 52, ld_bf16(source))
    st_f32(out + 56, f32_to_f16(out + 60, ld_f32(source + 8)))
    st_u8(out + 62, 511)
    st_i16(out + 64, -3)
    st(out + 68, f16_splat16(source))
    st(out + 132, cvt_f32x16(ld_f16x16(source)))
    st(out + 196, cvt_f32x16(ld_bf16x16(source)))


def test_scalars() -> None:
    source = RNG.integers(0, 256, 64, dtype=np.uint8)
    source[:32:2] = 0x91
    source[1:32:2] = 0xBC  # ordinary halves and bfloats
    source[8:12] = np.array([1.0001], np.float32).view(np.uint8)
    out = np.zeros(260, np.uint8)
    scalars(source.ctypes.data, out.ctypes.data)
    whole = out[:48].view(np.int64)
    read = [source[0], source.view(np.int8)[0], source.view(np.uint16)[0]]
    read += [source.view(np.uint32)[0], source.view(np.int32)[0], source.view(np.int64)[0]]
    assert whole.tolist() == [int(n) for n in read]
    halves = source[:32].view(np.float16).astype(np.float32)
    bfloats = (source[:32].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    floats = out[48:60].view(np.float32)
    assert floats[0] == halves[0] and floats[1] == bfloats[0]
    assert floats[2] == np.float16(1.0001) and out[60:62].view(np.float16)[0] == floats[2]
    assert out[62] == 255 and out[64:66].view(np.int16)[0] == -3
    assert np.array_equal(out[68:132].view(np.float32), np.full(16, halves[0]))
    assert np.array_equal(out[132:196].view(np.float32), halves)
    assert np.array_equal(out[196:260].view(np.float32), bfloats)


@kernel("ii")
def exchanges(place, seen):
    st_i64(seen, compare_exchange64(place, 5, 7))
    st_i64(seen + 8, compare_exchange64(place, 5, 9))
    st_i64(seen + 16, atomic_load64(place))


def test_exchanges() -> None:
    """The second finds another value than it expects, and leaves it."""
    place, seen = np.array([5]), np.zeros(3, np.int64)
    exchanges(place.ctypes.data, seen.ctypes.data)
    assert seen.tolist() == [5, 7, 7]


@kernel("i")
def lanes_are_zero(out):
    st(out, zero_i32x16())
    st(out + 64, splat_i8x64(ld_i8(out + 64)))


def test_zero_and_splat() -> None:
    out = np.full(128, 7, np.uint8)
    lanes_are_zero(out.ctypes.data)
    assert not out[:64].any() and (out[64:] == 7).all()
