"""Split models made of whole ones, as llama-gguf-split makes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.parts import PartName
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec


def split_file(
    whole: Path,
    prefix: Path,
    n_parts: int,
    *,
    number: Mapping[int, int] | None = None,
    count: Mapping[int, int] | None = None,
    n_tensors: int | None = None,
    extra: Mapping[int, Mapping[str, MetadataValue]] | None = None,
    repeat: str = "",
) -> list[Path]:
    """The parts of `whole`, named after `prefix`. The first has the metadata and no tensor.

    What parts say of themselves can be made wrong by the index of the part (from 0): `number`,
    `count`, `extra` keys; `repeat` is the name of a tensor that the last part has as well.
    """
    file = GGUFFile(whole)
    names = list(file.tensors)
    chunks = [[], *(list(chunk) for chunk in np.array_split(names, n_parts - 1))]
    if repeat:
        chunks[-1].append(repeat)
    paths = []
    for index, chunk in enumerate(chunks):
        metadata = {key: _value(file, key) for key in file.metadata} if index == 0 else {}
        metadata["split.no"] = Value("u16", (number or {}).get(index, index))
        metadata["split.count"] = Value("u16", (count or {}).get(index, n_parts))
        metadata["split.tensors.count"] = Value("i32", n_tensors or len(names))
        metadata.update((extra or {}).get(index, {}))
        path = prefix.with_name(str(PartName(prefix.name, index + 1, n_parts)))
        infos = [file.tensors[name] for name in chunk]
        specs = [TensorSpec(info.name, info.quant, info.shape) for info in infos]
        with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
            for name in chunk:
                writer.write(name, file.raw(name))
        paths.append(path)
    return paths


def _value(file: GGUFFile, key: str) -> MetadataValue:
    value: Any = file.metadata[key]
    kind = file.metadata_types[key]
    return Array(kind[4:-1], value) if kind.startswith("arr[") else Value(kind, value)
