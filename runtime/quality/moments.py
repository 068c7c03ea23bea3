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

Key = tuple[str, int | None]  # a tensor's name and, in a stack, the matrix's index


@dataclass(frozen=True)
class Inputs:
    """Matrices that are multiplied with the same numbers."""

    n_columns: int
    members: tuple[Key, ...]

    @property
    def moments_bytes(self) -> int:
        return 8 * self.n_columns * self.n_columns  # of the text and of first tokens


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
    text: Floats | None = None  # (n_columns, n_columns) of the text's tokens
    first: Floats | None = None  # the same of first tokens
    weighted: Floats | None = None  # both together, in the end

    def __post_init__(self) -> None:
        self.squares = np.zeros(self.n_columns, np.float32)

    @property
    def importance(self) -> Floats | None:
        """(n_columns,) as an importance matrix has it; None where no token came."""
        if not self.n_tokens:
            return None
        importance: Floats = self.squares / np.float32(self.n_tokens)
        return importance

    @property
    def shrinking(self) -> float:
        """How far the moments are shrunk: to the diagonal where few tokens came."""
        return SHRINK if self.n_tokens >= FEW else 1.0


class Collector:
    """An observer that adds up the moments of some groups."""

    def __init__(self, groups: Sequence[Inputs], *, whole: bool = False) -> None:
        """`whole`, or the diagonal alone."""
        self.sums = {group.members[0]: Sums(group.n_columns, whole) for group in groups}

    def observe(self, matrix: Matrix, inputs: Floats) -> None:
        """Inputs of tokens of the text."""
        sums = self.sums.get((matrix.name, matrix.index))
        if sums is not None:
            sums.squares += np.einsum("ij,ij->j", inputs, inputs)
            sums.n_tokens += len(inputs)
            if sums.whole:
                sums.text = _added(sums.text, inputs)

    def observe_first(self, matrix: Matrix, inputs: Floats) -> None:
        """Inputs of first tokens."""
        sums = self.sums.get((matrix.name, matrix.index))
        if sums is not None and sums.whole:
            sums.first = _added(sums.first, inputs)

    def finish(self, *, n_tokens: int, n_first: int) -> None:
        """The text had so many tokens, whichever of them a group saw, and there were so many first.

        What is not needed any more is forgotten.
        """
        for key, sums in self.sums.items():
            _check_finite(key, sums)
            if sums.text is not None:
                sums.text *= np.float32(1 / n_tokens)
                if sums.first is not None:
                    sums.first *= np.float32(SINK / n_first)
                    sums.text += sums.first
            sums.weighted, sums.text, sums.first = sums.text, None, None


def _check_finite(key: Key, sums: Sums) -> None:
    first = 0.0 if sums.first is None else np.trace(sums.first)
    if not np.isfinite(sums.squares).all() or not np.isfinite(first):
        raise FormatError(
            f"tensor {printable(key[0])} is multiplied with what is no number (NaN or infinity): "
            "the model's weights are damaged, or too large for this computation"
        )


def _added(sum_: Floats | None, inputs: Floats) -> Floats:
    """The sum and the moments of these inputs."""
    inputs = np.ascontiguousarray(inputs)
    product: Floats = inputs.T @ inputs  # of one array with itself: half the work
    if sum_ is None:
        return product
    sum_ += product
    return sum_


def shrunk(moments: Floats, share: float) -> Floats:
    """(1 - share) of the moments between columns; the diagonal as it is."""
    result: Floats = moments * np.float32(1 - share)
    np.fill_diagonal(result, np.diagonal(moments))
    return result
