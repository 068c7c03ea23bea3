"""What `gguf tune` found, kept in the cache folder for each machine, model and use of its GPUs.

Models are told apart by their tensors' shapes and types, not by their weights: a fine-tune is as
fast as its base. What cannot be read is as if it had not been measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguf_tools.cache_folder import cache_root
from gguf_tools.reader import GGUFFile
from runtime.devices import Device
from runtime.split import Wish

VERSION = 1
MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Tuned:
    """The settings that were fastest."""

    gpu_layers: int
    threads: int
    devices: tuple[str, ...]  # the GPUs that were there

    def layers_on(self, devices: Sequence[Device]) -> int | None:
        """The number of layers, where the GPUs are those that were measured."""
        return self.gpu_layers if self.devices == device_names(devices) else None


def remember(file: GGUFFile, tuned: Tuned, wish: Wish) -> Path | None:
    """Keep what was found for a wish; gives the file, or None when there is no cache folder."""
    folder = _folder()
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(file, wish)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"version": VERSION, **asdict(tuned)}, indent=1))
    part.replace(path)
    return path


def recall(file: GGUFFile, wish: Wish) -> Tuned | None:
    """What was found for such a model and wish on this machine, if anything.

    Of a wish all counts but the number of layers, which is what was found.
    """
    folder = _folder()
    if folder is None or not folder.is_dir():
        return None
    try:
        with (folder / _name(file, wish)).open("rb") as opened:
            record = json.loads(opened.read(MOST_BYTES))
    except (OSError, ValueError):
        return None
    return _read_record(record)


def _read_record(record: Any) -> Tuned | None:
    if not isinstance(record, dict) or record.get("version") != VERSION:
        return None
    layers, threads, devices = (record.get(key) for key in ("gpu_layers", "threads", "devices"))
    if not isinstance(layers, int) or not isinstance(threads, int) or not isinstance(devices, list):
        return None
    if layers < 0 or not 0 < threads <= (os.cpu_count() or 1):
        return None
    return Tuned(layers, threads, tuple(map(str, devices)))


def device_names(devices: Sequence[Device]) -> tuple[str, ...]:
    """What tells one set of GPUs from another."""
    return tuple(f"{device.name} {device.model} {device.total}" for device in devices)


def _folder() -> Path | None:
    root = cache_root()
    return None if root is None else root / "tuned"


def _name(file: GGUFFile, wish: Wish) -> str:
    """A digest of the machine, of the model's tensors, and of what was wished otherwise."""
    from runtime.doctor import processor_name  # which loads more than a start needs

    seen = hashlib.sha256()
    seen.update(f"{platform.machine()} {processor_name()} {os.cpu_count()}".encode())
    for info in file.tensors.values():
        seen.update(f"\0{info.name} {info.quant.name} {info.shape}".encode())
    others = replace(wish, gpu_layers=None, at_most=None)
    if others != Wish():
        seen.update(f"\0{others}".encode())
    return f"{seen.hexdigest()[:32]}.json"
