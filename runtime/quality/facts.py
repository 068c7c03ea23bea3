"""What a file says of itself, for a report on a model's family of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf_tools.describe import show_value
from gguf_tools.file_types import FILE_TYPES
from gguf_tools.values import RESERVE_KEY
from runtime.sources import Source

NOTES = ("gguf_tools.", "quantize.")  # keys that tell how a file was made and what it cost
MOST_NOTES = 60


@dataclass(frozen=True)
class TypeShare:
    """The tensors of one type in a file."""

    tensors: int
    weights: int
    n_bytes: int


@dataclass(frozen=True)
class Facts:
    """The facts of a file; texts of its own are made printable, not escaped."""

    model: str | None  # general.name
    architecture: str | None
    parameters: int
    type: str  # the file type it names, or the type that most of its bytes have
    types: Mapping[str, TypeShare]  # by the type's name, most bytes first
    notes: Mapping[str, str]  # metadata under NOTES


def read_facts(source: Source) -> Facts:
    """The facts of an open file, or of a checkpoint as its file would be."""
    shares: dict[str, TypeShare] = {}
    for tensor in source.tensors.values():
        held = shares.get(tensor.quant.name, TypeShare(0, 0, 0))
        shares[tensor.quant.name] = TypeShare(
            held.tensors + 1, held.weights + tensor.n_elements, held.n_bytes + tensor.nbytes
        )
    ordered = sorted(shares.items(), key=lambda item: -item[1].n_bytes)
    notes = [key for key in source.metadata if key.startswith(NOTES) and key != RESERVE_KEY]
    return Facts(
        model=_text(source.metadata.get("general.name")),
        architecture=_text(source.metadata.get("general.architecture")),
        parameters=sum(share.weights for share in shares.values()),
        type=_file_type(source.metadata.get("general.file_type"), [name for name, _ in ordered]),
        types=dict(ordered),
        notes={
            show_value(key): show_value(source.metadata[key]) for key in sorted(notes)[:MOST_NOTES]
        },
    )


def _file_type(number: Any, types: list[str]) -> str:
    names = {each.file_type_id: each.name for each in FILE_TYPES}
    if type(number) is int and number in names:
        return names[number]
    return types[0] if types else ""


def _text(value: Any) -> str | None:
    return show_value(value) if isinstance(value, str) and value.strip() else None
