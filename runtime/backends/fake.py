"""A GPU that is not there: the reference backend, with the memory and the mishaps of one."""

from __future__ import annotations

from collections.abc import Mapping

from gguf_tools.describe import short_size
from gguf_tools.errors import DeviceLostError, DeviceMemoryError
from runtime.backends.reference import ReferenceBackend
from runtime.devices import Device
from runtime.program import Floats, Stage
from runtime.split import stage_bytes


class FakeBackend:
    """Runs a stage as the reference does, on a device that holds only so many bytes."""

    def __init__(
        self, stage: Stage, device: Device, *, n_ctx: int, n_batch: int, kv_type: str
    ) -> None:
        """DeviceMemoryError when the stage takes more than the device holds."""
        needed = stage_bytes(stage, n_ctx=n_ctx, n_batch=n_batch, kv_type=kv_type)
        holds = device.free if device.holds is None else device.holds
        if needed > holds:
            raise DeviceMemoryError(
                f"{device.name} has room for {short_size(holds)}, not for {short_size(needed)}",
                room=holds,
            )
        self.notes: tuple[str, ...] = (
            f"{device.name} is a fake GPU: the reference backend computes its layers",
        )
        self._device = device
        self._left = device.lost_after
        self._backend = ReferenceBackend(stage, n_ctx=n_ctx)

    def run(
        self, index: int, values: Mapping[str, Floats], start: int, n_outputs: int
    ) -> dict[str, Floats]:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise DeviceLostError(f"{self._device.name} has stopped answering")
        return self._backend.run(index, values, start, n_outputs)

    def close(self) -> None:
        self._backend.close()
