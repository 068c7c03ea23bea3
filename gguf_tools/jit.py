"""Every numba option and the folder of compiled kernels, in one place.

Two decorators:

    @jit                a helper that kernels call; compiled when first needed, inlined by LLVM
    @kernel("iiif")     a C function of int64 (`i`: addresses and sizes) and float32 (`f`) arguments
                        that returns nothing; compiled when its address is first asked for.
                        An argument `c` is an address, too, of activations or results in one
                        column: `Kernel.for_columns` compiles the same for several columns

Kernels never hold the GIL: they are called through ctypes, which releases it, or by address from
other kernels. They follow IEEE rules strictly (no fastmath): quantisers must be bit-exact.

Compiled kernels are kept on disk in a folder named by a hash of all kernel sources, of numba's
version and of the processor. numba itself looks only at the file that defines a function, so an
edit of a helper elsewhere would leave stale code behind; the hash closes that gap.
"""

import ctypes
import hashlib
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import types

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root
from gguf_tools.child import python_command
from gguf_tools.columns import Columns
from gguf_tools.errors import DeviceError
from gguf_tools.processor import FEATURES, join_features

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
KEEP_DAYS = 30  # kernel folders of other versions are removed after this long without use

_PACKAGES = Path(__file__).resolve().parent.parent
# What kernels are made of; the rest of the project may change without compiling them again.
KERNEL_SOURCES = (
    *(f"gguf_tools/{name}.py" for name in ("columns", "control", "jit", "processor")),
    *(f"gguf_tools/{name}.py" for name in ("simd", "tiles", "vectors")),
    "gguf_tools/quants/**/*.py",
    "gguf_tools/feedback/kernels/*.py",
    "runtime/kernels/*.py",
)
_NUMBA_TYPES = {"i": types.int64, "f": types.float32, "c": types.int64}
_C_TYPES: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float, "c": ctypes.c_int64}


def _digest() -> str:
    """Names what a compiled kernel depends on: sources, compiler, processor."""
    seen = hashlib.sha256()
    for part in (sys.version, numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name()):
        seen.update(part.encode() + b"\0")
    seen.update(join_features(FEATURES).encode())
    for variable in ("NUMBA_CPU_NAME", "GGUF_TOOLS_DOT"):
        seen.update(os.environ.get(variable, "").encode() + b"\0")
    for pattern in KERNEL_SOURCES:
        for path in sorted(_PACKAGES.glob(pattern)):
            seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:20]


def _prepare_cache() -> tuple[Path | None, str]:
    """The kernel folder, ready to be written, or None with the reason in words."""
    root = cache_root()
    if root is None:
        return None, f"switched off by {CACHE_VARIABLE}"
    folder = root / "kernels" / _digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            os.utime(folder)
        _remove_old(folder)
    except OSError as error:
        return None, f"{root} cannot be written ({error.strerror})"
    return folder, ""


def _remove_old(current: Path) -> None:
    """Remove kernel folders nobody used for KEEP_DAYS; another process may do so at once."""
    import shutil

    limit = time.time() - KEEP_DAYS * 86400
    for folder in current.parent.iterdir():
        if folder != current and folder.stat().st_mtime < limit:
            shutil.rmtree(folder, ignore_errors=True)


CACHE_FOLDER, NO_CACHE_REASON = _prepare_cache()
if CACHE_FOLDER is not None:
    numba.config.CACHE_DIR = str(CACHE_FOLDER)
numba.config.CPU_FEATURES = join_features(FEATURES)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a helper for use inside kernels; it costs nothing when the kernel comes from disk.

    Kernels on disk call their helpers by qualified name. A function defined in another function
    has the same name each time: such helpers are made with `jit_for`.
    """
    if "<locals>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is one name for many functions: use jit_for")
    compiled: Callable[..., Any] = numba.njit(**OPTIONS)(function)
    return compiled


def jit_for(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """jit for a helper that is defined once for each `name`, which becomes a part of its own.

    Without that a process that loads two kernels from disk, each with its own helper of one name,
    would call the first one's from both.
    """

    def compile_as(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = f"{name}_{function.__name__}"
        return jit(function)

    return compile_as


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
        self._compiled: Any = None
        self._entry: Any = None
        self._others: dict[int, Kernel] = {}

    def __repr__(self) -> str:
        return f"kernel {self.function.__name__}({self.letters})"

    def for_columns(self, n: int) -> "Kernel":
        """The same for n columns at once (gguf_tools/columns.py).

        Each of its arguments `c` is two: the address in the first column, and how many bytes
        further on it is in the next.
        """
        if n == self.n_columns:
            return self
        if n not in self._others:
            name = f"{self.function.__name__}_{n}"
            self._others[n] = Kernel(_renamed(self.function, name), self.letters, n)
        return self._others[n]

    @property
    def address(self) -> int:
        """The C function's address; compiles on first use."""
        return int(self._compile().address)

    def __call__(self, *arguments: float) -> None:
        """Call it from Python; the GIL is released meanwhile."""
        self._compile()
        self._entry(*arguments)

    def _compile(self) -> Any:
        if self._compiled is None:
            with self._lock:
                if self._compiled is None:
                    check_processor(platform.machine(), FEATURES)
                    compiled = self._build(cache=CACHE_FOLDER is not None)
                    letters = self.letters
                    if self.n_columns > 1:
                        letters = letters.replace("c", "ii")
                    arguments = [_C_TYPES[letter] for letter in letters]
                    self._entry = ctypes.CFUNCTYPE(None, *arguments)(compiled.address)
                    self._compiled = compiled
        return self._compiled

    def _build(self, *, cache: bool) -> Any:
        kinds = dict(_NUMBA_TYPES)
        if self.n_columns > 1:
            kinds["c"] = Columns(self.n_columns)
        signature = types.void(*(kinds[letter] for letter in self.letters))
        try:
            compiled = numba.cfunc(signature, nopython=True, cache=cache, **OPTIONS)(self.function)
            if cache:
                self._marker.touch()
        except Exception:
            # The folder vanished or filled up, or holds a damaged entry (which raises whatever
            # unpickling meets): compile in memory. A fault of the kernel's own comes again.
            if not cache:
                raise
            return self._build(cache=False)
        return compiled

    @property
    def name(self) -> str:
        """module:function:columns"""
        name = self.function.__name__.removesuffix(f"_{self.n_columns}")
        return f"{self.function.__module__}:{name}:{self.n_columns}"

    @property
    def is_ready(self) -> bool:
        """Whether it is compiled, in memory or on disk."""
        return self._compiled is not None or (CACHE_FOLDER is not None and self._marker.exists())

    @property
    def _marker(self) -> Path:
        """A file beside numba's that says: this kernel is on disk."""
        assert CACHE_FOLDER is not None
        return CACHE_FOLDER / f"{self.name.replace(':', '.')}.ready"


def _renamed(function: Callable[..., None], name: str) -> Callable[..., None]:
    """A copy by another name: numba names what it keeps on disk by it."""
    copy = FunctionType(function.__code__, function.__globals__, name)
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, name, function.__doc__
    return copy


def kernel(letters: str) -> Callable[[Callable[..., None]], Kernel]:
    """Make a function with arguments `letters` (i = int64, f = float32, c = address in a column) a
    compiled C function."""
    unknown = set(letters) - set(_NUMBA_TYPES)
    if unknown:
        raise ValueError(f"kernel arguments are {sorted(_NUMBA_TYPES)}, not {sorted(unknown)}")
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
