"""What GPUs this machine has, and how much of their memory is free.

The NVIDIA driver is asked itself: that needs no package. GGUF_FAKE_GPUS puts others in the place of
what is there, such as "8GiB/6GiB@8.9,24GiB": total / free @ capability, one for each GPU. On those
the reference backend stands in, so that plans and their mistakes can be seen anywhere. Two more
facts may follow, after semicolons: `holds=5GiB`, what there is room for in truth, and `lost=40`,
the number of steps after which it stops answering.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf_tools.errors import DeviceError, GGUFError, printable

FAKES_VARIABLE = "GGUF_FAKE_GPUS"
LIBRARIES = {"win32": "nvcuda.dll"}  # elsewhere libcuda.so.1
NAME_BYTES = 256
MAJOR, MINOR = 75, 76  # CUdevice_attribute: of the compute capability
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MOST_DIGITS = 15

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_FAKE = re.compile(r"([^/@;]+)(?:/([^@;]+))?(?:@(\d+)\.(\d+))?((?:;[a-z]+=[^;]+)*)", re.ASCII)


@dataclass(frozen=True)
class Device:
    """A GPU. Sizes in bytes."""

    name: str  # cuda:0, fake:0
    model: str  # as its maker calls it
    total: int
    free: int
    capability: tuple[int, int] | None = None
    holds: int | None = None  # of a fake: what there is room for, where that is not what is free
    lost_after: int | None = None  # of a fake: steps until it stops answering

    @property
    def is_fake(self) -> bool:
        return self.name.startswith("fake:")

    @property
    def index(self) -> int:
        return int(self.name.partition(":")[2])


def find_devices() -> tuple[Device, ...]:
    """The GPUs that a backend can use: the fakes, where there are any, or what the driver says."""
    wanted = os.environ.get(FAKES_VARIABLE, "").strip()
    if wanted:
        return tuple(_read_fake(i, text) for i, text in enumerate(wanted.split(",")))
    driver = load_driver()
    return () if driver is None else ask_driver(driver)


def choose_devices(devices: Sequence[Device], names: str | None) -> tuple[Device, ...]:
    """Those of a list such as `cuda:1,cuda:0`, in its order; all without one, none for `none`."""
    if names is None:
        return tuple(devices)
    if names == "none":
        return ()
    known = {device.name: device for device in devices}
    chosen = list(dict.fromkeys(part.strip() for part in names.split(",")))
    for name in chosen:
        if name not in known:
            there = ", ".join(known) or "none"
            raise DeviceError(
                f"--device {printable(name, 40)}: there is no such GPU; those here: {there}"
            )
    return tuple(known[name] for name in chosen)


def parse_size(text: str) -> int:
    """Bytes of a size such as 6GiB, 6G or 512MiB; ValueError says what is wrong."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(match[1]) > MOST_DIGITS:
        raise ValueError(f"a size is a number and KiB, MiB or GiB, not {printable(text, 40)!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def load_driver() -> Any | None:
    """The NVIDIA driver's library, or None where there is none."""
    try:
        return ctypes.CDLL(LIBRARIES.get(sys.platform, "libcuda.so.1"))
    except OSError:
        return None


def ask_driver(driver: Any) -> tuple[Device, ...]:
    """The GPUs of a driver (a library with CUDA's driver API); those that fail are left out."""
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = (_ask_device(driver, index) for index in range(count.value))
    return tuple(device for device in found if device is not None)


def _ask_device(driver: Any, index: int) -> Device | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(NAME_BYTES)
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    failed = (
        driver.cuDeviceGetName(name, NAME_BYTES, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    )
    memory = None if failed else _ask_memory(driver, device)
    if memory is None:
        return None
    model = printable(name.value.decode(errors="replace"), 60)
    free, total = memory
    return Device(f"cuda:{index}", model, total, free, (major.value, minor.value))


def _ask_memory(driver: Any, device: ctypes.c_int) -> tuple[int, int] | None:
    """Bytes that are free beside a context, as backends need one, and in all."""
    context = ctypes.c_void_p()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context) != 0:
            return None
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else (free.value, total.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _read_fake(index: int, text: str) -> Device:
    match = _FAKE.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError("a fake GPU is total/free@capability")
        total = parse_size(match[1])
        facts = dict(part.split("=", 1) for part in match[5].split(";") if part)
        holds, lost = facts.pop("holds", None), facts.pop("lost", None)
        if facts:
            raise ValueError(f"a fake GPU's facts are holds and lost, not {', '.join(facts)}")
        return Device(
            name=f"fake:{index}",
            model="fake GPU",
            total=total,
            free=total if match[2] is None else parse_size(match[2]),
            capability=None if match[3] is None else (int(match[3]), int(match[4])),
            holds=None if holds is None else parse_size(holds),
            lost_after=None if lost is None else int(lost),
        )
    except ValueError as error:
        raise GGUFError(
            f"{FAKES_VARIABLE}: {printable(text, 60)!r}: {error}; such as 8GiB/6GiB@8.9"
        ) from None
