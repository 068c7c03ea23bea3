"""Every numba option and the folder of compiled kernels, in one place.

Two decorators:

    @jit                a helper that kernels call; compiled when first needed, inlined by LLVM
    @kernel("iiif")     a C function of int64 (`i`: addresses and sizes) and float32 (`f`) arguments
                        that returns nothing; compiled when its address is first asked for

Kernels never hold the GIL: they are called through ctypes, which releases it, or by address from
other kernels. They follow IEEE rules strictly (no fastmath): quantisers must be bit-exact.

Compiled kernels are kept on disk in a folder named by a hash of all kernel sources, of numba's
version and of the processor. numba itself looks only at the file that defines a function, so an
edit of a helper elsewhere would leave stale code behind; the hash closes that gap.
"""

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import types

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
CACHE_VARIABLE = "GGUF_TOOLS_CACHE"
"""Environment variable that moves the cache folder; `off` keeps compiled kernels in memory only."""

KEEP_DAYS = 30  # kernel folders of other versions are removed after this long without use

_PACKAGES = Path(__file__).resolve().parent.parent
_KERNEL_SOURCES = ("gguf_tools/*.py", "gguf_tools/quants/**/*.py", "runtime/kernels/*.py")
_NUMBA_TYPES = {"i": types.int64, "f": types.float32}
_C_TYPES: dict[str, Any] = {"i": ctypes.c_int64, "f": ctypes.c_float}


def cache_root() -> Path | None:
    """The user's cache folder for this program (not made yet), or None when switched off."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gguf-tools"


def _digest() -> str:
    """Names what a compiled kernel depends on: sources, compiler, processor."""
    seen = hashlib.sha256()
    for part in (sys.version, numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name()):
        seen.update(part.encode() + b"\0")
    seen.update(llvm.get_host_cpu_features().flatten().encode())
    for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "GGUF_TOOLS_DOT"):
        seen.update(os.environ.get(variable, "").encode() + b"\0")
    for pattern in _KERNEL_SOURCES:
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


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a helper for use inside kernels; it costs nothing when the kernel comes from disk."""
    compiled: Callable[..., Any] = numba.njit(**OPTIONS)(function)
    return compiled


class Kernel:
    """A compiled C function; made, or loaded from disk, when first needed."""

    def __init__(self, function: Callable[..., None], letters: str) -> None:
        self.function = function
        self.letters = letters
        self.__doc__ = function.__doc__
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._entry: Any = None

    def __repr__(self) -> str:
        return f"kernel {self.function.__name__}({self.letters})"

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
                    compiled = self._build(cache=CACHE_FOLDER is not None)
                    arguments = [_C_TYPES[letter] for letter in self.letters]
                    self._entry = ctypes.CFUNCTYPE(None, *arguments)(compiled.address)
                    self._compiled = compiled
        return self._compiled

    def _build(self, *, cache: bool) -> Any:
        signature = types.void(*(_NUMBA_TYPES[letter] for letter in self.letters))
        try:
            return numba.cfunc(signature, nopython=True, cache=cache, **OPTIONS)(self.function)
        except (OSError, EOFError):
            # The folder vanished, filled up, or holds a damaged entry: compile in memory.
            if not cache:
                raise
            return self._build(cache=False)


def kernel(letters: str) -> Callable[[Callable[..., None]], Kernel]:
    """Make a function with arguments `letters` (i = int64, f = float32) a compiled C function."""
    unknown = set(letters) - set(_NUMBA_TYPES)
    if unknown:
        raise ValueError(f"kernel arguments are {sorted(_NUMBA_TYPES)}, not {sorted(unknown)}")
    return lambda function: Kernel(function, letters)
