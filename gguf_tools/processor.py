"""What the processor can do that kernels are compiled for.

LLVM knows all features of x86 processors. Of ARM's it reports few under Linux and none on a Mac,
the byte dot products nowhere but on Windows, so the system is asked for these.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping

import llvmlite.binding as llvm

# Features of ARM, by LLVM's names, as each system knows them.
AT_HWCAP, AT_HWCAP2 = 16, 26  # of Linux's auxiliary vector
HWCAP_ASIMDDP, HWCAP2_I8MM = 1 << 20, 1 << 13
ON_DARWIN = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "i8mm": b"hw.optional.arm.FEAT_I8MM"}
ON_WINDOWS = {"dotprod": 43, "i8mm": 66}  # PF_ARM_V82_..._INSTRUCTIONS_AVAILABLE

AVX_IS_SLOW = ("corei7-avx", "core-avx-i", "sandybridge", "ivybridge")  # numba leaves it out there

IS_ARM = platform.machine().lower() in ("arm64", "aarch64")


def examine_features() -> dict[str, bool]:
    """What kernels may use, by LLVM's names; NUMBA_CPU_FEATURES has the last word."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is not None:
        return parse_features(chosen)
    features = dict(llvm.get_host_cpu_features())
    if llvm.get_host_cpu_name() in AVX_IS_SLOW:
        features.update({name: False for name in features if name.startswith("avx")})
    return features | (_ask_system() if IS_ARM else {})


def core_name() -> str:
    """The kind of core as compilers call it, such as cortex-a76; empty if LLVM knows none."""
    name = llvm.get_host_cpu_name()
    return "" if name == "generic" else name


def parse_features(text: str) -> dict[str, bool]:
    """LLVM's list of features, such as `+neon,-sve`."""
    return {word[1:]: word[0] == "+" for word in text.split(",") if word}


def join_features(features: Mapping[str, bool]) -> str:
    """LLVM's list of features, in order."""
    return ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(features.items()))


def choose_dot(features: Mapping[str, bool], *, is_arm: bool) -> str:
    """The best byte dot product (see compiler/vectors.py) with these features."""
    if is_arm:
        if features.get("dotprod"):
            return "i8mm" if features.get("i8mm") else "neon"
        return "armv8" if features.get("neon", True) else "portable"
    if all(features.get(name) for name in ("avx512vnni", "avx512vl", "avx512bw")):
        return "avx512vnni"
    return next((name for name in ("avxvnni", "avx2") if features.get(name)), "portable")


def decode_hwcaps(hwcap: int, hwcap2: int) -> dict[str, bool]:
    """What ARM's words in Linux's auxiliary vector say."""
    return {"dotprod": bool(hwcap & HWCAP_ASIMDDP), "i8mm": bool(hwcap2 & HWCAP2_I8MM)}


def _ask_system() -> dict[str, bool]:
    """ARM's features as the system tells them; what it does not know is left out."""
    try:
        if sys.platform == "darwin":
            sysctl = ctypes.CDLL(None).sysctlbyname
            return {name: _read_switch(sysctl, switch) for name, switch in ON_DARWIN.items()}
        if sys.platform == "win32":
            has = ctypes.WinDLL("kernel32").IsProcessorFeaturePresent
            return {name: bool(has(number)) for name, number in ON_WINDOWS.items()}
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):  # another system, or one without that call
        return {}
    getauxval.restype = ctypes.c_ulong
    getauxval.argtypes = [ctypes.c_ulong]
    return decode_hwcaps(getauxval(AT_HWCAP), getauxval(AT_HWCAP2))


def _read_switch(sysctl: Callable[..., int], name: bytes) -> bool:
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    return sysctl(
        name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    ) == 0 and (value.value == 1)


FEATURES = examine_features()

DOT = os.environ.get("GGUF_TOOLS_DOT") or choose_dot(FEATURES, is_arm=IS_ARM)
"""How bytes are multiplied: avx512vnni, avxvnni, avx2; i8mm (ARM's usdot), neon (its sdot), armv8
(neither); or portable. The variable overrides the choice, for tests."""

X86_DOTS = ("avx512vnni", "avxvnni", "avx2")
ARM_DOTS = ("i8mm", "neon", "armv8")
