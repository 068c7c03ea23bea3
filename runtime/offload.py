"""From `--gpu-layers` and its companions to a pipeline that runs, however wrong the guess was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gguf_tools.errors import DeviceError, DeviceMemoryError, printable
from runtime.backends import Backend
from runtime.backends.cuda_toolkit import LEAST_CAPABILITY, missing_packages
from runtime.devices import Device, choose_devices, find_devices, load_driver, parse_size
from runtime.plan_text import brief
from runtime.program import Program, Stage
from runtime.split import HOST, Plan, Sizes, Wish, plan_split
from runtime.stages import Pipeline, cut_program

CPU_REMEDY = "leave --gpu-layers out, or give 0, to run on the CPU"
MOST_DIGITS = 9
ALL = 999_999_999  # layers; more than any model has
CPU_ALONE = Wish(gpu_layers=0)


@dataclass(frozen=True)
class Offload:
    """The devices that layers may go to, and what the user wishes of them."""

    devices: tuple[Device, ...] = ()
    wish: Wish = CPU_ALONE

    @property
    def is_automatic(self) -> bool:
        return self.wish.gpu_layers is None

    def at_most(self, n: int) -> Offload:
        """With no more layers than n, where the number is left to the plan."""
        return replace(self, wish=replace(self.wish, at_most=n)) if self.is_automatic else self


def parse_gpu_layers(text: str) -> int | None:
    """The number of `--gpu-layers`: None for auto; ValueError says what is wrong."""
    if text == "auto":
        return None
    if text in ("all", "-1"):
        return ALL
    if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS:
        return int(text)
    raise ValueError(f"--gpu-layers is a number, all or auto, not {printable(text, 40)}")


def read_offload(
    gpu_layers: str,
    *,
    device: str | None = None,
    vram_limit: str | None = None,
    kv_offload: bool = True,
    cpu_moe: int = 0,
    backend: str = "cpu",
) -> Offload:
    """What the options ask for, on the devices there are.

    ValueError for options that mean nothing; DeviceError when layers are to go to a GPU and there
    is none that can take them. With `auto` that is no error: everything is the CPU's.
    """
    asked = parse_gpu_layers(gpu_layers)
    limit = None if vram_limit is None else _parse_limit(vram_limit)
    wish = Wish(asked, kv_offload=kv_offload, cpu_moe=cpu_moe, vram_limit=limit)
    if asked == 0 or (asked is None and device is None and backend != "cpu"):
        return Offload()
    devices = choose_devices(find_devices() if device != "none" else (), device)
    usable = tuple(found for found in devices if why_unusable(found) is None)
    if not usable and (asked or device not in (None, "none")):
        raise DeviceError(
            f"--gpu-layers {gpu_layers}: {_why_nowhere(devices, device)}; {CPU_REMEDY}"
        )
    return Offload(usable, wish)


def _parse_limit(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"--vram-limit: {error}") from None


def why_unusable(device: Device) -> str | None:
    """Why no backend here can use a device, and the remedy; None if one can."""
    if device.is_fake:
        return None
    named = f"{device.name} ({device.model})"
    if device.capability is not None and device.capability < LEAST_CAPABILITY:
        found, least = (
            f"{major}.{minor}" for major, minor in (device.capability, LEAST_CAPABILITY)
        )
        return f"{named} has compute capability {found}, and {least} is needed"
    missing = missing_packages()
    return None if missing is None else f"{named} cannot be used: {missing}"


def _why_nowhere(devices: tuple[Device, ...], chosen: str | None) -> str:
    if chosen == "none":
        return "--device none leaves no GPU"
    if devices:
        return why_unusable(devices[0]) or "no GPU can be used"
    if load_driver() is None:
        return "no NVIDIA driver is visible here: install it, or give the container the GPU"
    return "the NVIDIA driver sees no GPU"


def open_planned(
    program: Program,
    sizes: Sizes,
    offload: Offload,
    make: Callable[[Device | None, Stage], Backend],
    say: Callable[[str], None],
) -> tuple[Pipeline, Plan]:
    """Make the backends of a plan; where a device has no room after all, of one with fewer layers.

    `make(device, stage)` makes one, of the CPU for None. Each failure is said; what is tried next
    is a layer less, or as many as fit where the device says how much it held, down to none. A
    device that cannot be used is an error where layers were asked for; else it gets none.
    """
    most: dict[int, int] = {}
    rooms: dict[int, int] = {}
    while True:
        plan = plan_split(sizes, offload.devices, offload.wish, most=most, rooms=rooms)
        for line in brief(plan):
            say(line)
        places: list[int] = []

        def attempt(place: int, stage: Stage, places: list[int] = places) -> Backend:
            places.append(place)
            return make(None if place == HOST else offload.devices[place - 1], stage)

        try:
            cut = cut_program(program, plan.places(program))
            return Pipeline.open(program, cut, attempt), plan
        except DeviceMemoryError as error:
            if places[-1] == HOST:
                raise
            index = places[-1] - 1
            most[index] = plan.shares[index].n_units - 1
            if error.room is not None:
                rooms[index] = error.room
            say(f"{error}: trying fewer layers there")
        except DeviceError as error:
            if places[-1] == HOST or not offload.is_automatic:
                raise
            most[places[-1] - 1] = 0
            say(f"{error}: going on without it")


def make_device_backend(
    device: Device,
    stage: Stage,
    *,
    n_ctx: int,
    n_batch: int,
    kv_type: str,
    say: Callable[[str], None],
) -> Backend:
    """The backend of a stage on a device, tried out; `say` hears what takes long.

    DeviceMemoryError when it has no room for it, DeviceError when it cannot compute it.
    """
    if device.is_fake:
        from runtime.backends.fake import FakeBackend

        return FakeBackend(stage, device, n_ctx=n_ctx, n_batch=n_batch, kv_type=kv_type)
    from runtime.backends.cuda import CUDABackend
    from runtime.kernels.cuda import kept

    if kept.is_empty():
        say(f"compiling the kernels for {device.name}: some ten seconds, this once")
    backend = CUDABackend(stage, n_ctx=n_ctx, n_batch=n_batch, kv_type=kv_type, device=device.index)
    backend.try_out()
    return backend
