"""SIMD vectors as first-class values inside numba kernels.

`f32x16`, `i8x64` and the like are numba types whose data model is an LLVM vector, so that kernels
keep reading like Python:

    total = dpbusd(zero_i32x16(), ld_i8x64(weights), ld_i8x64(activations))
    y = fma(cvt_f32x16(total), splat_f32x16(scale), y)

Every operation is pasted into its caller as LLVM IR: no call, no compile unit of its own. Memory
is addressed by plain int64 addresses (`array.ctypes.data`) and needs no alignment. LLVM splits a
vector wider than the machine's registers, so all operations run on every processor; only the byte
dot product, the 16-bit multiply-add, the byte table and `pause` name instructions of one processor,
and they are chosen in one place (`DOT`).

For each vector type there are (T stands for its name, such as f32x16):

    ld_T(address)  zero_T()  splat_T(scalar)
    bits_T(x)      the same bits seen as T
    cvt_T(x)       numeric conversion; integers count as signed
    ucvt_T(x)      numeric conversion; the source's integers count as unsigned

and for all of them `st(address, vector)` and the operators + - * / & | ^ (lane by lane),
`<<` and `>>` by a scalar (`>>` shifts zeros in).

The scalar types `float32`, `int8` and the like are here, too, as casts. All of it is made by
gguf_tools/compiler/simd.py when a kernel is compiled: what is imported from here is only named.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from gguf_tools.deferred import Deferred, named

COMPILER = "gguf_tools.compiler.simd"


def __getattr__(name: str) -> Any:
    return named(COMPILER, name)


def make_shuffle(name: str, lanes: Sequence[int], source: str, *, two: bool = False) -> Deferred:
    """A fixed choice of lanes of a vector (of both operands' when `two`) as an operation."""
    return _made("make_shuffle", name, lanes, source, two)


def make_constant(name: str, values: Sequence[int], result: str) -> Deferred:
    """An operation without operands that gives a vector of these lanes (integers, signed)."""
    return _made("make_constant", name, values, result)


def make_table(name: str, read: Callable[[], bytes]) -> Deferred:
    """An operation without operands that gives the address of what `read` gives.

    `read` is called when a kernel is compiled; the bytes are a constant of that kernel, on disk,
    too.
    """
    return _made("make_table", name, read)


def _made(maker: str, *arguments: Any) -> Deferred:
    return Deferred(lambda: getattr(import_module(COMPILER), maker)(*arguments))
