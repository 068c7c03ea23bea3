"""Importance matrices in llama.cpp's GGUF form: writing, and adding several up.

llama-imatrix (tools/imatrix/imatrix.cpp) and llama-quantize read what is written here. Beside what
they know there is one key of ours: a digest of the model, the text and the options, by which a
later run finds that it may go on from the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError, printable
from gguf_tools.imatrix import COUNTS, IDENTITY_KEY, SUMS, Entry, ImportanceMatrix
from gguf_tools.quants import by_name
from gguf_tools.writer import Array, GGUFWriter, MetadataValue, TensorSpec, Value

Wide = npt.NDArray[np.float64]

OLD_CHUNK = 512  # tokens, where a file of the old form does not say


def write_importance_matrix(
    path: Path,
    entries: Mapping[str, Entry],
    *,
    datasets: Sequence[str],
    n_chunks: int,
    chunk_size: int,
    identity: str = "",
    force: bool = False,
) -> None:
    """Write `entries` to `path`, at once or not at all; sums are stored as float32."""
    metadata: dict[str, MetadataValue] = {
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Array("str", list(datasets)),
        "imatrix.chunk_count": Value("u32", n_chunks),
        "imatrix.chunk_size": Value("u32", chunk_size),
    }
    if identity:
        metadata[IDENTITY_KEY] = Value("str", identity)
    f32 = by_name("F32")
    tensors = {}
    for name, entry in sorted(entries.items()):
        n_matrices = len(entry.counts)
        tensors[name + SUMS] = entry.sums.reshape(n_matrices, -1)
        tensors[name + COUNTS] = entry.counts.reshape(n_matrices, 1)
    specs = [TensorSpec(name, f32, values.shape) for name, values in tensors.items()]
    with GGUFWriter(path, metadata=metadata, tensors=specs, force=force) as writer:
        for name, values in tensors.items():
            writer.write(name, np.ascontiguousarray(values, "<f4").view(np.uint8))


def merge(matrices: Sequence[ImportanceMatrix]) -> tuple[dict[str, Entry], int, int]:
    """The entries of all added up, the number of chunks, and their size.

    FormatError where they are of different models. As llama-imatrix does it: sums and counts of a
    tensor are added; one count for all experts stands for as many equal ones; what the old form
    has per chunk is multiplied by the size of a chunk.
    """
    size = next((matrix.chunk_size for matrix in matrices if matrix.chunk_size), OLD_CHUNK)
    for matrix in matrices[1:]:
        if not set(matrix.entries) & set(matrices[0].entries):
            raise FormatError(
                f"{_shown(matrix)} and {_shown(matrices[0])} have no tensor in common: they are of "
                "different models"
            )
    sums: dict[str, Wide] = {}  # added up in float64, so that nothing is lost
    counts: dict[str, Wide] = {}
    for matrix in matrices:
        factor = 1 if matrix.chunk_size else size
        for name, entry in matrix.entries.items():
            own = entry.sums.astype(np.float64) * factor, entry.counts.astype(np.float64) * factor
            if name in sums:
                own = _added((sums[name], counts[name]), own, name, matrix)
            sums[name], counts[name] = own
    if all(matrix.n_chunks and matrix.chunk_size in (0, size) for matrix in matrices):
        n_chunks = sum(matrix.n_chunks for matrix in matrices)
    else:
        n_chunks = int(max(count.max() for count in counts.values())) // size
    merged = {
        name: Entry(sums[name].astype(np.float32), counts[name].astype(np.float32)) for name in sums
    }
    return merged, n_chunks, size


def _added(
    one: tuple[Wide, Wide], other: tuple[Wide, Wide], name: str, matrix: ImportanceMatrix
) -> tuple[Wide, Wide]:
    """The sums and counts of both."""
    n_matrices = max(len(one[1]), len(other[1]))
    if len(one[0]) != len(other[0]) or any(
        len(counts) not in (1, n_matrices) for counts in (one[1], other[1])
    ):
        raise FormatError(
            f"{_shown(matrix)}: tensor {printable(name)}: expected {len(one[0]):,} sums and "
            f"{len(one[1]):,} counts as in the file before it, found {len(other[0]):,} and "
            f"{len(other[1]):,}; it is of another model"
        )
    return one[0] + other[0], one[1] + other[1]


def _shown(matrix: ImportanceMatrix) -> str:
    return printable(matrix.path, limit=1000)
