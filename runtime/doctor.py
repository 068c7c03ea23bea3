"""What this machine is and what was chosen for it: the facts that `gguf doctor` shows."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from gguf_tools.cores import default_threads
from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from gguf_tools.kernel_files import CACHE_FOLDER, NO_CACHE_REASON, SUFFIX
from gguf_tools.processor import DOT, core_name
from runtime.backends.cuda_toolkit import REMEDY, missing_packages
from runtime.bandwidth import measure_bandwidth

# What the byte dot product, the heart of every quantised kernel, is made of.
DOT_MEANINGS = {
    "avx512vnni": "AVX-512 VNNI: one instruction multiplies and adds 64 pairs of bytes",
    "avxvnni": "AVX-VNNI: one instruction multiplies and adds 32 pairs of bytes",
    "avx2": "AVX2: a few instructions multiply and add 32 pairs of bytes",
    "i8mm": "ARM mixed-sign dot products: one instruction multiplies and adds 16 pairs of bytes",
    "neon": "ARM dot products: one or two instructions multiply and add 16 pairs of bytes",
    "armv8": "ARM without dot products: a few instructions multiply and add 16 pairs of bytes",
    "portable": "no vector unit that this build knows: plain arithmetic, which is slow",
}
SLOW_DOTS = ("portable",)

PACKAGES = ("gguf-tools", "numba", "llvmlite", "numpy")
CUDA_LIBRARIES = {"win32": "nvcuda.dll"}  # elsewhere libcuda.so.1
CUDA_NAME_BYTES = 256


@dataclass(frozen=True)
class Processor:
    name: str
    architecture: str
    physical_cores: int | None  # None: the system does not say
    logical_cores: int
    allowed_cores: int  # logical cores that this process may use
    threads: int  # what `run` uses unless told otherwise


@dataclass(frozen=True)
class VectorUnit:
    dot: str
    meaning: str
    slow: bool


@dataclass(frozen=True)
class Bandwidth:
    threads: int
    bytes_per_second: float


@dataclass(frozen=True)
class KernelCache:
    folder: str | None
    usable: bool
    reason: str  # why not, in words
    kernels: int
    bytes: int


@dataclass(frozen=True)
class CUDA:
    backend: bool  # whether what layers on a GPU need is installed
    driver: str | None  # the CUDA version the NVIDIA driver speaks; None: no driver is visible
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    processor: Processor
    vector_unit: VectorUnit
    memory_total: int
    memory_available: int
    read_bandwidth: tuple[Bandwidth, ...]
    kernel_cache: KernelCache
    versions: dict[str, str]
    cuda: CUDA


def examine() -> Facts:
    """Look at everything and measure the memory: about two seconds."""
    memory = psutil.virtual_memory()
    counts = sorted({1, default_threads()})
    return Facts(
        processor=Processor(
            name=processor_name(),
            architecture=platform.machine(),
            physical_cores=psutil.cpu_count(logical=False),
            logical_cores=os.cpu_count() or 1,
            allowed_cores=_allowed_cores(),
            threads=default_threads(),
        ),
        vector_unit=VectorUnit(DOT, dot_meaning(DOT), DOT in SLOW_DOTS),
        memory_total=int(memory.total),
        memory_available=int(memory.available),
        read_bandwidth=tuple(Bandwidth(n, measure_bandwidth(n)) for n in counts),
        kernel_cache=_examine_cache(),
        versions={"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        cuda=examine_cuda(),
    )


def to_json(facts: Facts) -> dict[str, Any]:
    """The object that `gguf doctor --json` prints."""
    return asdict(facts)


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts as pairs of a label and a text fit for a terminal."""
    processor, unit, cache = facts.processor, facts.vector_unit, facts.kernel_cache
    yield "processor", f"{printable(processor.name)} ({printable(processor.architecture)})"
    physical = "unknown" if processor.physical_cores is None else processor.physical_cores
    yield (
        "cores",
        f"{physical} physical, {processor.logical_cores} logical, "
        f"{processor.allowed_cores} allowed to this process; threads by default: "
        f"{processor.threads}",
    )
    forced = " (set by GGUF_TOOLS_DOT)" if os.environ.get("GGUF_TOOLS_DOT") else ""
    yield "byte products", f"{printable(unit.dot)}{forced}: {unit.meaning}"
    yield (
        "memory",
        f"{short_size(facts.memory_total)}, {short_size(facts.memory_available)} available",
    )
    for index, measured in enumerate(facts.read_bandwidth):
        label = "read bandwidth" if index == 0 else ""
        plural = "" if measured.threads == 1 else "s"
        speed = f"{measured.bytes_per_second / 1e9:.1f} GB/s"
        yield label, f"{speed} with {measured.threads} thread{plural}"
    if cache.usable:
        yield "kernel cache", printable(cache.folder, limit=1000)
        yield "", f"{cache.kernels} compiled kernels, {short_size(cache.bytes)}"
    else:
        yield "kernel cache", f"none: {printable(cache.reason, limit=1000)}"
        yield "", "every start compiles the kernels anew, which takes some seconds"
    yield "versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    yield "CUDA", _describe_cuda(facts.cuda)


def dot_meaning(dot: str) -> str:
    """What a byte dot product is, in words."""
    return DOT_MEANINGS.get(dot, "chosen for this processor")


def processor_name() -> str:
    """The processor as its maker calls it, as far as the system says."""
    name = ""
    if sys.platform == "darwin":
        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
    elif sys.platform == "win32":
        import winreg

        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            name = str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
    else:
        name = _read_cpuinfo()
    return name.strip() or core_name() or platform.machine() or "unknown"


def _read_cpuinfo() -> str:
    try:
        return name_in_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return ""


def name_in_cpuinfo(text: str) -> str:
    """The processor's name in Linux's /proc/cpuinfo; empty, as for most of ARM's, without one."""
    fields = (line.partition(":") for line in text.splitlines())
    names = {label.strip().lower(): value.strip() for label, _, value in fields}
    return names.get("model name") or names.get("hardware") or names.get("model") or ""


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _examine_cache() -> KernelCache:
    if CACHE_FOLDER is None:
        return KernelCache(None, False, NO_CACHE_REASON, 0, 0)
    files = [path for path in CACHE_FOLDER.rglob("*") if path.is_file()]
    kernels = sum(path.suffix == SUFFIX for path in files)
    return KernelCache(
        str(CACHE_FOLDER), True, "", kernels, sum(path.stat().st_size for path in files)
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def examine_cuda() -> CUDA:
    """What the NVIDIA driver says, if there is one."""
    backend = missing_packages() is None
    try:
        driver = ctypes.CDLL(CUDA_LIBRARIES.get(sys.platform, "libcuda.so.1"))
    except OSError:
        return CUDA(backend=backend, driver=None, devices=())
    number, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return CUDA(backend=backend, driver=None, devices=())
    devices = []
    if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for index in range(count.value):
            name = ctypes.create_string_buffer(CUDA_NAME_BYTES)
            if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
                driver.cuDeviceGetName(name, CUDA_NAME_BYTES, device)
                devices.append(name.value.decode(errors="replace"))
    shown = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return CUDA(backend=backend, driver=shown, devices=tuple(devices))


def _describe_cuda(cuda: CUDA) -> str:
    build = (
        "layers can go to GPUs" if cuda.backend else f"models run on the CPU ({REMEDY} for GPUs)"
    )
    if cuda.driver is None:
        return f"{build}; no NVIDIA driver is visible"
    devices = ", ".join(printable(name) for name in cuda.devices) or "no device"
    return f"{build}; an NVIDIA driver for CUDA {cuda.driver} is visible with {devices}"
