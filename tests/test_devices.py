"""What the NVIDIA driver is asked: against a driver that answers from a table."""

import ctypes

from runtime.devices import Device, ask_driver

GIB = 1 << 30


class Driver:
    """CUDA's driver API, as far as it is called here, of two GPUs and one that fails."""

    def __init__(self, *, broken: str = "") -> None:
        self.broken = broken
        self.contexts: list[int] = []  # of devices, retained
        self.current: list[int] = []

    def __getattr__(self, name: str):
        if name == self.broken:
            return lambda *arguments: 999
        raise AttributeError(name)

    def _answer(self, name: str, reference, value) -> int:
        if name == self.broken:
            return 999
        reference._obj.value = value
        return 0

    def cuInit(self, flags):
        return 100 if self.broken == "cuInit" else 0

    def cuDeviceGetCount(self, count):
        return self._answer("cuDeviceGetCount", count, 3)

    def cuDeviceGet(self, device, index):
        return 999 if index == 1 else self._answer("cuDeviceGet", device, index * 10)

    def cuDeviceGetName(self, name, size, device):
        name.value = b"GPU \x1b[31m" + str(device.value).encode()
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        return self._answer("cuDeviceGetAttribute", value, {75: 8, 76: 9}[attribute])

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.contexts.append(device.value)
        return self._answer("cuDevicePrimaryCtxRetain", context, 1000 + device.value)

    def cuCtxPushCurrent_v2(self, context):
        self.current.append(context.value)
        return 999 if self.broken == "cuCtxPushCurrent_v2" else 0

    def cuMemGetInfo_v2(self, free, total):
        assert ctypes.sizeof(free._obj) == ctypes.sizeof(ctypes.c_size_t)
        place = self.current[-1] - 1000
        self._answer("cuMemGetInfo_v2", total, (place + 8) * GIB)
        return self._answer("cuMemGetInfo_v2", free, (place + 6) * GIB)

    def cuCtxPopCurrent_v2(self, context):
        self.current.pop()
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts.remove(device.value)
        return 0


def test_devices_of_a_driver() -> None:
    driver = Driver()
    assert ask_driver(driver) == (
        Device("cuda:0", "GPU \\x1b[31m0", 8 * GIB, 6 * GIB, (8, 9)),
        Device("cuda:2", "GPU \\x1b[31m20", 28 * GIB, 26 * GIB, (8, 9)),
    )
    assert not driver.contexts and not driver.current  # everything is given back


def test_a_driver_that_fails() -> None:
    calls = (
        "cuInit cuDeviceGetCount cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain "
        "cuCtxPushCurrent_v2 cuMemGetInfo_v2"
    )
    for broken in calls.split():
        assert ask_driver(Driver(broken=broken)) == (), broken
