"""numba, and what it has to know to compile kernels: every numba option is here.

Nothing imports this package before a kernel has to be compiled. Kernels follow IEEE rules strictly
(no fastmath): quantisers must be bit-exact. They raise nothing and need nothing of the interpreter,
so that a compiled one is an object file that runs in any process (gguf_tools/kernel_files.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import ccallback
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import typeof_impl

from gguf_tools.compiler.columns import Columns
from gguf_tools.deferred import Deferred
from gguf_tools.processor import FEATURES, join_features

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}

numba.config.CPU_FEATURES = join_features(FEATURES)


@dataclass(frozen=True)
class Compiled:
    """A C function in this process, and as an object file."""

    address: int
    object_file: bytes
    needs: frozenset[str]  # the functions of the system that it calls
    library: Any  # numba's, which owns the code


def helper(function: Callable[..., Any]) -> Any:
    """A function that kernels call, compiled with them."""
    return numba.njit(**OPTIONS)(function)


def compile_function(
    function: Callable[..., None], letters: str, *, n_columns: int, symbol: str
) -> Compiled:
    """A kernel (`gguf_tools.jit.kernel`) as the C function `symbol`."""
    column = Columns(n_columns) if n_columns > 1 else types.int64
    kinds = {"i": types.int64, "f": types.float32, "c": column}
    arguments = tuple(kinds[letter] for letter in letters)
    with global_compiler_lock:
        compiler = _Plain(function, cpu_target, {"nopython": True, **OPTIONS}, {}, Compiler)
        facts = attrgetter("fndesc", "library")
        described, library = facts(compiler.compile(arguments, types.void))
        library.add_ir_module(_entry(described, symbol))
        library.finalize()
        address = library.get_pointer_to_function(symbol)
        return Compiled(address, library._get_compiled_object(), _needs(library), library)


class _Plain(ccallback._CFuncCompiler):  # type: ignore[name-defined]
    """Compiles no entry: numba's own would tell the interpreter of exceptions."""

    def _customize_flags(self, flags: Any) -> Any:
        flags = super()._customize_flags(flags)
        flags.no_cfunc_wrapper = True
        return flags


def _entry(function: Any, symbol: str) -> Any:
    """LLVM's module of a C function that calls a compiled one (CPUContext.create_cfunc_wrapper)."""
    context = cpu_target.target_context
    module = context.create_module("entry")
    kind = context.call_conv.get_function_type(function.restype, function.argtypes)
    called = ir.Function(module, kind, function.llvm_func_name)
    parameters = [context.get_value_type(argument) for argument in function.argtypes]
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), symbol)
    builder = ir.IRBuilder(entry.append_basic_block("entry"))
    context.call_conv.call_function(
        builder, called, function.restype, function.argtypes, entry.args
    )
    builder.ret_void()
    return module


def _needs(library: Any) -> frozenset[str]:
    functions = library._final_module.functions
    declared = {function.name for function in functions if function.is_declaration}
    return frozenset(name for name in declared if not name.startswith("llvm."))


@typeof_impl.register(Deferred)
def _typeof_deferred(value: Deferred, context: Any) -> Any:
    """What numba takes a global of a kernel's module for."""
    if not value.is_made:
        value.real  # noqa: B018 - is made
        cpu_target.typing_context.refresh()  # it may be an operation that numba did not know
        cpu_target.target_context.refresh()
    return cpu_target.typing_context.resolve_value_type(value.real)
