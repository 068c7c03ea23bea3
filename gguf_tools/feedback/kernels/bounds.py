"""Which scales and minima can be stored."""

import numpy as np

from gguf_tools.feedback.kernels.rounding import (
    HAS_MINIMUM,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    clamp,
    inverse,
    nearest,
    number,
)
from gguf_tools.jit import jit
from gguf_tools.simd import (
    cvt_f16x16,
    cvt_f32x16,
    ld_f32x16,
    ld_i64,
    splat_f32x16,
    st,
    zero_f32x16,
)

MOST = np.float32(65504.0)  # float16's largest

D, DMIN, BY_D, BY_DMIN, S_LOW, S_HIGH, M_LOW, M_HIGH = 0, 64, 128, 192, 256, 320, 384, 448
"""Where in `bounds`: units and their inverses, then the bounds themselves."""


@jit
def set_bounds(bounds, facts, unit, min_unit, in_steps):
    """Between which a scale and a minimum lie: multiples of units, or what float16 holds."""
    most, least, zero = splat_f32x16(MOST), splat_f32x16(-MOST), zero_f32x16()
    by_d, by_dmin, s_low, s_high, m_low, m_high = unit, min_unit, least, most, least, most
    if ld_i64(facts + HIGHEST_SCALE) > 1:
        m_low = zero
        if ld_i64(facts + HAS_MINIMUM):
            s_low = zero
    if in_steps:
        by_d, by_dmin = inverse(unit), inverse(min_unit)
        s_low, s_high = number(facts + LOWEST_SCALE), number(facts + HIGHEST_SCALE)
        m_high = s_high
    st(bounds + D, unit)
    st(bounds + DMIN, min_unit)
    st(bounds + BY_D, by_d)
    st(bounds + BY_DMIN, by_dmin)
    st(bounds + S_LOW, s_low)
    st(bounds + S_HIGH, s_high)
    st(bounds + M_LOW, m_low)
    st(bounds + M_HIGH, m_high)


@jit
def snap_scale(s, bounds, in_steps):
    """The nearest scale that can be stored."""
    low, high = ld_f32x16(bounds + S_LOW), ld_f32x16(bounds + S_HIGH)
    if in_steps:
        return ld_f32x16(bounds + D) * nearest(s * ld_f32x16(bounds + BY_D), low, high)
    return as_half(clamp(s, low, high))


@jit
def snap_minimum(m, bounds, in_steps):
    low, high = ld_f32x16(bounds + M_LOW), ld_f32x16(bounds + M_HIGH)
    if in_steps:
        return ld_f32x16(bounds + DMIN) * nearest(m * ld_f32x16(bounds + BY_DMIN), low, high)
    return as_half(clamp(m, low, high))


@jit
def to_half(x):
    return as_half(clamp(x, splat_f32x16(-MOST), splat_f32x16(MOST)))


@jit
def as_half(x):
    return cvt_f32x16(cvt_f16x16(x))
