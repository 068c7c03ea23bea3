"""A GGUF file as the source of another: what llama-quantize does, to the byte.

Metadata is carried over as it is, but for the two keys that say how the file is quantised and for
what describes parts of a split model. Tensors that no file type quantises keep their type.
"""

import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.errors import FormatError, OutputError, UnsupportedQuantError, printable
from gguf_tools.file_types import FILE_TYPES, FileType, RecipeFacts
from gguf_tools.plan import PLAIN, QUANTIZATION_VERSION, Plan, TensorPlan
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile, TensorInfo
from gguf_tools.recipes import Choice, choose_types, is_quantisable, sorted_names
from gguf_tools.safetensors_file import Bytes, Floats, LazyTensor
from gguf_tools.values import ALIGNMENT_KEY, MAGIC, MetadataValue, Value

SPLIT = ("split.no", "split.count", "split.tensors.count")
VERSION_KEY, TYPE_KEY = "general.quantization_version", "general.file_type"
REPLACED = (*SPLIT, VERSION_KEY, TYPE_KEY, ALIGNMENT_KEY)


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: a file that begins as one, or is called so."""
    if not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def plan_requantisation(
    file: GGUFFile, file_type: FileType, *, allow_requantize: bool = False
) -> Plan:
    """What the new file will hold. `file` must stay open until it is written.

    Weights that are quantised already are an error unless `allow_requantize`: then they are
    dequantised first, and both errors add up.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    choices = choose_types(file_type, shapes, facts=_read_facts(file))
    for name, tensor in file.tensors.items():
        if not is_quantisable(name, tensor.shape):
            choices[name] = Choice(tensor.quant.name, tensor.quant.name)
    twice = [
        tensor
        for name, tensor in file.tensors.items()
        if tensor.quant.name not in PLAIN and tensor.quant.name != choices[name].type
    ]
    if twice and not allow_requantize:
        first = twice[0]
        raise UnsupportedQuantError(
            f"{printable(file.path, limit=1000)}: {len(twice):,} tensors are quantised already "
            f"({printable(first.name)} is {first.quant.name}): quantising them again adds a second "
            "error to the first; use a file in BF16, F16 or F32, or say --allow-requantize"
        )
    tensors = tuple(
        TensorPlan(
            name,
            _lazy(file, file.tensors[name]),
            None,
            by_name(choices[name].type),
            choices[name],
        )
        for name in sorted_names(shapes)
    )
    metadata: dict[str, MetadataValue] = {
        key: file.encoded(key) for key in file.metadata if key not in REPLACED
    }
    # Last, where llama-quantize puts them.
    metadata[VERSION_KEY] = Value("u32", QUANTIZATION_VERSION)
    metadata[TYPE_KEY] = Value("u32", file_type.file_type_id)
    return Plan(file_type, tensors, metadata, _notes(file, twice))


def protect_parts(file: GGUFFile, output: Path) -> None:
    """Refuse to write over the file that is being read."""
    if output.exists() and any(os.path.samefile(path, output) for path in file.paths):
        raise OutputError(
            f"{printable(output, limit=1000)} is the file that is being read; choose another name"
        )


def source_name(path: Path) -> Path:
    """The model's name in that of its file, for the name of the output: without what follows it.

    `models/qwen-F16.gguf` and `models/qwen.Q8_0-00001-of-00003.gguf` are both `models/qwen`.
    """
    stem = path.name.removesuffix(".gguf")
    if len(stem) > 15 and stem[-9:-5] == "-of-" and stem[-14:-9].isdecimal():
        stem = stem[:-15]
    for mark in "-.":
        head, _, tail = stem.rpartition(mark)
        if head and _names_a_type(tail):
            stem = head
            break
    return path.with_name(stem)


def _names_a_type(text: str) -> bool:
    return text.upper() in {file_type.name for file_type in FILE_TYPES}


def _notes(file: GGUFFile, twice: list[TensorInfo]) -> tuple[str, ...]:
    if not twice:
        return ()
    types = ", ".join(sorted({tensor.quant.name for tensor in twice}))
    n_weights = sum(prod(tensor.shape) for tensor in twice)
    return (
        f"{len(twice):,} tensors ({n_weights:,} weights) were quantised already ({types}) and are "
        "quantised a second time: both errors add up",
    )


def _lazy(file: GGUFFile, tensor: TensorInfo) -> LazyTensor:
    def raw(first: int, last: int) -> Bytes:
        return file.rows(tensor.name, first, last)

    def load(first: int, last: int) -> Floats:
        weights: Floats = tensor.quant.dequantize(raw(first, last))
        return weights.reshape(last - first, tensor.row_length)

    return LazyTensor(tensor.name, tensor.shape, tensor.quant.name, load, raw)


def _read_facts(file: GGUFFile) -> RecipeFacts:
    """What the rules of file types ask, from the metadata."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FormatError(
            f"{printable(file.path, limit=1000)}: metadata general.architecture: expected the name "
            f"of an architecture, found {'none' if name is None else printable(repr(name))}"
        )

    def number(key: str, default: int | None) -> int:
        value: Any = file.metadata.get(f"{name}.{key}", default)
        if isinstance(value, (list, np.ndarray)):  # one for each layer
            value = value[0] if len(value) else default
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise FormatError(
                f"{printable(file.path, limit=1000)}: metadata {printable(name)}.{key}: expected a "
                f"count, found {'none' if value is None else printable(repr(value))}"
            )
        return int(value)

    n_heads = number("attention.head_count", 0)
    return RecipeFacts(
        name,
        number("block_count", None),
        n_heads,
        number("attention.head_count_kv", n_heads),
        number("expert_count", 0),
    )
