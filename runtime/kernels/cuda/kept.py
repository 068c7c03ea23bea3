"""Kernels that stay on disk once they are compiled: machine code for each kind of GPU.

numba-cuda has a cache of its own, which looks only at the file that defines a kernel, and which
never finds a kernel again that is made by a function. This one stands in its place: an entry is
named by the kernel's name here, its arguments' types and the GPU's compute capability, in a folder
beside those of compiled kernels for the processor (gguf_tools/kernel_files.py) that is named by a
hash of all sources and of the compilers' versions. What cannot be read is compiled again.
"""

import hashlib
import os
import pickle
import sys
import zlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numba import config, cuda

from gguf_tools.kernel_files import CACHE_FOLDER

SOURCES = (
    *("gguf_tools/compiler/*.py", "gguf_tools/kernel_files.py", "gguf_tools/quants/iq4.py"),
    "runtime/kernels/cuda/*.py",
)
COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings")

_PROJECT = Path(__file__).resolve().parents[3]
_names: set[str] = set()


def kernel(name: str, *, registers: int | None = None) -> Callable[[Callable[..., Any]], Any]:
    """cuda.jit for a kernel that is kept on disk by this name, which no other may have.

    `registers` are the most that a thread may have. Where a number is given, ptxas has been seen to
    use what it allows and to put all loads first; without, to have fewer loads under way.
    """
    if name in _names:
        raise ValueError(f"{name} is the name of another kernel")
    _names.add(name)

    def compile_as(function: Callable[..., Any]) -> Any:
        if config.ENABLE_CUDASIM:
            return cuda.jit(function)
        dispatcher = cuda.jit(max_registers=registers)(function)
        dispatcher._cache = Entries(name)
        return dispatcher

    return compile_as


class Entries:
    """One kernel's on disk; what a dispatcher of numba-cuda asks of its cache."""

    def __init__(self, name: str) -> None:
        self._name = name

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled kernel for arguments of these types; None if it must be compiled."""
        try:
            from numba.cuda.dispatcher import _Kernel

            path = self._path(signature)
            if path is None:
                return None
            return _Kernel._rebuild(**pickle.loads(zlib.decompress(path.read_bytes())))
        except Exception:
            # Not there, or damaged, which raises whatever unpickling meets.
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep it, where the folder can be written."""
        from numba.cuda import serialize

        try:
            path = self._path(signature)
            if path is None or compiled.launch_config_sensitive:
                return
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(zlib.compress(serialize.dumps(compiled._reduce_states()), 1))
            part.replace(path)
        except Exception:
            # The folder is full or has vanished, or this numba-cuda has other insides: the kernel
            # is in memory.
            return

    def flush(self) -> None:
        """Nothing waits to be written."""

    @property
    def cache_path(self) -> str:
        return str(folder() or "")

    def _path(self, signature: Any) -> Path | None:
        where = folder()
        if where is None:
            return None
        capability = cuda.get_current_device().compute_capability
        types = hashlib.sha256(f"{signature}".encode()).hexdigest()[:16]
        return where / "{}.sm_{}{}.{}".format(self._name, *capability, types)


@cache
def folder() -> Path | None:
    """The folder of compiled kernels, ready to be written; None where nothing is kept."""
    if CACHE_FOLDER is None:
        return None
    where = CACHE_FOLDER.parent / f"cuda-{_digest()}"
    try:
        where.mkdir(parents=True, exist_ok=True)
        os.utime(where)  # in use: kernel_files.py removes folders that nobody used for long
    except OSError:
        return None
    return where


def is_empty() -> bool:
    """Whether nothing is kept, so that all kernels have to be compiled."""
    where = folder()
    return where is None or not where.is_dir() or next(where.iterdir(), None) is None


def _digest() -> str:
    """Names what a compiled kernel depends on beside the GPU: sources and compilers."""
    seen = hashlib.sha256(sys.version.encode())
    for package in COMPILERS:
        seen.update(f"\0{package} {_version(package)}".encode())
    seen.update(f"\0{cuda.runtime.get_version()}".encode())
    for pattern in SOURCES:
        for path in sorted(_PROJECT.glob(pattern)):
            seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:20]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
