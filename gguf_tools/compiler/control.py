"""What kernels need besides arithmetic: atomics, spinning, and calls by address."""

import os
from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gguf_tools.compiler.vectors import I32, I64, emit_call, pointer
from gguf_tools.processor import ARM_DOTS, DOT, X86_DOTS

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def emit_pause(b: Any) -> None:
    if DOT in X86_DOTS:
        emit_call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif DOT in ARM_DOTS:  # `yield` is no more than a nop on most; this one takes some time
        emit_call(b, "llvm.aarch64.isb", ir.VoidType(), [I32(15)])


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a spin loop."""

    def emit(context, b, sig, args):
        emit_pause(b)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def yield_core(typingctx):
    """Let another thread have this core, if one waits for it."""

    def emit(context, b, sig, args):
        name = "SwitchToThread" if os.name == "nt" else "sched_yield"
        emit_call(b, name, I32, [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def atomic_load64(typingctx, address):
    """int64 load (acquire)."""

    def emit(context, b, sig, args):
        return b.load_atomic(pointer(b, args[0]), "acquire", 8, typ=I64)

    return types.int64(types.int64), emit


@intrinsic
def compare_exchange64(typingctx, address, expected, desired):
    """int64: store `desired` if `expected` is there (acquire and release); gives what was there."""

    def emit(context, b, sig, args):
        place = b.inttoptr(args[0], I64.as_pointer())
        pair = b.cmpxchg(place, args[1], args[2], "acq_rel", "acquire")
        return b.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), emit


def _define_call(name: str, arguments: int) -> None:
    def call(typingctx, *operands):
        def emit(context, b, sig, args):
            kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)
            b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * (arguments + 1)), emit

    names = ", ".join(f"a{i}" for i in range(arguments))
    scope: dict[str, Any] = {"call": call}
    exec(f"def {name}(typingctx, f, {names}): return call(typingctx, f, {names})", scope)
    function = scope[name]
    function.__qualname__, function.__module__ = name, __name__
    function.__doc__ = f"Call the kernel of {arguments} int64 at an address."
    globals()[name] = intrinsic(function)


for _count in (3, 5, 7, 8, 9, 10, 12):
    _define_call(f"call{_count}", _count)
