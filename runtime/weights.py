"""Tensors for a decoder, checked against the shape it needs before an address leaves here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import MissingTensorError, printable
from gguf_tools.quants import by_name
from runtime.program import Floats, Matrix
from runtime.sources import Source, streamed
from runtime.streamed_rows import StreamedRows

NAMED_AT_MOST = 8  # tensors named in one error; a wrong file may lack hundreds


class Weights:
    """Look-ups that remember what was missing, so that one error can name all of it."""

    def __init__(self, file: Source, *, in_memory: bool = False, stream: bool = False) -> None:
        """`in_memory` copies matrices out of the mapped file; with `stream` none is read yet.

        Where the system gives large arrays huge pages, such copies are read faster: a mapped file
        lies in pages of 4 KiB, and a processor that crosses one every 100 ns waits for its address.
        """
        self.file = file
        self.stream = stream
        self._copies: dict[str, npt.NDArray[np.uint8]] | None = {} if in_memory else None
        self.used: set[str] = set()
        self.problems: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def matrix(self, name: str, n_rows: int, n_columns: int) -> Matrix:
        """A matrix of n_rows outputs, each of n_columns inputs."""
        if self._check(name, (n_rows, n_columns)):
            info = self.file.tensors[name]
            return Matrix(name, info.quant, n_rows, n_columns, self._blocks(name))
        return Matrix(name, by_name("F32"), n_rows, n_columns, np.empty((0, 0), np.uint8))

    def row(self, name: str, n_columns: int) -> Matrix:
        """A matrix of one row, which files store as a vector or as a matrix."""
        info = self.file.tensors.get(name)
        if info is not None and len(info.shape) == 2:
            return self.matrix(name, 1, n_columns)
        if self.stream and info is not None and tuple(info.shape) == (n_columns,):
            self.used.add(name)
            return Matrix(name, info.quant, 1, n_columns, streamed(self.file, name))
        values = self.vector(name, n_columns)
        return Matrix(name, by_name("F32"), 1, n_columns, values.view(np.uint8)[None, :])

    def split_matrix(self, name: str, sizes: Sequence[int], n_columns: int) -> list[Matrix]:
        """A matrix whose rows are several one after the other, of `sizes` rows each."""
        whole = self.matrix(name, sum(sizes), n_columns)
        parts, first = [], 0
        for size in sizes:
            data = whole.data[first : first + size]
            parts.append(Matrix(whole.name, whole.quant, size, n_columns, data))
            first += size
        return parts

    def experts(self, name: str, n_experts: int, n_rows: int, n_columns: int) -> tuple[Matrix, ...]:
        """One matrix per expert of a stacked tensor (n_experts, n_rows, n_columns).

        Files from before April 2024 have a tensor for each expert instead: `blk.0.ffn_up.7.weight`
        for the eighth of `blk.0.ffn_up_exps.weight`.
        """
        stem, suffix = name.split("_exps", 1) if "_exps" in name else (name, "")
        if not self.has(name) and self.has(f"{stem}.0{suffix}"):
            return self._single_experts(stem, suffix, n_experts, (n_rows, n_columns))
        if not self._check(name, (n_experts, n_rows, n_columns)):
            none = np.empty((0, 0), np.uint8)
            return (Matrix(name, by_name("F32"), n_rows, n_columns, none),) * n_experts
        info = self.file.tensors[name]
        data = self._blocks(name)
        firsts = range(0, n_experts * n_rows, n_rows)
        return tuple(
            Matrix(name, info.quant, n_rows, n_columns, data[first : first + n_rows], index)
            for index, first in enumerate(firsts)
        )

    def flattened(self, name: str, n: int, n_rows: int, n_columns: int) -> Matrix:
        """A stacked tensor (n, n_rows, n_columns) as one matrix of n * n_rows rows."""
        if not self._check(name, (n, n_rows, n_columns)):
            none = np.empty((0, 0), np.uint8)
            return Matrix(name, by_name("F32"), n * n_rows, n_columns, none)
        quant = self.file.tensors[name].quant
        return Matrix(name, quant, n * n_rows, n_columns, self._blocks(name))

    def _single_experts(
        self, stem: str, suffix: str, n_experts: int, shape: tuple[int, int]
    ) -> tuple[Matrix, ...]:
        names = [f"{stem}.{expert}{suffix}" for expert in range(n_experts)]
        matrices = tuple(self.matrix(name, *shape) for name in names)
        first = matrices[0].quant.name
        for matrix in matrices:
            if self.has(matrix.name) and matrix.quant.name != first:
                found = f"{matrix.quant.name}, and {names[0]} {first}"
                self.problems.append(
                    f"{matrix.name} is {found}: expected one type for all experts of a layer"
                )
        return matrices

    def table(self, name: str, n_rows: int, n_columns: int) -> Floats:
        """A float32 matrix that is small and not multiplied with, such as norms of heads."""
        if self._check(name, (n_rows, n_columns)):
            return np.ascontiguousarray(self.file.load(name), np.float32)
        return np.zeros((n_rows, n_columns), np.float32)

    def vector(self, name: str, size: int) -> Floats:
        """A float32 vector such as a norm's weight."""
        if self._check(name, (size,)):
            return np.ascontiguousarray(self.file.load(name), np.float32)
        return np.zeros(size, np.float32)

    def optional_vector(self, name: str, size: int) -> Floats | None:
        return self.vector(name, size) if self.has(name) else None

    def finish(self) -> None:
        """Raise MissingTensorError for all that was missing, misshapen, or left unused."""
        unused = [name for name in self.file.tensors if name not in self.used]
        problems = self.problems + [f"{printable(name)} is not expected" for name in unused]
        if problems:
            more = len(problems) - NAMED_AT_MOST
            rest = f"; and {more} more" if more > 0 else ""
            raise MissingTensorError(
                f"{printable(self.file.path)}: the tensors do not fit the architecture: "
                + "; ".join(problems[:NAMED_AT_MOST])
                + rest
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> bool:
        self.used.add(name)
        info = self.file.tensors.get(name)
        if info is None:
            self.problems.append(f"{name} is missing")
        elif tuple(info.shape) != shape:
            found = " x ".join(str(n) for n in info.shape)
            self.problems.append(f"{name} is {found}, expected {' x '.join(map(str, shape))}")
        return info is not None and tuple(info.shape) == shape

    def _blocks(self, name: str) -> npt.NDArray[np.uint8] | StreamedRows:
        """The blocks of a tensor, (n_rows, row_bytes)."""
        if self.stream:
            return streamed(self.file, name)
        if self._copies is None:
            return self.file.raw(name)
        if name not in self._copies:
            self._copies[name] = self.file.raw(name).copy()
        return self._copies[name]
