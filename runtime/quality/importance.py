"""Importance matrices: how large the inputs of each matrix's columns are, over a text.

The text is cut as llama.cpp's llama-imatrix does it: windows of n_ctx tokens, each read from an
empty cache, its first token replaced by bos where the model asks for one. For each matrix the
squares of what it is multiplied with are added up for each column, for an expert over the tokens
that it was chosen for.

A group of windows goes through one layer after the other. Sums of a group are float64 and those of
all groups float32, as in a file: a run that goes on from one ends as one that was never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import FormatError, GGUFError, printable
from gguf_tools.identity import digest_inputs
from gguf_tools.imatrix import Entry, ImportanceMatrix
from runtime.layerwise import LayerwiseModel
from runtime.program import ExpertMatMul, Floats, MatMul, Matrix, Show
from runtime.quality.evaluation import Ids, with_bos
from runtime.sources import Source
from runtime.streamed_rows import StreamedRows

HIDDEN_BYTES = 256 << 20  # of hidden states of windows that go through the layers together


@dataclass(frozen=True)
class Read:
    """How far it is: at the start, and after a group of windows went through a layer."""

    done: int  # windows times layers
    total: int


@dataclass(frozen=True, eq=False)
class Collected:
    """All that is known after so many windows."""

    entries: Mapping[str, Entry]
    windows: int


class Collector:
    """Adds up what an observer is told."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._entries: dict[str, Entry] = {}  # of all groups before
        self._sums: dict[str, npt.NDArray[np.float64]] = {}  # of this group, (n_matrices, k)
        self._counts: dict[str, npt.NDArray[np.int64]] = {}  # (n_matrices,) or (1,)

    def go_on_from(self, entries: Mapping[str, Entry]) -> None:
        """Begin with what a file holds."""
        self._entries = dict(entries)

    def observe(self, matrix: Matrix, inputs: Floats) -> None:
        """observing.Observe"""
        name = matrix.name
        if name not in self._sums:
            self._add(matrix)
        squares = np.einsum("ij,ij->j", inputs, inputs)
        if matrix.index is None:  # or all matrices of a stack, which have the same inputs
            self._sums[name] += squares
            self._counts[name] += len(inputs)
        else:
            self._sums[name][matrix.index] += squares
            self._counts[name][matrix.index] += len(inputs)

    def finish_group(self) -> dict[str, Entry]:
        """The sums of all groups up to here."""
        for name, sums in self._sums.items():
            if not np.isfinite(sums).all():
                raise FormatError(
                    f"tensor {printable(name)} is multiplied with what is no number (NaN or "
                    "infinity): the model's weights are damaged, or too large for this "
                    "computation; see what `gguf verify FILE` finds"
                )
            flat, counts = sums.reshape(-1), self._counts[name].astype(np.float64)
            before = self._entries.get(name)
            if before is not None:
                if before.sums.size != flat.size or before.counts.size != counts.size:
                    raise FormatError(
                        f"tensor {printable(name)}: expected {flat.size:,} sums in the file that "
                        f"this run was to go on from, found {before.sums.size:,}; it is damaged: "
                        "use --force to begin again"
                    )
                flat, counts = before.sums + flat, before.counts + counts
            self._entries[name] = Entry(flat.astype(np.float32), counts.astype(np.float32))
        self._sums, self._counts = {}, {}
        return dict(self._entries)

    def _add(self, matrix: Matrix) -> None:
        n_matrices = prod(self._source.tensors[matrix.name].shape[:-2])
        self._sums[matrix.name] = np.zeros((n_matrices, matrix.n_columns), np.float64)
        self._counts[matrix.name] = np.zeros(1 if matrix.index is None else n_matrices, np.int64)


def collect(
    model: LayerwiseModel,
    source: Source,
    windows: Ids,  # (n_windows, n_ctx)
    *,
    bos: int | None,
    with_output: bool = False,
    start: Collected | None = None,
    group: int = 10,
) -> Iterator[Read | Collected]:
    """Read the windows, a group at a time; gives what is known after each group.

    `start` is what is known of the first windows already. `with_output`: also of the matrix that
    gives the logits. FormatError where a model answers with no number.
    """
    if windows.max() >= model.config.n_vocab:
        raise GGUFError(
            f"the text has token {windows.max()} and the model knows {model.config.n_vocab} tokens"
        )
    n_layers = len(model.program.layers)
    room = max(1, HIDDEN_BYTES // (4 * windows.shape[1] * model.config.dim))
    collector, first = Collector(source), 0
    if start is not None:
        collector.go_on_from(start.entries)
        first = start.windows
    total = len(windows) * n_layers
    yield Read(first * n_layers, total)
    while first < len(windows):
        part = windows[first : first + min(group, room)]
        hidden = [model.embed(with_bos(window, bos).tolist()) for window in part]
        for layer in range(n_layers):
            hidden = [model.layer(layer, x, collector.observe) for x in hidden]
            yield Read(first * n_layers + (layer + 1) * len(part), total)
        if with_output:
            for x in hidden:
                model.head(x, collector.observe)
        first += len(part)
        yield Collected(collector.finish_group(), first)


def identify(paths: Sequence[Path], windows: Ids, *, bos: int | None, with_output: bool) -> str:
    """A digest of all that decides the sums: the model's files, the text as ids, the options."""
    seen = hashlib.sha256(digest_inputs(paths, any_change=False).encode())
    seen.update(f" {windows.shape[1]} {bos} {with_output} ".encode())
    seen.update(np.ascontiguousarray(windows, "<i8").tobytes())
    return seen.hexdigest()


def started(matrix: ImportanceMatrix) -> Collected:
    """What a file holds, to go on from; in memory of its own, as the file will be replaced."""
    entries = {
        name: Entry(entry.sums.copy(), entry.counts.copy())
        for name, entry in matrix.entries.items()
    }
    return Collected(entries, matrix.n_chunks)


def tensors_of(model: LayerwiseModel, *, with_output: bool) -> list[str]:
    """The tensors that a complete importance matrix has entries of."""
    steps = [step for layer in model.program.layers for step in layer]
    steps += model.program.head if with_output else ()
    found: dict[str, None] = {}
    for step in steps:
        if isinstance(step, MatMul):
            matrices: tuple[Matrix, ...] = (step.matrix,)
        elif isinstance(step, ExpertMatMul):
            matrices = step.experts
        else:
            matrices = step.matrices if isinstance(step, Show) else ()
        found |= {each.name: None for each in matrices if isinstance(each.data, StreamedRows)}
    return list(found)
