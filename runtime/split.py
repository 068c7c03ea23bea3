"""Which layers go to which GPU: sizes, devices and wishes in, a plan out. Nothing is touched here.

Layers are counted from the end, as llama.cpp does: the first is the output head, then the last
layer, the one before it... The embedding stays on the CPU. A layer's KV cache lies where the layer
does. The first device is filled first: what comes last in a step is on it, and what does not fit
goes on to the next device, and then to the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends.cuda_formats import allocated, held_bytes
from runtime.backends.cuda_room import kv_bytes, logits_bytes, scratch_bytes
from runtime.devices import Device
from runtime.program import (
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Instruction,
    Matrix,
    Program,
    Stage,
    StoreKV,
)

RESERVE_SHARE, RESERVE_LEAST = 0.05, 256 << 20  # left free: of all memory, and at least
FIXED = 32 << 20  # bytes of kernels on each device, and of weights on their way
HOST = 0  # the place of the CPU; device i has place i + 1


@dataclass(frozen=True)
class LayerSize:
    """Bytes of a layer."""

    weights: int
    experts: int  # of the weights, those that --cpu-moe may leave on the CPU
    kv: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model that is to run with some context and batch."""

    layers: tuple[LayerSize, ...]
    head: int
    scratch: int  # of a device that has any layer
    logits: int  # scratch of the device with the head

    @property
    def most_layers(self) -> int:
        """What `all` means: the head is one more."""
        return len(self.layers) + 1


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    gpu_layers: int | None = None  # None: as many as fit
    at_most: int | None = None  # of those that fit: what was measured to be fastest
    kv_offload: bool = True
    cpu_moe: int = 0  # of the first so many layers the experts stay on the CPU
    vram_limit: int | None = None  # bytes of each device


@dataclass(frozen=True)
class Share:
    """What a device gets. Sizes in bytes."""

    device: Device
    layers: range
    head: bool
    weights: int
    kv: int
    scratch: int
    budget: int  # what may be used, after the reserve or the limit
    one_more: int | None  # what lacks for one more layer; None when there is none left to place

    @property
    def used(self) -> int:
        return self.weights + self.kv + self.scratch

    @property
    def n_units(self) -> int:
        return len(self.layers) + self.head


@dataclass(frozen=True)
class Plan:
    """Where everything goes."""

    wish: Wish
    shares: tuple[Share, ...]  # of every device, used or not
    n_layers: int
    host_weights: int  # bytes of layers and head on the CPU
    host_kv: int

    @property
    def gpu_layers(self) -> int:
        """The number that --gpu-layers would be given for it."""
        return sum(share.n_units for share in self.shares)

    def places(self, program: Program) -> list[int]:
        """The place of every instruction: HOST, or 1 for the first device..."""
        layer_places = [HOST] * self.n_layers
        head = HOST
        for place, share in enumerate(self.shares, start=1):
            for layer in share.layers:
                layer_places[layer] = place
            head = place if share.head else head
        places: list[int] = []
        for index, steps in enumerate(program.layers):
            away = _stays(steps, experts=index < self.wish.cpu_moe, kv=not self.wish.kv_offload)
            places += [HOST if stays else layer_places[index] for stays in away]
        return places + [head] * len(program.head)


def measure_sizes(program: Program, *, n_ctx: int, n_batch: int, kv_type: str) -> Sizes:
    """The bytes of every part, to run with a context of n_ctx tokens read n_batch at a time."""
    layers = []
    for steps, shape in zip(program.layers, program.caches, strict=True):
        inside = _experts_inside(steps)
        layers.append(
            LayerSize(
                weights=sum(map(step_bytes, steps)),
                experts=sum(step_bytes(steps[i]) for i in inside),
                kv=kv_bytes(shape, n_ctx, kv_type),
            )
        )
    return Sizes(
        layers=tuple(layers),
        head=sum(map(step_bytes, program.head)),
        scratch=FIXED + scratch_bytes(program, n_batch=n_batch, n_ctx=n_ctx),
        logits=logits_bytes(program, n_batch=n_batch),
    )


def plan_split(
    sizes: Sizes,
    devices: Sequence[Device],
    wish: Wish,
    *,
    most: Mapping[int, int] | None = None,
    rooms: Mapping[int, int] | None = None,
) -> Plan:
    """Place as many layers as are wanted and fit.

    A number of layers is placed whether it fits or not: what is free may be guessed wrong. When
    it was, `most` are the units that a device, by index, may get at most, and `rooms` the bytes.
    """
    units = _make_units(sizes, wish)
    asked = wish.at_most if wish.gpu_layers is None else wish.gpu_layers
    wanted = len(units) if asked is None else min(asked, len(units))
    most, rooms = most or {}, rooms or {}
    shares: list[Share] = []
    taken = 0
    for index, device in enumerate(devices):
        is_last = index == len(devices) - 1
        forced = wish.gpu_layers is not None and is_last and index not in rooms
        limit = min(wanted, taken + most.get(index, len(units)))
        room = rooms.get(index, budget(device, wish))
        share = _fill(sizes, device, room, units, taken, limit, forced=forced)
        shares.append(share)
        taken += share.n_units
    weights = sizes.head + sum(layer.weights for layer in sizes.layers)
    return Plan(
        wish=wish,
        shares=tuple(shares),
        n_layers=len(sizes.layers),
        host_weights=weights - sum(share.weights for share in shares),
        host_kv=sum(layer.kv for layer in sizes.layers) - sum(share.kv for share in shares),
    )


def budget(device: Device, wish: Wish) -> int:
    """Bytes of a device that may be used; below 0 when not even the reserve is free."""
    usable = device.free - max(int(device.total * RESERVE_SHARE), RESERVE_LEAST)
    return usable if wish.vram_limit is None else min(usable, wish.vram_limit)


def stage_bytes(stage: Stage, *, n_ctx: int, n_batch: int, kv_type: str) -> int:
    """What a stage takes on a device."""
    return (
        sum(map(step_bytes, stage.steps))
        + sum(kv_bytes(shape, n_ctx, kv_type) for shape in stage.caches)
        + FIXED
        + scratch_bytes(stage, n_ctx=n_ctx, n_batch=n_batch)
        + logits_bytes(stage, n_batch=n_batch)
    )


def step_bytes(step: Instruction) -> int:
    """Bytes of an instruction's weights on a GPU."""
    total = 0
    for value in vars(step).values():
        if isinstance(value, Matrix):
            total += allocated(held_bytes([value]))
        elif isinstance(value, np.ndarray):
            total += allocated(value.nbytes)
        elif isinstance(step, ExpertMatMul) and value is step.experts:
            total += allocated(held_bytes(step.experts))
    return total


@dataclass(frozen=True)
class _Unit:
    """Something that is placed as a whole: a layer, or the head. Sizes in bytes."""

    weights: int
    kv: int
    scratch: int

    @property
    def size(self) -> int:
        return self.weights + self.kv + self.scratch


def _make_units(sizes: Sizes, wish: Wish) -> list[_Unit]:
    """In the order in which they are placed."""
    units = [_Unit(sizes.head, 0, sizes.logits)]
    for index in reversed(range(len(sizes.layers))):
        layer = sizes.layers[index]
        weights = layer.weights - (layer.experts if index < wish.cpu_moe else 0)
        units.append(_Unit(weights, layer.kv if wish.kv_offload else 0, 0))
    return units


def _fill(
    sizes: Sizes,
    device: Device,
    room: int,
    units: Sequence[_Unit],
    first: int,
    limit: int,
    *,
    forced: bool,
) -> Share:
    """Give a device units from `first` on, to below `limit`; `forced`: even beyond its room."""
    used, end = sizes.scratch, first
    while end < limit and (forced or used + units[end].size <= room):
        used += units[end].size
        end += 1
    mine = units[first:end]
    n_layers = len(sizes.layers)
    lacking = max(used + units[end].size - room, 0) if end < len(units) else None
    return Share(
        device=device,
        # Unit i is layer n_layers - i, and unit 0 the head.
        layers=range(n_layers - end + 1, n_layers - max(first, 1) + 1) if mine else range(0),
        head=first == 0 < end,
        weights=sum(unit.weights for unit in mine),
        kv=sum(unit.kv for unit in mine),
        scratch=sizes.scratch + sum(unit.scratch for unit in mine) if mine else 0,
        budget=room,
        one_more=lacking,
    )


def _experts_inside(steps: Sequence[Instruction]) -> range:
    """The instructions of a layer from its first product of experts to their last sum."""
    kinds = (ExpertMatMul, ExpertBias, ExpertSum)
    inside = [i for i, step in enumerate(steps) if isinstance(step, kinds)]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _stays(steps: Sequence[Instruction], *, experts: bool, kv: bool) -> list[bool]:
    """Which instructions of a layer are the CPU's although the layer is a device's."""
    inside = _experts_inside(steps) if experts else range(0)
    return [
        i in inside or (kv and isinstance(step, (StoreKV, Attend))) for i, step in enumerate(steps)
    ]
