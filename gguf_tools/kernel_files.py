"""The folder of compiled kernels: object files, which are loaded without the compiler.

The folder is named by a hash of what a compiled kernel depends on: all kernel sources, the
compiler's version, the processor. A file is a digest and the object file that it is of, so that
one that is damaged is never run.
"""

import hashlib
import os
import sys
import tempfile
import threading
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root
from gguf_tools.processor import FEATURES, join_features

KEEP_DAYS = 30  # kernel folders of other versions are removed after this long without use
DIGEST_BYTES = 32
SUFFIX = ".o"

_PACKAGES = Path(__file__).resolve().parent.parent
# What kernels are made of; the rest of the project may change without compiling them again.
KERNEL_SOURCES = (
    *(f"gguf_tools/{name}.py" for name in ("control", "deferred", "jit", "kernel_files")),
    *(f"gguf_tools/{name}.py" for name in ("processor", "simd", "tiles")),
    "gguf_tools/compiler/*.py",
    "gguf_tools/quants/**/*.py",
    "gguf_tools/feedback/kernels/*.py",
    "runtime/kernels/*.py",
)
# What compiled kernels may call by name: these are in any process.
SYSTEM_FUNCTIONS = {"sched_yield", "SwitchToThread"}

_engines: list[Any] = []  # what owns the code that is loaded
_lock = threading.Lock()


def save(name: str, object_file: bytes) -> None:
    """Keep a compiled kernel for other processes; OSError where that cannot be."""
    path = _path(name)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(object_file).digest() + object_file)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def is_kept(name: str) -> bool:
    return CACHE_FOLDER is not None and _path(name).exists()


def load(name: str, symbol: str) -> int | None:
    """The address of a C function in a kept object file; None where there is no such file."""
    if CACHE_FOLDER is None:
        return None
    try:
        data = _path(name).read_bytes()
    except OSError:
        return None
    digest, object_file = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if not object_file or hashlib.sha256(object_file).digest() != digest:
        return None
    with _lock:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(object_file))
        engine.finalize_object()
        _engines.append(engine)
        return int(engine.get_function_address(symbol))


@cache
def _machine() -> Any:
    """What LLVM loads code for."""
    if sys.platform == "win32":
        import gguf_tools.compiler  # noqa: F401 - makes functions of the C runtime known to LLVM
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine()


def _path(name: str) -> Path:
    assert CACHE_FOLDER is not None
    return CACHE_FOLDER / (name.replace(":", ".") + SUFFIX)


def _digest() -> str:
    """Names what a compiled kernel depends on: sources, compiler, processor."""
    seen = hashlib.sha256()
    compiler = (version("numba"), llvmlite.__version__, llvm.get_host_cpu_name())
    for part in (sys.version, *compiler, join_features(FEATURES)):
        seen.update(part.encode() + b"\0")
    for variable in ("NUMBA_CPU_NAME", "NUMBA_OPT", "GGUF_TOOLS_DOT"):
        seen.update(os.environ.get(variable, "").encode() + b"\0")
    for pattern in KERNEL_SOURCES:
        for path in sorted(_PACKAGES.glob(pattern)):
            seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:20]


def _prepare_folder() -> tuple[Path | None, str]:
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
    limit = time.time() - KEEP_DAYS * 86400
    for folder in current.parent.iterdir():
        if folder != current and folder.stat().st_mtime < limit:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)


CACHE_FOLDER, NO_CACHE_REASON = _prepare_folder()
