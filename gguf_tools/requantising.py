"""A GGUF file as the source of another: what llama-quantize does, to the byte.

Metadata is carried over as it is, but for the two keys that say how the file is quantised, what
that cost, and what describes parts of a split model. Tensors that no file type quantises keep their
type.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.errors import FormatError, UnsupportedQuantError, printable
from gguf_tools.file_types import FILE_TYPES, FileType, RecipeFacts
from gguf_tools.imatrix import ImportanceMatrix
from gguf_tools.overrides import NO_OVERRIDES, Overrides
from gguf_tools.plan import PLAIN, QUANTIZATION_VERSION, Plan, TensorPlan, plan_tensors
from gguf_tools.quality_sheet import PREFIX as SHEET
from gguf_tools.reader import GGUFFile, TensorInfo
from gguf_tools.recipes import is_quantisable
from gguf_tools.safetensors_file import Bytes, Floats, LazyTensor
from gguf_tools.values import ALIGNMENT_KEY, MAGIC, MetadataValue, Value

SPLIT = ("split.no", "split.count", "split.tensors.count")
VERSION_KEY, TYPE_KEY = "general.quantization_version", "general.file_type"
DROPPED = (*SPLIT, ALIGNMENT_KEY)


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: a file that begins as one, or is called so."""
    if not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def plan_requantisation(
    file: GGUFFile,
    file_type: FileType,
    *,
    allow_requantize: bool = False,
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
    calibrates: bool = False,
) -> Plan:
    """What the new file will hold. `file` must stay open until it is written.

    A file that is to be calibrated is planned with `calibrates`: see `build_plan`.

    Weights that are quantised already are an error unless `allow_requantize`: then they are
    dequantised first, and both errors add up.
    """
    facts = replace(_read_facts(file), has_importance=matrix is not None, is_calibrated=calibrates)
    tensors = plan_tensors(
        {name: (_lazy(file, tensor), None) for name, tensor in file.tensors.items()},
        file_type=file_type,
        facts=facts,
        kept={
            name: tensor.quant.name
            for name, tensor in file.tensors.items()
            if overrides.keeps(name) or not is_quantisable(name, tensor.shape)
        },
        overrides=overrides,
        matrix=matrix,
    )
    twice = [
        file.tensors[tensor.name]
        for tensor in tensors
        if tensor.source.dtype not in (*PLAIN, tensor.quant.name)
    ]
    if twice and not allow_requantize:
        first = twice[0]
        raise UnsupportedQuantError(
            f"{printable(file.path, limit=1000)}: {len(twice):,} tensors are quantised already "
            f"({printable(first.name)} is {first.quant.name}): quantising them again adds a second "
            "error to the first; use a file in BF16, F16 or F32, or say --allow-requantize"
        )
    # Last, where llama-quantize puts them.
    own: dict[str, MetadataValue] = {
        VERSION_KEY: Value("u32", QUANTIZATION_VERSION),
        TYPE_KEY: Value("u32", file_type.file_type_id),
        **(matrix.metadata() if matrix is not None else {}),
    }
    replaced = {*DROPPED, *own}
    carried = {
        key: file.encoded(key)
        for key in file.metadata
        if key not in replaced and not key.startswith(SHEET)
    }
    return Plan(file_type, tensors, {**carried, **own}, _notes(tensors), matrix, facts=facts)


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


def _notes(tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    second = [tensor for tensor in tensors if tensor.is_second and tensor.quant.name not in PLAIN]
    if not second:
        return ()
    types = ", ".join(sorted({tensor.source.scheme for tensor in second}))
    n_weights = sum(tensor.source.n_elements for tensor in second)
    return (
        f"{len(second):,} tensors ({n_weights:,} weights) were quantised already ({types}) and are "
        "quantised a second time: both errors add up",
    )


def _lazy(file: GGUFFile, tensor: TensorInfo) -> LazyTensor:
    def raw(first: int, last: int) -> Bytes:
        return file.rows(tensor.name, first, last)

    def load(first: int, last: int) -> Floats:
        weights: Floats = tensor.quant.dequantize(raw(first, last))
        return weights.reshape(last - first, tensor.row_length)

    name = tensor.quant.name
    return LazyTensor(tensor.name, tensor.shape, name, load, raw, "" if name in PLAIN else name)


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
