"""Split a model into several files, and merge them again.

The parts are those of llama-gguf-split, to the byte: all metadata in the first, `split.no`,
`split.count` and `split.tensors.count` in each, tensors in their order. A limit on the size counts
the tensors' bytes, padded, and not the header. Merging leaves the three keys away, so that a file
split and merged is what it was.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.describe import short_size
from gguf_tools.errors import GGUFError, OutputError, printable
from gguf_tools.parts import PartName, parse_part_name
from gguf_tools.reader import GGUFFile, TensorInfo
from gguf_tools.values import ALIGNMENT_KEY, MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec, file_size

SPLIT = "split."
MAX_PARTS = 65535  # split.count is a u16
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class PartPlan:
    """A file that splitting will write."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorSpec, ...]
    size: int  # bytes of the whole file


@dataclass(frozen=True)
class Step:
    """Bytes of a tensor have been written."""

    path: Path
    name: str
    n_bytes: int


def parse_size(text: str) -> int:
    """Bytes of `2GB`, `500M`, `1.5GiB`: K, M, G, T are thousands, and with an i 1024s."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise GGUFError(f"expected a size such as 2GB, 500M or 1.5GiB, found '{printable(text)}'")
    unit = found[2].upper()
    factor = 1024 ** "KMGT".find(unit) * 1024 if unit and found[3] else _UNITS[unit]
    size = int(float(found[1]) * factor)
    if size < 1:
        raise GGUFError(f"expected a size of at least one byte, found '{printable(text)}'")
    return size


def plan_split(
    file: GGUFFile,
    prefix: Path,
    *,
    max_size: int | None = None,
    max_tensors: int | None = None,
) -> list[PartPlan]:
    """The files that `file` is to become, named PREFIX-00001-of-0000N.gguf."""
    if (max_size is None) == (max_tensors is None):
        raise ValueError("expected one of max_size and max_tensors")
    if not file.tensors:
        raise GGUFError(f"{_shown(file)}: there are no tensors in it to split")
    groups = (
        _group_by_size(file, max_size)
        if max_size is not None
        else _group_by_count(list(file.tensors.values()), max_tensors or 1)
    )
    if len(groups) > MAX_PARTS:
        raise GGUFError(
            f"{_shown(file)}: that makes {len(groups):,} parts, and {MAX_PARTS:,} is the most that "
            "the format can count; choose a larger limit"
        )
    plans = []
    for index, group in enumerate(groups):
        metadata = _kept_metadata(file) if index == 0 else {}
        metadata["split.no"] = Value("u16", index)
        metadata["split.tensors.count"] = Value("i32", len(file.tensors))
        metadata["split.count"] = Value("u16", len(groups))
        if index and ALIGNMENT_KEY in file.metadata:
            metadata[ALIGNMENT_KEY] = Value("u32", file.alignment)
        path = prefix.with_name(str(PartName(prefix.name, index + 1, len(groups))))
        specs = tuple(TensorSpec(info.name, info.quant, info.shape) for info in group)
        plans.append(PartPlan(path, metadata, specs, file_size(metadata, specs, file.alignment)))
    return plans


def split(file: GGUFFile, plans: Sequence[PartPlan], *, force: bool = False) -> Iterator[Step]:
    """Write the parts, the first one last: until all are there, nothing opens as the model.

    After an error none of them is left. With `force` parts of the same names are replaced.
    """
    for plan in plans:
        _protect_source(file, plan.path)
        if not force and os.path.lexists(plan.path):
            raise OutputError(
                f"{printable(plan.path, limit=1000)} exists already; use --force to replace it, or "
                "choose another name with --output"
            )
    _check_space(plans)
    if force:
        with suppress(FileNotFoundError):  # an old first part must not open new others
            if not plans[0].path.is_dir():
                plans[0].path.unlink()
    finished: list[Path] = []
    try:
        for plan in (*plans[1:], plans[0]):
            yield from _copy(file, plan, force=force)
            finished.append(plan.path)
    except BaseException:
        for path in finished:
            with suppress(OSError):
                path.unlink()
        raise


def default_prefix(path: Path) -> Path:
    """What the parts of `path` are called before their numbers, in the current folder."""
    part = parse_part_name(path.name)
    name = part.prefix if part else path.name.removesuffix(".gguf")
    return Path(name)


def merge(file: GGUFFile, output: Path, *, force: bool = False) -> Iterator[Step]:
    """Write a split model as one file. It appears when it is complete."""
    if len(file.paths) == 1:
        raise GGUFError(f"{_shown(file)}: this is a whole model already; there is nothing to merge")
    _protect_source(file, output)
    specs = tuple(TensorSpec(info.name, info.quant, info.shape) for info in file.tensors.values())
    metadata = _kept_metadata(file)
    size = file_size(metadata, specs, file.alignment)
    return _copy(file, PartPlan(output, metadata, specs, size), force=force)


def copy_tensors(
    file: GGUFFile, writer: GGUFWriter, specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, int]]:
    """Copy the bytes of tensors band by band; the name and the bytes of each."""
    for spec in specs:
        for band in file.bands(spec.name):
            writer.write(spec.name, band)
            yield spec.name, band.size


def _copy(file: GGUFFile, plan: PartPlan, *, force: bool) -> Iterator[Step]:
    with GGUFWriter(
        plan.path,
        metadata=plan.metadata,
        tensors=plan.tensors,
        force=force,
        alignment=file.alignment,
    ) as writer:
        for name, n_bytes in copy_tensors(file, writer, plan.tensors):
            yield Step(plan.path, name, n_bytes)


def _kept_metadata(file: GGUFFile) -> dict[str, MetadataValue]:
    """The metadata of a whole model, in its order, byte for byte."""
    return {
        key: Value("u32", file.alignment) if key == ALIGNMENT_KEY else file.encoded(key)
        for key in file.metadata
        if not key.startswith(SPLIT)
    }


def _group_by_count(tensors: list[TensorInfo], count: int) -> list[list[TensorInfo]]:
    return [tensors[first : first + count] for first in range(0, len(tensors), count)]


def _group_by_size(file: GGUFFile, limit: int) -> list[list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in file.tensors.values():
        padded = tensor.nbytes + -tensor.nbytes % file.alignment
        if padded > limit:
            largest = max(info.nbytes for info in file.tensors.values()) + file.alignment
            raise GGUFError(
                f"{_shown(file)}: tensor {printable(tensor.name)} has {tensor.nbytes:,} bytes, "
                f"which is more than {limit:,}, and a tensor is not divided; choose a size of "
                f"{largest:,} bytes ({short_size(largest)}) or more"
            )
        if size + padded > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += padded
    return groups


def _check_space(plans: Sequence[PartPlan]) -> None:
    folder = plans[0].path.parent
    if not folder.is_dir():
        raise OutputError(
            f"the folder {printable(folder, limit=1000)} does not exist; create it first"
        )
    needed = sum(plan.size for plan in plans)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{printable(plans[0].path, limit=1000)}: the parts need {needed:,} bytes and the disk "
            f"has {free:,} free"
        )


def _protect_source(file: GGUFFile, output: Path) -> None:
    for path in file.paths:
        with suppress(OSError):  # one of them is not there: nothing to protect
            if os.path.samefile(path, output):
                raise OutputError(
                    f"{printable(output, limit=1000)} is a file of the model that is being read; "
                    "choose another name with --output"
                )


def _shown(file: GGUFFile) -> str:
    return printable(file.path, limit=1000)
