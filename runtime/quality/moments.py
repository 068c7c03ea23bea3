"""Second moments of what the matrices of a layer are multiplied with.

Rounding a weight changes what its row makes of every input. How much that is over a text, with all
weights of a row together, is a quadratic form of the inputs' second moments X^T X; calibrated
rounding minimises it, and its diagonal is what an importance matrix holds. Plain moments mislead
in two ways, both mended here:

- The first token of a window is one of hundreds, but attention reads it everywhere, and what it
  makes of itself is far from all others. Sequences of one token give it exactly; their moments are
  added with a weight of their own (SINK).
- The text is not what the model will read. Moments between columns overfit most; they are shrunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gguf_tools.errors import FormatError, printable
from runtime.program import (
    ExpertMatMul,
    Floats,
    Instruction,
    MatMul,
    Matrix,
    Route,
    Show,
)
from runtime.streamed_rows import StreamedRows

SINK = 0.125  # what moments of first tokens count beside those of all
SHRINK = 0.2  # of the moments between columns
FEW = 256  # tokens; of an expert that saw fewer, only the diagonal is believed
TILE = 2048  # columns whose moments are made together

Key = tuple[str, int | None]  # a tensor's name and, in a stack, the matrix's index


@dataclass(frozen=True)
class Inputs:
    """Matrices that are multiplied with the same numbers."""

    n_columns: int
    members: tuple[Key, ...]

    @property
    def moments_bytes(self) -> int:
        return 4 * self.n_columns * self.n_columns


def shared_inputs(layer: Sequence[Instruction]) -> list[Inputs]:
    """What the matrices of a layer of a streamed program are multiplied with, in their order."""
    versions: dict[str, int] = {}
    found: dict[tuple[object, ...], dict[Key, int]] = {}

    def add(matrix: Matrix, *place: object) -> None:
        found.setdefault(place, {})[matrix.name, matrix.index] = matrix.n_columns

    for step in layer:
        match step:
            case MatMul() if isinstance(step.matrix.data, StreamedRows):  # as it is in the file
                add(step.matrix, step.source, versions.get(step.source, 0))
            case ExpertMatMul():
                for index, matrix in enumerate(step.experts):
                    routed = versions.get(step.routes, 0)
                    add(matrix, step.source, versions.get(step.source, 0), routed, index)
            case Show():
                for index, matrix in enumerate(step.matrices):
                    place = index * step.stride
                    add(matrix, step.source, versions.get(step.source, 0), "from", place)
        written = step.routes if isinstance(step, Route) else getattr(step, "target", None)
        if written is not None:
            versions[written] = versions.get(written, 0) + 1
    seen: set[Key] = set()
    groups = []
    for members in found.values():
        new = tuple(key for key in members if key not in seen)
        seen.update(new)
        if new:
            groups.append(Inputs(next(iter(members.values())), new))
    return groups


def in_passes(groups: Sequence[Inputs], room: int) -> Iterator[list[Inputs]]:
    """The groups in as few runs as have their moments in `room` bytes; one has at least one."""
    chosen: list[Inputs] = []
    for group in groups:
        if chosen and sum(each.moments_bytes for each in (*chosen, group)) > room:
            yield chosen
            chosen = []
        chosen.append(group)
    if chosen:
        yield chosen


@dataclass(eq=False)
class Sums:
    """What was added up over the inputs of one group."""

    n_columns: int
    whole: bool
    n_tokens: int = 0  # of the text
    squares: Floats = field(init=False)  # (n_columns,) of the text's tokens
    # (n_columns, n_columns) of the text's and of first tokens, these with their weight
    weighted: Floats | None = None

    def __post_init__(self) -> None:
        self.squares = np.zeros(self.n_columns, np.float32)

    @property
    def importance(self) -> Floats | None:
        """(n_columns,) as an importance matrix has it; None where no token came."""
        if not self.n_tokens:
            return None
        importance: Floats = self.squares / np.float32(self.n_tokens)
        return importance

    def take_moments(self) -> Floats | None:
        """The moments, shrunk: to the diagonal where few tokens came. They are gone from here."""
        moments, self.weighted = self.weighted, None
        if moments is not None:
            shrink(moments, SHRINK if self.n_tokens >= FEW else 1.0)
        return moments


class Collector:
    """An observer that adds up the moments of some groups."""

    def __init__(
        self, groups: Sequence[Inputs], *, n_tokens: int, n_first: int, whole: bool = False
    ) -> None:
        """`whole`, or the diagonal alone.

        The text has so many tokens, whichever of them a group sees, and there are so many first.
        """
        self.sums = {group.members[0]: Sums(group.n_columns, whole) for group in groups}
        self._n_tokens = n_tokens
        # What a first token's inputs are multiplied with, to count as it should.
        self._first = np.float32(np.sqrt(SINK * n_tokens / n_first))

    def observe(self, matrix: Matrix, inputs: Floats) -> None:
        """Inputs of tokens of the text."""
        sums = self.sums.get((matrix.name, matrix.index))
        if sums is not None:
            sums.squares += np.einsum("ij,ij->j", inputs, inputs)
            sums.n_tokens += len(inputs)
            if sums.whole:
                sums.weighted = _added(sums.weighted, inputs)

    def observe_first(self, matrix: Matrix, inputs: Floats) -> None:
        """Inputs of first tokens."""
        sums = self.sums.get((matrix.name, matrix.index))
        if sums is not None and sums.whole:
            sums.weighted = _added(sums.weighted, inputs * self._first)

    def finish(self) -> None:
        """All inputs were told: make sums means.

        FormatError where one was no number.
        """
        for key, sums in self.sums.items():
            _check_finite(key, sums)
            if not sums.n_tokens:
                sums.weighted = None
            if sums.weighted is not None:
                _mirror(sums.weighted)
                sums.weighted *= np.float32(1 / self._n_tokens)


def _check_finite(key: Key, sums: Sums) -> None:
    diagonal = sums.squares if sums.weighted is None else np.diagonal(sums.weighted)
    if not np.isfinite(sums.squares).all() or not np.isfinite(diagonal).all():
        raise FormatError(
            f"tensor {printable(key[0])} is multiplied with what is no number (NaN or infinity): "
            "the model's weights are damaged, or too large for this computation"
        )


def _added(sum_: Floats | None, inputs: Floats) -> Floats:
    """The sum with the moments of these inputs, in its tiles on the diagonal and above it.

    A wide matrix's moments are near a gigabyte: there is never one more of that size.
    """
    n = inputs.shape[1]
    if sum_ is None:
        sum_ = np.zeros((n, n), np.float32)
    for first in range(0, n, TILE):
        tile = np.ascontiguousarray(inputs[:, first : first + TILE])
        last = first + TILE
        sum_[first:last, first:last] += tile.T @ tile  # of one array with itself: half the work
        sum_[first:last, last:] += tile.T @ inputs[:, last:]
    return sum_


def _mirror(sum_: Floats) -> None:
    """Copy the tiles above the diagonal below it."""
    for first in range(0, len(sum_), TILE):
        last = first + TILE
        sum_[last:, first:last] = sum_[first:last, last:].T


def shrink(moments: Floats, share: float) -> None:
    """Leave (1 - share) of the moments between columns; the diagonal as it is."""
    diagonal = np.diagonal(moments).copy()
    moments *= np.float32(1 - share)
    np.fill_diagonal(moments, diagonal)
