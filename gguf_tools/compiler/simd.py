"""The operations of gguf_tools/simd.py, which see, as numba intrinsics.

Every operation is pasted into its caller as LLVM IR: no call, no compile unit of its own.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import float32, int8, int16, int32, int64, types, uint64  # noqa: F401 - casts
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from gguf_tools.compiler.columns import intrinsic
from gguf_tools.compiler.vectors import (
    ELEMENTS,
    I1,
    I8,
    I32,
    I64,
    SCALARS,
    VECTORS,
    Vector,
    emit_call,
    emit_convert,
    emit_dot,
    emit_fma,
    emit_lookup,
    emit_prefetch,
    emit_shuffle,
    emit_splat,
    pointer,
)
from gguf_tools.processor import DOT

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


# --- making intrinsics -----------------------------------------------------------------------


def _define(name: str, typing: Callable[..., Any], doc: str = "") -> None:
    """Publish a numba intrinsic under `name` in this module."""
    typing.__name__ = typing.__qualname__ = name
    typing.__module__ = __name__
    typing.__doc__ = doc or typing.__doc__
    globals()[name] = intrinsic(typing)


def _define_type(name: str, vector: Vector) -> None:
    def ld(typingctx, address):
        def emit(context, b, sig, args):
            return b.load(pointer(b, args[0]), typ=vector.llvm(), align=1)

        return vector(types.int64), emit

    def zero(typingctx):
        def emit(context, b, sig, args):
            return ir.Constant(vector.llvm(), None)

        return vector(), emit

    def splat(typingctx, scalar):
        def emit(context, b, sig, args):
            return emit_splat(b, vector.llvm(), args[0])

        return vector(SCALARS[vector.element]), emit

    def bits(typingctx, x):
        def emit(context, b, sig, args):
            return b.bitcast(args[0], vector.llvm())

        return vector(x), emit

    def cvt(typingctx, x):
        def emit(context, b, sig, args):
            return emit_convert(b, args[0], x, vector, True)

        return vector(x), emit

    def ucvt(typingctx, x):
        def emit(context, b, sig, args):
            return emit_convert(b, args[0], x, vector, False)

        return vector(x), emit

    _define(f"ld_{name}", ld)
    _define(f"zero_{name}", zero)
    _define(f"bits_{name}", bits)
    _define(f"cvt_{name}", cvt)
    _define(f"ucvt_{name}", ucvt)
    if vector.element in SCALARS:
        _define(f"splat_{name}", splat)


for _name, _vector in VECTORS.items():
    _define_type(_name, _vector)


# --- scalars in memory -----------------------------------------------------------------------


def _define_scalar_load(name: str, result: Any, kind: Any, widen: Any = None) -> None:
    def ld(typingctx, address):
        def emit(context, b, sig, args):
            value = b.load(pointer(b, args[0]), typ=kind, align=1)
            return b.fpext(value, widen) if widen else value

        return result(types.int64), emit

    _define(name, ld, f"The {result} at an address.")


_define_scalar_load("ld_u8", types.uint8, I8)
_define_scalar_load("ld_i8", types.int8, I8)
_define_scalar_load("ld_u16", types.uint16, ir.IntType(16))
_define_scalar_load("ld_u32", types.uint32, I32)
_define_scalar_load("ld_i32", types.int32, I32)
_define_scalar_load("ld_u64", types.uint64, I64)
_define_scalar_load("ld_i64", types.int64, I64)
_define_scalar_load("ld_f32", types.float32, ir.FloatType())
_define_scalar_load("ld_f16", types.float32, ir.HalfType(), ir.FloatType())
_define_scalar_load("ld_bf16", types.float32, ELEMENTS["bf16"], ir.FloatType())


def _define_scalar_store(name: str, accepted: Any, kind: Any) -> None:
    def st(typingctx, address, x):
        def emit(context, b, sig, args):
            value = args[1]
            if value.type != kind:
                value = b.trunc(value, kind)
            b.store(value, pointer(b, args[0]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, accepted), emit

    _define(name, st, f"Store the low bits of an {accepted}.")


_define_scalar_store("st_u8", types.int64, I8)
_define_scalar_store("st_i16", types.int64, ir.IntType(16))
_define_scalar_store("st_i32", types.int64, I32)
_define_scalar_store("st_i64", types.int64, I64)
_define_scalar_store("st_f32", types.float32, ir.FloatType())


@intrinsic
def st(typingctx, address, vector):
    """Store a vector."""

    def emit(context, b, sig, args):
        b.store(args[1], pointer(b, args[0]), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), emit


@intrinsic
def f32_to_f16(typingctx, address, x):
    """Round a float32 to half, store the half, return it as float32."""

    def emit(context, b, sig, args):
        half = b.fptrunc(args[1], ir.HalfType())
        b.store(half, pointer(b, args[0]), align=1)
        return b.fpext(half, ir.FloatType())

    return types.float32(types.int64, types.float32), emit


@intrinsic
def f16_splat16(typingctx, address):
    """f32x16 filled with the half at an address (one broadcast, one conversion)."""
    result = VECTORS["f32x16"]

    def emit(context, b, sig, args):
        short = b.load(pointer(b, args[0]), typ=ir.IntType(16), align=1)
        halves = b.bitcast(
            emit_splat(b, ir.VectorType(ir.IntType(16), 16), short),
            ir.VectorType(ir.HalfType(), 16),
        )
        return b.fpext(halves, result.llvm())

    return result(types.int64), emit


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address (any address is allowed)."""

    def emit(context, b, sig, args):
        emit_prefetch(b, pointer(b, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), emit


# --- arithmetic ------------------------------------------------------------------------------


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c with one rounding, f32 lanes."""

    def emit(context, builder, sig, args):
        return emit_fma(builder, *args)

    return a(a, a, a), emit


@intrinsic
def hsum(typingctx, v):
    """Sum of all lanes (floats by halving: the order is fixed, but not left to right)."""

    def emit(context, b, sig, args):
        if not v.is_float:
            name = f"llvm.vector.reduce.add.v{v.lanes}{v.element}"
            return emit_call(b, name, ELEMENTS[v.element], [args[0]])
        value, n = args[0], v.lanes
        while n > 1:
            n //= 2
            low = emit_shuffle(b, value, None, range(n))
            value = b.fadd(low, emit_shuffle(b, value, None, range(n, 2 * n)))
        return b.extract_element(value, I32(0))

    return SCALARS[v.element](v), emit


@intrinsic
def hmax(typingctx, v):
    """Largest lane of an f32 vector; a number wins over NaN."""

    def emit(context, b, sig, args):
        # By halving: LLVM's own reduction goes through the lanes one by one, to be strict.
        value, n = args[0], v.lanes
        while n > 1:
            n //= 2
            halves = [emit_shuffle(b, value, None, range(first, first + n)) for first in (0, n)]
            value = emit_call(b, f"llvm.maxnum.v{n}f32", halves[0].type, halves)
        return b.extract_element(value, I32(0))

    return types.float32(v), emit


@intrinsic
def hmax_abs(typingctx, v, w):
    """Largest absolute value in two f32 vectors; NaN if there is one."""

    def emit(context, b, sig, args):
        # Without the sign, floats are in the order of their bits, NaN above infinity.
        words = ir.VectorType(I32, v.lanes)
        sign = ir.Constant(words, [0x7FFFFFFF] * v.lanes)
        a, c = (b.and_(b.bitcast(x, words), sign) for x in args)
        both = emit_call(b, f"llvm.umax.v{v.lanes}i32", words, [a, c])
        largest = emit_call(b, f"llvm.vector.reduce.umax.v{v.lanes}i32", I32, [both])
        return b.bitcast(largest, ir.FloatType())

    return types.float32(v, v), emit


@intrinsic
def to_f32(typingctx, x):
    """An int32 as float32."""

    def emit(context, b, sig, args):
        return b.sitofp(args[0], ir.FloatType())

    return types.float32(types.int32), emit


@intrinsic
def first_lane(typingctx, v):
    """Lane 0."""

    def emit(context, b, sig, args):
        return b.extract_element(args[0], I32(0))

    return SCALARS[v.element](v), emit


def _define_float(name: str, llvm_name: str, operands: int, doc: str) -> None:
    def emit(context, b, sig, args):
        kind = args[0].type
        return emit_call(b, f"llvm.{llvm_name}.v{kind.count}f32", kind, args)

    def one(typingctx, v):
        return v(v), emit

    def two(typingctx, v, w):
        return v(v, v), emit

    _define(name, one if operands == 1 else two, doc)


_define_float("vsqrt", "sqrt", 1, "Square root, lane by lane.")
_define_float("vfabs", "fabs", 1, "Absolute value, lane by lane.")
_define_float("vrint", "rint", 1, "Round half to even, lane by lane.")
_define_float("vtrunc", "trunc", 1, "Round towards zero, lane by lane.")
_define_float("vmax", "maxnum", 2, "The larger, lane by lane; a number wins over NaN.")
_define_float("vmin", "minnum", 2, "The smaller, lane by lane; a number wins over NaN.")


@intrinsic
def sel_lt(typingctx, a, c, x, y):
    """a < c ? x : y, lane by lane (false for NaN)."""

    def emit(context, b, sig, args):
        return b.select(b.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return x(a, a, x, x), emit


@intrinsic
def sel_bits(typingctx, bits, x, y):
    """Lane i of x where bit i of the integer `bits` is set, else of y."""

    def emit(context, b, sig, args):
        width = args[0].type.width
        word = args[0] if width == x.lanes else b.trunc(args[0], ir.IntType(x.lanes))
        return b.select(b.bitcast(word, ir.VectorType(I1, x.lanes)), args[1], args[2])

    return x(bits, x, x), emit


@intrinsic
def sel_test(typingctx, word, bits, x, y):
    """Lane i of x where lane i of `word` has one of the bits of lane i of `bits`, else of y."""

    def emit(context, b, sig, args):
        found = b.and_(args[0], args[1])
        return b.select(b.icmp_unsigned("!=", found, ir.Constant(found.type, None)), *args[2:])

    return x(word, word, x, x), emit


@intrinsic
def dpbusd(typingctx, total, unsigned, signed):
    """i32 lanes: total + the dot product of 4 unsigned by 4 signed bytes."""

    def emit(context, b, sig, args):
        return emit_dot(b, *args)

    return total(total, unsigned, signed), emit


@intrinsic
def dpbusd7(typingctx, total, unsigned, signed):
    """As dpbusd, for unsigned bytes below 128 (weights of 7 bits or fewer): cheaper on AVX2."""

    def emit(context, b, sig, args):
        return emit_dot(b, *args, small=True)

    return total(total, unsigned, signed), emit


# --- shuffles --------------------------------------------------------------------------------


@intrinsic
def concat(typingctx, low, high):
    """Both vectors as one of twice the lanes."""
    result = VECTORS[f"{low.element}x{2 * low.lanes}"]

    def emit(context, b, sig, args):
        return emit_shuffle(b, args[0], args[1], range(2 * low.lanes))

    return result(low, low), emit


def make_shuffle(name: str, lanes: Sequence[int], vector: str, two: bool) -> Any:
    source = VECTORS[vector]
    result = VECTORS[f"{source.element}x{len(lanes)}"]

    def one_operand(typingctx, a):
        def emit(context, b, sig, args):
            return emit_shuffle(b, args[0], None, lanes)

        return result(source), emit

    def two_operands(typingctx, a, c):
        def emit(context, b, sig, args):
            return emit_shuffle(b, args[0], args[1], lanes)

        return result(source, source), emit

    function = two_operands if two else one_operand
    function.__name__ = function.__qualname__ = name
    return intrinsic(function)


def make_constant(name: str, values: Sequence[int], vector: str) -> Any:
    result = VECTORS[vector]

    def constant(typingctx):
        def emit(context, b, sig, args):
            return ir.Constant(result.llvm(), list(values))

        return result(), emit

    constant.__name__ = constant.__qualname__ = name
    return intrinsic(constant)


def make_table(name: str, read: Callable[[], bytes]) -> Any:
    def table(typingctx):
        def emit(context, b, sig, args):
            data = bytearray(read())
            kind = ir.ArrayType(I8, len(data))
            place = cgutils.global_constant(b, name, ir.Constant(kind, data))
            place.align = 64
            return b.ptrtoint(place, I64)

        return types.int64(), emit

    table.__name__ = table.__qualname__ = name
    return intrinsic(table)


@intrinsic
def keep(typingctx, x):
    """x, as a value that stays in a register.

    LLVM sees through constants and would rather load them again at every use, in the loop.
    """

    def emit(context, b, sig, args):
        if DOT != "avx512vnni":  # with half the registers that is the better choice
            return args[0]
        kind = ir.FunctionType(args[0].type, [args[0].type])
        return b.asm(kind, "", "=v,0", args, False)

    return x(x), emit


@intrinsic
def lookup16(typingctx, table, indices):
    """table[i] for every lane i of `indices`, which must be 0 to 15; a table of 16 bytes."""

    def emit(context, b, sig, args):
        return emit_lookup(b, *args)

    return indices(table, indices), emit


@intrinsic
def transpose16(typingctx, source, source_stride, target, target_stride):
    """16 rows of 16 dwords, transposed in registers; strides in bytes."""

    def emit(context, b, sig, args):
        source, source_stride, target, target_stride = args
        kind = ir.VectorType(I32, 16)

        def row(base: Any, stride: Any, i: int) -> Any:
            return pointer(b, b.add(base, b.mul(stride, I64(i))))

        rows = [b.load(row(source, source_stride, i), typ=kind, align=1) for i in range(16)]
        for s in (8, 4, 2, 1):  # swap the off-diagonal blocks of s x s
            low = [(i if not (i & s) else 16 + (i ^ s)) for i in range(16)]
            high = [((i ^ s) if not (i & s) else 16 + i) for i in range(16)]
            swapped = list(rows)
            for i in range(16):
                if not i & s:
                    swapped[i] = emit_shuffle(b, rows[i], rows[i | s], low)
                    swapped[i | s] = emit_shuffle(b, rows[i], rows[i | s], high)
            rows = swapped
        for i in range(16):
            b.store(rows[i], row(target, target_stride, i), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


# --- operators -------------------------------------------------------------------------------


def _define_operator(op: Any, emit_integer: Any, emit_float: Any) -> None:
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    def lower(context, b, sig, args):
        return (emit_float if sig.args[0].is_float else emit_integer)(b, *args)

    in_place = getattr(operator, "i" + op.__name__.rstrip("_"))
    for each in (op, in_place):
        infer_global(each)(Typing)
        lower_builtin(each, Vector, Vector)(lower)


_B = ir.IRBuilder
_define_operator(operator.add, _B.add, _B.fadd)
_define_operator(operator.sub, _B.sub, _B.fsub)
_define_operator(operator.mul, _B.mul, _B.fmul)
_define_operator(operator.truediv, None, _B.fdiv)
_define_operator(operator.and_, _B.and_, None)
_define_operator(operator.or_, _B.or_, None)
_define_operator(operator.xor, _B.xor, None)


def _define_shift(op: Any, emit_shift: Any) -> None:
    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            by_scalar = len(args) == 2 and isinstance(args[1], types.Integer)
            if by_scalar and isinstance(args[0], Vector):
                return signature(args[0], *args)
            return None

    @lower_builtin(op, Vector, types.Integer)
    def lower(context, b, sig, args):
        kind, amount = sig.args[0].llvm(), args[1]
        if amount.type.width > kind.element.width:
            amount = b.trunc(amount, kind.element)
        elif amount.type.width < kind.element.width:
            amount = b.zext(amount, kind.element)
        return emit_shift(b, args[0], emit_splat(b, kind, amount))


_define_shift(operator.lshift, _B.shl)
_define_shift(operator.rshift, _B.lshr)
