"""Elementary functions of 16 floats; NaN stays NaN where a caller could miss it."""

from gguf_tools.jit import jit
from gguf_tools.simd import (
    bits_f32x16,
    cvt_i32x16,
    float32,
    fma,
    int32,
    sel_lt,
    splat_f32x16,
    splat_i32x16,
    vfabs,
    vmax,
    vmin,
    vrint,
    zero_f32x16,
)


@jit
def exp16(x):
    """exp of 16 floats within 2 units in the last place; clamped to [-87, 88] (Cephes, expf)."""
    x = vmin(vmax(x, splat_f32x16(float32(-87.0))), splat_f32x16(float32(88.0)))
    n = vrint(x * splat_f32x16(float32(1.4426950408889634)))
    r = fma(n, splat_f32x16(float32(-0.693359375)), x)
    r = fma(n, splat_f32x16(float32(2.12194440e-4)), r)
    p = splat_f32x16(float32(1.9875691500e-4))
    p = fma(p, r, splat_f32x16(float32(1.3981999507e-3)))
    p = fma(p, r, splat_f32x16(float32(8.3334519073e-3)))
    p = fma(p, r, splat_f32x16(float32(4.1665795894e-2)))
    p = fma(p, r, splat_f32x16(float32(1.6666665459e-1)))
    p = fma(p, r, splat_f32x16(float32(5.0000001201e-1)))
    p = fma(p, r * r, r) + splat_f32x16(float32(1.0))
    return p * bits_f32x16((cvt_i32x16(n) + splat_i32x16(int32(127))) << 23)


@jit
def over_exp(x, y):
    """x / (1 + exp(-y)): the sigmoid of y times x."""
    return x / (splat_f32x16(float32(1.0)) + exp16(zero_f32x16() - y))


@jit
def tanh16(x):
    """tanh within 3 units in the last place (Cephes, tanhf)."""
    z = x * x
    p = splat_f32x16(float32(-5.70498872745e-3))
    p = fma(p, z, splat_f32x16(float32(2.06390887954e-2)))
    p = fma(p, z, splat_f32x16(float32(-5.37397155531e-2)))
    p = fma(p, z, splat_f32x16(float32(1.33314422036e-1)))
    p = fma(p, z, splat_f32x16(float32(-3.33332819422e-1)))
    small = fma(p * z, x, x)
    size = vfabs(x)
    one = splat_f32x16(float32(1.0))
    large = one - splat_f32x16(float32(2.0)) / (exp16(size + size) + one)
    large = sel_lt(x, zero_f32x16(), zero_f32x16() - large, large)
    return sel_lt(splat_f32x16(float32(0.625)), size, large, small)


@jit
def erfc16(x):
    """erfc of numbers from 0 on, within 1.2e-7 of the result and what exp16 rounds.

    Press et al., Numerical Recipes, erfcc.
    """
    one = splat_f32x16(float32(1.0))
    t = one / fma(x, splat_f32x16(float32(0.5)), one)
    p = splat_f32x16(float32(0.17087277))
    p = fma(p, t, splat_f32x16(float32(-0.82215223)))
    p = fma(p, t, splat_f32x16(float32(1.48851587)))
    p = fma(p, t, splat_f32x16(float32(-1.13520398)))
    p = fma(p, t, splat_f32x16(float32(0.27886807)))
    p = fma(p, t, splat_f32x16(float32(-0.18628806)))
    p = fma(p, t, splat_f32x16(float32(0.09678418)))
    p = fma(p, t, splat_f32x16(float32(0.37409196)))
    p = fma(p, t, splat_f32x16(float32(1.00002368)))
    p = fma(p, t, splat_f32x16(float32(-1.26551223)))
    return t * exp16(fma(zero_f32x16() - x, x, p))
