"""Kernels for several columns at once, made out of those for one.

A matvec reads a block of weights, unpacks it, and multiplies it with the block's activations. For
n tokens only the last has to be done n times. `Columns` is the address of n columns: what a kernel
loads from it is `Each`, n values, and an operation on one of those is done on each of them. So the
source of a kernel for one column, compiled with Columns for its addresses, unpacks weights once
for all n, keeps n sums in registers, and computes to the bit what it computes for each alone.

Operations of gguf_tools.simd are made with `intrinsic` of this module, which extends them to Each;
operators are extended below. A value that is one for all columns becomes Each where it meets one.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from gguf_tools.compiler.vectors import I64

# --- the types -------------------------------------------------------------------------------


class Columns(types.Type):
    """An address in each of n columns: base + column * stride, passed on as these two."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"Columns({count})")

    dtype = types.int64


class Each(types.Type):
    """A value of type `dtype` for each of n columns."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Each({dtype} x {count})")

    def unify(self, typingctx: Any, other: Any) -> Any:
        return self if other == self.dtype else None

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        return Conversion.safe if other == self.dtype else None


@register_model(Columns)
class _ColumnsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, columns: Columns) -> None:
        super().__init__(manager, columns, ir.LiteralStructType([I64, I64]))


@register_model(Each)
class _EachModel(models.PrimitiveModel):
    def __init__(self, manager: Any, each: Each) -> None:
        kind = manager.lookup(each.dtype).get_value_type()
        super().__init__(manager, each, ir.ArrayType(kind, each.count))


def _is_many(kind: Any) -> bool:
    return isinstance(kind, (Columns, Each))


def _count(kinds: Sequence[Any]) -> int:
    """How many columns an operation on these types is done for; 0: they are the same for all."""
    counts = {kind.count for kind in kinds if _is_many(kind)}
    assert len(counts) <= 1, kinds
    return counts.pop() if counts else 0


def _of_one(kind: Any) -> Any:
    return kind.dtype if _is_many(kind) else kind


def _take(b: Any, kind: Any, value: Any, i: int) -> Any:
    """What column i has of a value."""
    if isinstance(kind, Each):
        return b.extract_value(value, i)
    if isinstance(kind, Columns):
        base, stride = (b.extract_value(value, part) for part in (0, 1))
        return b.add(base, b.mul(stride, I64(i)))
    return value


def _emit_each(context: Any, b: Any, sig: Any, args: Any, one: Any, emit: Any) -> Any:
    """Emit an operation, of signature `one` for one column, for every column."""
    result = None
    for i in range(_count(sig.args)):
        values = [
            context.cast(b, _take(b, kind, value, i), _of_one(kind), wanted)
            for kind, value, wanted in zip(sig.args, args, one.args, strict=True)
        ]
        value = emit(b, values)
        if isinstance(sig.return_type, Each):
            if result is None:
                kind = context.get_value_type(sig.return_type)
                result = ir.Constant(kind, ir.Undefined)
            result = b.insert_value(result, value, i)
    return context.get_dummy_value() if result is None else result


def _for_each(one: Any, kinds: Sequence[Any]) -> Any:
    """The signature for operands of these types of an operation of signature `one`."""
    nothing = one.return_type == types.void
    result = types.void if nothing else Each(one.return_type, _count(kinds))
    pairs = zip(kinds, one.args, strict=True)
    return signature(result, *(kind if _is_many(kind) else plain for kind, plain in pairs))


# --- operations ------------------------------------------------------------------------------


def intrinsic(typing: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, of an operation that also takes Columns for addresses, and Each."""

    @functools.wraps(typing)
    def extended(typingctx: Any, *kinds: Any) -> Any:
        found = typing(typingctx, *(_of_one(kind) for kind in kinds))
        if found is None or not _count(kinds):
            return found
        one, emit_one = found

        def emit(context: Any, b: Any, sig: Any, args: Any) -> Any:
            return _emit_each(
                context, b, sig, args, one, lambda b, values: emit_one(context, b, one, values)
            )

        return _for_each(one, kinds), emit

    return numba.extending.intrinsic(extended)


def _extend_operator(op: Any) -> None:
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if not any(isinstance(kind, Each) for kind in args):
                return None
            kinds = tuple(_of_one(kind) for kind in args)
            one = self.context.resolve_function_type(op, kinds, {})
            return None if one is None else _for_each(one, args)

    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        kinds = tuple(_of_one(kind) for kind in sig.args)
        one = context.typing_context.resolve_function_type(op, kinds, {})
        emit = context.get_function(op, one)
        return _emit_each(context, b, sig, args, one, emit)

    infer_global(op)(Typing)
    for kinds in ((Each, Each), (Each, types.Any), (types.Any, Each)):
        lower_builtin(op, *kinds)(lower)


for _name in ("add", "sub", "mul", "truediv", "and_", "or_", "xor", "lshift", "rshift"):
    _extend_operator(getattr(operator, _name))
for _name in ("iadd", "isub", "imul"):
    _extend_operator(getattr(operator, _name))


@infer_global(operator.add)
class _Along(AbstractTemplate):
    """Columns + int64: further on in every column."""

    def generic(self, args: Any, kws: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], Columns) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.int64)
        return None


@lower_builtin(operator.add, Columns, types.Integer)
def _along(context: Any, b: Any, sig: Any, args: Any) -> Any:
    return b.insert_value(args[0], b.add(b.extract_value(args[0], 0), args[1]), 0)


@lower_cast(types.Any, Each)
def _same_for_all(context: Any, b: Any, source: Any, target: Any, value: Any) -> Any:
    result = ir.Constant(context.get_value_type(target), ir.Undefined)
    for i in range(target.count):
        result = b.insert_value(result, value, i)
    return result
