"""Compiled kernels: how they are written, and how they come into a process.

Two decorators:

    @jit                a helper that kernels call; compiled when first needed, inlined by LLVM
    @kernel("iiif")     a C function of int64 (`i`: addresses and sizes) and float32 (`f`) arguments
                        that returns nothing; compiled when its address is first asked for.
                        An argument `c` is an address, too, of activations or results in one
                        column: `Kernel.for_columns` compiles the same for several columns

Kernels never hold the GIL: they are called through ctypes, which releases it, or by address from
other kernels. They are compiled by numba (gguf_tools/compiler) once for a machine, and kept on disk
(gguf_tools/kernel_files.py); a process that finds them there does not import numba at all.
"""

import ctypes
import importlib
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root
from gguf_tools.child import python_command
from gguf_tools.deferred import Deferred
from gguf_tools.errors import DeviceError
from gguf_tools.kernel_files import CACHE_FOLDER, SYSTEM_FUNCTIONS, is_kept, load, save
from gguf_tools.processor import FEATURES

PACKAGES = ("gguf_tools.", "runtime.")
_C_TYPES: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float, "c": ctypes.c_int64}


def jit(function: Callable[..., Any]) -> Deferred:
    """Compile a helper for use inside kernels; it costs nothing when the kernel comes from disk."""

    def compile_helper() -> Any:
        from gguf_tools.compiler import helper

        return helper(function)

    return Deferred(compile_helper)


def check_processor(machine: str, features: Mapping[str, bool]) -> None:
    """DeviceError on an x86 processor without F16C, where compiled half conversions crash."""
    if machine.lower() in ("x86_64", "amd64") and not features.get("f16c"):
        raise DeviceError(
            "this processor cannot convert 16-bit floats (it lacks F16C, which x86 processors have "
            "since 2012), and compiled kernels need it; `run --backend reference` works, slowly"
        )


class Kernel:
    """A compiled C function; made, or loaded from disk, when first needed."""

    def __init__(self, function: Callable[..., None], letters: str, n_columns: int = 1) -> None:
        self.function = function
        self.letters = letters
        self.n_columns = n_columns
        self.__doc__ = function.__doc__
        self._lock = threading.Lock()
        self._compiled: Any = None  # owns the code, if it was compiled here
        self._address = 0
        self._entry: Any = None
        self._others: dict[int, Kernel] = {}

    def __repr__(self) -> str:
        return f"kernel {self.function.__name__}({self.letters})"

    def for_columns(self, n: int) -> "Kernel":
        """The same for n columns at once (gguf_tools/compiler/columns.py).

        Each of its arguments `c` is two: the address in the first column, and how many bytes
        further on it is in the next.
        """
        if n == self.n_columns:
            return self
        if n not in self._others:
            self._others[n] = Kernel(self.function, self.letters, n)
        return self._others[n]

    @property
    def address(self) -> int:
        """The C function's address; compiles on first use."""
        return self._make()

    def __call__(self, *arguments: float) -> None:
        """Call it from Python; the GIL is released meanwhile."""
        self._make()
        self._entry(*arguments)

    def _make(self) -> int:
        if not self._address:
            with self._lock:
                if not self._address:
                    check_processor(platform.machine(), FEATURES)
                    kept = load(self.name, self._symbol) if self._can_be_kept else None
                    address = kept or self._build()
                    letters = self.letters
                    if self.n_columns > 1:
                        letters = letters.replace("c", "ii")
                    arguments = [_C_TYPES[letter] for letter in letters]
                    self._entry = ctypes.CFUNCTYPE(None, *arguments)(address)
                    self._address = address
        return self._address

    def _build(self) -> int:
        """Compile it, and keep it on disk where there is room for it."""
        from gguf_tools.compiler import compile_function

        self._compiled = compile_function(
            self.function, self.letters, n_columns=self.n_columns, symbol=self._symbol
        )
        if self._can_be_kept and self._compiled.needs <= SYSTEM_FUNCTIONS:
            with suppress(OSError):  # it is compiled again next time
                save(self.name, self._compiled.object_file)
        return int(self._compiled.address)

    @property
    def name(self) -> str:
        """module:function:columns"""
        return f"{self.function.__module__}:{self.function.__name__}:{self.n_columns}"

    @property
    def is_ready(self) -> bool:
        """Whether it is compiled, in memory or on disk."""
        return self._address != 0 or (self._can_be_kept and is_kept(self.name))

    @property
    def _can_be_kept(self) -> bool:
        """The folder's name knows the sources of the project's own kernels, and of no others."""
        return CACHE_FOLDER is not None and self.function.__module__.startswith(PACKAGES)

    @property
    def _symbol(self) -> str:
        """What its C function is called."""
        return self.name.replace(":", "_").replace(".", "_")


def kernel(letters: str) -> Callable[[Callable[..., None]], Kernel]:
    """Make a function with arguments `letters` (i = int64, f = float32, c = address in a column) a
    compiled C function."""
    unknown = set(letters) - set(_C_TYPES)
    if unknown:
        raise ValueError(f"kernel arguments are {sorted(_C_TYPES)}, not {sorted(unknown)}")
    return lambda function: Kernel(function, letters)


def compile_kernels(kernels: Iterable[Kernel]) -> Iterator[tuple[int, int]]:
    """Compile what is not compiled yet, yielding (kernels done, kernels in all).

    numba compiles one function at a time in a process, so a second process takes every other
    kernel, where there is a second core and a cache folder to hand them over. Yields nothing when
    nothing is to do.
    """
    missing = [kernel for kernel in dict.fromkeys(kernels) if not kernel.is_ready]
    total = len(missing)
    if not missing:
        return
    yield 0, total
    theirs = missing[1::2] if CACHE_FOLDER is not None and (os.cpu_count() or 1) > 1 else []
    helper = _start_helper(theirs) if theirs else None
    # Ours first; then, from their end, those that the helper has not reached.
    for kernel in [k for k in missing if k not in theirs] + theirs[::-1]:
        if not kernel.is_ready:
            kernel.address  # noqa: B018 - compiles
            yield sum(k.is_ready for k in missing), total
    if helper is not None:
        helper.kill()
        helper.wait()
    yield total, total


class Background:
    """Compiles kernels in another process while this one goes on.

    Nothing is compiled here: without a folder to hand them over, they are never ready.
    """

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self._kernels = list(dict.fromkeys(kernels))
        self._started = False
        self._helper: subprocess.Popen[bytes] | None = None

    def is_done(self) -> bool:
        """Whether all are on disk; the first call that finds one missing starts the process."""
        missing = [kernel for kernel in self._kernels if not kernel.is_ready]
        if not missing:
            self.close()
        elif not self._started and CACHE_FOLDER is not None:
            self._started = True
            self._helper = _start_helper(missing)
        return not missing

    def close(self) -> None:
        """Stop it; another process may go on from there."""
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper = None


def _start_helper(kernels: list[Kernel]) -> subprocess.Popen[bytes] | None:
    """A process that compiles kernels to the cache folder; without it all is compiled here."""
    environment = {**os.environ, CACHE_VARIABLE: str(cache_root())}
    command = python_command("gguf_tools.jit", [kernel.name for kernel in kernels])
    quiet = subprocess.DEVNULL
    try:
        return subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:
        return None


def main(names: Sequence[str]) -> None:
    """The helper process: compile kernels (by `Kernel.name`) to the cache folder."""
    for name in names:
        module, function, n_columns = name.split(":")
        kernel = getattr(importlib.import_module(module), function)
        kernel.for_columns(int(n_columns)).address  # noqa: B018 - compiles
