"""Register-blocked inner loops, written at LLVM level.

A tile keeps all its sums in registers while it walks along the shared dimension. Python loops run
at code generation, so the counts must be literals at the place of the call.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gguf_tools.compiler.vectors import (
    I8,
    I32,
    I64,
    emit_dot,
    emit_fma,
    emit_prefetch,
    emit_splat,
    pointer,
)

F32 = ir.FloatType()
_INTS = ir.VectorType(I32, 16)
_FLOATS = ir.VectorType(F32, 16)
_BYTES = ir.VectorType(I8, 64)


def _at(b: Any, base: Any, offset: Any) -> Any:
    return pointer(b, b.add(base, I64(offset) if isinstance(offset, int) else offset))


def _columns(b: Any, base: Any, stride: Any, count: int) -> list[Any]:
    return [b.add(base, b.mul(stride, I64(c))) for c in range(count)]


@intrinsic(prefer_literal=True)
def int8_tile(
    typingctx, n_columns, group, offset, small, w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups
):
    """32 weight rows times `n_columns` columns of activations (n_columns, group, offset
    and small literal; small: weights below 128, see emit_dot).

    w      weights as unsigned bytes, [group / 4][32 rows][4] per group, 64-byte aligned
    ws wo  scales and offsets of the rows, float32 [n_groups][32], 64-byte aligned
    x      activations, int8, columns `xs` bytes apart
    dx corr dxs   per column and group: scale (f32), what the sum starts from (i32), scale * sum
                  (f32); columns `ms` bytes apart
    y      float32 [n_columns][32], columns `ys` bytes apart:
           y[c][r] = sum over groups of  ws[r] * dx[c] * (corr[c] + dot) + wo[r] * dxs[c]
    """
    columns, size, has_offset, below_128 = (
        a.literal_value for a in (n_columns, group, offset, small)
    )

    def emit(context, b, sig, args):
        w, ws, wo, x, xs, dx, corr, dxs, ms, y, ys, n_groups = args[4:]
        x_at = _columns(b, x, xs, columns)
        dx_at, corr_at, dxs_at = (_columns(b, a, ms, columns) for a in (dx, corr, dxs))
        zero = ir.Constant(_FLOATS, None)
        sums = [[cgutils.alloca_once_value(b, zero) for _ in range(columns)] for _ in range(2)]
        with cgutils.for_range(b, n_groups) as loop:
            i = loop.index
            i4, along = b.mul(i, I64(4)), b.mul(i, I64(size))
            weights = b.add(w, b.mul(i, I64(size * 32)))
            dots: list[list[Any]] = [[None] * columns for _ in range(2)]
            for c in range(columns):
                first = b.load(_at(b, corr_at[c], i4), typ=I32, align=4)
                dots[0][c] = dots[1][c] = emit_splat(b, _INTS, first)
            for j in range(size // 4):
                rows = [
                    b.load(_at(b, weights, (j * 2 + r) * 64), typ=_BYTES, align=64) for r in (0, 1)
                ]
                for c in range(columns):
                    four = b.load(_at(b, b.add(x_at[c], along), j * 4), typ=I32, align=4)
                    spread = b.bitcast(emit_splat(b, _INTS, four), _BYTES)
                    for r in (0, 1):
                        dots[r][c] = emit_dot(b, dots[r][c], rows[r], spread, small=below_128)
            place = b.mul(i, I64(128))
            for r in (0, 1):
                scale = b.load(_at(b, b.add(ws, place), r * 64), typ=_FLOATS, align=64)
                shift = None
                if has_offset:
                    shift = b.load(_at(b, b.add(wo, place), r * 64), typ=_FLOATS, align=64)
                for c in range(columns):
                    d = emit_splat(b, _FLOATS, b.load(_at(b, dx_at[c], i4), typ=F32, align=4))
                    value = b.sitofp(dots[r][c], _FLOATS)
                    total = emit_fma(b, value, b.fmul(scale, d), b.load(sums[r][c]))
                    if has_offset:
                        s = b.load(_at(b, dxs_at[c], i4), typ=F32, align=4)
                        total = emit_fma(b, shift, emit_splat(b, _FLOATS, s), total)
                    b.store(total, sums[r][c])
        for c, column in enumerate(_columns(b, y, ys, columns)):
            for r in (0, 1):
                b.store(b.load(sums[r][c]), _at(b, column, r * 64), align=4)
        return context.get_dummy_value()

    return types.void(n_columns, group, offset, small, *[types.int64] * 12), emit


@intrinsic(prefer_literal=True)
def float_tile(typingctx, n_columns, n_vectors, w_bytes, fresh, x, xs, w, ws, y, ys, n, ahead):
    """y[c][0:v] += sum over i < n of x[c][i] * w[i][0:v], where v = 16 * n_vectors.

    x and y are float32. Literals are `n_columns`, `n_vectors`, `w_bytes`, the bytes of a number of
    w (4: float32, 2: f16, 1: int8), and `fresh`: y = instead of +=. Strides in bytes: `xs` between
    columns of x, `ws` between rows of w, `ys` between columns of y. Memory is asked for what lies
    `ahead` bytes further than w, unless that is a literal 0. Beyond 24 sums the registers do not
    suffice.
    """
    literals = (n_columns, n_vectors, w_bytes, fresh)
    columns, parts, size, is_fresh = (a.literal_value for a in literals)
    kind = ir.VectorType({4: F32, 2: ir.HalfType(), 1: I8}[size], 16)

    def widened(b: Any, value: Any) -> Any:
        if size == 4:
            return value
        return b.fpext(value, _FLOATS) if size == 2 else b.sitofp(value, _FLOATS)

    def emit(context, b, sig, args):
        x, xs, w, ws, y, ys, n, ahead = args[4:]
        zero = ir.Constant(_FLOATS, None)
        y_at, x_at = _columns(b, y, ys, columns), _columns(b, x, xs, columns)
        sums = [
            [
                cgutils.alloca_once_value(
                    b, zero if is_fresh else b.load(_at(b, at, r * 64), typ=_FLOATS, align=4)
                )
                for at in y_at
            ]
            for r in range(parts)
        ]
        with cgutils.for_range(b, n) as loop:
            row, i4 = b.add(w, b.mul(loop.index, ws)), b.mul(loop.index, I64(4))
            if not isinstance(sig.args[-1], types.IntegerLiteral):
                further = b.add(row, ahead)
                for line in range(0, 16 * size * parts, 64):
                    emit_prefetch(b, _at(b, further, line))
            weights = [
                widened(b, b.load(_at(b, row, r * 16 * size), typ=kind, align=size))
                for r in range(parts)
            ]
            for c in range(columns):
                value = emit_splat(b, _FLOATS, b.load(_at(b, x_at[c], i4), typ=F32, align=4))
                for r in range(parts):
                    b.store(emit_fma(b, weights[r], value, b.load(sums[r][c])), sums[r][c])
        for c in range(columns):
            for r in range(parts):
                b.store(b.load(sums[r][c]), _at(b, y_at[c], r * 64), align=4)
        return context.get_dummy_value()

    return types.void(
        *(n_columns, n_vectors, w_bytes, fresh, *[types.int64] * 7),
        ahead if isinstance(ahead, types.IntegerLiteral) else types.int64,
    ), emit
