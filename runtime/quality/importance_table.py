"""What `gguf imatrix --show-statistics` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from gguf_tools.errors import printable
from gguf_tools.imatrix import ImportanceMatrix
from gguf_tools.imatrix_statistics import LayerStatistics, TensorStatistics

TENSOR_HEADER = (
    "tensor",
    "layer",
    "sum",
    "min",
    "max",
    "mean",
    "deviation",
    "active",
    "columns",
    "entropy",
    "of most",
    "ZD",
    "similarity",
    "tokens",
)
LAYER_HEADER = ("layer", "mean sum", "mean ZD", "mean similarity")


def describe(matrix: ImportanceMatrix) -> str:
    """One line about the whole file."""
    texts = ", ".join(printable(name, 60) for name in matrix.datasets) or "an unknown text"
    size = f" of {matrix.chunk_size:,} tokens" if matrix.chunk_size else ""
    return (
        f"{printable(matrix.path, 1000)}: {len(matrix.entries):,} tensors, "
        f"{matrix.n_chunks:,} windows{size}, from {texts}"
    )


def tensor_rows(tensors: Sequence[TensorStatistics]) -> Iterator[tuple[str, ...]]:
    """A row of texts for each tensor."""
    for each in tensors:
        least, most = each.tokens
        yield (
            printable(each.kind, 60),
            "-" if each.layer is None else str(each.layer),
            f"{each.total:.2f}",
            f"{each.least:.4f}",
            f"{each.most:.4f}",
            f"{each.mean:.4f}",
            f"{each.deviation:.4f}",
            f"{each.active:.2%}",
            f"{each.columns:,}",
            f"{each.entropy:.4f}",
            f"{each.normalized_entropy:.2%}",
            f"{each.zd:.2%}",
            f"{each.similarity:.4f}",
            f"{most:,}" if least == most else f"{least:,} to {most:,}",
        )


def layer_rows(layers: Sequence[LayerStatistics]) -> Iterator[tuple[str, ...]]:
    """A row of texts for each layer."""
    for each in layers:
        yield (
            str(each.layer),
            f"{each.total:.2f}",
            f"{each.zd:.4%}",
            f"{each.similarity:.4f}",
        )


def to_json(
    matrix: ImportanceMatrix,
    tensors: Sequence[TensorStatistics],
    layers: Sequence[LayerStatistics],
) -> dict[str, Any]:
    """What `--json` prints of all that."""
    return {
        "file": str(matrix.path),
        "windows": matrix.n_chunks,
        "ctx": matrix.chunk_size,
        "texts": list(matrix.datasets),
        "tensors": [
            asdict(each) | {"normalized_entropy": each.normalized_entropy} for each in tensors
        ],
        "layers": [asdict(each) for each in layers],
    }
