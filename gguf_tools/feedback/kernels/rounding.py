"""Columns rounded one after another, each error going on to the next ones."""

import numpy as np

from gguf_tools.jit import jit
from gguf_tools.simd import (
    float32,
    fma,
    ld_f32,
    ld_f32x16,
    ld_i64,
    sel_lt,
    splat_f32x16,
    st,
    vfabs,
    zero_f32x16,
)

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction

GROUP, LOWEST, HIGHEST, HAS_MINIMUM, LOWEST_SCALE, HIGHEST_SCALE = 0, 8, 16, 24, 32, 40
N_RANGES, N_FACTORS, N_REFITS, N_MOVES, N_VALUES, VALUES = 48, 56, 64, 72, 80, 88
"""Where in `facts`."""


@jit
def round_two(w, tile, pivots, facts, s0, m0, s1, m1, losses, errors):
    """The losses of rounding with one scale and minimum, and with another."""
    n, low, high = ld_i64(facts + GROUP), number(facts + LOWEST), number(facts + HIGHEST)
    by0, by1 = inverse(s0), inverse(s1)
    loss0 = loss1 = zero_f32x16()
    for j in range(n):
        v0 = v1 = ld_f32x16(w + j * 64)
        for i in range(j):
            u = splat_f32x16(ld_f32(tile + (i * n + j) * 4))
            v0 = fma(ld_f32x16(errors + i * 128), u, v0)
            v1 = fma(ld_f32x16(errors + i * 128 + 64), u, v1)
        pivot = splat_f32x16(ld_f32(pivots + j * 4))
        level0 = nearest_level((v0 + m0) * by0, low, high, facts)
        level1 = nearest_level((v1 + m1) * by1, low, high, facts)
        error0, error1 = (s0 * level0 - m0 - v0) * pivot, (s1 * level1 - m1 - v1) * pivot
        loss0 += error0 * error0
        loss1 += error1 * error1
        st(errors + j * 128, error0)
        st(errors + j * 128 + 64, error1)
    st(losses, loss0)
    st(losses + 64, loss1)


@jit
def round_one(w, tile, pivots, facts, s, m, errors, levels):
    """Round with a scale and a minimum; gives the loss."""
    n, low, high = ld_i64(facts + GROUP), number(facts + LOWEST), number(facts + HIGHEST)
    by = inverse(s)
    loss = zero_f32x16()
    for j in range(n):
        v = ld_f32x16(w + j * 64)
        for i in range(j):
            v = fma(ld_f32x16(errors + i * 64), splat_f32x16(ld_f32(tile + (i * n + j) * 4)), v)
        level = nearest_level((v + m) * by, low, high, facts)
        error = (s * level - m - v) * splat_f32x16(ld_f32(pivots + j * 4))
        loss += error * error
        st(levels + j * 64, level)
        st(errors + j * 64, error)
    return loss


@jit
def divide(w, tile, pivots, n, result):
    """Rows divided by a tile, negative."""
    zero = zero_f32x16()
    for j in range(n):
        v = ld_f32x16(w + j * 64)
        for i in range(j):
            v = fma(ld_f32x16(result + i * 64), splat_f32x16(ld_f32(tile + (i * n + j) * 4)), v)
        st(result + j * 64, (zero - v) * splat_f32x16(ld_f32(pivots + j * 4)))


@jit
def catch_up(x, errors, strip, n, group, target):
    """target = x + errors of n columns times their rows of the strip, for a group's columns."""
    for j in range(0, group, 8):
        at = x + j * 64
        a, b = ld_f32x16(at), ld_f32x16(at + 64)
        c, d = ld_f32x16(at + 128), ld_f32x16(at + 192)
        e, f = ld_f32x16(at + 256), ld_f32x16(at + 320)
        g, h = ld_f32x16(at + 384), ld_f32x16(at + 448)
        for i in range(n):
            error = ld_f32x16(errors + i * 64)
            u = strip + (i * group + j) * 4
            a = fma(error, splat_f32x16(ld_f32(u)), a)
            b = fma(error, splat_f32x16(ld_f32(u + 4)), b)
            c = fma(error, splat_f32x16(ld_f32(u + 8)), c)
            d = fma(error, splat_f32x16(ld_f32(u + 12)), d)
            e = fma(error, splat_f32x16(ld_f32(u + 16)), e)
            f = fma(error, splat_f32x16(ld_f32(u + 20)), f)
            g = fma(error, splat_f32x16(ld_f32(u + 24)), g)
            h = fma(error, splat_f32x16(ld_f32(u + 28)), h)
        at = target + j * 64
        st(at, a)
        st(at + 64, b)
        st(at + 128, c)
        st(at + 192, d)
        st(at + 256, e)
        st(at + 320, f)
        st(at + 384, g)
        st(at + 448, h)


@jit
def number(address):
    """A whole number as float32, in all lanes."""
    return splat_f32x16(float32(ld_i64(address)))


@jit
def nearest_level(x, low, high, facts):
    """The nearest of a format's levels."""
    n_values = ld_i64(facts + N_VALUES)
    if not n_values:
        return nearest(x, low, high)
    level = low
    for i in range(1, n_values):
        value = ld_i64(facts + VALUES + i * 8)
        middle = float32(ld_i64(facts + VALUES + i * 8 - 8) + value) * float32(0.5)
        level = sel_lt(splat_f32x16(middle), x, splat_f32x16(float32(value)), level)
    return level


@jit
def nearest(x, low, high):
    """The nearest whole number between two."""
    magic = splat_f32x16(MAGIC)
    return clamp(x, low, high) + magic - magic


@jit
def clamp(x, low, high):
    x = sel_lt(x, high, x, high)
    return sel_lt(low, x, x, low)


@jit
def inverse(x):
    """1 / x, and 0 for 0."""
    return sel_lt(zero_f32x16(), vfabs(x), splat_f32x16(float32(1.0)) / x, zero_f32x16())
